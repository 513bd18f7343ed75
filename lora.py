"""
Low-rank updates of frozen Linear layers: add them, list them, merge them into the weights.

         x (in)
         |---------------.
         |            dropout
      W frozen           |
    (out, in)      A (r, in)      drawn at random
         |               |  r numbers, a bottleneck
         |         B (out, r)     zeros: at the start the update is nothing
         |               |
         |          * alpha / r
         +<--------------'
         |
         y (out)                  y = W x + (alpha / r) B A x,   merged: W' = W + (alpha / r) B A

r 16 on q_proj and v_proj of a 7B LLaMA: 8.4 million weights learn in the place of 6.7 billion.
Not here: which layers get one (model.py), biases, embeddings and convolutions.

Source: LoRA (arXiv 2106.09685, section 4.1). peft, which the official code uses, calls our lora_A.weight
lora_A.default.weight, and base.weight is there the layer's own weight.
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
        # a base on the meta device gets its weight later (weights/hf_llama.py); the update begins to exist now
        device = None if base.weight.is_meta else base.weight.device
        self.lora_A = nn.Linear(base.in_features, r, bias=False, device=device)
        self.lora_B = nn.Linear(r, base.out_features, bias=False, device=device)
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / r
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        y = self.base(x)                                                        # (..., out)
        # the update stays in float32 beside a bfloat16 base: its steps are too small for bfloat16
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.weight.dtype)                                  # autocast would narrow it again
        update = self.lora_B(self.lora_A(self.dropout(x)))                      # (..., r), (..., out)
        return y + (self.scale * update).to(y.dtype)

    @torch.no_grad()
    def merged(self):
        """The base, with the update added to its weight in place. ValueError for a base in 8 bits."""
        if not self.base.weight.is_floating_point():
            raise ValueError("LoRA's update is too small for a weight in 8 bits: merge it before, into the LLM's own")
        update = self.scale * self.lora_B.weight @ self.lora_A.weight           # (out, r) @ (r, in) -> (out, in)
        self.base.weight.copy_(self.base.weight.to(update.dtype) + update)
        return self.base


def replace_module(root, name, new):
    """Put new in the place of the part of root that has this dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)


def add_lora(module, names, r, alpha, dropout=0.0):
    """
    Wrap every Linear inside module whose last name is one of names ("q_proj", ...) -> their full names.
    Raises ValueError, and wraps nothing, if one of names fits no Linear: a misspelt name would silently train less.
    """
    linears = {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    for wanted in names:
        if not any(name.rpartition(".")[2] == wanted for name in linears):
            found = sorted({name.rpartition(".")[2] for name in linears})
            raise ValueError(f'LoRA: no Linear layer is called "{wanted}", there are {", ".join(found)}')
    wrapped = [name for name in linears if name.rpartition(".")[2] in names]
    for name in wrapped:
        replace_module(module, name, LoRALinear(linears[name], r, alpha, dropout))
    return wrapped


def merge_lora(module):
    """Add every update to its frozen weight in place, and put the plain Linear back -> their full names."""
    layers = {name: part for name, part in module.named_modules() if isinstance(part, LoRALinear)}
    for name, layer in layers.items():
        replace_module(module, name, layer.merged())
    return list(layers)


def lora_state(module):
    """The updates alone, {name: tensor}: what a checkpoint beside a frozen LLM needs."""
    return {name: tensor for name, tensor in module.state_dict().items() if "lora_" in name}


def lora_parameters(module):
    """The updates' parameters, for an optimizer."""
    return [p for name, p in module.named_parameters() if "lora_" in name]
