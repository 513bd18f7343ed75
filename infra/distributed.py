"""Several processes that train one model, or answer one benchmark: their ranks, what they exchange, sharding.

    DDP (default)   every process has the whole model and a part of each batch; gradients are averaged
    --shard         FSDP2: weights, gradients and optimizer state are cut into one shard per process; each block is
                    gathered just before it computes, and freed again

The result is that of one process with the joint batch. Several machines share the folders of data and run.
Not here: which samples a process gets (data.Sampler), the loop (train.py).
Source: PyTorch DDP (arXiv 2006.15704), FSDP (arXiv 2304.11277); gathering with gradients: BLIP-2's official code.

    torchrun --nproc_per_node 8 --nnodes 2 train.py ...
"""
import datetime
import os
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as torch_dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

class GatherRows(torch.autograd.Function):
    """x (b, ...) of each process -> (b * size, ...) of all, in the joint batch's order: process r of n has the rows r,
    r + n, r + 2n, ... Each process computes a loss from all rows, so the gradient of a row is the sum of theirs."""
    @staticmethod
    def forward(ctx, x):
        rows = [torch.empty_like(x) for _ in range(torch_dist.get_world_size())]     # size tensors (b, ...)
        torch_dist.all_gather(rows, x.contiguous())
        return torch.stack(rows, 1).flatten(0, 1)                                    # (b * size, ...)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()                                                     # (b * size, ...)
        torch_dist.all_reduce(grad)
        return grad[torch_dist.get_rank()::torch_dist.get_world_size()]              # (b, ...)

@dataclass
class Distributed:
    """The processes of this run. Distributed() is a single process: it needs no torchrun and exchanges nothing."""
    rank: int = 0
    size: int = 1
    device: str = "cpu"
    cpu_group: object = None        # gloo: Python objects and counts go over the CPU, so no GPU is synchronised

    @property
    def is_main(self):
        return self.rank == 0

    def barrier(self):
        if self.size > 1:
            torch_dist.barrier(self.cpu_group)

    def all_gather_object(self, obj):
        """The objects of all processes, as a list."""
        objects = [obj] * self.size
        if self.size > 1:
            torch_dist.all_gather_object(objects, obj, group=self.cpu_group)
        return objects

    def all_reduce_sum(self, numbers):
        """Sums of these numbers over all processes, as a list."""
        return [sum(column) for column in zip(*self.all_gather_object(list(numbers)), strict=True)]

    def broadcast(self, obj):
        """The main process's object, in all processes."""
        return self.all_gather_object(obj)[0]

    def main_process_first(self, make):
        """make() in the main process first; the others call it when the files that it writes are there."""
        result = make() if self.is_main else None
        self.barrier()
        return result if self.is_main else make()

    def all_gather(self, x):
        """x (b, ...) of each process -> (b * size, ...) of all, with gradients."""
        return GatherRows.apply(x) if self.size > 1 else x

    def local_rows(self, x):
        """Rows of the joint batch (b * size, ...) -> those of this process (b, ...)."""
        return x[self.rank::self.size]

    def close(self):
        if self.size > 1:
            torch_dist.destroy_process_group()

def init_distributed(device, gloo_only=False):
    """Joins the processes that torchrun started, one GPU each -> Distributed; without torchrun, a single process.
    gloo_only: the processes exchange no GPU tensors. ValueError if there are too few GPUs."""
    size, on_gpu = int(os.environ.get("WORLD_SIZE", 1)), device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch finds no GPU here")

    # each process of a machine takes the GPU of its local rank
    if on_gpu and size > 1:
        local_rank, n_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= n_gpus:
            raise ValueError(f"{n_gpus} GPUs here for {os.environ['LOCAL_WORLD_SIZE']} processes (--nproc_per_node)")
        device = f"cuda:{local_rank}"
    if on_gpu and torch.device(device).index is not None:
        torch.cuda.set_device(device)
    if size == 1:
        return Distributed(device=device)

    # subtle: others may wait for hours while the main process indexes annotations or caches features
    timeout = datetime.timedelta(days=2)
    torch_dist.init_process_group("nccl" if on_gpu and not gloo_only else "gloo", timeout=timeout)
    return Distributed(torch_dist.get_rank(), size, device, torch_dist.new_group(backend="gloo", timeout=timeout))

@contextmanager
def raise_together(dist):
    """A ValueError or OSError of the main process within it is raised there, once instead of n times; the other
    processes exit with code 2."""
    problem = None
    try:
        yield
    except (ValueError, OSError) as error:
        problem = error
    main_fails = dist.broadcast(problem is not None)
    if problem and (dist.is_main or not main_fails):
        raise problem
    if main_fails:
        time.sleep(1)                                              # torchrun stops all processes as soon as one exits
        sys.exit(2)

# --------------------------------------------------------------------------------------- one model in several processes

def blocks_of(model):
    """ViT blocks, Q-Former layers, LLM layers."""
    return [block for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)
            and name.rpartition(".")[2] in ("blocks", "layer", "layers") for block in module]

def wrap_model(model, loss, dist, shard=False, find_unused=True):
    """Moves the model to its devices -> the function that computes a step's losses. find_unused: a step may leave parts
    unused (text without video, VTG alone at first), which DDP must find to give them no gradient, as in one process."""
    if shard:                                                      # FSDP2 moves its shards itself
        shard_model(model, dist)
        return loss
    model.to(dist.device)
    if dist.size == 1 and not torch_dist.is_initialized():         # bench.gpu has a group of a single process
        return loss
    # DDP wraps a module: one that owns the model and computes its losses
    module = torch.nn.Module()
    module.model, module.forward = model, loss
    return DistributedDataParallel(module, find_unused_parameters=find_unused)

def shard_model(model, dist):
    """FSDP2: each block is a unit, a frozen one too; the layers outside of blocks form the root unit."""
    # FSDP2 warns that Q-Former layers return views (keys and values); nothing here writes into them
    warnings.filterwarnings("ignore", message=".*returned a view tensor")

    # subtle: a scalar cannot be sharded: each process has its own temperature; sync_unsharded_grads keeps them equal
    scalars = {p for p in model.parameters() if p.ndim == 0}
    for p in scalars:
        p.data = p.data.to(dist.device)                            # FSDP ignores them, and does not move them

    # blocks first, then the rest; losses are methods of the model, which FSDP must know as entry points
    mesh = init_device_mesh(torch.device(dist.device).type, (dist.size,))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    for module in (*blocks_of(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=scalars)
    for method in ("stage1_losses", "lm_loss"):
        register_fsdp_forward_method(model, method)

def set_gradient_sync(forward, model, last):
    """Whether the next backward pass exchanges gradients: only the last micro-batch of a step does."""
    if isinstance(forward, DistributedDataParallel):               # else a single process, or FSDP2
        forward.require_backward_grad_sync = last
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)

def sync_unsharded_grads(model, dist):
    """Averages the gradients of the scalars that FSDP does not shard."""
    if hasattr(model, "set_requires_gradient_sync"):               # FSDP2 added this method
        for p in model.parameters():
            if p.grad is not None and not isinstance(p, DTensor):
                torch_dist.all_reduce(p.grad)
                p.grad /= dist.size

def full_tensor(t):
    """Gathers a sharded tensor; every process must call it. Other tensors are returned as they are."""
    return t.full_tensor() if isinstance(t, DTensor) else t

def shard_like(t, other):
    """Shards a full tensor as `other` is sharded, if it is."""
    return distribute_tensor(t, other.device_mesh, other.placements) if isinstance(other, DTensor) else t
