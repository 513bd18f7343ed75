"""Counted memory against real memory, and the index's costs. Run: pytest tests/test_bench.py"""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import speed, train_step
from model import PRESETS

ROOT = Path(__file__).resolve().parent.parent
REAL = """
import ctypes, sys
from dataclasses import replace
import torch
import test_bench
from bench import speed
from model import VideoChat2, set_trainable
from train import TrainConfig
from training.optim import make_optimizers

def two_steps(cfg, step):
    model = VideoChat2(cfg, step.stage).train()
    set_trainable(model, step.stage)
    optimizers = make_optimizers(model, TrainConfig(stage=step.stage))
    batch = speed.empty_batch(cfg, step)
    for _ in range(2):
        speed.loss_of(model, step, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

torch.set_num_threads(2)
cfg, step = test_bench.sizes(int(sys.argv[1]))
small = replace(cfg, vit=replace(cfg.vit, depth=1), llama=replace(cfg.llama, depth=1, vocab_size=100))
two_steps(small, replace(step, batch=1, text=20, targets=10))              # what PyTorch loads when it is first needed
ctypes.CDLL(None).malloc_trim(0)                                           # give back what that has freed
before = speed.memory_of("VmRSS")
two_steps(cfg, step)
print((speed.memory_of("VmHWM") - before) * 2**20)
"""


def sizes(stage):
    """A model of a middling size, whose activations outweigh what a process has anyway."""
    cfg = PRESETS["micro"]()
    cfg = replace(
        cfg, vit=replace(cfg.vit, img_size=128, patch_size=16, width=256, depth=6, heads=4),
        qformer=replace(cfg.qformer, vocab_size=500, width=128, depth=4, heads=4, ffn=512, vision_width=256,
                        embed_dim=128),
        llama=replace(cfg.llama, vocab_size=4000, width=384, depth=8, heads=6, kv_heads=6, ffn=1024))
    return cfg, speed.Step(stage, batch=6, frames=4, text=200, targets=100, dtype=torch.float32)


@pytest.mark.parametrize("stage", [2, 3])
def test_counted_memory_is_what_a_real_step_takes(stage):
    """In float32 on the CPU, whose attention kernel keeps what a GPU's keeps: within a tenth."""
    counted = speed.counted_step(*sizes(stage))
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    result = subprocess.run([sys.executable, "-c", REAL, str(stage)], capture_output=True, text=True, env=env,
                            check=True)
    real = float(result.stdout)
    assert real > 4e8 and counted["peak"] == pytest.approx(real, rel=0.1), (counted, real)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_reference_of_transformers_computes_the_same_losses(stage):
    """VideoMAE's ViT, InstructBlipVideo's Q-Former, LlamaForCausalLM and peft's LoRA, filled with our weights."""
    cfg = train_step.sizes("scaled", 2)
    cfg = replace(cfg, vit=replace(cfg.vit, depth=2), qformer=replace(cfg.qformer, depth=2),
                  llama=replace(cfg.llama, depth=2))
    model = train_step.ours(cfg, stage, torch.float32, "cpu")
    batch = train_step.made_batch(cfg, stage, 3, 2, 24, "cpu")
    negatives = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
    one = train_step.losses_of(model, batch, negatives)
    other = train_step.Reference(model)(batch, negatives)
    assert {n: loss.item() for n, loss in one.items()} == pytest.approx({n: x.item() for n, x in other.items()}, 1e-5)


def test_data_and_growth_print_what_they_measure(capsys):
    speed.main(["data", "--clips", "1", "--rounds", "1", "--workers", "0"])
    said = capsys.readouterr().out
    assert said.count("clips/s") == 4 and "times as fast as the official way" in said
