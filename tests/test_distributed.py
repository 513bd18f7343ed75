"""Two gloo processes against one with the joint batch: losses and gradients, DDP and FSDP2, with accumulation; what one
layout has written, the other reads.

Run: pytest tests/test_distributed.py
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from stop_at import without_dropout
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train
from infra import distributed, files
from model import PRESETS, VideoChat2, set_trainable
from prompt import VIDEO, add_packing
from toy import pretrain
from training import optim, resume

ROOT = Path(__file__).resolve().parent.parent

def torchrun(script, *arguments, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), str(script)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

# ---- one step, by the parts that train.fit is made of

def batch_of(stage, size=8):
    """A joint batch without a loader. Rows have unlike numbers of words."""
    g = torch.Generator().manual_seed(stage)
    batch = {"video": torch.randn(size, 4, 3, 64, 64, generator=g), "idx": torch.arange(size), "bad": [], "paths": []}
    ids = torch.randint(5, 60, (size, 16), generator=g)
    length = torch.randint(11, 17, (size,), generator=g)
    mask = (torch.arange(16) < length[:, None]).long()
    if stage == 1:
        return batch | {"ids": ids * mask, "mask": mask}
    ids[:, 1:9] = VIDEO
    return batch | {"ids": ids, "mask": mask, "labels": ids.masked_fill((mask == 0) | (torch.arange(16) < 9), -100)}

def model_of(stage):
    config = without_dropout()
    config.llama.vocab_size = config.qformer.vocab_size = 64
    torch.manual_seed(0)
    model = VideoChat2(config, stage)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "temp_embed" in name:                  # they start at zero
                p.normal_(std=0.1)
    set_trainable(model, stage)
    return model.train()

def one_step(stage, dist, shard=False, accumulate=1, negatives=False):
    """-> ({loss: of the joint batch}, {parameter: whole gradient}), as train.fit comes by them."""
    model, cfg = model_of(stage), train.parse(["--stage", str(stage), "--grad-accum", str(accumulate)])[0]
    generator = torch.Generator().manual_seed(3)

    def loss(batch, done):
        if stage == 1:
            return model.stage1_losses(batch, 63, dist, generator, global_negatives=negatives)
        return {"lm": model.lm_loss(batch)}

    forward = distributed.wrap_model(model, loss, dist, shard, find_unused=stage == 3)
    whole = batch_of(stage)
    size = len(whole["idx"]) // accumulate
    parts = [{k: dist.local_rows(v[i * size:(i + 1) * size]) if torch.is_tensor(v) else v for k, v in whole.items()}
             for i in range(accumulate)]
    parts = [add_packing(batch) if "labels" in batch else batch for batch in parts]
    (words,) = dist.all_reduce_sum([sum(map(train.count_targets, parts))])
    job = train.Stage("", None, model, None, None, loss, None)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = train.forward_backward(job, forward, parts, words, 0, scaler, cfg, dist)
    losses = {name: loss.item() for name, loss in losses.items()}
    losses = dict(zip(losses, (total / dist.size for total in dist.all_reduce_sum(losses.values())), strict=True))
    norm = distributed.full_tensor(nn.utils.clip_grad_norm_(model.parameters(), 1e9))
    grads = {name: distributed.full_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return losses | {"norm": norm.item()}, grads

@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_never_waits_for_what_a_device_has_computed(stage, monkeypatch):
    """On PyTorch's meta device, whose tensors have no values: whoever asked for one would get an error."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)      # does not know meta
    model, batch = model_of(stage).to("meta"), batch_of(stage)
    batch = train.to_device(add_packing(batch) if stage > 1 else batch, "meta")
    dist, generator = distributed.Distributed(), torch.Generator()
    losses = model.stage1_losses(batch, 63, dist, generator) if stage == 1 else {"lm": model.lm_loss(batch)}
    sum(losses.values()).backward()
    optimizers = optim.make_optimizers(model, train.parse(["--stage", str(stage)])[0])
    norm = optim.clip_gradients(model, optimizers, torch.amp.GradScaler("cpu", enabled=False), 1.0)
    assert norm.is_meta and all(p.grad is None or p.grad.is_meta for p in model.parameters())
    if stage > 1:
        with pytest.raises(RuntimeError):                                     # without what its collate knew, it asks
            model.lm_loss({name: t for name, t in batch.items() if name not in ("lengths", "targets")})

class Attentions(TorchDispatchMode):
    """Notes the attention kernels that are called, and whether with a mask."""
    def __init__(self):
        super().__init__()
        self.kernels, self.masked = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func) and "backward" not in str(func):
            self.kernels.append(str(func))
            self.masked += (kwargs or {}).get("attn_mask") is not None
        assert "bmm" not in str(func)                                         # attention without a kernel
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize("stage", [2, 3])
def test_attention_takes_the_flash_kernel(stage):
    """Without a mask, which a GPU's flash kernel does not take, and although the texts differ in length."""
    model, batch = model_of(stage), batch_of(stage)
    with Attentions() as seen:
        model.lm_loss(batch).backward()
    vit, qformer, llama = model.cfg.vit.depth, model.cfg.qformer, model.cfg.llama.depth
    assert len(seen.kernels) == vit + qformer.depth + qformer.depth // qformer.cross_every + llama * len(batch["ids"])
    assert all("flash" in name for name in seen.kernels) and seen.masked == 0

if __name__ == "__main__":                                                # under torchrun: all cases, in one go
    dist = distributed.init_distributed("cpu")
    found = {f"{stage} {shard} {accumulate}": one_step(stage, dist, shard, accumulate, negatives=True)
             for stage in (1, 2, 3) for shard in (False, True) for accumulate in (1, 2)}
    if dist.is_main:
        torch.save(found, sys.argv[1])
    dist.close()

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes find, of every case."""
    path = tmp_path_factory.mktemp("two") / "found.pt"
    torchrun(__file__, path)
    return torch.load(path)

@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_equal_one_with_the_joint_batch(two, stage, shard, accumulate):
    losses, grads = two[f"{stage} {shard} {accumulate}"]
    # contrast and matching are within a part of the step; the means over words are over the whole step
    expected_losses, expected = one_step(stage, distributed.Distributed(), accumulate=accumulate if stage == 1 else 1,
                                         negatives=True)
    assert losses.keys() == expected_losses.keys() and grads.keys() == expected.keys() and len(grads) > 20
    for name, value in expected_losses.items():
        assert losses[name] == pytest.approx(value, rel=1e-5), name
    for name, grad in expected.items():
        assert (grads[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-7, name

def test_the_losses_know_of_the_other_processes(two):
    """Contrast over half of the batch each, as without gathering, is another loss."""
    half = {k: v[::2] if torch.is_tensor(v) else v for k, v in batch_of(1).items()}
    alone = model_of(1).stage1_losses(half, 63, distributed.Distributed(), torch.Generator().manual_seed(3))
    assert abs(alone["vtc"].item() - two["1 False 1"][0]["vtc"]) > 0.05

def test_recomputing_blocks_changes_nothing():
    plain = one_step(3, distributed.Distributed())
    real = VideoChat2.__init__

    def recomputing(self, config, *rest, **more):
        real(self, config, *rest, **more)
        config.vit.checkpoint_blocks = config.qformer.checkpoint_layers = config.llama.checkpoint_layers = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VideoChat2, "__init__", recomputing)
        again = one_step(3, distributed.Distributed())
    assert plain[0] == pytest.approx(again[0]) and all(torch.equal(plain[1][n], again[1][n]) for n in plain[1])

def test_each_clip_is_in_one_part_of_one_process():
    dataset = range(64)
    joint = list(data.Sampler(dataset, 16))
    shares = [list(data.Sampler(dataset, 16, rank=rank, world_size=2, grad_accum=2)) for rank in range(2)]
    assert all(len(part) == 4 for share in shares for part in share) and len(shares[0]) == 2 * len(joint)
    for step, batch in enumerate(joint):
        mine = [i for share in shares for part in share[2 * step:2 * step + 2] for i in part]
        assert sorted(mine) == sorted(batch)
    with pytest.raises(ValueError, match="a batch of 6 cannot be shared evenly by 2 processes in 2 parts"):
        data.Sampler(dataset, 6, world_size=2, grad_accum=2)

def test_a_text_without_video_loses_no_process():
    """Parts that a batch does not use keep grad None, or the optimizer would decay them."""
    model = model_of(3)
    ids = torch.randint(5, 60, (2, 8))
    model.lm_loss({"ids": ids, "mask": torch.ones_like(ids), "labels": ids}).backward()
    lora_grads = [p.grad for name, p in model.named_parameters() if "lora_" in name]
    assert model.query_tokens.grad is None and lora_grads[0] is not None

# ---- train.py under torchrun

@pytest.fixture(scope="module")
def begun(world, tmp_path_factory):
    """Pretraining and stages 1 and 2 by one process."""
    out = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "micro", without_dropout)
        options = ["--preset", "micro", "--data", str(world), "--out", str(out)]
        pretrain.main(options)
        for stage in ("1", "2"):
            train.main(["--stage", stage, *options])
    return out

def test_what_one_layout_writes_the_others_go_on_from(world, begun, tmp_path):
    """Two processes with FSDP2, stopped; two with DDP, stopped; one alone: the checkpoint is the same for all."""
    def options(out):
        return list(map(str, ["--preset", "micro", "--data", world, "--out", out, "--stage", 3, "--init",
                              begun / "stage2", "--steps", 7, "--save-every", 2, "--batch", 4]))

    stop = ROOT / "tests" / "stop_at.py"
    torchrun(stop, 2, *options(tmp_path / "parts"), "--shard")
    assert list(resume.saved_steps(tmp_path / "parts" / "stage3.unfinished")) == [2]
    assert "resuming from step 2" in torchrun(stop, 4, *options(tmp_path / "parts"))
    for out in ("parts", "whole"):
        train.main(options(tmp_path / out))
    parts, whole = (files.read_tensors(tmp_path / out / "stage3" / "model.safetensors") for out in ("parts", "whole"))
    assert parts.keys() == whole.keys()
    for name, t in whole.items():                                         # as near as sums in another order allow
        assert (parts[name] - t).norm() <= 5e-3 * t.norm() + 1e-4, name

def test_refusals_are_told_once(world, begun, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "train.py"),
               "--preset", "micro", "--data", str(world), "--out", str(tmp_path / "new"), "--stage", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0 and done.stderr.count("run: python train.py --stage 2") == 1
