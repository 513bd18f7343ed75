"""How weights move: the learning rate over the steps, AdamW, and Muon for layers' matrices where it is asked for.

Options and their defaults are recipes.TrainConfig's. Not here: what trains at all (model.FROZEN), the loop (train.py).
Source: AdamW (arXiv 1711.05101), Muon (arXiv 2502.16982), both PyTorch's; no decay on biases, norms, queries and
temperature: official utils/optimizer.py.

    pytest tests/test_train.py
"""
import math
import re

import torch

from parallel import whole


def learning_rate(step, cfg):
    """Linear rise over the first warmup * steps, lr until hold * steps, then a cosine down to lr * lr_end."""
    rise = max(1, round(cfg.warmup * cfg.steps))
    if step < rise:
        return cfg.lr * (step + 1) / rise
    fall = max(rise, round(cfg.hold * cfg.steps))
    done = max(0, step - fall) / max(1, cfg.steps - fall)
    return cfg.lr * (cfg.lr_end + (1 - cfg.lr_end) * 0.5 * (1 + math.cos(math.pi * done)))


LAYER = re.compile(r"\.(blocks|layers?)\.\d+\.")                          # of ViT, Q-Former, LLM


def make_optimizers(model, cfg):
    """[AdamW] with weight decay on matrices only; with cfg.muon [AdamW, Muon], and Muon has the layers' matrices.

    Muon moves a matrix in all its directions by the same amount, with "match_rms_adamw" by as much as AdamW moves it
    (arXiv 2502.16982). LoRA's matrices stay with AdamW. "scale" of a group: its rate in multiples of cfg.lr.
    """
    matrices, lora, layers, others = [], [], [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if p.ndim < 2 or "query_tokens" in name or name.endswith("temp"):
            others.append(p)
        elif "lora_" in name:
            lora.append(p)
        else:
            (layers if cfg.muon and p.ndim == 2 and LAYER.search(name) else matrices).append(p)
    groups = [{"params": matrices, "scale": 1.0}, {"params": lora, "scale": cfg.lora_lr},
              {"params": others, "scale": 1.0, "weight_decay": 0.0}]
    settings = dict(lr=cfg.lr, weight_decay=cfg.weight_decay)
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, cfg.beta2), fused=True, **settings)]
    if layers:
        muon = [{"params": layers, "scale": cfg.muon}]
        optimizers.append(torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw", **settings))
    return optimizers


def grad_norm(model, optimizers, scaler, clip):
    """The gradient's norm, a tensor that nobody has read yet; gradients are cut to `clip`."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    return whole(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))


def optimizer_step(optimizers, lr, scaler, norm):
    """One step, unless the norm is not finite: then nothing changes.

    subtle: fused AdamW looks at found_inf on the device, as it does for a GradScaler, so nobody waits to ask; Muon
    cannot, and is asked about.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        fused = optimizer.defaults.get("fused")
        if fused and not scaler.is_enabled():
            optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
        if fused or norm.isfinite():
            scaler.step(optimizer)                                         # skipped where float16 overflowed
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
