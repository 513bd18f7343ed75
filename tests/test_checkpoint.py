"""Folders written whole or not at all, and read strictly. Run: pytest tests/test_checkpoint.py"""
import json

import pytest
import torch
from torch import nn

import checkpoint
from llama import Llama, LlamaConfig
from lora import add_lora

TINY = LlamaConfig(vocab_size=40, width=16, depth=2, heads=2, kv_heads=1, ffn=32)


def llm_folder(tmp_path, golden, seed=0):
    torch.manual_seed(seed)
    llama = Llama(TINY)
    with checkpoint.whole_folder(tmp_path / f"llm{seed}") as folder:
        checkpoint.write_llm(llama, golden / "tokenizer.model", folder)
    return llama, tmp_path / f"llm{seed}"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "run"
    with checkpoint.whole_folder(target) as folder:
        (folder / "a").write_text("first")
        assert not target.exists()
    with pytest.raises(RuntimeError), checkpoint.whole_folder(target) as folder:
        (folder / "a").write_text("half of the sec")
        raise RuntimeError("power failure")
    assert (target / "a").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]                 # nothing temporary is left


def test_loading_names_everything_that_does_not_fit():
    module = nn.Linear(2, 3)
    message = r"1 missing \(bias\).*1 left over \(scale\).*weight \(5, 2\) instead of \(3, 2\)"
    with pytest.raises(ValueError, match=message):
        checkpoint.load_strictly(module, {"weight": torch.zeros(5, 2), "scale": torch.zeros(1)}, "here")
    before = module.bias.clone()
    tensors = {"weight": torch.ones(3, 2), "old": torch.ones(1)}
    checkpoint.load_strictly(module, tensors, "here", fresh=("bias",), dropped=("old",))
    assert torch.equal(module.weight, torch.ones(3, 2)) and torch.equal(module.bias, before)


def test_a_truncated_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.save_tensors({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        checkpoint.read_tensors(path)


def test_an_llm_folder_survives_the_round_trip_and_transformers_reads_it(tmp_path, golden):
    transformers = pytest.importorskip("transformers")
    llama, folder = llm_folder(tmp_path, golden)
    again, _ = checkpoint.load_llm(folder)
    ids = torch.arange(12).view(2, 6)
    logits = llama.lm_head(llama(llama.embed(ids)))
    torch.testing.assert_close(again.lm_head(again(again.embed(ids))), logits)
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(theirs(ids).logits, logits, atol=1e-5, rtol=1e-4)


def test_another_llm_is_refused_with_both_named(tmp_path, golden):
    holder = nn.Module()
    holder.llama_model, right = llm_folder(tmp_path, golden, seed=0)
    add_lora(holder.llama_model, ["q_proj"], 2, 4, 0.0)
    _, wrong = llm_folder(tmp_path, golden, seed=1)
    _, mark = checkpoint.put_llm(holder, right)
    checkpoint.put_llm(holder, right, expected=mark, needed_by="run")
    with pytest.raises(ValueError, match=f"run was trained with the LLM {mark}, but .*llm1 holds"):
        checkpoint.put_llm(holder, wrong, expected=mark, needed_by="run")


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        checkpoint.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        checkpoint.read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="not a VideoChat2 checkpoint"):
        checkpoint.read_config(tmp_path)
