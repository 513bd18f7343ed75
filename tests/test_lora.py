"""python -m pytest tests/test_lora.py"""
import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

from lora import LoRALinear, add_lora, merge_lora

class Toy(nn.Module):
    """Two blocks of three Linears, one with a bias."""
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "q_proj": nn.Linear(6, 6, bias=False), "v_proj": nn.Linear(6, 6), "mlp": nn.Linear(6, 6)})
            for _ in range(2))
        self.lm_head = nn.Linear(6, 9, bias=False)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["mlp"](torch.tanh(block["q_proj"](x)) * block["v_proj"](x))
        return self.lm_head(x)

def lora_state(module):
    """{name: parameter} of the updates alone."""
    return {name: p for name, p in module.named_parameters() if "lora_" in name}

def make(names=("q_proj", "v_proj", "lm_head"), r=3, alpha=12, dropout=0.0):
    """A toy with LoRA whose B is no longer zero, the toy before, and an input."""
    torch.manual_seed(0)
    plain = Toy()
    ours = copy.deepcopy(plain)
    add_lora(ours, names, r, alpha, dropout)
    for name, p in ours.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    return ours, plain, torch.randn(5, 6)

def make_peft(plain, ours, names=("q_proj", "v_proj", "lm_head"), r=3, alpha=12):
    """peft's wrapping of the same toy, with our updates under its names."""
    reference = get_peft_model(copy.deepcopy(plain), LoraConfig(r=r, lora_alpha=alpha, target_modules=list(names)))
    theirs = dict(reference.named_parameters())
    for name, p in ours.named_parameters():
        if "lora_" in name:
            theirs[f"base_model.model.{name.replace('.weight', '.default.weight')}"].data.copy_(p.data)
    return reference

def test_outputs_and_gradients_equal_peft():
    ours, plain, x = make()
    reference = make_peft(plain, ours)
    assert_close(ours(x), reference(x))
    ours(x).square().sum().backward()
    reference(x).square().sum().backward()
    expected = {name.replace(".default", "").removeprefix("base_model.model."): p.grad
                for name, p in reference.named_parameters() if p.requires_grad}
    trained = {name: p.grad for name, p in ours.named_parameters() if "lora_" in name}
    assert trained.keys() == expected.keys()
    for name in trained:
        assert_close(trained[name], expected[name])

def test_merged_weights_equal_peft_and_give_the_same_outputs():
    ours, plain, x = make()
    expected_weights = make_peft(plain, ours).merge_and_unload().state_dict()
    before = ours(x)
    names = merge_lora(ours)
    assert names == ["blocks.0.q_proj", "blocks.0.v_proj", "blocks.1.q_proj", "blocks.1.v_proj", "lm_head"]
    assert_close(ours(x), before)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for name, weight in ours.state_dict().items():
        assert_close(weight, expected_weights[name])
    assert not any(isinstance(part, LoRALinear) for part in ours.modules())

def test_the_update_by_hand():
    layer = LoRALinear(nn.Linear(2, 1, bias=False), r=1, alpha=2)
    with torch.no_grad():
        layer.base.weight.copy_(torch.tensor([[1.0, 2.0]]))
        layer.lora_A.weight.copy_(torch.tensor([[3.0, 4.0]]))
        layer.lora_B.weight.copy_(torch.tensor([[5.0]]))
    # W x = 3, A x = 7, B A x = 35, times alpha / r = 2
    assert layer(torch.ones(2)).item() == 3 + 2 * 35
    assert layer.merged().weight.tolist() == [[1 + 2 * 15, 2 + 2 * 20]]

def test_at_the_start_nothing_changes_and_only_the_update_trains():
    torch.manual_seed(0)
    plain = Toy()
    ours, x = copy.deepcopy(plain), torch.randn(5, 6)
    add_lora(ours, ["q_proj"], r=2, alpha=4)
    assert torch.equal(ours(x), plain(x))
    ours(x).sum().backward()
    assert all(block["q_proj"].base.weight.grad is None for block in ours.blocks)
    assert [p.grad is not None for p in lora_state(ours).values()] == [True] * 4

def test_names_and_state():
    ours, _, _ = make(["v_proj"])
    assert list(lora_state(ours)) == [f"blocks.{i}.v_proj.lora_{m}.weight" for i in (0, 1) for m in "AB"]
    assert "blocks.0.v_proj.base.weight" in ours.state_dict()
    assert sum(p.numel() for p in lora_state(ours).values()) == 2 * (3 * 6 + 6 * 3)

def test_dropout_only_in_training():
    ours, _, x = make(dropout=0.5)
    assert not torch.equal(ours.train()(x), ours(x))
    assert torch.equal(ours.eval()(x), ours(x))

def test_a_bfloat16_base_keeps_a_float32_update():
    torch.manual_seed(0)
    toy = Toy().bfloat16()
    add_lora(toy, ["q_proj"], r=2, alpha=4)
    assert all(p.dtype == torch.float32 for p in lora_state(toy).values())
    assert toy(torch.randn(5, 6).bfloat16()).dtype == torch.bfloat16
    merge_lora(toy)
    assert toy.blocks[0]["q_proj"].weight.dtype == torch.bfloat16

def test_a_misspelt_name_is_refused_before_anything_is_wrapped():
    toy = Toy()
    with pytest.raises(ValueError, match='"w_proj", there are lm_head, mlp, q_proj, v_proj'):
        add_lora(toy, ["q_proj", "w_proj"], r=2, alpha=4)
    assert not lora_state(toy)
    add_lora(toy, ["q_proj"], r=2, alpha=4)
    with pytest.raises(ValueError, match='"q_proj"'):       # a second time would stack updates
        add_lora(toy, ["q_proj"], r=2, alpha=4)
    with pytest.raises(ValueError, match="rank is 0"):
        LoRALinear(nn.Linear(2, 2), r=0, alpha=1)
