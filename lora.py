"""Low-rank updates of frozen Linear layers: add them, merge them into the weights.

    x (in) -+-> W (out, in), frozen ------------------------------------------+-> y (out)
            |                                                                 |
            '-> dropout -> A (r, in), random -> B (out, r), zeros -> alpha / r '

    y = W x + (alpha / r) B A x, at the start W x          merged: W' = W + (alpha / r) B A

With r = 16 on q_proj and v_proj of a 7B LLaMA, 8.4 million weights train instead of 6.7 billion.
Not here: which layers get one (model.py); biases, embeddings and convolutions.

Source: LoRA (arXiv 2106.09685, section 4.1). In peft, which the official code uses, our lora_A.weight is called
lora_A.default.weight, and our base.weight is the layer's own weight.
Run:    python -m pytest tests/test_lora.py
"""
import math

import torch
from torch import nn

class LoRALinear(nn.Module):
    """The frozen Linear base with an update of rank r: x (..., in) -> (..., out)."""
    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__()
        if r < 1:
            raise ValueError(f"LoRA's rank is {r}, expected at least 1")
        self.base = base.requires_grad_(False)
        # a base on the meta device gets its weight later (weights/hf_llama.py); the update needs memory now
        device = None if base.weight.is_meta else base.weight.device
        self.lora_A = nn.Linear(base.in_features, r, bias=False, device=device)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, device=device)
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / r
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        y = self.base(x)                                                        # (..., out)
        # the update is float32 even if the base is bfloat16, whose precision is too low for its small steps
        if not torch.is_autocast_enabled(x.device.type):                        # autocast chooses the dtype itself
            x = x.to(self.lora_A.weight.dtype)
        update = self.lora_B(self.lora_A(self.dropout(x)))                      # (..., r), (..., out)
        return y + (self.scale * update).to(y.dtype)

    @torch.no_grad()
    def merged(self):
        """The base, with the update added to its weight in place. ValueError for an int8 base."""
        if not self.base.weight.is_floating_point():
            raise ValueError("LoRA's update is too small for a weight in 8 bits: load the LLM without --llm-int8")
        update = self.scale * self.lora_B.weight @ self.lora_A.weight           # (out, r) @ (r, in) -> (out, in)
        self.base.weight.copy_(self.base.weight.to(update.dtype) + update)
        return self.base

def replace_module(root, name, new):
    """Replace the submodule of root that has this dotted name: "layers.0.self_attn.q_proj"."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)

def add_lora(module, names, r, alpha, dropout=0.0):
    """Wrap every Linear inside module whose last name is one of names ("q_proj", ...) -> their full names. ValueError,
    and nothing is wrapped, if no Linear has one of the names: a typo would silently train less."""
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    last_names = {name.rpartition(".")[2] for name in linears}
    unknown = sorted(set(names) - last_names)
    if unknown:
        raise ValueError(f'LoRA: no Linear layer is called "{unknown[0]}", there are {", ".join(sorted(last_names))}')

    wrapped = [name for name in linears if name.rpartition(".")[2] in names]
    for name in wrapped:
        replace_module(module, name, LoRALinear(linears[name], r, alpha, dropout))
    return wrapped

def merge_lora(module):
    """Add every update to its frozen weight in place, and put the plain Linear back -> their full names."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoRALinear)}
    for name, layer in layers.items():
        replace_module(module, name, layer.merged())
    return list(layers)
