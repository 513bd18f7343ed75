"""Frozen weights in 8 bits: a 7B LLM takes 7 GB instead of 13.5, so stage 3 fits smaller GPUs.

Each row of a weight (out, in), one output channel, is divided by its scale, the row's largest magnitude / 127, and
rounded. Inputs, sums and gradients keep their dtype. This saves memory, not time: a weight is converted back each time
it is used. lm_head and the embeddings would lose most, and stay as they are.
Not here: reading folders (hf_llama.py), LoRA, which trains beside these layers (lora.py).
Source: ours; LLM.int8 (arXiv 2208.07339) treats outliers apart, which plain rounding per channel does not.

    pytest tests/test_int8.py
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from lora import replace_module

def dequantize(weight, scale, dtype):
    """weight int8 (out, in) * scale (out,) -> (out, in). subtle: scaling after the product would overflow float16."""
    return (weight * scale[:, None]).to(dtype)

class Int8MatMul(torch.autograd.Function):
    """x @ W.T with a gradient for x alone. subtle: autograd would keep each layer's dequantized weight for the backward
    pass, which costs more than int8 saves. This keeps the int8 weight and dequantizes it a second time."""
    @staticmethod
    def forward(ctx, x, weight, scale):                                # (..., in), (out, in), (out,)
        ctx.save_for_backward(weight, scale)
        return F.linear(x, dequantize(weight, scale, x.dtype))         # (..., out)

    @staticmethod
    def backward(ctx, grad):                                           # (..., out)
        weight, scale = ctx.saved_tensors
        return grad @ dequantize(weight, scale, grad.dtype), None, None  # (..., in)

class Int8Linear(nn.Module):
    """A frozen nn.Linear with its weight in 8 bits: x (..., in) -> (..., out)."""
    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.quantize(linear.weight)

    @torch.no_grad()
    def quantize(self, weight):
        """Rounds weight (out, in) to 8 bits and stores it; one on the meta device stays there."""
        scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-12)                          # (out,)
        rounded = (weight.float() / scale[:, None]).round().to(torch.int8)                     # (out, in)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = Int8MatMul.apply(x, self.weight, self.scale)                                       # (..., out)
        return y if self.bias is None else y + self.bias.to(y.dtype)

def quantize_int8(llama):
    """Replaces every Linear in a Llama's layers by an Int8Linear, except LoRA's own."""
    for name, module in list(llama.model["layers"].named_modules()):
        if isinstance(module, nn.Linear) and "lora_" not in name:
            replace_module(llama.model["layers"], name, Int8Linear(module))
