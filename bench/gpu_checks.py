"""Parts 1, 5 and 6 of bench.gpu: does a card compute what the CPU computes, and does everything run on it?

Each part is a function of the Report to which it writes its rows. Without CUDA it does the same on the CPU.
Not here: speed (gpu_speed.py); processes, time limits, the page (gpu.py).

    python -m bench.gpu --tiny --only 1,5,6 --out DIR
"""
import json
import math
import signal
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as torch_dist

import train
from bench.train_step import DEVICE, Step, our_model, random_batch, step_config, step_losses
from evaluation.engine import Engine
from evaluation.protocol import Protocol
from infra.distributed import Distributed, GatherRows, full_tensor, wrap_model
from infra.files import load_strict, read_json, read_tensors
from llama import LlamaConfig
from model import DTYPES, PRESETS, Config, VideoChat2
from prompt import pad_ids
from qformer import QFormerConfig
from tokenizer import SentencePiece, WordPiece
from training.log import to_device
from training.optim import clip_gradients, make_optimizers, optimizer_step
from vit_video import ViTConfig
from weights.checkpoint import is_frozen_llm, save_checkpoint
from weights.official_names import DROPPED, OFFICIAL, from_official

ROOT, ON_GPU = Path(__file__).resolve().parent.parent, DEVICE == "cuda"
GOLDEN, VOCAB, MICRO = ROOT / "tests/golden", ROOT / "assets/bert_vocab.txt", Step(3, "micro", 4, frames=4, text=24)

class Trainer:
    """A model and the training step that train.fit makes of its parts."""
    def __init__(self, model, dtype, shard=False):
        self.cfg = train.parse(["--stage", str(model.stage), "--dtype", dtype])[0]
        self.stage, self.dist = train.Stage("", None, model, None, None, None, None), Distributed(device=DEVICE)
        generator = torch.Generator().manual_seed(0)
        self.forward = wrap_model(model, lambda batch, _: step_losses(model, batch, generator), self.dist, shard)
        self.optimizers = make_optimizers(model, self.cfg)
        self.scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == "fp16")

    def step(self, batch, lr=1e-5):
        """A step on a batch of the CPU -> {name: loss}, on the device."""
        n = train.count_targets(batch)
        losses = train.forward_backward(self.stage, self.forward, [batch], n, 0, self.scaler, self.cfg, self.dist)
        grad_norm = clip_gradients(self.stage.model, self.optimizers, self.scaler, 1.0)
        optimizer_step(self.optimizers, lr, self.scaler, grad_norm)
        return losses

def pinned_batch(step, shortest=1.0):
    """As a loader hands it over: in pinned memory, so that copying it does not wait for the card."""
    batch = random_batch(step_config(step), step, shortest)
    return {n: t.pin_memory() if ON_GPU and torch.is_tensor(t) else t for n, t in batch.items()}

def random_chat(preset, device, dtype):
    """-> (stage 3 of a preset with random weights, its two tokenizers)."""
    cfg, qformer_tok, llm_tok = PRESETS[preset](), WordPiece.load(VOCAB), SentencePiece(GOLDEN / "tokenizer.model")
    cfg.qformer.vocab_size, cfg.llama.vocab_size = qformer_tok.vocab_size, llm_tok.vocab_size
    return our_model(cfg, 3, device, dtype).eval(), qformer_tok, llm_tok

def made_questions(media):
    """A question about each medium, as evaluation.tasks.load_questions gives them."""
    return [{"task": "Action Sequence", "index": i, "video": Path(path).name, "media": str(path), "size": 0,
             "bound": None, "question": f"What does person {i} do after opening the door?", "answer": "Sits down.",
             "candidates": ["Sits down.", "Leaves the room.", "Closes the window.", "Picks up the phone."]}
            for i, path in enumerate(media)]

# ------------------------------------------------------------------------------------------- part 1: the same numbers

def relative_error(x, y):
    x, y = (t.detach().cpu().double() for t in (x, y))
    return ((x - y).norm() / y.norm().clamp(min=1e-30)).item()

def verdict(error, tolerance):
    return f"{error:.1e}, {'within' if error <= tolerance else 'ABOVE'} {tolerance:.1e}"       # NaN is above

def same_numbers(report):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report.attempt("numbers of the official code", compare_golden)
    for stage in (1, 2, 3):
        report.attempt(f"micro, stage {stage}", compare_step, stage)
    report.attempt("greedy answers", compare_answers)
    report.attempt("fp16", train_fp16)

def compare_golden(report):
    """What the official stage 3 computed at tiny size, here in fp32 on DEVICE."""
    g = {n: t.to(DEVICE) for n, t in read_tensors(GOLDEN / "stage3.safetensors").items()}
    model = VideoChat2(Config(
        vit=ViTConfig(img_size=32, patch_size=8, width=48, depth=3, heads=4, pos_table="resized14"),
        qformer=QFormerConfig(width=20, depth=4, heads=4, ffn=40, vision_width=48, max_positions=128),
        llama=LlamaConfig(width=32, depth=2, heads=4, kv_heads=4, ffn=64, max_positions=1024),
        n_query=8, n_extra=6, lora_r=4, lora_alpha=8), 3).to(DEVICE).eval()
    weights = {n.removeprefix("w."): t for n, t in g.items() if n.startswith("w.")}
    load_strict(model, from_official(weights, "stage3", OFFICIAL[3], model.state_dict(), drop_rules=DROPPED)[0], GOLDEN)

    # pixels to features, features and instruction to video tokens, embeddings to hidden states
    vision, ids, mask = model.encode_video(g["in.image"]), g["in.qformer_input_ids"], g["out.attention_mask"]
    tokens = model.video_tokens(vision, ids, g["in.qformer_attention_mask"][:, -ids.shape[1]:])    # (B, Q, D)
    hidden, real = model.llama_model(g["out.inputs_embeds"], mask.long()), mask.bool()
    pairs = {"ViT": (vision, g["out.vision_embeds"]), "Q-Former": (tokens, g["out.img_embeds"]),
             "LLM with LoRA": (hidden[real], g["out.hidden_final"][real])}
    report.row(what="numbers of the official code, fp32",
               **{part: verdict(relative_error(*pair), 1e-3) for part, pair in pairs.items()})

def compare_step(report, stage):
    """fp32 without TF32 must agree to 1e-3. bf16 has 8 bits: what they cost in a step, the CPU shows in bf16; the card,
    which rounds elsewhere, may be twice as far from fp32, or 1 %."""
    exact = micro_step(stage, "cpu", "fp32")
    of_bf16 = map(relative_error, micro_step(stage, "cpu", "bf16"), exact)
    for dtype, tolerances in (("fp32", (1e-3, 1e-3)), ("bf16", [max(0.01, 2 * e) for e in of_bf16])):
        losses, gradients = map(verdict, map(relative_error, micro_step(stage, DEVICE, dtype), exact), tolerances)
        report.row(what=f"micro, stage {stage}, {dtype}", losses=losses, gradients=gradients)

def micro_step(stage, device, dtype):
    """Losses (n,) and gradients (parameters,) of a step of the micro preset, with the same weights on each device."""
    step = replace(MICRO, stage=stage)
    model, batch = our_model(step_config(step), stage, "cpu", torch.float32), random_batch(step_config(step), step)
    for name, p in model.named_parameters():
        if is_frozen_llm(name):
            p.data = p.data.to(DTYPES[dtype])

    # rounding must not choose other negatives
    with (patch("qformer.hard_negatives", lambda sim, idx, generator: (idx.roll(1), idx.roll(1))),
          torch.autocast(device, DTYPES[dtype], enabled=dtype != "fp32")):
        losses = torch.stack([*step_losses(model.to(device), to_device(batch, device)).values()])
    losses.sum().backward()
    return losses.float(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

def compare_answers(report):
    """Greedy answers of a toy with random weights, by generate and by the engine with its drafts."""
    model, qformer_tok, llm_tok = random_chat("toy", "cpu", torch.float32)
    questions, answers = made_questions(map(str, range(8))), []
    video = torch.randn(8, 8, 3, 64, 64, generator=torch.Generator().manual_seed(0))           # (B, T, 3, H, W)
    for device in ("cpu", DEVICE):
        engine = Engine(model.to(device), qformer_tok, llm_tok, Protocol(max_new_tokens=24))
        tokens = engine.video_tokens(engine.encode_clips(video, "", range(8)), "", range(8), questions)    # (B, Q, D)
        ids, mask = (t.to(device) for t in pad_ids([engine.prompt(q).ids for q in questions], 0, "left"))  # (B, S)
        with torch.inference_mode():
            rows = model.llama_model.generate(model.insert_video_tokens(ids, tokens), mask, 24)
        answers.append([*rows, *(answer.text for answer in engine.answer(questions, tokens))])
    differ = sum(x != y for x, y in zip(*answers, strict=True))
    report.row(what="greedy answers in fp32, generate and engine", answers=len(answers[0]), differ=differ)

def train_fp16(report):
    """Losses are scaled before the backward pass."""
    trainer = Trainer(our_model(step_config(MICRO), 3, dtype=torch.float16), "fp16")
    losses = [round(trainer.step(pinned_batch(MICRO), 1e-3)["lm"].item(), 4) for _ in range(8)]
    report.row(what="micro, stage 3, fp16, 8 steps", losses=losses, finite=all(map(math.isfinite, losses)),
               scale=trainer.scaler.get_scale())

# --------------------------------------------------------------------------------------------------- part 5: processes

def processes(report):
    report.attempt("DDP and FSDP2", compare_layouts)
    report.attempt("a run that is stopped and resumed", compare_resumed)

def compare_layouts(report):
    """The same steps without a group of processes, and by DDP and FSDP2 in a group of one. Weights may differ by more
    than losses: AdamW makes a step of full size of a gradient that only rounding keeps from being 0."""
    expected, backend, store = {}, "nccl" if ON_GPU else "gloo", f"file://{tempfile.mkdtemp()}/store"
    if ON_GPU:
        torch.cuda.set_device(0)                           # nccl's
    try:
        # the first layout gives what the others must give
        for layout in ("one process", "DDP", "FSDP2"):
            if layout == "DDP":
                torch_dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
                rows = torch.randn(4, 3, device=DEVICE, requires_grad=True)
                GatherRows.apply(rows).square().sum().backward()
                report.row(what=f"{backend}: rows gathered, and their gradient", equal=torch.equal(rows.grad, 2 * rows))
            for stage, dtype in ((1, "fp32"), (3, "fp32"), (3, "bf16")):
                losses, weights = train_micro(stage, dtype, layout == "FSDP2")
                first_losses, first_weights = expected.setdefault((stage, dtype), (losses, weights))
                tolerance, of_weights = (1e-3, 0.01) if dtype == "fp32" else (0.01, 0.03)
                report.row(layout=layout, stage=stage, dtype=dtype, losses=[round(x, 4) for x in losses.tolist()],
                           **{"losses as in one process": verdict(relative_error(losses, first_losses), tolerance),
                              "weights": verdict(relative_error(weights, first_weights), of_weights)})
    finally:
        if torch_dist.is_initialized():
            torch_dist.destroy_process_group()

def train_micro(stage, dtype, shard):
    """Four steps of the micro preset -> (losses (4,), all trained weights (parameters,))."""
    step = replace(MICRO, stage=stage)
    model = our_model(step_config(step), stage, "cpu", DTYPES[dtype])
    trainer, batch = Trainer(model, dtype, shard=shard), pinned_batch(step)
    losses = [sum(trainer.step(batch, 1e-3).values()) for _ in range(4)]
    trained = [full_tensor(p.detach()).flatten() for p in model.parameters() if p.requires_grad]
    return torch.stack(losses).float(), torch.cat(trained)

def compare_resumed(report):
    """A run of train.py that SIGTERM stops and that is resumed has the weights of one that is not stopped. On a card,
    sums in another order may make even two equal runs differ: their difference is beside it."""
    folder, cfg = Path(tempfile.mkdtemp()), step_config(replace(MICRO, stage=1))
    cfg.qformer.vocab_size = WordPiece.load(VOCAB).vocab_size
    (folder / "init").mkdir()
    save_checkpoint(VideoChat2(cfg, 1).state_dict(), 0, cfg, folder / "init", VOCAB)
    command = ["train", "--stage", 1, "--preset", "micro", "--data", toy_world(40, 1, 100), "--init", folder / "init",
               "--steps", 6, "--save-every", 2, "--out"]
    for name in ("first", "repeated"):
        run_command(*command, folder / name)

    # the stopped run exits, and the same command resumes it
    log_step = train.TrainLog.step
    def step_and_stop(log, step, *results):
        log_step(log, step, *results)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
    with patch.object(train.TrainLog, "step", step_and_stop), suppress(SystemExit):
        run_command(*command, folder / "resumed")
        raise RuntimeError("SIGTERM did not stop train.py")
    run_command(*command, folder / "resumed")

    first, repeated, resumed = (read_tensors(folder / name / "stage1" / "model.safetensors")
                                for name in ("first", "repeated", "resumed"))
    report.row(what="train.py, 6 steps of stage 1: largest difference of a tensor",
               **{name: f"{max(relative_error(t, first[n]) for n, t in weights.items()):.1e}"
                  for name, weights in (("stopped and resumed", resumed), ("only repeated", repeated))})

# -------------------------------------------------------------------------------------------------------- part 6: toy

def run_command(name, *arguments):
    """As `python -m NAME ARGUMENTS`, but in this process: starting a new one would take seconds of a card's time."""
    import_module(name).main([*map(str, arguments)])

def toy_world(clips, questions, texts):
    """Folder of a toy world with so many clips, questions of each task, and texts; later parts use it, too."""
    data = Path(tempfile.gettempdir()) / f"toy-{clips}-{questions}-{texts}"
    if not data.is_dir():
        run_command("toy.world", "--out", data, "--clips", clips, "--questions", questions, "--texts", texts)
    return data

def toy(report):
    """The commands of `make demo`, with as many of their steps as the time allows; tiny, toy.pretrain comes first."""
    out, rate, done = Path(tempfile.mkdtemp()), 30, set()                  # steps a second; stages
    preset, data = ("micro", toy_world(40, 1, 100)) if report.tiny else ("toy", toy_world(4000, 20, 0))
    full = {"toy.pretrain": 0} if report.tiny else {}
    full |= {"train --stage 1": 3500, "train --stage 2": 1200, "train --stage 3": 2800}
    for i, (name, most) in enumerate(full.items()):
        # each stage shows how many steps a second the next one will make; 20 s are for MVBench, 3 to load and to save
        seconds = (report.deadline - time.monotonic() - 20) * most / sum([*full.values()][i:]) - 3
        steps = 2 if report.tiny else max(1, min(most, int(rate * seconds)) // 20) * 20
        run_command(*name.split(), "--preset", preset, "--data", data, "--out", out, "--steps", steps,
                    "--log-every", min(20, steps))

        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        for stage, last in {row["stage"]: row for row in lines if row["stage"] not in done}.items():
            rate = 1000 / last["ms"]
            done.add(stage)
            report.row(stage=stage, steps=steps, loss=last["loss"] and f"{last['loss']:.3f}", ms=last["ms"],
                       **{"clips/s": last["clips_per_s"], "waiting for data": f"{last['waiting']:.0%}"})

    run_command("mvbench", "--ckpt", out / "stage3", "--data", data / "mvbench")
    summary = read_json(out / "stage3" / "mvbench" / "summary.json")
    report.row(stage="MVBench", questions=summary["average"]["asked"], right=f"{summary['average']['accuracy']:.1f} %",
               seconds=summary["seconds"])
