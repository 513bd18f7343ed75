"""Twins of our parts, made of transformers and peft and filled with our weights: what bench/ compares with.

    ViTTwin       VideoMAEModel                          in place of vit_video.VisionTransformer
    QFormerTwin   InstructBlipVideoQFormerModel          in place of qformer.QFormer
    LlamaTwin     LlamaForCausalLM, with peft's LoRA     in place of llama.Llama

They compute what transformers computes, padding included; the small layers between them stay ours. Weights are loaded
strictly, so that nothing keeps its random start.

    pytest tests/test_bench.py
"""
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import nn

from qformer import hard_negatives, similarity, vtc_loss, vtg_loss
from weights.hf_llama import HF_NAMES

VIT_NAMES = {"blocks.": "encoder.layer.", "patch_embed.proj": "embeddings.patch_embeddings.projection",
             "norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc1": "intermediate.dense",
             "mlp.fc2": "output.dense", "attn.proj": "attention.output.dense", "attn.qkv": "attention.attention.qkv",
             "attn.q_bias": "attention.attention.query.bias", "attn.v_bias": "attention.attention.value.bias"}
QFORMER_NAMES = {"bert.": "", "attention.self.": "attention.attention.", "embeddings.LayerNorm": "embeddings.layernorm"}
LORA_NAMES = {".base.": ".base_layer.", "lora_A.": "lora_A.default.", "lora_B.": "lora_B.default."}

def import_dev(name):
    """The module of this name; ValueError says how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise ValueError(f"{error}; this comparison needs it: pip install -r requirements-dev.txt") from error

def renamed(module, names):
    """{name: tensor} of the module, each part of a name replaced as `names` says."""
    weights = module.state_dict()
    for ours, theirs in names.items():
        weights = {name.replace(ours, theirs): t for name, t in weights.items()}
    return weights

class ViTTwin(nn.Module):
    """video (B, T, 3, H, W) -> (B, T, L, C)."""
    def __init__(self, vit):
        super().__init__()
        hf, cfg, weights = import_dev("transformers"), vit.cfg, renamed(vit, VIT_NAMES)
        self.twin = hf.VideoMAEModel(hf.VideoMAEConfig(
            image_size=cfg.img_size, patch_size=cfg.patch_size, num_frames=cfg.frames, tubelet_size=1,
            hidden_size=cfg.width, num_hidden_layers=cfg.depth, num_attention_heads=cfg.heads,
            intermediate_size=cfg.mlp_ratio * cfg.width, layer_norm_eps=cfg.eps, use_mean_pooling=True))

        # our qkv is three matrices there
        for name in [name for name in weights if "qkv" in name]:
            for part, t in zip(("query", "key", "value"), weights.pop(name).chunk(3), strict=True):
                weights[name.replace("qkv", part)] = t
        self.twin.load_state_dict(weights)

    def forward(self, video):
        return self.twin(video).last_hidden_state.unflatten(1, (video.shape[1], -1))

class QFormerTwin(nn.Module):
    """As QFormer, for queries, text or both; a mask may also be (B, 1, Q + S, Q + S). Without dropout."""
    def __init__(self, qformer):
        super().__init__()
        hf, cfg = import_dev("transformers.models.instructblipvideo.modeling_instructblipvideo"), qformer.cfg
        self.cls = qformer.cls
        self.twin = hf.InstructBlipVideoQFormerModel(hf.InstructBlipVideoQFormerConfig(
            vocab_size=cfg.vocab_size, hidden_size=cfg.width, num_hidden_layers=cfg.depth, layer_norm_eps=cfg.eps,
            num_attention_heads=cfg.heads, intermediate_size=cfg.ffn, max_position_embeddings=cfg.max_positions,
            encoder_hidden_size=cfg.vision_width, cross_attention_frequency=cfg.cross_every, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0))
        weights = renamed(qformer, QFORMER_NAMES)
        self.twin.load_state_dict({name: t for name, t in weights.items() if not name.startswith("cls.")})

    def forward(self, query=None, ids=None, mask=None, vision=None, *_, **__):
        if query is not None:
            query = query.expand(len(vision), -1, -1)                                   # (B, Q, E)
            if mask is not None and mask.ndim == 2:
                mask = F.pad(mask, (query.shape[1], 0), value=1)                        # (B, Q + S)
        return self.twin(ids, attention_mask=mask, query_embeds=query, encoder_hidden_states=vision).last_hidden_state

class LlamaTwin(nn.Module):
    """The LLM of a VideoChat2, in stage 3 with LoRA, which alone trains."""
    def __init__(self, model):
        super().__init__()
        hf, cfg, weights = import_dev("transformers"), model.llama_model.cfg, renamed(model.llama_model, LORA_NAMES)
        sizes = {theirs: getattr(cfg, ours) for ours, theirs in HF_NAMES.items()} | {"head_dim": cfg.head_size}
        # made in its dtype, as from_pretrained does; .to(dtype) would take twice the memory, and round the angles
        default = torch.get_default_dtype()
        try:
            torch.set_default_dtype(weights["model.embed_tokens.weight"].dtype)
            with torch.device(model.device):
                self.twin = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes))
        finally:
            torch.set_default_dtype(default)
        self.twin.requires_grad_(False)

        # peft wraps the same layers as lora.py, and the model once more
        if model.stage == 3:
            peft, cfg = import_dev("peft"), model.cfg
            self.twin = peft.get_peft_model(self.twin, peft.LoraConfig(
                r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules=list(cfg.lora_names)))
            weights = {f"base_model.model.{name}": t for name, t in weights.items()}
        self.twin.load_state_dict(weights)
        self.embed = self.twin.get_input_embeddings()
        self.train(model.training)

    def generate(self, embeds, max_new_tokens, stop):
        """As Llama.generate, for one prompt: embeds (1, S, D) -> [its new ids]."""
        stopping = import_dev("transformers").StoppingCriteriaList([lambda ids, *_, **__: stop(ids[0].tolist())])
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)     # (1, S)
        return self.twin.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=max_new_tokens,
                                  do_sample=False, pad_token_id=0, stopping_criteria=stopping).tolist()

def use_twins(model):
    """Puts twins in place of the parts of a VideoChat2, for twin_losses."""
    device, model.vision_encoder = model.device, ViTTwin(model.vision_encoder).requires_grad_(model.stage > 1)
    model.qformer = QFormerTwin(model.qformer)
    if model.stage > 1:
        model.llama_model = LlamaTwin(model)
    return model.to(device).train()

def twin_losses(model, batch, generator=None):
    """{name: loss} of a batch after use_twins, with the values that our own parts give."""
    ids, mask = batch["ids"], batch["mask"]
    if model.stage > 1:
        return {"lm": model.llama_model.twin(inputs_embeds=model.input_embeds(batch), attention_mask=mask,
                                             labels=batch["labels"]).loss}

    # as BLIP-2: captioning and the queries alone share a pass, since queries do not see the caption
    vision, heads, query = model.encode_video_stage1(batch["video"]), model.aligner, model.query_tokens
    (B, S), Q = ids.shape, query.shape[1]
    dec_ids = torch.cat((torch.full_like(ids[:, :1], 3), ids[:, 1:]), 1)           # (B, S)
    visible = torch.ones(Q + S, Q + S, dtype=torch.bool, device=ids.device).tril()      # (Q + S, Q + S)
    visible[:Q, :Q] = True
    visible = visible & F.pad(mask.bool(), (Q, 0), value=True)[:, None, None]           # (B, 1, Q + S, Q + S)
    hidden = model.qformer(query, dec_ids, visible, vision)                             # (B, Q + S, E)
    words = model.qformer.cls["predictions"](
        hidden[:, Q:], model.qformer.twin.embeddings.word_embeddings.weight)            # (B, S, V)
    text = heads.text_features(model.qformer(ids=ids, mask=mask))                       # (B, e)
    sim = similarity(heads.video_features(hidden[:, :Q]), text) / heads.temperature()   # (B, B)

    # matching: true pairs, pairs with another video, pairs with another text
    other_videos, other_texts = hard_negatives(sim, batch["idx"], generator)            # (B,), (B,)
    pairs = ((ids, ids, ids[other_texts]), (mask, mask, mask[other_texts]), (vision, vision[other_videos], vision))
    logits = heads.itm_logits(model.qformer, query, *map(torch.cat, pairs))             # (3*B, 2)
    is_pair = (torch.arange(3 * B, device=ids.device) < B).long()                       # (3*B,)
    return {"vtc": vtc_loss(sim, batch["idx"]), "vtm": F.cross_entropy(logits, is_pair),
            "vtg": vtg_loss(words, dec_ids, mask, model.cfg.qformer.label_smoothing)}
