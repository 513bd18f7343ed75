"""Frozen weights in 8 bits: a 7B LLM in 7 GB instead of 13.5, so that stage 3 fits smaller cards.

Each row of a weight (out, in), which makes one output channel, is divided by its largest magnitude / 127 and rounded:

    W (out, in)  ->  weight int8 (out, in), scale (out,)        W = weight * scale, nearly

Weights alone are 8 bits wide; inputs, sums and gradients keep their dtype. What it saves is memory, not time: a weight
is widened each time it is used. Not here: which layers (quantize_int8: all of the LLM's but lm_head and embeddings, which
would lose most), reading folders (weights/hf_llama.py), LoRA, which learns beside them (lora.py).

Source: ours; LLM.int8 (arXiv 2208.07339) treats outliers apart, which plain rounding per channel does not.
    pytest tests/test_int8.py
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


def widened(weight, scale, dtype):
    """weight int8 (out, in) * scale (out,) -> (out, in). subtle: x weight^T, scaled only then, overflows float16."""
    return (weight * scale[:, None]).to(dtype)


class Int8Product(torch.autograd.Function):
    """x W^T with a gradient for x alone.

    subtle: autograd would keep the widened weight of every layer until the backward pass, and so more than int8 saves.
    Here the narrow one is kept and widened a second time.
    """

    @staticmethod
    def forward(ctx, x, weight, scale):                                # (..., in), (out, in), (out,)
        ctx.save_for_backward(weight, scale)
        return F.linear(x, widened(weight, scale, x.dtype))            # (..., out)

    @staticmethod
    def backward(ctx, grad):                                           # (..., out)
        weight, scale = ctx.saved_tensors
        return grad @ widened(weight, scale, grad.dtype), None, None   # (..., in)


class Int8Linear(nn.Module):
    """A frozen nn.Linear whose weight is kept in 8 bits: x (..., in) -> (..., out)."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        device = linear.weight.device
        self.weight = nn.Parameter(torch.empty_like(linear.weight, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(self.out_features, device=device), requires_grad=False)
        if not linear.weight.is_meta:
            self.fill(linear.weight)

    @torch.no_grad()
    def fill(self, weight):
        """Rounds weight (out, in) to 8 bits."""
        scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-12)                          # (out,)
        rounded = (weight.float() / scale[:, None]).round().to(torch.int8)                     # (out, in)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x):
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        y = Int8Product.apply(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def quantize_int8(llama):
    """Puts an Int8Linear in the place of each Linear of a Llama's layers, LoRA's own excepted."""
    for name, module in list(llama.model["layers"].named_modules()):
        if isinstance(module, nn.Linear) and "lora_" not in name:
            parent, _, leaf = name.rpartition(".")
            setattr(llama.model["layers"].get_submodule(parent), leaf, Int8Linear(module))
