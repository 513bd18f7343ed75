"""What the official checkpoints call each tensor, and what we call it: a table per stage, used in both directions.

    vision_encoder.encoder.blocks.3.attn.qkv.weight                            vision_encoder.blocks.3.attn.qkv.weight
    temp                                                                       aligner.temp
    llama_model.base_model.model.lm_head.lora_A.default.weight                 llama_model.lm_head.lora_A.weight

Our names follow the official ones where that costs nothing, so the tables are short. Tensors that are not imported are
listed with the reason. Not here: reading and writing the files (weights/convert.py).
Source: state dicts of videochat2_{qformer,pt_vicuna,it_vicuna}.py and it_mistral.py; missing keys in mvbench.ipynb.

    pytest tests/test_convert.py
"""
import re

import torch

# Rows are (official name, our name). * is the same on both sides; LLM is "llama" for Vicuna, "mistral" for Mistral.
STAGE1 = [
    ("vision_encoder.encoder.*", "vision_encoder.*"),
    ("vision_layernorm.*", "vision_layernorm.*"),
    ("query_tokens", "query_tokens"),
    ("qformer.*", "qformer.*"),
    ("vision_temp_embed", "vision_temp_embed"),
    ("temp", "aligner.temp"),
    ("vision_proj.*", "aligner.vision_proj.*"),
    ("text_proj.*", "aligner.text_proj.*"),
    ("itm_head.*", "aligner.itm_head.*"),
]
STAGE2 = [("extra_query_tokens", "extra_query_tokens"), ("LLM_proj.*", "llama_proj.*")]
LORA = [  # as peft names them
    ("LLM_model.base_model.model.*.lora_A.default.weight", "llama_model.*.lora_A.weight"),
    ("LLM_model.base_model.model.*.lora_B.default.weight", "llama_model.*.lora_B.weight"),
]
LLM = {2: [("LLM_model.*", "llama_model.*")], 3: [("LLM_model.base_model.model.*", "llama_model.*")]}
UMT = [("encoder.*", "vision_encoder.*"), STAGE1[0]]
BERT = [("*", "qformer.*")]
OFFICIAL = {1: STAGE1, 2: STAGE1 + STAGE2 + LLM[2], 3: STAGE1 + STAGE2 + LORA + LLM[3]}  # each stage's checkpoint

DROPPED = [  # (pattern of official names, why they are not imported)
    (r"\.rotary_emb\.inv_freq$", "follows from the LLM's rope_theta"),
    (r"\.position_ids$", "counted where they are needed"),
    (r"^(qformer\.)?cls\.predictions\.decoder\.", "tied to the word embeddings and bias"),
]
DROPPED_UMT = [(r"^(?!(vision_encoder\.)?encoder\.(patch_embed|blocks)\.)", "not part of the ViT's blocks")]
DROPPED_BERT = [
    *DROPPED,
    (r"token_type_embeddings", "the Q-Former has one type of text"),
    (r"^bert\.pooler\.|^cls\.seq_relationship\.", "BERT's head for sentence pairs"),
]
TABLES = {  # option of weights.convert -> (names, what is dropped)
    "umt": (UMT, DROPPED_UMT), "bert": (BERT, DROPPED_BERT),
    "stage1": (OFFICIAL[1], DROPPED), "stage2": (OFFICIAL[2], DROPPED), "stage3": (OFFICIAL[3], DROPPED)}
TIED = {  # official names of copies, which are not stored -> the tensor that they are copies of
    "qformer.cls.predictions.decoder.weight": "qformer.bert.embeddings.word_embeddings.weight",
    "qformer.cls.predictions.decoder.bias": "qformer.cls.predictions.bias"}
TEXT_HALF = re.compile(  # the Q-Former's weights for text, which the official stage 2 deletes
    r"^qformer\.bert\.(embeddings\.(word|position)_embeddings|encoder\.layer\.\d+\.(intermediate|output))\.")

def rename_key(name, table, prompt_style="vicuna", reverse=False):
    """Renames by the first row of the table that matches, from official to ours or in reverse; None if no row does."""
    llm = "mistral" if prompt_style == "mistral" else "llama"
    for row in table:
        source, target = (re.sub("^LLM", llm, pattern) for pattern in (reversed(row) if reverse else row))
        if match := re.fullmatch(re.escape(source).replace(r"\*", "(.+)"), name):
            return target.replace("*", match[1]) if match.groups() else target
    return None

def from_official(tensors, where, table, names, prompt_style="vicuna", drop_rules=(), other_names=()):
    """Official {name: tensor} -> ({our name: tensor}, {official name: why it is dropped}). ValueError for other names.
    names: of our model in this stage; other_names: in other stages, to be dropped. drop_rules: rows like DROPPED's."""
    ours, dropped, unknown = {}, {}, []
    for name, t in tensors.items():
        # LoRA wraps a layer, whose own weight we then call base.weight
        new = rename_key(name, table, prompt_style)
        base = re.sub(r"\.(weight|bias)$", r".base.\1", new or "")
        new = base if base in names else new

        reason = next((why for pattern, why in drop_rules if re.search(pattern, name)), "")
        if new in names and not reason:
            ours[new] = t
        elif reason or new in other_names or base in other_names:
            dropped[name] = reason or "not needed in this stage"
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{where}: {len(unknown)} tensors have names that VideoChat2 does not know: "
                         f"{', '.join(unknown[:4])}; is this the file that the option asks for?")
    return ours, dropped

def to_official(tensors, stage, cfg):
    """Our {name: tensor} of a stage -> the official state dict of that stage, without the frozen LLM."""
    official = {rename_key(n, OFFICIAL[stage], cfg.prompt_style, reverse=True): t for n, t in tensors.items()
                if stage != 2 or not TEXT_HALF.match(n)}

    # the official files also hold tied weights and constants, which we do not store; Mistral's have no inv_freq
    official["qformer.bert.embeddings.position_ids"] = torch.arange(cfg.qformer.max_positions)[None]
    if stage == 1:
        official |= {copy: tensors[source] for copy, source in TIED.items()}
    elif cfg.prompt_style == "vicuna":
        inv_freq = 1.0 / cfg.llama.rope_theta ** (torch.arange(0, cfg.llama.head_size, 2).float() / cfg.llama.head_size)
        for i in range(cfg.llama.depth):
            name = f"llama_model.model.layers.{i}.self_attn.rotary_emb.inv_freq"
            official[rename_key(name, LLM[stage], reverse=True)] = inv_freq
    return official
