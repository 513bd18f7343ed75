"""Memory of a training step at real size, counted without a GPU, and the largest batch that fits one.

The real step runs on tensors that have shapes but no values, and every byte is counted while it lives: nothing is
estimated from formulas. Where a GPU differs from a CPU, the count follows the GPU: attention keeps only queries, keys,
values and output, and LayerNorm computes in float32. AdamW, no recomputation. Not here: memory and time of a step that
really runs (train_step.py); tests/test_bench.py compares the two.

    python -m bench.memory --preset vicuna-7b --stage 3 --batch 4
"""
import argparse
from dataclasses import dataclass, replace
from unittest.mock import patch
from weakref import WeakSet, finalize

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.train_step import Step, our_model, random_batch, step_config, step_losses
from infra.cli import add_options, option, read_options, run
from model import DTYPES
from vit_video import position_table
from weights.int8 import quantize_int8

GIB = 2 ** 30

@dataclass
class Options(Step):
    dtype: str = option("bf16", "of the computation and the frozen LLM", choices=tuple(DTYPES))
    llm_int8: bool = option(False, "the frozen LLM in 8 bits")
    gpu: float = option(80.0, "GiB of the GPU that the batch is to fit")

class LiveBytes(TorchDispatchMode):
    """Inside it, what each operation returns is counted from its creation until it is freed."""
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.storages = 0, 0, WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.add(tree_leaves(results))
        return results

    def add(self, leaves):
        for storage in {t.untyped_storage() for t in leaves if torch.is_tensor(t)}:
            if storage not in self.storages:
                self.storages.add(storage)
                size = -(-storage.nbytes() // 512) * 512                       # the CUDA allocator's smallest piece
                self.change(size)
                finalize(storage, self.change, -size)

    def change(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)

def counted_step(cfg, step):
    """{name: bytes} of a training step on one GPU. It is the second step: the first one makes AdamW's moments."""
    # neither the weights of a 7B model nor their initialization take memory or time on the meta device
    batch, live, dtype = random_batch(cfg, step, shortest=1), LiveBytes(), DTYPES[step.dtype]
    model = our_model(cfg, step.stage, "meta", dtype, dropout=True)
    if step.llm_int8 and step.stage > 1:
        quantize_int8(model.llama_model)

    # attention and LayerNorm as on a GPU; nothing may read values, or leave tensors without values in a cache
    layer_norm, kernel = F.layer_norm, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    def attention(q, k, v, **_):
        return kernel(q.to(dtype), k.to(dtype), v.to(dtype))[0]                # without a mask (..., S, S)

    with (patch.object(F, "scaled_dot_product_attention", attention),
          patch.object(F, "layer_norm", lambda x, *args: layer_norm(x.float(), *args)),        # as CUDA's autocast
          patch("qformer.hard_negatives", lambda sim, idx, generator: (idx.roll(1), idx.roll(1))),
          patch("vit_video.position_table", position_table.__wrapped__),
          FakeTensorMode(allow_non_fake_inputs=True)):
        # weights and batch are there before the step, and stay
        model.to_empty(device="cpu")
        live.add([*model.parameters(), *batch.values()])
        optimizer, before_steps = torch.optim.AdamW(model.parameters(), fused=True), live.now
        trained, frozen = (sum(p.nbytes for p in model.parameters() if p.requires_grad is b) for b in (True, False))

        # two steps; everything that they create and free is counted
        losses_of = torch.autocast("cpu", torch.bfloat16, enabled=step.dtype != "fp32")(step_losses)
        with live:
            for _ in range(2):
                before, live.peak = live.now, 0
                loss = sum(losses_of(model, batch).values())
                activations = live.now - before
                loss.backward()
                gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
                del loss
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return {"frozen weights": frozen, "trained weights": trained, "gradients": gradients,
                "optimizer": live.now - before_steps, "activations": activations, "peak": live.peak}

def clips_that_fit(gpu, batch, peak, per_clip):
    """The largest batch for a GPU of `gpu` GiB, from the peak of a batch; CUDA itself and its libraries take 1 GiB."""
    return max(0, int(batch + ((gpu - 1) * GIB - peak) // per_clip))

def main(argv=None):
    parser = argparse.ArgumentParser("python -m bench.memory", description=__doc__.splitlines()[0])
    add_options(parser, Options)
    step, _ = read_options(parser, Options, argv)
    cfg = step_config(step)

    # the peak grows by the same amount with each clip
    sizes, larger = counted_step(cfg, step), counted_step(cfg, replace(step, batch=step.batch + 1))
    per_clip = larger["peak"] - sizes["peak"]
    print(f"{step}, {step.dtype}{', LLM in 8 bits' * step.llm_int8}")
    for name, size in (*sizes.items(), ("each further clip", per_clip)):
        print(f"  {name:20}{size / GIB:8.2f} GiB")

    clips = clips_that_fit(step.gpu, step.batch, sizes["peak"], per_clip)
    print(f"  a GPU of {step.gpu:g} GiB, 1 of them for CUDA itself, has room for {clips} clips")

if __name__ == "__main__":
    run(main, "bench.memory")
