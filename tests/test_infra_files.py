"""Folders written whole or not at all, and read strictly. Run: pytest tests/test_infra_files.py"""

import pytest
import torch
from torch import nn

from infra import files

def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "run"
    with files.atomic_folder(target) as folder:
        (folder / "a").write_text("first")
        assert not target.exists()
    with pytest.raises(RuntimeError), files.atomic_folder(target) as folder:
        (folder / "a").write_text("half of the sec")
        raise RuntimeError("power failure")
    assert (target / "a").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]                 # nothing temporary is left

def test_loading_names_everything_that_does_not_fit():
    module = nn.Linear(2, 3)
    message = r"1 missing \(bias\).*1 left over \(scale\).*weight \(5, 2\) instead of \(3, 2\)"
    with pytest.raises(ValueError, match=message):
        files.load_strict(module, {"weight": torch.zeros(5, 2), "scale": torch.zeros(1)}, "here")
    before = module.bias.clone()
    tensors = {"weight": torch.ones(3, 2), "old": torch.ones(1)}
    files.load_strict(module, tensors, "here", fresh=("bias",), dropped=("old",))
    assert torch.equal(module.weight, torch.ones(3, 2)) and torch.equal(module.bias, before)

def test_a_truncated_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "model.safetensors"
    files.save_tensors({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        files.read_tensors(path)

def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    files.write_json({"step": 1}, tmp_path / "state.json")
    with pytest.raises(TypeError):
        files.write_json({"step": {2}}, tmp_path / "state.json")           # a set is not JSON
    with pytest.raises(RuntimeError), files.atomic_file(tmp_path / "state.json") as temporary:
        temporary.write_text("half of the sec")
        raise RuntimeError("power failure")
    assert files.read_json(tmp_path / "state.json") == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]

def test_both_kinds_of_files_give_back_what_was_saved(tmp_path):
    tensors = {"view": torch.arange(6.).view(2, 3).T, "half": torch.ones(2, dtype=torch.bfloat16)}
    for name in ("a.safetensors", "b.pth"):
        files.save_tensors(tensors, tmp_path / name)
        loaded = files.read_tensors(tmp_path / name)
        assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[n], t) for n, t in tensors.items())
    torch.save({"model": {"module": tensors}, "epoch": 3}, tmp_path / "c.pth")     # as official files nest them
    assert files.read_tensors(tmp_path / "c.pth").keys() == tensors.keys()

def test_a_fingerprint_is_of_names_shapes_and_values_and_stays_what_it_was():
    tensors = {"b": torch.arange(100.).view(10, 10), "a": torch.ones(3, dtype=torch.bfloat16)}
    digits = files.fingerprint(tensors)
    assert digits == files.fingerprint(reversed(tensors.items())) == "6064a37366462bee"
    for change in ({"a": torch.zeros(3)}, {"b": tensors["b"].view(100)}, {"c": torch.ones(1)}):
        assert files.fingerprint(tensors | change) != digits
