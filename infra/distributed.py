"""Several processes train one model, or answer one benchmark: who each is, what they exchange, how a model is cut up.

    torchrun --nproc_per_node 8 --nnodes 2 train.py ...

    DDP (default)   every process has the whole model and a share of each batch; gradients are averaged
    --shard         FSDP2: weights, gradients and optimizer are cut into as many pieces as there are processes; each
                    block is put together just before it computes, and cut again

The result is that of one process with the joint batch. Several machines share the folders of data and run. Not here:
what a batch is (data.Sampler), the loop (train.py).
Source: PyTorch DDP (arXiv 2006.15704), FSDP (arXiv 2304.11277); gathering with gradients: BLIP-2's official code.

    pytest tests/test_distributed.py
"""
import datetime
import os
import sys
import warnings
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


@dataclass
class Distributed:
    """The processes of this run. One process alone needs no torchrun, and exchanges nothing."""
    rank: int = 0
    size: int = 1
    device: str = "cpu"
    control: object = None      # gloo group: what processes tell each other on the CPU waits for no GPU

    @property
    def is_main(self):
        return self.rank == 0

    def barrier(self):
        if self.size > 1:
            dist.barrier(self.control)

    def all_reduce_sum(self, numbers):
        """Sums of these numbers over all processes; they wait for each other, but for no GPU."""
        if self.size == 1:
            return list(numbers)
        t = torch.tensor(list(numbers), dtype=torch.float64)
        dist.all_reduce(t, group=self.control)
        return t.tolist()

    def broadcast(self, thing):
        """What the first process says, to all."""
        if self.size == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, 0, group=self.control)
        return box[0]

    def all_gather_object(self, thing):
        """What each process says, in a list."""
        if self.size == 1:
            return [thing]
        boxes = [None] * self.size
        dist.all_gather_object(boxes, thing, group=self.control)
        return boxes

    def main_process_first(self, make):
        """make() in the first process, and then, when what it leaves on the disk is there, in the others."""
        if not self.is_main:
            self.barrier()
        made = make()
        if self.is_main:
            self.barrier()
        return made

    def all_gather(self, x):
        """x (b, ...) of each process -> (b * size, ...) of all, with gradients."""
        return GatherRows.apply(x) if self.size > 1 else x

    def local_rows(self, x):
        """Of rows of the joint batch (b * size, ...), those of this process (b, ...)."""
        return x[self.rank::self.size]

    def all_reduce_max(self, n):
        """The largest of all processes' numbers."""
        return max(self.all_gather_object(n))

    def close(self):
        if self.size > 1:
            dist.destroy_process_group()


def init_distributed(device, gloo_only=False):
    """The World that torchrun has made, or one of a single process. Each process takes a GPU of its own.

    only_talk: they exchange no tensors that lie on a GPU.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch finds no GPU here")
    if size == 1:
        if torch.device(device).index is not None and device.startswith("cuda"):
            torch.cuda.set_device(device)
        return Distributed(device=device)
    on_gpu, local = device.startswith("cuda"), int(os.environ["LOCAL_RANK"])
    if on_gpu:
        if local >= torch.cuda.device_count():
            raise ValueError(f"{os.environ['LOCAL_WORLD_SIZE']} processes, but {torch.cuda.device_count()} GPUs here: "
                             "start as many as there are (--nproc_per_node)")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    # subtle: some wait for hours, while the first indexes annotations or looks at all clips
    patience = datetime.timedelta(days=2)
    dist.init_process_group("nccl" if on_gpu and not gloo_only else "gloo", timeout=patience)
    return Distributed(dist.get_rank(), size, device, dist.new_group(backend="gloo", timeout=patience))


def raise_together(problem, world):
    """A problem of the first process is told once, and ends them all."""
    stop = world.broadcast(problem is not None)
    if problem and (world.is_main or not stop):
        raise problem
    if stop:
        sys.exit(2)

# ----------------------------------------------------------------------------------------------------------------------
# one model in several processes

class Step(nn.Module):
    """What a step computes, loss(batch, share of the steps done), as the module that DDP wants."""
    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch, done):
        return self.loss(batch, done)


def blocks_of(model):
    """ViT blocks, Q-Former layers, LLM layers."""
    return [block for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
            and name.rpartition(".")[2] in ("blocks", "layer", "layers") for block in module]


def wrap_model(model, loss, world, shard=False, idle=True):
    """Puts the model onto the world's devices -> the function that computes a step's losses.

    idle: steps may leave parts of the model unused (text without video, captions alone at first). These keep no
    gradient, as in one process, but DDP must look for them.
    """
    if shard:
        return wrap_fsdp(model, loss, world)
    model.to(world.device)
    if world.size == 1:
        return loss
    return DistributedDataParallel(Step(model, loss), find_unused_parameters=idle)


def wrap_fsdp(model, loss, world):
    """FSDP2: each block is a unit, frozen ones, too; what stands between them belongs to the whole."""
    # it warns of Q-Former layers, which return views of their keys and values; nobody here writes into them
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    # subtle: a number cannot be cut; each process keeps the temperature whole, and sync_unsharded_grads keeps them the same
    full_tensor = {p for p in model.parameters() if p.ndim == 0}
    for p in full_tensor:
        p.data = p.data.to(world.device)
    cut = partial(fully_shard, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    for block in blocks_of(model):
        cut(block)
    cut(model, ignored_params=full_tensor)
    for method in ("stage1_losses", "lm_loss"):
        register_fsdp_forward_method(model, method)
    return loss


def set_gradient_sync(step, model, last):
    """Whether the next backward pass ends in an exchange of gradients: only the last one of a step does."""
    if isinstance(step, DistributedDataParallel):
        step.require_backward_grad_sync = last
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)


def sync_unsharded_grads(model, world):
    """Averages the gradients of what FSDP leaves whole."""
    if hasattr(model, "set_requires_gradient_sync"):
        for p in model.parameters():
            if p.grad is not None and not isinstance(p, DTensor):
                dist.all_reduce(p.grad)
                p.grad /= world.size


def full_tensor(t):
    """A tensor, put together where it is cut up. All processes must ask for it."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def shard_like(t, other):
    """A whole tensor, cut up as the other one is."""
    return distribute_tensor(t, other.device_mesh, other.placements) if isinstance(other, DTensor) else t

# ----------------------------------------------------------------------------------------------------------------------
# samples of all processes

class GatherRows(torch.autograd.Function):
    """x (b, ...) of each process -> (b * processes, ...) of all, in the order of the joint batch, of which the Sampler
    gave each process every so-many-th row.

    Every process computes a loss of its own from all rows; the gradient of its rows is the sum of what they all say.
    """

    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.stack(rows, 1).flatten(0, 1)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[dist.get_rank()::dist.get_world_size()]
