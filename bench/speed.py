"""What evaluation and training need, measured or counted.

    mvbench   questions a second by mvbench.py, and by the plain loop of plain_mvbench.py, with the same weights
    memory    the memory of a training step at real size, without a GPU: weights, gradients, optimizer, activations
    index     how long annotation files of millions of entries take, and how much memory
    train, data, growth     how fast training is: bench_train.py

memory runs one real step of the stage on tensors that have shapes but no values, and counts the bytes that live at each
moment; nothing is estimated from formulas. What a GPU does otherwise than a CPU is put in its place: the attention
kernel keeps queries, keys, values and output, LayerNorm is computed in float32.

Run:    python bench.py mvbench --ckpt runs/toy/stage3
        python bench.py memory --preset vicuna-7b --stage 3 --batch 4
        python bench.py index --entries 5000000
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import weakref
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from bench import reference, train_step
from data import Sampler, VideoTextDataset
from evaluation.engine import letter_ids
from evaluation.tasks import TASKS, load_questions
from infra.distributed import Distributed
from infra.files import atomic_folder, read_json
from llama import Llama, LlamaConfig
from model import DTYPES, PRESETS, Config, VideoChat2, set_trainable
from prompt import ANSWER_PROMPT, QUESTION_PROMPT, SYSTEM, VIDEO
from qformer import QFormerConfig
from tokenizer import SentencePiece, train_sentencepiece
from training.annotations import AnnotationFile, Source, load_corpus
from training.optim import make_optimizers
from training.recipes import TrainConfig
from vit_video import VisionTransformer, ViTConfig
from weights.checkpoint import is_frozen_llm, load_checkpoint, save_checkpoint
from weights.hf_llama import inspect_llm, write_llm
from weights.int8 import quantize_int8

GIB = 2 ** 30

# -------------------------------------------------------------------------------------------------------------- mvbench

SCALED = Config(                        # a vicuna-7b at a hundredth of the cost, its parts in like proportions
    preset="scaled-down 7B", vit=ViTConfig(img_size=112, patch_size=16, width=256, depth=6, heads=4, frames=4),
    qformer=QFormerConfig(vocab_size=30523, width=96, depth=12, heads=3, ffn=384, vision_width=256),
    llama=LlamaConfig(vocab_size=0, width=512, depth=8, heads=8, kv_heads=8, ffn=1376))


def mvbench(args):
    """Asks the same questions in every way, and prints questions a second, where the time goes, and what differs."""
    with tempfile.TemporaryDirectory() as folder:
        ckpt, data, limit = args.ckpt, args.data, args.limit
        if not ckpt:
            ckpt, data, limit = scaled_down(Path(folder), limit or 3)
        questions = load_questions(data, limit=limit)
        loaded = load_checkpoint(ckpt, device="cuda" if torch.cuda.is_available() else "cpu")
        print(f"{loaded[0].cfg.preset}: {len(questions)} questions, {loaded[0].cfg.eval_frames} frames", flush=True)
        plain = {"plain loop": reference.own_llm(loaded[0], loaded[2])}
        try:
            plain["plain loop over transformers and peft"] = reference.transformers_llm(loaded[0], loaded[2], ckpt)
        except ImportError:
            print("(transformers and peft are not installed: no loop over them)")
        found, rates = {}, {}
        for name, generate in plain.items():
            reference.answers(*loaded, questions[:3], generate)        # warm
            found[name], seconds = reference.answers(*loaded, questions, generate)
            rates[name] = told_rate(name, len(questions), seconds)
        for processes in sorted({1, args.processes}):
            name = f"mvbench.py, {processes} process{'es' * (processes > 1)}"
            found[name], seconds = by_mvbench(ckpt, data, limit, args.batch, processes, Path(folder) / str(processes))
            rates[name] = told_rate(name, len(questions), seconds)
        best = max(rates, key=rates.get)
        for name in plain:
            differ = sum(a != b for a, b in zip(found[best], found[name], strict=True))
            print(f"{best}: {rates[best] / rates[name]:.1f} times the {name}; {differ} of {len(questions)} answers "
                  "differ")


def told_rate(name, n, seconds):
    """Prints a line -> questions per second, the loading of the model not counted."""
    seconds = {part: s for part, s in seconds.items() if part not in ("loading the model", "in all")}
    rate = n / sum(seconds.values())
    parts = ", ".join(f"{part} {s:.1f} s" for part, s in seconds.items())
    print(f"{name:40}{rate:8.1f} questions/s   {parts}", flush=True)
    return rate


def by_mvbench(ckpt, data, limit, batch, processes, out):
    """The command, in processes of their own -> (the predictions, seconds of each part)."""
    begin = ["-m", "torch.distributed.run", "--nproc_per_node", processes] if processes > 1 else []
    cuda = torch.cuda.is_available()
    command = [sys.executable, *begin, Path(__file__).parent.with_name("mvbench.py"), "--ckpt", ckpt, "--data", data, "--out",
               out, "--limit", limit, "--batch", batch, "--device", "cuda" if cuda else "cpu", "--dtype",
               "bf16" if cuda else "fp32", *(["--workers", 0] if processes > 1 else [])]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"mvbench.py: {done.stderr[-2000:]}")
    (summary,), (rows,) = out.glob("summary*.json"), out.glob("predictions*.jsonl")
    return [json.loads(line)["prediction"] for line in rows.read_text().splitlines()], read_json(summary)["seconds"]


def scaled_down(folder, limit):
    """Makes a checkpoint with random weights, and a benchmark of H.264 videos, 10 seconds of 480p each, `limit`
    questions a task -> (checkpoint, benchmark, 0).

    The weights are bent until an answer is a letter and "Took the box.": as long as those of trained ones are.
    """
    texts = [f"{SYSTEM} ###Human: <Video></Video> Question: {q} Options: (A) {' '.join(OPTIONS)} {QUESTION_PROMPT} "
             f"###Assistant: {ANSWER_PROMPT}" for q in QUESTIONS]
    train_sentencepiece(texts * 50, folder / "tokenizer.model", 400)
    tok = SentencePiece(folder / "tokenizer.model")
    cfg = replace(SCALED, llama=replace(SCALED.llama, vocab_size=tok.vocab_size))
    torch.manual_seed(0)
    llm = Llama(cfg.llama)
    with torch.no_grad():
        bend(llm, tok)
    with atomic_folder(folder / "llm") as made:
        write_llm(llm, folder / "tokenizer.model", made)
    model = VideoChat2(cfg, 3, defer_llm=True)
    with atomic_folder(folder / "stage3") as made:
        save_checkpoint(model.state_dict(), 3, cfg, made, Path(__file__).parent.parent / "assets" / "bert_vocab.txt",
                         {"path": "../llm", "fingerprint": inspect_llm(folder / "llm")[1]})
    write_benchmark(folder / "MVBench", limit)
    return folder / "stage3", folder / "MVBench", 0


def bend(llm, tok):
    """Makes the LLM say, behind the bracket, a letter, then ") Took the box." and </s>, each word by the one before."""
    words, heads = llm.model["embed_tokens"].weight, llm.lm_head.weight                        # (V, D), (V, D)
    words *= 50                                                            # the stream is then mostly the last word
    letters, text = letter_ids(tok), tok.encode("(A) Took the box.")
    text = text[text.index(letters[0]) + 1:]
    for before, after in pairwise([tok.encode(ANSWER_PROMPT)[-1:], letters, *([i] for i in text), [tok.eos_id]]):
        heads[after] = 0.1 * heads[after] + 0.02 * words[before].sum(0)


OPTIONS = ("Put down the cup/glass/bottle.", "Tidied up the blanket.", "Took the box.", "Ate the medicine.",
           "Not sure.")
QUESTIONS = ("What happened after the person took the food?",
             "What direction is the cyan sphere moving within the video?",
             "During which part of the video does the action 'person opens a window' occur?")


def write_benchmark(root, limit):
    """MVBench's layout with `limit` questions a task, each about a video of its own."""
    (root / "json").mkdir(parents=True)
    video = encoded_video(root / "video.mp4")
    for t, task in enumerate(TASKS):
        entries = []
        for i in range(limit):
            name = f"{task.short}{i}.mp4"
            (root / "video" / task.folder).mkdir(parents=True, exist_ok=True)
            os.link(video, root / "video" / task.folder / name)
            options = [OPTIONS[(i + t + j) % 5] for j in range(4)]
            entries.append({"video": name, "question": QUESTIONS[(i + t) % 3], "candidates": options,
                            "answer": options[i % 4], "start": 1.0, "end": 9.0})
        (root / "json" / f"{task.file}.json").write_text(json.dumps(entries))


def encoded_video(path):
    """10 seconds of H.264, 854 x 480, 25 frames a second: a moving gradient with noise."""
    import av  # for the development's requirements alone
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height = 854, 480
        for i in range(250):
            ramp = (np.add.outer(np.arange(480), np.arange(854)) + 5 * i) % 256
            frame = (ramp[..., None] + rng.integers(0, 4, (480, 854, 3))).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


# --------------------------------------------------------------------------------------------------------------- memory


class LiveBytes(TorchDispatchMode):
    """Within it, every operation's results are counted from their birth until they are freed."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for t in tree_leaves(results):
            if torch.is_tensor(t):
                self.note(t)
        return results

    def note(self, t):
        storage = t.untyped_storage()
        if storage._cdata in self.known:
            return
        n = -(-storage.nbytes() // 512) * 512                  # the CUDA allocator's smallest piece
        self.known[storage._cdata] = n
        self.now += n
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key):
        self.now -= self.known.pop(key)


class FlashAttention(torch.autograd.Function):
    """What a fused attention kernel keeps for the backward pass, without its numbers."""

    @staticmethod
    def forward(ctx, q, k, v):                                 # (B, nh, S, hs)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def as_on_a_gpu(dtype):
    """Patches for the time of the count: what differs on a GPU, and what would have to look at values."""
    layer_norm = F.layer_norm

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        return FlashAttention.apply(q.to(dtype), k.to(dtype), v.to(dtype))

    return [
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        mock.patch.object(F, "layer_norm", lambda x, *rest: layer_norm(x.float(), *rest)),     # autocast does on CUDA
        mock.patch.object(VisionTransformer, "positions", lambda self, T, device: torch.empty(
            T, self.cfg.grid ** 2, self.cfg.width)),
    ]


@dataclass
class Step:
    """What a training step is of."""
    stage: int
    batch: int
    frames: int
    text: int              # tokens beside the video's; in stage 1 of the caption
    targets: int           # of them with a loss
    dtype: torch.dtype
    int8: bool = False


def counted_step(cfg, step):
    """{name: bytes} of one training step as on one GPU, the second one: the optimizer has its moments by then."""
    with torch.device("meta"):
        model = VideoChat2(cfg, step.stage)
        if step.int8 and step.stage > 1:
            quantize_int8(model.llama_model)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for patch in as_on_a_gpu(step.dtype):
            stack.enter_context(patch)
        live = LiveBytes()
        model.to_empty(device="cpu").train()
        set_trainable(model, step.stage)
        for name, p in model.named_parameters():
            if is_frozen_llm(name) and p.is_floating_point() and not name.endswith(".scale"):
                p.data = p.data.to(step.dtype)
            live.note(p)
        found = {"frozen weights": sum(size_of(p) for p in model.parameters() if not p.requires_grad),
                 "trained weights": sum(size_of(p) for p in model.parameters() if p.requires_grad)}
        optimizers = make_optimizers(model, TrainConfig(stage=step.stage))
        batch = empty_batch(cfg, step)
        for t in filter(torch.is_tensor, batch.values()):
            live.note(t)
        begun = live.now
        stack.enter_context(live)
        for _ in range(2):
            before = live.now
            live.peak = 0
            with torch.autocast("cpu", torch.bfloat16, enabled=step.dtype != torch.float32):
                loss = loss_of(model, step, batch)
            found["activations"] = live.now - before
            loss.backward()
            found["gradients"] = sum(size_of(p.grad) for p in model.parameters() if p.grad is not None)
            del loss
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        found["optimizer"] = live.now - begun
        found["peak"] = live.peak
    return found


def size_of(t):
    return t.numel() * t.element_size()


def empty_batch(cfg, step):
    """A batch of the step's shapes."""
    n_video = cfg.n_query + cfg.n_extra
    size = cfg.vit.img_size
    batch = {"video": torch.empty(step.batch, step.frames, 3, size, size)}
    ids = torch.zeros(step.batch, step.text + (n_video if step.stage > 1 else 0), dtype=torch.long)
    batch |= {"ids": ids, "labels": torch.zeros_like(ids), "mask": torch.ones_like(ids)}
    if step.stage == 1:
        return batch | {"idx": torch.arange(step.batch)}
    ids[:, 1:1 + n_video] = VIDEO
    batch |= {"lengths": [ids.shape[1]] * step.batch, "targets": torch.arange(step.batch * step.targets)}
    if step.stage == 3:
        instruction = torch.zeros(step.batch, 64, dtype=torch.long)
        batch |= {"instruction_ids": instruction, "instruction_mask": torch.ones_like(instruction)}
    return batch


def loss_of(model, step, batch):
    if step.stage > 1:
        return model.lm_loss(batch)
    others = torch.arange(step.batch).roll(1)
    with mock.patch("qformer.hard_negatives", return_value=(others, others)):
        return sum(model.stage1_losses(batch, 0, Distributed()).values())


def memory(args):
    cfg = PRESETS[args.preset]()
    if not cfg.llama.vocab_size:                               # the toy's is known after its tokenizer is made
        cfg.llama.vocab_size = cfg.qformer.vocab_size = 1000
    frames = args.frames or (cfg.align_frames if args.stage == 1 else cfg.train_frames)
    text = args.text or {1: cfg.align_text, 2: 64, 3: cfg.max_text}[args.stage]
    step = Step(args.stage, args.batch, frames, text, min(args.targets or text // 2, text), DTYPES[args.dtype],
                args.llm_int8)
    found = counted_step(cfg, step)
    one = counted_step(cfg, replace(step, batch=args.batch + 1))
    print(f"{args.preset}, stage {args.stage}: {args.batch} clips of {frames} frames, {text} tokens of text, "
          f"{args.dtype}{', LLM in 8 bits' * args.llm_int8}; AdamW, no recomputation")
    for name in ("frozen weights", "trained weights", "gradients", "optimizer", "activations"):
        print(f"  {name:28} {found[name] / GIB:8.2f} GiB")
    print(f"  {'peak within the step':28} {found['peak'] / GIB:8.2f} GiB\n"
          f"  {'each further clip':28} {(one['peak'] - found['peak']) / GIB:8.2f} GiB\n"
          "The CUDA context and its libraries take 0.5 to 1 GiB more, and the allocator some percent.")


# ---------------------------------------------------------------------------------------------------------------- index


def index(args):
    """Generates an annotation file, indexes it in a process of its own, and opens it in workers."""
    with tempfile.TemporaryDirectory(dir=args.folder or None) as folder:
        path = Path(folder) / "captions.json"
        write_captions(path, args.entries)
        print(f"{args.entries:,} captions, {path.stat().st_size / 2**20:,.0f} MiB", flush=True)
        seconds, grown = in_a_process(open_annotations, path)
        print(f"  index made     {seconds:9.2f} s, {args.entries / seconds:,.0f} entries per second; the process grew "
              f"by {grown:,.0f} MiB; {os.path.getsize(f'{path}.index') / 2**20:,.0f} MiB on disk", flush=True)
        seconds, grown = in_a_process(open_annotations, path)
        print(f"  opened again   {seconds:9.4f} s, the process grew by {grown:,.1f} MiB")
        for workers in (1, 4):
            added, speed = in_a_process(read_in_workers, path, workers)
            print(f"  {workers} worker(s)    {added:9.1f} MiB added by each after 20,000 entries; {speed:,.0f} entries "
                  "per second in all")
        seconds, grown = in_a_process(first_batches, path)
        print(f"  first batch    {seconds:9.2f} s, in an epoch's random order, by batches of like length; the process "
              f"grew by {grown:,.0f} MiB")


def write_captions(path, n):
    words = "a man in a red shirt walks slowly across the wet street while two dogs play near the old house".split()
    with open(path, "w") as f:
        for i in tqdm(range(n), desc="writing", unit="entry", unit_scale=True, leave=False,
                      disable=not sys.stderr.isatty()):
            text = " ".join(words[j] for j in range(i % 7, 7 + i % 13))
            f.write(("," if i else "[") + json.dumps({"video": f"{i // 1000:06d}/{i:09d}.mp4", "caption": text}))
        f.write("]")


def in_a_process(measure, *args):
    """What measure(*args) returns in a fresh process, so that its memory is its own."""
    with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *args).result()


def open_annotations(path):
    """-> (seconds, MiB that the process grew by at its largest)."""
    before, begun = memory_of(), time.time()
    entries = AnnotationFile(Source(str(path), media="video", media_key="video"))
    assert entries[len(entries) - 1]["caption"]
    return time.time() - begun, memory_of() - before


def memory_of(key="VmHWM"):
    """MiB of this process, at its largest or now (VmRSS). subtle: ru_maxrss would begin with the parent's memory."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def first_batches(path):
    """Seconds until the sampler has drawn an epoch's order, and MiB that it takes."""
    corpus = [{"anno": str(path), "media": "video"}]
    before, begun = memory_of(), time.time()
    dataset = VideoTextDataset(load_corpus(corpus), 4, None)
    next(iter(Sampler(dataset, 2048)))
    return time.time() - begun, memory_of() - before


def read_in_workers(path, workers):
    """-> (MiB that each worker adds, entries per second of all)."""
    entries = AnnotationFile(Source(str(path), media="video", media_key="video"))
    context = torch.multiprocessing.get_context("fork")
    results, begun = context.SimpleQueue(), time.time()
    processes = [context.Process(target=read_some, args=(entries, seed, results)) for seed in range(workers)]
    for process in processes:
        process.start()
    added = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return max(added), workers * 20_000 / (time.time() - begun)


def read_some(entries, seed, results):
    before = own_memory()
    for i in torch.randint(len(entries), (20_000,), generator=torch.Generator().manual_seed(seed)).tolist():
        assert entries[i]["caption"]
    results.put((own_memory() - before) / 1024)


def own_memory():
    """KiB that are this process's alone: what it shares with its parent, or with the page cache, costs nothing."""
    rows = dict(line.split(":") for line in open("/proc/self/smaps_rollup") if ":" in line and "kB" in line)
    return sum(int(rows[key].split()[0]) for key in ("Private_Dirty", "Private_Clean"))


# --------------------------------------------------------------------------------------------------------- command line


def parse(argv=None):
    p = argparse.ArgumentParser(prog="bench.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True, metavar="mvbench|memory|index|train|data|growth")
    e = commands.add_parser("mvbench", help="questions a second, against a plain loop")
    e.add_argument("--ckpt", default="", help="checkpoint (default: a scaled-down 7B shape with random weights)")
    e.add_argument("--data", default="data/toy/mvbench",
                   help="with --ckpt: MVBench folder (default %(default)s); without, videos are made")
    e.add_argument("--limit", type=int, default=0, help="questions of each task (default: all; without --ckpt 3)")
    e.add_argument("--batch", type=int, default=32, help="(default %(default)s)")
    e.add_argument("--processes", type=int, default=2, help="for mvbench.py in several processes (default %(default)s)")
    m = commands.add_parser("memory", help="what one training step needs, counted without a GPU")
    m.add_argument("--preset", default="vicuna-7b", choices=tuple(PRESETS), help="(default %(default)s)")
    m.add_argument("--stage", type=int, choices=(1, 2, 3), required=True)
    m.add_argument("--batch", type=int, default=4, help="clips per step (default %(default)s)")
    m.add_argument("--frames", type=int, default=0, help="of a clip (default: the preset's)")
    m.add_argument("--text", type=int, default=0, help="tokens beside the video's (default 32, 64 and 512)")
    m.add_argument("--targets", type=int, default=0, help="tokens with a loss (default: half of the text)")
    m.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="(default %(default)s)")
    m.add_argument("--llm-int8", action="store_true", help="the frozen LLM in 8 bits")
    i = commands.add_parser("index", help="annotation files of millions of entries")
    i.add_argument("--entries", type=int, default=5_000_000, help="(default 5,000,000)")
    i.add_argument("--folder", default="", help="where the file is written and deleted again (default: the system's)")
    t = commands.add_parser("train", help="a step of every stage, against the same of transformers and peft")
    t.add_argument("--stage", type=int, choices=(1, 2, 3), default=0, help="(default: all)")
    t.add_argument("--steps", type=int, default=5, help="timed in each process (default %(default)s)")
    t.add_argument("--compile", action="store_true", help="ours with torch.compile, too")
    t.add_argument("--shortest", type=float, default=0.25,
                   help="the shortest text, as a share of the longest; between them they are drawn evenly (default "
                        "%(default)s, which is denser than the toy's stage 3; 1: no padding)")
    t.add_argument("--rounds", type=int, default=2, help="processes of each side, in turn (default %(default)s)")
    d = commands.add_parser("data", help="decoded clips a second, against the official way")
    d.add_argument("--clips", type=int, default=16, help="in a round (default %(default)s)")
    d.add_argument("--rounds", type=int, default=3, help="(default %(default)s)")
    d.add_argument("--workers", type=int, default=2, help="(default %(default)s)")
    g = commands.add_parser("growth", help="how a step's cost grows with batch, frames and text")
    for each in (t, g):
        each.add_argument("--preset", default="", help="(default: vicuna-7b on a GPU, else a scaled-down one)")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    {"mvbench": mvbench, "memory": memory, "index": index, "train": train_step.train, "data": train_step.data,
     "growth": train_step.growth}[args.command](args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    except (ValueError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)
