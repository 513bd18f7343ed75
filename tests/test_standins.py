"""What assets/toy/ holds: stand-ins for UMT, BERT and Vicuna, as good as the demo needs, of today's toy world.

Run: pytest tests/test_standins.py
"""
import numpy as np
import pytest
import torch

import train
from infra.files import read_json, read_tensors
from prompt import pad_ids
from qformer import QFormer
from tokenizer import WordPiece
from toy import probe, world
from training.resume import TOY_INIT
from weights import checkpoint
from weights.hf_llama import inspect_llm

LLM = TOY_INIT.parent / "llm"

@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three clips and questions of each task, of a world of their own."""
    out = tmp_path_factory.mktemp("standins") / "toy"
    world.build(world.WorldConfig(str(out), clips=8, questions=3, seed=77, workers=1))
    return probe.read_benchmark(out, 3)

def mean(rows):
    return np.mean([shares for _, shares in rows], axis=0)

def test_they_fit_into_8_megabytes_in_float16():
    files = [path for path in TOY_INIT.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    for folder in (TOY_INIT, LLM):
        assert {t.dtype for t in read_tensors(folder / "model.safetensors").values()} == {torch.float16}

def test_they_know_today_s_world():
    """Where this fails, scenarios or texts have changed: make demo-from-nothing trains the stand-ins anew."""
    known = read_json(TOY_INIT / "world.json")
    assert world.record(known["settings"]) == known
    assert known["settings"]["seed"] != world.WorldConfig().seed             # no clip of the demo's world

def test_stage_1_starts_from_them_and_stage_2_finds_their_llm(tmp_path):
    cfg, _ = train.parse(["--stage", "1", "--out", str(tmp_path)])
    assert train.resume.init_checkpoint(cfg) == TOY_INIT
    _, record = checkpoint.read_config(TOY_INIT)
    assert checkpoint.find_llm(TOY_INIT, record["llm"]["path"]).resolve() == LLM
    assert inspect_llm(LLM)[1] == record["llm"]["fingerprint"]
    (tmp_path / "init").mkdir()                                              # whoever makes an own one wants that
    with pytest.raises(FileNotFoundError, match="init, which is not finished"):
        train.resume.init_checkpoint(cfg)

@torch.no_grad()
def test_the_vit_names_what_moves(clips):
    colour, shape, activity = mean(probe.probe_vit(TOY_INIT, clips))
    assert colour > 0.98 and shape > 0.95 and activity > 0.95

@torch.no_grad()
def test_the_llm_answers_where_the_caption_takes_the_video_s_place(clips):
    assert mean(probe.probe_llm_from_text(LLM, clips)) > 0.75

@torch.no_grad()
def test_the_text_half_fills_in_a_hidden_word(clips):
    cfg, _ = checkpoint.read_config(TOY_INIT)
    tok, qformer = WordPiece.load(TOY_INIT / "vocab.txt"), QFormer(cfg.qformer).eval()
    tensors = {name.removeprefix("qformer."): t.float() for name, t in
               read_tensors(TOY_INIT / "model.safetensors").items() if name.startswith("qformer.")}
    missing, unexpected = qformer.load_state_dict(tensors, strict=False)
    assert not unexpected and all("crossattention" in name for name in missing)
    layer = qformer.bert["encoder"]["layer"][0]
    text, query = (part["dense"].weight for part in (layer.intermediate, layer.intermediate_query))
    assert torch.equal(text, query)                                          # as the official Q-Former starts

    # the second word, such as the verb after "it", often follows from those around it
    rows = [tok.encode(clip["caption"], sep=True) for task in clips.values() for clip in task]
    ids, mask = pad_ids(rows, tok.pad_id)                                    # (B, S)
    places = torch.full((len(rows),), 2)
    hidden = qformer(ids=ids.scatter(1, places[:, None], tok.mask_id), mask=mask)
    words = qformer.bert["embeddings"].word_embeddings.weight
    best = qformer.cls["predictions"](hidden[torch.arange(len(rows)), places], words).argmax(-1)
    assert (best == ids[torch.arange(len(rows)), places]).float().mean() > 0.5
