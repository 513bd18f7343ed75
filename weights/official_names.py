"""What the official checkpoints call each tensor, and what we call it: a table per component, read in both directions.

    vision_encoder.encoder.blocks.3.attn.qkv.weight                            vision_encoder.blocks.3.attn.qkv.weight
    temp                                                                       aligner.temp
    llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight
                                                                llama_model.model.layers.0.self_attn.q_proj.lora_A.weight

Our names follow the official ones where that costs nothing, so the tables are short. What is not carried over follows
from something else, and says from what. Not here: reading and writing the files (weights.py).
Source: the state dicts of the official videochat2_{qformer,pt_vicuna,it_vicuna}.py and it_mistral.py, and the list of
missing keys in mvbench.ipynb.

    pytest tests/test_convert.py
"""
import re

import torch

# ---------------------------------------------------------------------------------------------------------- the tables
# Tables of (official name, our name), one per component. * is the same on both sides; LLM is "llama" for Vicuna and
# "mistral" for Mistral.

VIT = [("vision_encoder.encoder.*", "vision_encoder.*")]
QFORMER = [
    ("vision_layernorm.*", "vision_layernorm.*"),
    ("query_tokens", "query_tokens"),
    ("qformer.bert.*", "qformer.bert.*"),
]
ALIGN = [  # the heads of stage 1
    ("vision_temp_embed", "vision_temp_embed"),
    ("qformer.cls.*", "qformer.cls.*"),
    ("temp", "aligner.temp"),
    ("vision_proj.*", "aligner.vision_proj.*"),
    ("text_proj.*", "aligner.text_proj.*"),
    ("itm_head.*", "aligner.itm_head.*"),
]
CONNECT = [
    ("extra_query_tokens", "extra_query_tokens"),
    ("LLM_proj.*", "llama_proj.*"),
]
LORA = [  # as peft names them
    ("LLM_model.base_model.model.*.lora_A.default.weight", "llama_model.*.lora_A.weight"),
    ("LLM_model.base_model.model.*.lora_B.default.weight", "llama_model.*.lora_B.weight"),
]
LLM = {2: [("LLM_model.*", "llama_model.*")], 3: [("LLM_model.base_model.model.*", "llama_model.*")]}
UMT = [("encoder.*", "vision_encoder.*"), *VIT]
BERT = [
    ("bert.embeddings.*", "qformer.bert.embeddings.*"),
    ("bert.encoder.layer.*", "qformer.bert.encoder.layer.*"),
    ("cls.predictions.*", "qformer.cls.predictions.*"),
]
OFFICIAL = {  # of the checkpoint of each stage
    1: VIT + QFORMER + ALIGN,
    2: VIT + QFORMER + ALIGN + CONNECT + LLM[2],
    3: VIT + QFORMER + ALIGN + CONNECT + LORA + LLM[3],
}
DROPPED = [  # (official name, why it is not imported); only what follows from something else, or has no use here
    (r"\.rotary_emb\.inv_freq$", "follows from the LLM's rope_theta"),
    (r"\.position_ids$", "counted on the spot"),
    (r"^(qformer\.)?cls\.predictions\.decoder\.", "the word embeddings and bias themselves"),
]
DROPPED_UMT = [(r"^(?!(vision_encoder\.)?encoder\.(patch_embed|blocks)\.)", "not of the ViT's blocks")]
DROPPED_BERT = [
    (r"token_type_embeddings", "the Q-Former has one kind of text"),
    (r"^bert\.pooler\.|^cls\.seq_relationship\.", "BERT's head for pairs of sentences"), *DROPPED]
TEXT_HALF = re.compile(  # of the Q-Former, which the official stage 2 deletes
    r"^qformer\.bert\.(embeddings\.(word|position)_embeddings|encoder\.layer\.\d+\.(intermediate|output))\.")

# ----------------------------------------------------------------------------------------------------- both directions


def renamed(name, table, prompt_style="vicuna", back=False):
    """A name by the first row of the table that fits, from official to ours or back; None if no row fits."""
    llm = "mistral" if prompt_style == "mistral" else "llama"
    for official, ours in table:
        source, target = (ours, official) if back else (official, ours)
        source, target = (re.sub(r"^LLM", llm, text) for text in (source, target))
        found = re.fullmatch(re.escape(source).replace(r"\*", "(.+)"), name)
        if found:
            return target.replace("*", found[1]) if found.groups() else target
    return None


def to_ours(tensors, table, own, prompt_style="vicuna", dropped=(), others=()):
    """Official {name: tensor} -> ({our name: tensor}, {official name: why it was dropped}). ValueError for the unknown.

    own: the names that our model has; others: those of the model in other stages, which are dropped.
    """
    ours, without, unknown = {}, {}, []
    for name, t in tensors.items():
        reason = next((why for pattern, why in dropped if re.search(pattern, name)), "")
        new = renamed(name, table, prompt_style)
        base = re.sub(r"\.(weight|bias)$", r".base.\1", new or "")
        new = base if base in own else new                                 # a layer's own weight, behind LoRA
        if new in own and not reason:
            ours[new] = t
        elif reason or new in others or base in others:
            without[name] = reason or "not needed in this stage"
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{len(unknown)} tensors have names that VideoChat2 does not know: {', '.join(unknown[:4])}"
                         f"{', ...' if len(unknown) > 4 else ''}; is this the file that the option asks for?")
    return ours, without


def to_official(tensors, stage, cfg):
    """Our {name: tensor} of a stage -> the official state dict of that stage, without the frozen LLM.

    What the official files repeat (tied weights) or keep although it follows from sizes is written again.
    """
    table = OFFICIAL[stage]
    official = {renamed(n, table, cfg.prompt_style, back=True): t for n, t in tensors.items()
                if stage != 2 or not TEXT_HALF.match(n)}                   # which stage 2 does not have
    official["qformer.bert.embeddings.position_ids"] = torch.arange(cfg.qformer.max_positions)[None]
    if stage == 1:
        official["qformer.cls.predictions.decoder.weight"] = tensors[
            "qformer.bert.embeddings.word_embeddings.weight"]
        official["qformer.cls.predictions.decoder.bias"] = tensors["qformer.cls.predictions.bias"]
    elif cfg.prompt_style == "vicuna":                                            # Mistral's are not kept
        pair = torch.arange(0, cfg.llama.head_size, 2).float()
        inv_freq = 1.0 / (cfg.llama.rope_theta ** (pair / cfg.llama.head_size))
        for i in range(cfg.llama.depth):
            name = renamed(f"llama_model.model.layers.{i}.self_attn.rotary_emb.inv_freq", LLM[stage], back=True)
            official[name] = inv_freq
    return official
