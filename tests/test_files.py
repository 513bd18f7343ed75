"""Folders written whole or not at all, and read strictly. Run: pytest tests/test_files.py"""

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
