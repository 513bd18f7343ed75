"""Parts 2, 3 and 4 of bench.gpu: how fast a card trains and answers at the real size, and with how much memory.

Each part is a function of the Report to which it writes its rows. Weights are random and made on the card. What only a
card can tell is "not run: no CUDA device" elsewhere. Not here: whether the numbers are right (gpu_checks.py);
processes, time limits, the page (gpu.py).

    python -m bench.gpu --tiny --only 2,3,4 --out DIR
"""
import functools
import math
import os
import re
import shutil
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from bench import decoding, memory, mvbench_speed, train_step
from bench.gpu_checks import ON_GPU, Trainer, made_questions, pinned_batch, random_chat
from bench.train_step import CPU_ATTENTION, DEVICE, DTYPE, Step, our_model, step_config
from evaluation.batches import GROUP, evaluate
from evaluation.engine import Engine
from evaluation.predictions import Condition
from evaluation.protocol import Protocol
from infra.distributed import blocks_of
from lora import merge_lora
from weights.int8 import quantize_int8

GIB, NO_CUDA = memory.GIB, "not run: no CUDA device"
RECOMPUTE, INT8, COMPILE = "--grad-checkpoint vit,qformer,llm", "--llm-int8", "--compile"
# stage -> variant -> GiB of the first clip, of each further: python -m bench.memory, vicuna-7b, bf16; stage 1 has
# these from 16 clips on, before that AdamW's step takes more
COUNTED = {
    1: {"": (3.68, 0.201), RECOMPUTE: (3.55, 0.073)},
    2: {"": (19.99, 1.99), RECOMPUTE: (18.80, 0.13), INT8: (14.21, 1.98)},
    3: {"": (23.25, 4.43), RECOMPUTE: (19.83, 0.29), INT8: (17.41, 4.41)}}
LARGEST = {1: 64, 2: 16, 3: 8}                             # clips of a batch that keep a large card busy

# names of kernels, of which cuDNN has a flash kernel too, and of CUDA's calls; a copy to pinned memory does not wait
FLASH, ATTENTION = re.compile("flash|cudnn.*sdpa", re.I), re.compile("flash|fmha|sdpa|attention", re.I)
HOST_WAITS = re.compile(r"Synchronize|^cuda(Memcpy|Malloc|Free|HostAlloc)(_v\d+)?$|^Memcpy DtoH.*Pageable")

def clips_that_fit(stage, variant, gib):
    """By the count, on a card of this size, 1 GiB of which CUDA itself takes."""
    first, each = COUNTED[stage].get(variant, COUNTED[stage][""])
    return memory.clips_that_fit(gib, 1, first * GIB, each * GIB)

def real_step(stage, variant="", tiny=False):
    """The Step that is measured: the largest that fits into nine tenths of what is free, up to LARGEST. MemoryError if
    not even one clip fits."""
    if tiny:
        return Step(stage, "micro", batch=2, frames=2, text=12)
    gib = 0.9 * torch.cuda.mem_get_info()[0] / GIB
    clips = clips_that_fit(stage, "", gib) or clips_that_fit(stage, variant, gib)      # one batch for all, if it can be
    if not clips:
        raise MemoryError(f"vicuna-7b does not fit: {gib / 0.9:.1f} GiB are free")
    return Step(stage, "vicuna-7b", batch=min(LARGEST[stage], clips))

def real_size(report):
    """A step of each stage and variant, each with new weights; compiling, which may take minutes, comes last."""
    rate, operations = train_step.matmul_rate(), {}
    report.row(what=f"product of two large matrices in {DTYPE}, the rate that MFU refers to",
               result=f"{rate / 1e12:.3g} TFLOP/s")
    for variant in ("", INT8, RECOMPUTE, COMPILE):
        for stage in (3, 2, 1) if not report.tiny or not variant else (3,):
            if variant != INT8 or stage > 1:                               # stage 1 has no LLM
                report.attempt(f"stage {stage} {variant}", measure, stage, variant, rate, operations)

def measure(report, stage, variant, rate, operations):
    """Times one variant. rate: of a matrix product; operations: {stage: counted for a clip}, which this may fill."""
    # a new model
    step = real_step(stage, variant, report.tiny)
    cfg = step_config(step)
    cfg.vit.checkpoint_blocks = cfg.qformer.checkpoint_layers = cfg.llama.checkpoint_layers = variant == RECOMPUTE
    model = our_model(cfg, stage, dropout=True)
    if variant == INT8:
        quantize_int8(model.llama_model)
    for block in blocks_of(model) if variant == COMPILE else ():
        block.compile(backend="inductor" if ON_GPU else "eager")

    # the first steps make AdamW's moments, and compile
    trainer, batch = Trainer(model, "bf16" if ON_GPU else "fp32"), pinned_batch(step)
    train_once = functools.partial(trainer.step, batch)
    for _ in range(3):
        train_once()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    seconds = train_step.seconds_of(train_once, 0.01 if report.tiny else 2)
    peak = torch.cuda.max_memory_allocated() / GIB if ON_GPU else math.nan

    # operations: the plain step's, for recomputing is no progress; where that does not fit, int8's has the same
    is_first = stage not in operations and variant in ("", INT8)
    if is_first:
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            train_once()
        operations[stage] = counter.get_total_flops() / step.batch

    # its peak beside the count for vicuna-7b, and the batches that fit by the count
    flops, (first, each) = operations.get(stage, math.nan) * step.batch, COUNTED[stage].get(variant, COUNTED[stage][""])
    counted = first + (step.batch - 1) * each
    report.row(stage=stage, variant=variant or "plain", ms=f"{1000 * seconds:.1f}", MFU=f"{flops / seconds / rate:.0%}",
               **{"clips/s": f"{step.batch / seconds:.2f}", "TFLOP": f"{flops / 1e12:.3g}",
                  "peak GiB": f"{peak:.2f}" if ON_GPU else NO_CUDA, "counted GiB": f"{counted:.2f}",
                  "peak/counted": f"{peak / counted:.2f}" if ON_GPU else NO_CUDA, "clips for 24, 40, 80 GiB":
                  [clips_that_fit(stage, variant, gib) for gib in (24, 40, 80)], "size": step})

    # texts of unlike lengths, as real ones are
    if is_first:
        report_kernels(report, stage, functools.partial(trainer.step, pinned_batch(step, shortest=0.5)))

def report_kernels(report, stage, train_once):
    """Which attention runs, and what makes the host wait: by the profiler, and by PyTorch's warnings."""
    for _ in range(2):
        train_once()                                                       # memory for these shapes
    with torch.profiler.profile() as profile:                              # of CPU and card; waits for it at the end
        with torch.profiler.record_function("training step"):
            train_once()
    attention, kernels, waits = read_profile(profile.events())

    # a second witness: PyTorch warns of each call of its own that waits, at the line that made it
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("warn")
        train_once()
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
    lines = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message))

    # a profiler that is not allowed to watch the card sees no kernel, and no wait either
    blind = "the profiler saw no attention kernel" if ON_GPU else NO_CUDA
    flash = sum(n for name, n in kernels.items() if FLASH.search(name))
    report.row(stage=stage, attention=times(attention), **{
        "flash kernels": flash if kernels else blind, "attention kernels": times(kernels) if kernels else blind,
        "host waits, by the profiler": times(waits) if kernels else blind,
        "host waits, by PyTorch's warnings": times(lines) if ON_GPU else NO_CUDA})

def read_profile(events):
    """Events of a profiled "training step" -> operations of attention, its kernels, what made the host wait."""
    on_gpu = [e for e in events if e.device_type == DeviceType.CUDA]
    on_host = [e for e in events if e.device_type == DeviceType.CPU]
    step = next(e.time_range for e in on_host if e.name == "training step")
    inside = [e for e in on_host if step.start <= e.time_range.start <= step.end]
    return (Counter(e.name for e in inside if e.name.startswith("aten::_scaled_dot_product")),
            Counter(e.name for e in on_gpu if ATTENTION.search(e.name)),
            Counter(e.name for e in [*inside, *on_gpu] if HOST_WAITS.search(e.name)))

def times(counter):
    return [f"{count} {name[:90]}" for name, count in counter.most_common()] or "none"

# ------------------------------------------------------------------------------------------ part 3: beside transformers

def beside_transformers(report):
    """The step of bench.train_step on both sides: same weights, batch and losses, no dropout."""
    steps, ours = {}, {}
    for stage in (3,) if report.tiny else (3, 2, 1):
        for side in ("ours", "transformers"):
            report.attempt(f"stage {stage}, {side}", measure_side, side, stage, steps, ours)

def measure_side(report, side, stage, steps, ours):
    """Times a side. This fills steps: {stage: the Step of both sides}, and ours: {stage: seconds of our side}."""
    if stage not in steps:
        step = real_step(stage, "", report.tiny)
        steps[stage] = replace(step, batch=max(1, step.batch // 2))        # their padding takes more memory
    step = steps[stage]
    result = train_step.measure(side, step, 0.01 if report.tiny else 2)
    seconds = result["seconds"]
    if side == "ours":
        ours[stage] = seconds
    report.row(stage=stage, side=side, ms=f"{1000 * seconds:.1f}", MFU=f"{result['mfu']:.0%}",
               losses={name: f"{loss:.4f}" for name, loss in result["losses"].items()}, size=step,
               **{"clips/s": f"{step.batch / seconds:.2f}", "peak GiB": f"{result['peak'] / GIB:.2f}",
                  "times ours": f"{seconds / ours.get(stage, math.nan):.2f}"})

# --------------------------------------------------------------------------------------------------- part 4: MVBench

def mvbench_real_size(report):
    """Questions about one made video under many names. Random weights accept no draft of an answer, so each takes ten
    steps of the LLM; a trained LLM needs about two."""
    tiny, folder, protocol = report.tiny, Path(tempfile.mkdtemp()), Protocol(max_new_tokens=10)
    chat = random_chat("micro" if tiny else "vicuna-7b", DEVICE, DTYPE)    # model and tokenizers
    merge_lora(chat[0].llama_model)                                        # as mvbench.py does
    decoding.write_clip(folder / "clip.mp4", np.random.default_rng(0), 20 if tiny else 250)
    media = [folder / f"{i}.mp4" for i in range(4 if tiny else 400)]
    for path in media:
        path.symlink_to(folder / "clip.mp4")
    questions, few = made_questions(media), 2 if tiny else 10

    # loader processes hand clips over in shared memory, of which a container may have only 64 MB: each needs room for
    # the group it reads, two that are read and one that is in use
    cfg, batch = chat[0].cfg, 32 if not ON_GPU or torch.cuda.mem_get_info()[1] > 30 * GIB else 8
    group = GROUP * 4 * cfg.eval_frames * 3 * cfg.vit.img_size ** 2                            # bytes
    workers = 0 if tiny else min(8, os.cpu_count() // 2, shutil.disk_usage("/dev/shm").free // (4 * group))

    def report_rate(way, n, seconds, parts):
        report.row(size=f"{cfg.preset}, {cfg.eval_frames} frames", way=way, questions=n, **{
            "questions/s": f"{n / seconds:.2f}", "parts": parts, "minutes for 4,000": f"{4000 * seconds / n / 60:.1f}"})

    with torch.autocast(DEVICE, DTYPE, enabled=ON_GPU):
        _, seconds = mvbench_speed.ask_one_by_one(*chat, questions[:few], protocol)
        report_rate("answer_one", few, seconds, "-")

        # the first batch is asked twice, and not counted at first
        engine, condition = Engine(*chat, protocol), Condition(Path(tempfile.mkdtemp()))
        for part in (questions[:batch], questions):
            engine.seconds.clear()
            start = time.perf_counter()
            rows = sum((rows for _, rows in evaluate(engine, part, [condition], batch, workers)), [])
            seconds = time.perf_counter() - start

    # a video that cannot be read would be answered in no time
    if unread := [row["unread"] for row in rows if "unread" in row]:
        raise ValueError(f"{len(unread)} of {len(rows)} videos: {unread[0]}")
    report_rate(f"engine, batches of {batch}, {workers} workers", len(rows), seconds,
                {part: f"{s:.2f} s" for part, s in engine.seconds.items()})
