"""Shared by all tests: the golden numbers of the official implementation, and an MVBench with a model
and a toy world, all tiny."""
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from videos import painted, write_video

from evaluation.engine import letter_ids
from evaluation.tasks import TASKS
from infra import files
from llama import Llama
from model import PRESETS, VideoChat2
from tokenizer import SentencePiece
from toy import world as toyworld
from weights import checkpoint, hf_llama

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

@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A toy world for the micro preset; tests do not write into it."""
    folder = tmp_path_factory.mktemp("world") / "toy"
    toyworld.build(toyworld.WorldConfig(str(folder), clips=40, questions=2, texts=200, patch=12, workers=1))
    return folder

# ---- MVBench at tiny size --------------------------------------------------------------------------------------------

SUFFIX = {"ssv2_video": ".webm", "nturgbd": ".avi"}                        # as the original archives have them

@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """The official folder tree, two questions a task: H.264, VP9 in WebM, AVI, folders of JPEGs at 3 per second."""
    root = tmp_path_factory.mktemp("MVBench")
    for t, task in enumerate(TASKS):
        entries = []
        for q in range(2):
            folder = root / "video" / task.folder
            if task.short == "ER":
                name = f"s01e0{q}_seg02_clip_0{q}"
                (folder / name).mkdir(parents=True)
                for i in range(1, 31):
                    Image.fromarray(painted(i)).save(folder / name / f"{i:05d}.jpg", quality=95)
            else:
                name = f"{task.short}_{q}{SUFFIX.get(task.folder, '.mp4')}"
                codec = {".webm": "libvpx-vp9", ".avi": "mpeg4"}.get(SUFFIX.get(task.folder), "libx264")
                write_video(folder / name, codec, frames=40, rate=10, **({"q:v": 2} if codec == "mpeg4" else {}))
            entry = {"video": name, "question": f"What happens, {t}?", "answer": "It spins.",
                     "candidates": ["It jumps.", "It spins.", "Nothing."], "question_type": "ignored"}
            entries.append(entry | ({"start": 1.0, "end": 3.0} if task.bound else {}))
        (root / "json").mkdir(exist_ok=True)
        (root / "json" / f"{task.file}.json").write_text(json.dumps(entries))
    return root

@pytest.fixture(scope="session")
def ckpt(tmp_path_factory, golden):
    """A checkpoint of stage 3 at micro size, with random weights and a full vocabulary, and its LLM's folder."""
    out = tmp_path_factory.mktemp("run")
    cfg = PRESETS["micro"]()
    cfg.llama.vocab_size = SentencePiece(golden / "tokenizer.model").vocab_size
    cfg.qformer.vocab_size = 30523
    torch.manual_seed(0)
    llama = Llama(cfg.llama)
    with torch.no_grad():                                                  # letters that differ in more than rounding
        llama.lm_head.weight[letter_ids(SentencePiece(golden / "tokenizer.model"))] *= 30
    with files.atomic_folder(out / "llm") as folder:
        hf_llama.write_llm(llama, golden / "tokenizer.model", folder)
    _, mark = hf_llama.inspect_llm(out / "llm")
    model = VideoChat2(cfg, 3, defer_llm=True)
    with files.atomic_folder(out / "stage3") as folder:
        checkpoint.save_checkpoint(model.state_dict(), 3, cfg, folder, BERT_VOCAB,
                                    {"path": "../llm", "fingerprint": mark})
    return out / "stage3"
