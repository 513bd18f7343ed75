"""Counted memory beside real memory; twins of transformers and peft beside our parts. pytest tests/test_bench.py"""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from videos import write_video

from bench import decoding, memory, mvbench_speed, reference, train_step
from model import PRESETS, Config
from video import load_eval_clip

ROOT = Path(__file__).resolve().parent.parent
REAL = """
import ctypes, sys
from dataclasses import replace
import torch
import process
import test_bench
from bench import train_step
from model import VideoChat2, set_trainable

def two_steps(cfg, step):
    model = VideoChat2(cfg, step.stage).train()
    set_trainable(model, step.stage)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    batch = train_step.random_batch(cfg, step, shortest=1)
    for _ in range(2):
        sum(train_step.step_losses(model, batch).values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

torch.set_num_threads(2)
cfg, step = test_bench.sizes(int(sys.argv[1]))
small = replace(cfg, vit=replace(cfg.vit, depth=1), llama=replace(cfg.llama, depth=1, vocab_size=100))
two_steps(small, replace(step, batch=1, text=20))                          # what PyTorch loads when it is first needed
ctypes.CDLL(None).malloc_trim(0)                                           # give back what that has freed
before = process.memory_of("VmRSS")
two_steps(cfg, step)
print((process.memory_of("VmHWM") - before) * 2**20)
"""

def sizes(stage):
    """A model of a middling size, whose activations outweigh what a process has anyway."""
    cfg = PRESETS["micro"]()
    cfg = replace(
        cfg, vit=replace(cfg.vit, img_size=128, patch_size=16, width=256, depth=6, heads=4),
        qformer=replace(cfg.qformer, vocab_size=500, width=128, depth=4, heads=4, ffn=512, vision_width=256,
                        embed_dim=128),
        llama=replace(cfg.llama, vocab_size=4000, width=384, depth=8, heads=6, kv_heads=6, ffn=1024))
    return cfg, memory.Options(stage, batch=6, frames=4, text=200, dtype="fp32")

@pytest.mark.parametrize("stage", [2, 3])
def test_counted_memory_is_what_a_real_step_takes(stage):
    """In float32 on the CPU, whose attention kernel keeps what a GPU's keeps: within a tenth."""
    counted = memory.counted_step(*sizes(stage))
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    result = subprocess.run([sys.executable, "-c", REAL, str(stage)], capture_output=True, text=True, env=env,
                            check=True)
    real = float(result.stdout)
    assert real > 4e8 and counted["peak"] == pytest.approx(real, rel=0.1), (counted, real)

def test_the_largest_batch_fits_and_one_more_does_not(capsys):
    """The count of each further clip leads to a batch whose own count is within the GPU's memory."""
    memory.main(["--preset", "micro", "--stage", "1", "--batch", "2", "--gpu", "1.1"])
    printed = capsys.readouterr().out
    clips = int(printed.split("has room for ")[1].split()[0])
    step = memory.Options(stage=1, preset="micro", batch=clips)
    room, cfg = 0.1 * 2**30, train_step.step_config(step)
    assert clips > 10 and memory.counted_step(cfg, step)["peak"] == pytest.approx(room, rel=0.05)

@pytest.mark.parametrize("preset", ["scaled", "micro"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_twins_of_transformers_and_peft_give_the_same_losses(stage, preset):
    """VideoMAE's ViT, InstructBlipVideo's Q-Former, LlamaForCausalLM and peft's LoRA, filled with our weights."""
    step = train_step.Step(stage, preset, batch=3, frames=2, text=24)
    cfg = train_step.step_config(step)
    cfg = replace(cfg, vit=replace(cfg.vit, depth=2), qformer=replace(cfg.qformer, depth=2),
                  llama=replace(cfg.llama, depth=2))
    model, batch = train_step.our_model(cfg, stage), train_step.random_batch(cfg, step)
    ours = train_step.step_losses(model, batch, torch.Generator().manual_seed(0))
    twins = reference.twin_losses(reference.use_twins(model), batch, torch.Generator().manual_seed(0))
    assert {n: loss.item() for n, loss in ours.items()} == pytest.approx({n: x.item() for n, x in twins.items()}, 1e-5)

def test_a_twin_in_bf16_keeps_its_rotary_angles_in_float32():
    """As from_pretrained makes it; rounded to bf16, the angles of later tokens would be others."""
    model = train_step.our_model(train_step.step_config(train_step.Step(2, "micro")), 2, "cpu", torch.bfloat16)
    twin = reference.LlamaTwin(model).twin
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16} and torch.get_default_dtype() == torch.float32
    assert twin.model.rotary_emb.inv_freq.dtype == torch.float32

def test_a_training_step_prints_both_sides(capsys):
    train_step.main(["--preset", "micro", "--stage", "1", "--batch", "2"])
    printed = capsys.readouterr().out
    assert "micro, stage 1: 2 clips, 4 frames, 32 text tokens" in printed and printed.count("MFU") == 2

def test_questions_one_by_one_have_the_answers_of_the_batched_engine(ckpt, tree, capsys):
    """One question at a time, by our LLM and by transformers' with peft's LoRA."""
    mvbench_speed.main(["--ckpt", str(ckpt), "--data", str(tree), "--limit", "1", "--workers", "0"])
    printed = capsys.readouterr().out
    assert "20 questions; mvbench.py" in printed and printed.count(", 0 answers differ") == 2

def test_the_notebook_s_way_reads_the_same_pixels(tmp_path):
    path, cfg = write_video(tmp_path / "a.mp4", width=320, height=256, frames=30), Config()
    difference = (decoding.read_as_notebook(path, cfg) - load_eval_clip(path, cfg)).abs()      # one level is 0.015
    assert difference.shape == (16, 3, 224, 224) and difference.max() < 0.05

def test_decoding_prints_what_it_measures(capsys):
    decoding.main(["--clips", "1", "--workers", "1"])
    assert capsys.readouterr().out.count("clips/s") == 4

def test_a_missing_library_is_named_with_its_cure():
    with pytest.raises(ValueError, match="No module named 'transformerz'.*requirements-dev.txt"):
        reference.import_dev("transformerz")
