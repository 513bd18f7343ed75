"""Shared by all tests: the repository root on the path, and the golden numbers of the official implementation."""
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

GOLDEN = Path(__file__).resolve().parent / "golden"
BERT_VOCAB = GOLDEN.parent.parent / "assets" / "bert_vocab.txt"
WEIGHTS_OF = {"qformer_text": "qformer_query", "qformer_joint": "qformer_query", "qformer_cap": "qformer_query",
              "vit_interp": "vit"}  # kept once: they are the same


@pytest.fixture(scope="session")
def golden():
    """Folder of numbers recorded from the official implementation."""
    return GOLDEN


def golden_tensors(name):
    """All tensors of one recorded case, {name: tensor}: `w.`, `in.`, `out.`, `grad.`, `aux.`"""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    if name in WEIGHTS_OF:
        shared = load_file(GOLDEN / f"{WEIGHTS_OF[name]}.safetensors")
        tensors |= {key: t for key, t in shared.items() if key.startswith("w.")}
    return tensors
