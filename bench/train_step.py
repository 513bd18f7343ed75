"""How fast training is: one step of every stage, and the videos that feed it.

    train     clips a second and memory, against the same computation built from Hugging Face transformers: VideoMAE's
              ViT, InstructBlipVideo's Q-Former, LlamaForCausalLM with peft's LoRA; the same weights, batch and losses
    data      decoded clips a second, against the official way (frame by frame, Pillow) and against decoding alone
    growth    how a step's cost grows with batch, frames, text and processes

On a CPU, the sizes of bench.SCALED in float32; on a GPU, vicuna-7b's in bf16. Dropout is off, in both. MFU, the
utilisation: counted operations of a step over what the machine does in that time of plain matrix products.

Run:    python bench.py train
        python bench.py data
        python bench.py growth
"""
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import decord
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bench import reference
from infra.distributed import Distributed, init_distributed, wrap_model
from model import PRESETS, VideoChat2, set_trainable
from prompt import IGNORE, VIDEO, add_packing
from qformer import hard_negatives, similarity, vtc_loss, vtg_loss
from train import compile_blocks, to_device
from video import eval_frame_indices, load_eval_clip

# --------------------------------------------------------------------------------------------------- the same, twice


def sizes(preset, frames):
    """The Config without dropout, which the two sides would draw differently."""
    if preset == "scaled":
        from bench.speed import SCALED
        cfg = replace(SCALED, llama=replace(SCALED.llama, vocab_size=4000),
                      qformer=replace(SCALED.qformer, vocab_size=4000))
    else:
        cfg = PRESETS[preset]()
    return replace(cfg, lora_dropout=0.0, bos_ones=False, vit=replace(cfg.vit, frames=frames), align_frames=frames,
                   qformer=replace(cfg.qformer, dropout=0.0, drop_path=0.0))


def made_batch(cfg, stage, size, frames, text, device, shortest=0.25):
    """Random clips; texts of shortest * text to text words, of which stage 3 learns a third, stage 2 all."""
    g = torch.Generator().manual_seed(0)
    batch = {"video": torch.randn(size, frames, 3, cfg.vit.img_size, cfg.vit.img_size, generator=g)}
    n_video, vocab = cfg.n_query + cfg.n_extra, min(cfg.llama.vocab_size, cfg.qformer.vocab_size) - 1
    length = torch.randint(int(shortest * text), text + 1, (size,), generator=g)
    length[0] = text
    mask = (torch.arange(text) < length[:, None]).long()                           # (B, S)
    words = torch.randint(5, vocab, (size, text), generator=g)
    if stage == 1:
        batch |= {"ids": words * mask, "mask": mask, "idx": torch.arange(size)}
    else:
        learnt = (torch.arange(text) % 3 == 0) | (stage == 2)
        labels = words.masked_fill((mask == 0) | ~learnt, IGNORE)
        slot = torch.full((size, n_video), VIDEO)
        batch |= add_packing({"ids": torch.cat((slot, words), 1), "mask": F.pad(mask, (n_video, 0), value=1),
                               "labels": F.pad(labels, (n_video, 0), value=IGNORE)})
        if stage == 3:
            batch |= {"instruction_ids": words[:, :48] % vocab, "instruction_mask": torch.ones_like(words[:, :48])}
    return to_device(batch, device)


def ours(cfg, stage, dtype, device):
    torch.manual_seed(0)
    with torch.device(device):
        model = VideoChat2(cfg, stage)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("extra_query") or "lora_B" in name:
                p.normal_(std=0.02)                                                # zeros would hide what reads them
            if name.startswith("llama_model.") and "lora_" not in name:
                p.data = p.data.to(dtype)
    set_trainable(model, stage)
    return model.train()


def losses_of(model, batch, negatives):
    if model.stage > 1:
        return {"lm": model.lm_loss(batch)}
    with mock.patch("qformer.hard_negatives", return_value=negatives):
        return model.stage1_losses(batch, 3, Distributed())


class Reference(nn.Module):
    """The same model, of Hugging Face's parts, with the weights of ours."""

    def __init__(self, model):
        super().__init__()
        from transformers import InstructBlipVideoQFormerConfig, VideoMAEConfig, VideoMAEModel
        from transformers.models.bert.modeling_bert import BertConfig, BertLMPredictionHead
        from transformers.models.instructblipvideo.modeling_instructblipvideo import InstructBlipVideoQFormerModel
        cfg = self.cfg = model.cfg
        self.stage, v, q = model.stage, cfg.vit, cfg.qformer
        self.vision = VideoMAEModel(VideoMAEConfig(
            image_size=v.img_size, patch_size=v.patch_size, num_frames=v.frames, tubelet_size=1, hidden_size=v.width,
            num_hidden_layers=v.depth, num_attention_heads=v.heads, intermediate_size=v.mlp_ratio * v.width,
            layer_norm_eps=v.eps, use_mean_pooling=True))
        names = dict(hidden_size=q.width, num_attention_heads=q.heads, intermediate_size=q.ffn, layer_norm_eps=q.eps,
                     vocab_size=q.vocab_size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        self.qformer = InstructBlipVideoQFormerModel(InstructBlipVideoQFormerConfig(
            num_hidden_layers=q.depth, encoder_hidden_size=q.vision_width, cross_attention_frequency=q.cross_every,
            max_position_embeddings=q.max_positions, **names))
        self.vision_layernorm = nn.LayerNorm(v.width, eps=1e-12)
        self.vision_layernorm.load_state_dict(model.vision_layernorm.state_dict())
        self.vision.load_state_dict(video_mae_names(model.vision_encoder), strict=False)
        self.qformer.load_state_dict(instruct_blip_names(model.qformer), strict=False)
        if self.stage == 1:
            self.query, self.time = nn.Parameter(model.query_tokens.data), nn.Parameter(model.vision_temp_embed.data)
            self.heads = model.aligner
            self.words = BertLMPredictionHead(BertConfig(**names))
            own = model.qformer.cls["predictions"].state_dict()
            self.words.load_state_dict({**own, "decoder.bias": own["bias"]}, strict=False)
            self.words.decoder.weight = self.qformer.embeddings.word_embeddings.weight
        else:
            self.query = nn.Parameter(torch.cat((model.query_tokens, model.extra_query_tokens), 1).detach())
            self.proj = model.llama_proj
            self.llm = transformers_llama(model)
        for p in self.vision.parameters():
            p.requires_grad = self.stage > 1
        self.to(model.device).train()

    def see(self, batch):
        x = self.vision(batch["video"]).last_hidden_state                          # (B, N, C)
        if self.stage == 1:
            B, T = batch["video"].shape[:2]
            x = (x.unflatten(1, (T, -1)) + self.time).flatten(1, 2)
        return self.vision_layernorm(x)

    def read(self, vision, ids=None, mask=None, query=True):
        """-> hidden states of queries and text."""
        B, Q = len(ids) if ids is not None else len(vision), self.query.shape[1]
        if query and mask is not None and mask.ndim == 2:
            mask = F.pad(mask, (Q, 0), value=1)
        if mask is None:
            mask = torch.ones(B, Q, device=self.query.device)
        return self.qformer(ids, attention_mask=mask, query_embeds=self.query.expand(B, -1, -1) if query else None,
                            encoder_hidden_states=vision if query else None).last_hidden_state

    def forward(self, batch, negatives=None):
        vision = self.see(batch)
        if self.stage > 1:
            Q = self.query.shape[1]
            tokens = self.proj(self.read(vision, batch.get("instruction_ids"), batch.get("instruction_mask"))[:, :Q])
            embeds = self.llm.get_input_embeddings()(batch["ids"][:, Q:])
            return {"lm": self.llm(inputs_embeds=torch.cat((tokens.to(embeds.dtype), embeds), 1),
                                   attention_mask=batch["mask"], labels=batch["labels"]).loss}
        return self.align(vision, batch["ids"], batch["mask"], batch["idx"], negatives)

    def align(self, vision, ids, mask, idx, negatives):
        """As BLIP-2 does; captioning and the queries alone in one pass, for queries do not see the caption."""
        (B, S), Q, heads = ids.shape, self.query.shape[1], self.heads
        dec_ids = torch.cat((torch.full_like(ids[:, :1], 3), ids[:, 1:]), 1)
        sees = torch.zeros(B, 1, Q + S, Q + S, dtype=torch.bool, device=ids.device)
        sees[..., :Q] = True
        sees[:, 0, Q:, Q:] = torch.ones(S, S, dtype=torch.bool, device=ids.device).tril() & mask.bool()[:, None]
        hidden = self.read(vision, dec_ids, sees)                                  # (B, Q + S, E)
        text = self.read(None, ids, mask, query=False)                             # (B, S, E)
        sim = similarity(heads.video_features(hidden[:, :Q]), heads.text_features(text)) / heads.temperature()
        videos, texts = negatives or hard_negatives(sim, idx)
        both = self.read(torch.cat((vision, vision[videos], vision)), torch.cat((ids, ids, ids[texts])),
                         torch.cat((mask, mask, mask[texts])))                     # (3 * B, Q + S, E)
        match = heads.itm_head(torch.cat((both[:, :Q].mean(1), both[:, Q]), -1))
        right = (torch.arange(3 * B, device=ids.device) < B).long()
        return {"vtc": vtc_loss(sim, idx), "vtm": F.cross_entropy(match, right),
                "vtg": vtg_loss(self.words(hidden[:, Q:]), dec_ids, mask, self.cfg.qformer.label_smoothing)}


def video_mae_names(vit):
    renamed = {}
    for name, t in vit.state_dict().items():
        name = re.sub(r"^blocks\.", "encoder.layer.", name)
        for was, now in (("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("norm1", "layernorm_before"),
                         ("norm2", "layernorm_after"), ("attn.proj", "attention.output.dense"),
                         ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
                         ("attn.q_bias", "attention.attention.query.bias"),
                         ("attn.v_bias", "attention.attention.value.bias")):
            name = name.replace(was, now)
        parts = zip(("query", "key", "value"), t.chunk(3), strict=True) if "qkv" in name else [("", t)]
        renamed |= {name.replace("attn.qkv", f"attention.attention.{part}"): piece for part, piece in parts}
    return renamed


def instruct_blip_names(qformer):
    own = {name.removeprefix("bert.").replace("attention.self.", "attention.attention."): t
           for name, t in qformer.state_dict().items() if name.startswith("bert.")}
    return {name.replace("embeddings.LayerNorm", "embeddings.layernorm"): t for name, t in own.items()}


def transformers_llama(model):
    """LlamaForCausalLM, in stage 3 with peft's LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    cfg = model.cfg.llama
    dtype = model.llama_model.model["embed_tokens"].weight.dtype
    with torch.device(model.device):
        llm = LlamaForCausalLM(LlamaConfig(
            vocab_size=cfg.vocab_size, hidden_size=cfg.width, num_hidden_layers=cfg.depth,
            num_attention_heads=cfg.heads, num_key_value_heads=cfg.kv_heads, intermediate_size=cfg.ffn,
            rms_norm_eps=cfg.eps, max_position_embeddings=cfg.max_positions)).to(dtype)
    own = {name.replace(".base.", "."): t for name, t in model.llama_model.state_dict().items()}
    llm.load_state_dict({name: t for name, t in own.items() if "lora_" not in name})
    llm.requires_grad_(False)
    if model.stage == 3:
        llm = get_peft_model(llm, LoraConfig(r=model.cfg.lora_r, lora_alpha=model.cfg.lora_alpha,
                                             target_modules=list(model.cfg.lora_names)))
        llm.load_state_dict({"base_model.model." + name.replace(".weight", ".default.weight"): t
                             for name, t in own.items() if "lora_" in name}, strict=False)
    return llm

# ------------------------------------------------------------------------------------------------------------- measured


SHAPES = {1: (16, 4, 32), 2: (8, 8, 64), 3: (4, 8, 256)}       # stage: clips, frames, text, on a CPU
GPU_SHAPES = {1: (64, 4, 32), 2: (16, 8, 64), 3: (8, 8, 512)}


def train(args):
    """Prints a table of the stages. Each side in processes of its own, in turn: memory is measured by the process."""
    on_gpu = torch.cuda.is_available()
    preset = args.preset or ("vicuna-7b" if on_gpu else "scaled")
    print(f"{preset}, {torch.cuda.get_device_name() if on_gpu else f'{torch.get_num_threads()} threads'}, "
          f"{'bf16' if on_gpu else 'fp32'}; texts of {args.shortest:g} to 1 of the longest; clips a second (best of "
          f"{args.rounds}), peak GiB, share of the matrix rate")
    print(f"{'stage':6}{'clips, frames, text':>20}{'ours':>20}{'transformers':>20}{'ratio':>7}{'MFU':>7}  losses")
    for stage in (1, 2, 3) if not args.stage else (args.stage,):
        shape = (GPU_SHAPES if on_gpu else SHAPES)[stage]
        found = {"ours": [], "transformers": []} | ({"compiled": []} if args.compile else {})
        for _ in range(args.rounds):
            for side, rows in found.items():
                rows.append(in_a_process(side, preset, stage, shape, args.steps, args.shortest))
        best = {side: min(rows, key=lambda row: row["seconds"]) for side, rows in found.items()}
        one, other = best["ours"], best["transformers"]
        rate = {side: f"{shape[0] / row['seconds']:.2f}/s {row['peak']:.2f}" for side, row in best.items()}
        print(f"{stage:<6}{str(shape):>20}{rate['ours']:>20}{rate['transformers']:>20}"
              f"{other['seconds'] / one['seconds']:>7.2f}{one['mfu']:>7.0%}  "
              + ", ".join(f"{name} {one['losses'][name]:.4f} {other['losses'][name]:.4f}" for name in one["losses"])
              + (f"; compiled {other['seconds'] / best['compiled']['seconds']:.2f}" if args.compile else ""),
              flush=True)


def in_a_process(side, preset, stage, shape, steps, shortest=0.25):
    call = (f"from bench import train_step as bench_train; "
            f"bench_train.one_side({side!r}, {preset!r}, {stage}, {tuple(shape)}, {steps}, {shortest})")
    done = subprocess.run([sys.executable, "-c", call], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{side}, stage {stage}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def one_side(side, preset, stage, shape, steps, shortest):
    """Prints the seconds of a step (the median), its losses, peak memory and utilisation."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size, frames, text = shape
    cfg = sizes(preset, frames)
    model, batch = ours(cfg, stage, dtype, device), made_batch(cfg, stage, *shape, device, shortest)
    if side == "transformers":
        model = forward = Reference(model)
    else:
        forward = partial(losses_of, model)
    if side == "compiled":
        compile_blocks(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    # both sides are shown the same negatives: drawing them is not what is compared
    negatives = tuple(torch.arange(size, device=device).roll(n) for n in (1, 2))

    def step():
        with torch.autocast(device, dtype, enabled=device == "cuda"):
            losses = forward(batch, negatives)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return losses

    losses = {name: loss.item() for name, loss in step().items()}
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        step()
    seconds = sorted(timed(step, device) for _ in range(steps))[steps // 2]
    peak = (torch.cuda.max_memory_allocated() if device == "cuda" else
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 2 ** 30
    print(json.dumps({"seconds": seconds, "losses": losses, "peak": peak,
                      "mfu": counter.get_total_flops() / seconds / matrix_rate(device, dtype)}))


CPU_ATTENTION = {       # operations, from shapes, of what PyTorch's counter does not know
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *rest, **more: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *rest, **more: sdpa_backward_flop_count(grad, q, k, v)}


def timed(call, device):
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def matrix_rate(device, dtype):
    """Operations a second of a plain matrix product, measured here."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n ** 3 / min(timed(lambda: a @ b, device) for _ in range(10))

# ----------------------------------------------------------------------------------------------------------------- data


class Decoded(Dataset):
    """The same clip again and again, by one of WAYS."""

    def __init__(self, path, way, count):
        self.path, self.way, self.count = path, way, count

    def __len__(self):
        return self.count

    def __getitem__(self, _):
        return WAYS[self.way](self.path)


def decode_alone(path):
    reader = decord.VideoReader(str(path), num_threads=1)
    return torch.from_numpy(reader.get_batch(eval_frame_indices(16, len(reader) - 1, reader.get_avg_fps())).asnumpy())


WAYS = {
    "decoding alone (one get_batch, 854 x 480)": decode_alone,
    "ours, to (16, 3, 224, 224)": lambda path: load_eval_clip(path, PRESETS["vicuna-7b"]()),
    "the official way, frame by frame with Pillow": lambda path: reference.read_clip(
        path, None, PRESETS["vicuna-7b"]())[0],
}


def data(args):
    """Prints clips a second of each way, measured in turn; the official way also as its notebook does, without
    workers."""
    from bench.speed import encoded_video
    runs = [(way, args.workers) for way in WAYS] + [(list(WAYS)[-1], 0)]
    with tempfile.TemporaryDirectory() as folder:
        path = encoded_video(Path(folder) / "video.mp4")
        rounds = [[decoding(path, *run, args.clips) for run in runs] for _ in range(args.rounds)]
    pure, own, official, notebook = best = [min(seconds) for seconds in zip(*rounds, strict=True)]
    for (way, workers), seconds in zip(runs, best, strict=True):
        print(f"{way:48}{workers} workers{1 / seconds:8.2f} clips/s")
    print(f"ours: {official / own:.2f} times as fast as the official way, {notebook / own:.2f} times as its notebook, "
          f"{own / pure:.2f} times as long as the decoding alone")


def decoding(path, way, workers, clips):
    """Seconds a clip."""
    begun = time.perf_counter()
    for _ in DataLoader(Decoded(path, way, clips), None, num_workers=workers):
        pass
    return (time.perf_counter() - begun) / clips

# --------------------------------------------------------------------------------------------------------------- growth


def growth(args):
    """Prints the seconds and memory of a step of stage 3, one size growing at a time; then by processes."""
    base = dict(clips=4, frames=8, text=256)
    preset = args.preset or ("vicuna-7b" if torch.cuda.is_available() else "scaled")
    for name, values in {"clips": (1, 2, 4, 8, 16), "frames": (4, 8, 16, 32, 64), "text": (64, 128, 256, 512)}.items():
        for value in values:
            row = in_a_process("ours", preset, 3, (base | {name: value}).values(), 3)
            print(f"{name:10}{value:6}{row['seconds']:8.2f} s {row['peak']:6.2f} GiB  MFU {row['mfu']:.0%}", flush=True)
    for processes in (1, 2, 4)[:torch.cuda.device_count() if torch.cuda.is_available() else 2]:
        for layout in ("ddp", "shard")[:processes]:
            done = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "-m", "bench.train_step", preset,
                 layout, *map(str, base.values())], capture_output=True, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"})
            if done.returncode:
                raise ValueError(f"{processes} processes, {layout}: {done.stderr[-2000:]}")
            seconds = float(done.stdout.split()[-1])
            print(f"{'processes':10}{processes:6}{seconds:8.2f} s  {layout}, 1 thread each", flush=True)


def in_a_crowd(preset, layout, *shape):
    """One of several processes that share a batch; the first prints the seconds of a step."""
    clips, frames, text = map(int, shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    world, cfg = init_distributed(device), sizes(preset, frames)
    model = ours(cfg, 3, dtype, "cpu" if layout == "shard" else world.device)
    forward = wrap_model(model, lambda batch, done: {"lm": model.lm_loss(batch)}, world, layout == "shard", find_unused=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    batch = made_batch(cfg, 3, clips, frames, text, "cpu")
    batch = to_device(add_packing({name: world.local_rows(t) for name, t in batch.items() if name not in
                                    ("lengths", "targets")}), world.device)

    def step():
        with torch.autocast(device, dtype, enabled=device == "cuda"):
            loss = forward(batch, 0.0)["lm"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    seconds = sorted(timed(step, device) for _ in range(5))[2]
    if world.is_main:
        print(seconds)
    world.close()


if __name__ == "__main__":                                     # under torchrun, by growth
    in_a_crowd(*sys.argv[1:])
