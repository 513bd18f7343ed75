"""Weights in 8 bits: small errors, right gradients, little memory. Run: pytest tests/test_int8.py"""
import pytest
import torch
from torch import nn

from llama import Llama, LlamaConfig
from lora import LoRALinear, add_lora
from weights.int8 import Int8Linear, quantize_int8

def test_rows_are_scaled_apart_and_rounded_to_half_a_step():
    torch.manual_seed(0)
    linear = nn.Linear(64, 8, bias=True)
    with torch.no_grad():
        linear.weight.mul_(10.0 ** torch.arange(8)[:, None])               # rows of very different size
    narrow = Int8Linear(linear)
    step = linear.weight.abs().amax(1) / 127
    error = (narrow.weight * narrow.scale[:, None] - linear.weight).abs()
    assert narrow.weight.dtype == torch.int8 and (error <= step[:, None] * 0.501).all()
    x = torch.randn(3, 64)
    torch.testing.assert_close(narrow(x), x @ (narrow.weight * narrow.scale[:, None]).T + linear.bias)

def test_a_row_of_zeros_stays_zero():
    linear = nn.Linear(4, 2, bias=False)
    nn.init.zeros_(linear.weight)
    assert torch.equal(Int8Linear(linear)(torch.randn(3, 4)), torch.zeros(3, 2))

def test_large_outputs_do_not_overflow_in_float16():
    """LLaMA has channels in the hundreds; the sum before scaling is 127 / max|W| times larger."""
    linear = nn.Linear(64, 1, bias=False)
    nn.init.constant_(linear.weight, 0.05)
    y = Int8Linear(linear)(torch.full((1, 64), 100.0).half())
    assert y.item() == pytest.approx(320, rel=0.01)

def test_the_gradient_is_that_of_the_rounded_weight():
    torch.manual_seed(0)
    narrow = Int8Linear(nn.Linear(16, 8, bias=False))
    x, grad = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 5, 8)
    narrow(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ (narrow.weight * narrow.scale[:, None]))
    assert narrow.weight.grad is None

def test_autograd_keeps_the_narrow_weight_only():
    """Keeping each layer's widened weight until the backward pass would cost more than 8 bits save."""
    narrow, kept = Int8Linear(nn.Linear(256, 256, bias=False)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        narrow(torch.randn(1, 256, requires_grad=True))
    assert sum(t.numel() * t.element_size() for t in kept) == 256 * 256 + 256 * 4

def test_a_llama_in_8_bits_says_nearly_the_same():
    torch.manual_seed(0)
    llama = Llama(LlamaConfig(vocab_size=50, width=64, depth=3, heads=4, kv_heads=2, ffn=128, init_std=0)).eval()
    add_lora(llama, ["q_proj", "down_proj"], 4, 8)
    ids = torch.arange(24).view(2, 12)
    before = llama.lm_head(llama(llama.embed(ids)))
    quantize_int8(llama)
    narrow = [module for module in llama.modules() if isinstance(module, Int8Linear)]
    assert len(narrow) == 3 * 7                                            # lm_head and embeddings stay as they are
    assert sum(isinstance(module, LoRALinear) and isinstance(module.base, Int8Linear)
               for module in llama.modules()) == 6
    after = llama.lm_head(llama(llama.embed(ids)))
    assert 0 < (after - before).std() / before.std() < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        assert llama.model["layers"][0].mlp.up_proj(torch.randn(1, 64)).dtype == torch.bfloat16

def test_lora_is_not_merged_into_8_bits():
    layer = LoRALinear(Int8Linear(nn.Linear(8, 8, bias=False)), 2, 4)
    with pytest.raises(ValueError, match="too small for a weight in 8 bits"):
        layer.merged()
