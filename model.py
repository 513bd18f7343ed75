"""VideoChat2, assembled: a video goes in, language comes out.

    video (B, T, 3, H, W) -> vision_encoder -> (B, N, C) -> qformer -> (B, Q, E) -> llama_proj -> (B, Q, D)
    the projected queries fill Q places of the prompt, like Q words of a foreign language; the LLM continues it.

This file joins the parts (vit_video, qformer, llama, lora), names the sizes (PRESETS) and says what trains in which
stage (FROZEN). Not here: files (weights/checkpoint.py, data.py), prompts (prompt.py), the training loop (train.py).

Source: paper section 4 (figure 4); official models/videochat2_{qformer,pt_vicuna,it_vicuna}.py.
Try:    python model.py            # every preset's parts with their parameter counts; allocates nothing

Letters used for shapes, here and in every file:
    B batch   T frames   L patches per frame   N = T * L patches per video   Q queries   S text tokens
    C, E, D widths of ViT, Q-Former, LLM   nh heads   hs head size   V vocabulary
"""
import re
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from llama import Llama, LlamaConfig
from lora import add_lora
from prompt import VIDEO, add_packing, pack_rows
from qformer import QFormer, QFormerConfig, Stage1Heads
from vit_video import VisionTransformer, ViTConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# ---------------------------------------------------------------------------------------------------------------- sizes

# older checkpoints have these fields of Config under other names
OLD_FIELDS = {"style": "prompt_style", "tell_seconds": "add_timestamps", "train_choice": "frame_sampling"}

@dataclass
class Config:
    """Sizes and conventions of one model. The defaults are VideoChat2 with Vicuna-7B v0 (paper, table 10)."""
    preset: str = "vicuna-7b"
    vit: ViTConfig = field(default_factory=ViTConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    llama: LlamaConfig = field(default_factory=LlamaConfig)
    n_query: int = 32               # learned in stage 1
    n_extra: int = 64               # added in stages 2 and 3: the LLM then reads 32 + 64 = 96 tokens
    extra_std: float = 0.0          # of their initial values; with zeros, only dropout makes them differ
    align_frames: int = 4           # frames of a clip in stage 1, the length of vision_temp_embed
    train_frames: int = 8           # frames of a clip in stages 2 and 3
    eval_frames: int = 16           # frames of a clip in MVBench and chat
    align_text: int = 32            # tokens of a caption in stage 1
    max_text: int = 512             # tokens of a prompt in stages 2 and 3, without the video's
    lora_names: tuple = ("q_proj", "v_proj")
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.1
    prompt_style: str = "vicuna"    # how a conversation is written: prompt.py
    vtm_text_cls: str = "cat"       # stage 1: how matching reads the text: qformer.Stage1Heads
    frame_sampling: str = "rand"    # which frames of a clip training takes: video.train_frame_indices
    add_timestamps: bool = True     # stage 3 says at which seconds the frames were taken
    crop: bool = True               # random resized crop in training, centre crop in evaluation
    flip: bool = False              # mirror half of the training clips, as the official code does; left becomes right
    # oddities of the official code that the released weights depend on; the toy has none of them
    train_norm: str = "imagenet"    # QUIRK dataset/__init__.py:37 trains with ImageNet's mean and std ...
    eval_norm: str = "clip"         # ... conversation.py:103 evaluates with CLIP's
    bos_ones: bool = True           # QUIRK videochat2_it_vicuna.py:299: stage 3 trains with ones instead of <s>
    train_separators: bool = True   # prompt.vicuna_turns
    question_in_qformer: bool = True  # QUIRK it_dataset.py:101: the paper's table 11 says 50.8 with it, 51.1 without
    caption_sep: bool = False       # tokenizer.WordPiece.encode: stage 1 reads captions without [SEP]
    repeat_image: bool = True       # QUIRK videochat2_qformer.py:177: in stage 1 an image is repeated to align_frames

    @classmethod
    def from_dict(cls, d):
        """Inverse of asdict, with defaults for what d lacks. ValueError for a key that no field has."""
        d = {OLD_FIELDS.get(name, name): value for name, value in d.items()}
        d["qformer"] = dict(d.get("qformer", {}))
        if (cat := d["qformer"].pop("vtm_cat_text_cls", None)) is not None:  # before it had three values
            d["vtm_text_cls"] = "cat" if cat else "none"
        for name, part in (("vit", ViTConfig), ("qformer", QFormerConfig), ("llama", LlamaConfig)):
            d[name] = strict_init(part, d.get(name, {}))
        config = strict_init(cls, d)
        config.lora_names = tuple(config.lora_names)
        return config

def strict_init(cls, d):
    """cls(**d), with an error that names what cls does not know."""
    unknown = sorted(set(d) - {f.name for f in fields(cls)})
    if unknown:
        raise ValueError(f"{cls.__name__} has no option {', '.join(unknown)}")
    return cls(**d)

# the presets, as differences from the defaults above
EVERY_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# 64-pixel clips of coloured shapes: 8 frames x 16 patches = 128 tokens; about 3 million parameters in all.
# vocab_size 0: known when the tokenizers are made. pos_scale: in a ViT trained from scratch the patches grow,
# eighteenfold within 9,000 steps, and the positions would be lost among them.
TOY = dict(
    vit=dict(img_size=64, width=128, depth=4, heads=4, frames=8, init_std=0.0, pos_scale=2.0),
    qformer=dict(vocab_size=0, width=128, depth=4, heads=4, ffn=512, vision_width=128, embed_dim=128, cross_every=1,
                 max_positions=256, dropout=0.0, drop_path=0.0, init_std=0.0),
    llama=dict(vocab_size=0, width=128, depth=4, heads=4, kv_heads=4, ffn=384, init_std=0.0),
    n_query=16, n_extra=16, extra_std=0.02, align_frames=8, train_frames=8, eval_frames=8, align_text=64,
    lora_names=EVERY_LINEAR, lora_dropout=0.0, crop=False, add_timestamps=False, frame_sampling="mvbench",
    eval_norm="imagenet", bos_ones=False, train_separators=False, question_in_qformer=False)

# for tests: a step takes a fraction of a second; with dropout, which shows when a resumed run draws other numbers
MICRO = TOY | dict(
    vit=TOY["vit"] | dict(width=32, depth=2, heads=2, frames=4),
    qformer=TOY["qformer"] | dict(width=32, depth=2, heads=2, ffn=64, vision_width=32, embed_dim=32,
                                  dropout=0.1, drop_path=0.1),
    llama=TOY["llama"] | dict(width=32, depth=2, heads=2, kv_heads=1, ffn=64),
    n_query=4, n_extra=4, align_frames=4, train_frames=4, eval_frames=4, lora_r=4, lora_alpha=8, lora_dropout=0.05)

# the stronger later variant: Mistral-7B-Instruct-v0.2. Source: it_dataset_mistral.py: no question, no seconds
MISTRAL = dict(
    llama=dict(kv_heads=8, ffn=14336, eps=1e-5, rope_theta=1e6, max_positions=32768),
    lora_names=(*EVERY_LINEAR, "lm_head"), prompt_style="mistral", question_in_qformer=False, add_timestamps=False)

# {name: function that makes the Config}
PRESETS = {name: partial(Config.from_dict, {"preset": name, **differences}) for name, differences in (
    ("toy", TOY), ("micro", MICRO), ("vicuna-7b", {}), ("mistral-7b", MISTRAL))}

# ------------------------------------------------------------------------------------------------------------ the model

class VideoChat2(nn.Module):
    """The parts of one stage under the official checkpoint's names. Stage 1 has the heads of its losses (aligner) and
    no LLM; stages 2 and 3 have extra queries, projection and LLM; stage 3 has LoRA in the LLM. defer_llm: the LLM's
    weights get no memory until weights.checkpoint.attach_llm."""
    def __init__(self, cfg, stage, defer_llm=False):
        super().__init__()
        self.cfg, self.stage = cfg, stage
        C, E, D = cfg.vit.width, cfg.qformer.width, cfg.llama.width

        # ViT, queries and Q-Former of every stage
        self.vision_encoder = VisionTransformer(cfg.vit)
        self.vision_layernorm = nn.LayerNorm(C, eps=1e-12)
        self.query_tokens = nn.Parameter(torch.empty(1, cfg.n_query, E).normal_(std=0.02))
        self.qformer = QFormer(cfg.qformer)

        # what the losses of the stage need
        if stage == 1:
            self.vision_temp_embed = nn.Parameter(torch.zeros(1, cfg.align_frames, 1, C))
            self.aligner = Stage1Heads(cfg.qformer, cfg.vtm_text_cls)
        else:
            self.qformer.cls = None                                 # it writes captions in stage 1 only
            self.extra_query_tokens = nn.Parameter(torch.zeros(1, cfg.n_extra, E).normal_(std=cfg.extra_std))
            self.llama_proj = nn.Linear(E, D)
            with torch.device("meta") if defer_llm else nullcontext():
                self.llama_model = Llama(cfg.llama)
        if stage == 3:
            add_lora(self.llama_model, cfg.lora_names, cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout)

    @property
    def device(self):
        return self.query_tokens.device

    def encode_video_stage1(self, video, features=None):
        """video (B, T, 3, H, W), or the ViT's features of it (B, T, L, C) -> (B, N, C), with vision_temp_embed."""
        x = self.vision_encoder(video) if features is None else features    # (B, T, L, C)
        time = self.vision_temp_embed                               # (1, align_frames, 1, C)
        if x.shape[1] == 1 and not self.cfg.repeat_image:
            time = time[:, :1]                                      # else broadcasting repeats the image
        return self.vision_layernorm((x + time).flatten(1, 2))      # (B, N, C)

    def stage1_losses(self, batch, dec_id, dist, generator=None, vtg_only=False, global_negatives=False):
        """Stage 1: {"vtc", "vtm", "vtg"} of video (B, T, 3, H, W) and captions ids, mask (B, S), idx (B,). The other
        arguments are those of Stage1Heads.losses. Raises ValueError if VTM would have a single clip."""
        if not vtg_only and not global_negatives and batch.get("clips", 2) < 2:
            raise ValueError("matching (VTM) needs for each clip another one in the batch, but a batch of "
                             f"{len(batch['idx'])} holds a single clip: choose a larger --batch for each process")
        vision = self.encode_video_stage1(batch["video"], batch.get("features"))    # (B, N, C)
        return self.aligner.losses(self.qformer, self.query_tokens, vision, batch, dec_id, dist, generator, vtg_only,
                                   global_negatives)

    def encode_video(self, video, features=None):
        """As encode_video_stage1, but without stage 1's vision_temp_embed."""
        x = self.vision_encoder(video) if features is None else features    # (B, T, L, C)
        return self.vision_layernorm(x.flatten(1, 2))               # (B, N, C)

    def video_tokens(self, vision, instruction_ids=None, instruction_mask=None):
        """vision (B, N, C), with an instruction (B, S), or (1, S) for all -> what the LLM reads of it (B, Q, D)."""
        query = torch.cat([self.query_tokens, self.extra_query_tokens], 1)      # (1, Q, E)
        # subtle: in training each video has its own dropout, from the first row on
        if self.training or instruction_ids is None or len(instruction_ids) > 1:
            query = query.expand(len(vision), -1, -1)               # (B, Q, E)

        # subtle: in training the last layer computes its text rows, whose weights then have a gradient of zeros instead
        # of none, and so weight decay, as in the official code
        n_text_out = None if torch.is_grad_enabled() else 0
        hidden = self.qformer(query, instruction_ids, instruction_mask, vision, n_text_out=n_text_out)  # (B, Q + S, E)
        return self.llama_proj(hidden[:, :query.shape[1]])          # (B, Q, D)

    def insert_video_tokens(self, ids, video_tokens=None):
        """Embeds ids (B, S) -> (B, S, D), with video_tokens (B, Q, D) where ids is VIDEO."""
        is_video = ids == VIDEO
        embeds = self.llama_model.embed(ids.masked_fill(is_video, 0))       # (B, S, D)
        if video_tokens is None:
            return embeds

        # like masked_scatter, whose backward pass would sync the GPU
        index = (is_video.cumsum(1) - 1).clamp(min=0, max=video_tokens.shape[1] - 1)    # (B, S): which of the Q
        tokens = video_tokens.to(embeds.dtype).gather(1, index[..., None].expand_as(embeds))    # (B, S, D)
        return torch.where(is_video[..., None], tokens, embeds)     # (B, S, D)

    def input_embeds(self, batch):
        """Everything before the LLM's first layer -> (B, S, D)."""
        video, features = batch.get("video"), batch.get("features")
        if video is None and features is None:                      # text only
            return self.insert_video_tokens(batch["ids"])
        vision = self.encode_video(video, features)                 # (B, N, C)
        tokens = self.video_tokens(vision, batch.get("instruction_ids"), batch.get("instruction_mask"))     # (B, Q, D)
        return self.insert_video_tokens(batch["ids"], tokens)       # (B, S, D)

    def lm_loss(self, batch):
        """Stages 2 and 3: mean cross-entropy over the label tokens of video, ids, mask, labels (B, S), padded right.
        The collate functions add lengths and targets (prompt.add_packing); made here, they would sync a GPU."""
        batch = batch if "targets" in batch else add_packing(batch)
        embeds = self.input_embeds(batch)                           # (B, S, D)
        if self.stage == 3 and self.cfg.bos_ones:
            embeds = torch.cat((torch.ones_like(embeds[:, :1]), embeds[:, 1:]), 1)      # <s> is the first token
        return next_token_loss(self.llama_model, embeds, batch["labels"], batch["lengths"], batch["targets"])

def next_token_loss(llama, embeds, labels, lengths, targets):
    """Next-token cross-entropy, mean over labels != IGNORE: embeds (B, S, D), labels (B, S), padded right, with their
    lengths and targets (n,) by prompt.add_packing -> scalar, 0 without targets. Padding is not read at all, and logits
    are computed only at targets: the vocabulary is the model's widest axis."""
    hidden = llama.forward_packed(pack_rows(embeds, lengths), lengths, targets)     # (1, n, D)
    logits = llama.lm_head(hidden[0]).float()                       # (n, V)
    next_ids = pack_rows(labels, lengths)[0].index_select(0, targets + 1)   # (n,)
    return F.cross_entropy(logits, next_ids, reduction="sum") / max(1, len(targets))

# ------------------------------------------------------------------------------------------- what trains in which stage

FROZEN = {  # stage: the names that do not train, as a pattern; everything else does
    1: r"^vision_encoder\.",                 # the ViT
    # the LLM; and what only text rows of the Q-Former use (word embeddings, their feed-forward): stage 2 has none
    2: r"^llama_model\.|\.(word|position)_embeddings\.|\.layer\.\d+\.(intermediate|output)\.",
    3: r"^llama_model\.(?!.*lora_)",         # the LLM, except for LoRA
}

def set_trainable(model, stage, vit=True):
    """Freezes what the stage does not train, and the ViT unless vit -> rows (part, parameters, trained), for the log;
    LoRA is separate from the LLM that contains it."""
    frozen = FROZEN[stage] if vit else FROZEN[1] + "|" + FROZEN[stage]
    rows = {}
    for name, p in model.named_parameters():
        p.requires_grad = not re.search(frozen, name)
        part = "lora" if "lora_" in name else name.split(".")[0]
        total, trained = rows.get(part, (0, 0))
        rows[part] = (total + p.numel(), trained + p.numel() * p.requires_grad)
    return [(part, *counts) for part, counts in rows.items()]

def main():
    for name, make in PRESETS.items():
        cfg = make()
        if not cfg.llama.vocab_size:                                # the toy's is known when its tokenizers are made
            cfg.llama.vocab_size = cfg.qformer.vocab_size = 1000
        with torch.device("meta"):
            model = VideoChat2(cfg, 3)
        print(f"\n{name}: stage 3 on {cfg.train_frames} frames of {cfg.vit.img_size} pixels")
        for part, total, trained in set_trainable(model, 3):
            print(f"  {part:20} {total:>13,} parameters, {trained:>11,} trained")

if __name__ == "__main__":
    main()
