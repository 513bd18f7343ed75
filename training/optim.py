"""How weights move: the learning rate at each step, AdamW and, as an option, Muon for the matrices of the layers.

Not here: defaults (train.TrainConfig), which parameters train at all (model.FROZEN), the loop (train.py).
Source: AdamW (arXiv 1711.05101), PyTorch's; Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon; its learning
rate: arXiv 2502.16982, section 2.2); no decay on biases, norms, queries and temperature: official utils/optimizer.py.

    pytest tests/test_train.py
"""
import math
import re
from collections import defaultdict

import torch

from infra.distributed import full_tensor, shard_like

LAYER_MATRIX = re.compile(r"\.(blocks|layers?)\.\d+\.")                    # in the blocks of ViT, Q-Former and LLM

def get_lr(step, cfg):
    """The learning rate at a step: linear warmup, then constant, then a cosine from lr down to lr * lr_end."""
    # it rises over the first warmup * steps
    warmup_steps = max(1, round(cfg.warmup * cfg.steps))
    if step < warmup_steps:
        return cfg.lr * (step + 1) / warmup_steps

    # it stays at lr until constant_until * steps, then it falls
    decay_start = max(warmup_steps, round(cfg.constant_until * cfg.steps))
    progress = max(0, step - decay_start) / max(1, cfg.steps - decay_start)
    return cfg.lr * (cfg.lr_end + (1 - cfg.lr_end) * 0.5 * (1 + math.cos(math.pi * progress)))

def orthogonalize(updates, steps=5):
    """Matrices (n, rows, cols) -> the same with all singular values between about 0.7 and 1.2.

    Newton-Schulz: each step replaces every singular value s by the polynomial a s + b s^3 + c s^5, which moves all of
    (0, 1] close to 1, without a decomposition."""
    # bfloat16 is precise enough, but most laptops emulate each product in it, 18 times as slowly as in float32
    a, b, c = 3.4445, -4.7750, 2.0315
    x = updates.bfloat16() if updates.is_cuda else updates.float()
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT                                                           # (n, short, long)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)               # now no singular value is above 1
    for _ in range(steps):
        gram = x @ x.mT                                                    # (n, short, short)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)      # b gram + c gram^2
        x = torch.baddbmm(x, polynomial, x, beta=a)                        # a x + polynomial x
    return x.mT if tall else x

class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: every direction of a matrix moves by the same amount, the rare ones too.

    For matrices only. Updates have AdamW's usual size, a root mean square of 0.2, so that both share a learning rate.
    """

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # Nesterov's momentum: the gradient mixed with its running mean
            by_shape = defaultdict(list)
            for p in [p for p in group["params"] if p.grad is not None]:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                mean = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                by_shape[p.shape].append((p, p.grad.lerp(mean, group["momentum"])))

            # one batched product for all matrices of a shape; with FSDP each process computes all of them
            for (rows, cols), pairs in by_shape.items():
                updates = orthogonalize(torch.stack([full_tensor(update) for _, update in pairs]))
                size = 0.2 * math.sqrt(max(rows, cols))
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(shard_like(update.to(p.dtype), p), alpha=-group["lr"] * size)

def make_optimizers(model, cfg):
    """[AdamW], or with cfg.muon_lr_scale [AdamW, Muon], where Muon trains the matrices of the layers except LoRA's."""
    matrices, lora, layers, no_decay = [], [], [], []
    for name, p in [(name, p) for name, p in model.named_parameters() if p.requires_grad]:
        if p.ndim < 2 or "query_tokens" in name or name.endswith("temp"):
            no_decay.append(p)
        elif "lora_" in name:
            lora.append(p)
        else:
            (layers if cfg.muon_lr_scale and p.ndim == 2 and LAYER_MATRIX.search(name) else matrices).append(p)

    # "scale": a group's learning rate as a multiple of cfg.lr
    groups = [{"params": matrices, "scale": 1.0}, {"params": lora, "scale": cfg.lora_lr_scale},
              {"params": no_decay, "scale": 1.0, "weight_decay": 0.0}]
    settings = dict(lr=cfg.lr, weight_decay=cfg.weight_decay)
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, cfg.beta2), fused=True, **settings)]
    if layers:
        optimizers.append(Muon([{"params": layers, "scale": cfg.muon_lr_scale}], **settings))
    return optimizers

def clip_gradients(model, optimizers, scaler, max_norm):
    """Scales the gradients down to a norm of at most max_norm -> the norm before, a tensor not yet read."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    return full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))

def optimizer_step(optimizers, lr, scaler, grad_norm, skip=False):
    """One update of the weights. With skip, or if the gradient's norm is not finite, no weight or moment changes."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]

        # subtle: fused AdamW reads found_inf on the device, as GradScaler sets it, so nothing syncs the GPU; Muon
        # cannot, so the norm is read for it
        fused = optimizer.defaults.get("fused")
        if fused and not scaler.is_enabled():
            optimizer.grad_scale, optimizer.found_inf = None, (~grad_norm.isfinite()).float()
        if not skip and (fused or grad_norm.isfinite()):
            scaler.step(optimizer)                                         # skips where float16 overflowed
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
