"""pytest tests/test_data.py"""
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BERT_VOCAB
from PIL import Image

import data
from data import Sampler, VideoTextDataset, collate_stage1, collate_stage2, collate_stage3
from infra.media import MediaError
from model import Config
from prompt import IGNORE, VIDEO, seconds_message
from tokenizer import SentencePiece, WordPiece
from training import check_data
from training.annotations import load_corpus
from video import Transform

def paint(path, value, frames=16, size=48):
    """A GIF of the grey level `value` with a bar that moves two columns a frame."""
    images = [Image.new("L", (size, size), value) for _ in range(frames)]
    for i, image in enumerate(images):
        image.paste(255 - value, (2 * i, 10, 2 * i + 10, 20))
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=500, loop=0)

def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path

@pytest.fixture
def world(tmp_path):
    """Six videos and five images with captions; clip k has grey level 20 k."""
    for k in range(6):
        paint(tmp_path / "media" / f"{k}.gif", 20 * k)
    for k in range(5):
        Image.new("RGB", (60, 50), (20 * k,) * 3).save(tmp_path / "media" / f"{k}.png")
    write(tmp_path / "videos.json", [{"video": f"{k}.gif", "caption": [f"video {k}", f"clip {k}"]} for k in range(6)])
    write(tmp_path / "images.json", [{"image": f"{k}.png", "caption": f"image {k}"} for k in range(5)])
    write(tmp_path / "corpus.json", [["videos.json", "media", "video"], ["images.json", "media"]])
    return tmp_path

def clips(world, **options):
    transform = Transform(32, train=True)
    return VideoTextDataset(load_corpus(world / "corpus.json"), 4, transform, **options)

# ---- samples ---------------------------------------------------------------------------------------------------------

def test_a_sample(world):
    sample = clips(world)[3]
    assert sample["video"].shape == (4, 3, 32, 32) and sample["video"].dtype == torch.float32
    assert sample["text"] in ("video 3", "clip 3") and sample["idx"] == 3 and sample["path"].endswith("3.gif")
    assert len(sample["seconds"]) == 4 and sample["bad"] == []
    image = clips(world)[6]
    assert image["video"].shape == (1, 3, 32, 32) and image["medium"] == "image" and image["text"] == "image 0"

def test_the_same_seed_gives_the_same_sample(world):
    one, two = clips(world)[2], clips(world)[2]
    assert torch.equal(one["video"], two["video"]) and one["seconds"] == two["seconds"]
    assert one["prompt_choice"] == two["prompt_choice"]
    later = clips(world)
    later.set_epoch(1)
    assert not torch.equal(one["video"], later[2]["video"])
    assert not torch.equal(one["video"], clips(world, seed=1)[2]["video"])

def test_a_bad_medium_replaces_the_whole_sample(world):
    (world / "media" / "2.gif").write_bytes(b"broken" * 20)
    (world / "media" / "5.gif").unlink()
    dataset = clips(world)
    sample = dataset[2]
    assert sample["idx"] == 3 and sample["text"] in ("video 3", "clip 3") and sample["path"].endswith("3.gif")
    assert torch.equal(sample["video"], dataset[3]["video"])
    assert [line.split(": ")[0] for line in sample["bad"]] == [str(world / "media" / "2.gif")]
    assert dataset[5]["idx"] == 0  # the next of the same source: still a video

def test_too_many_bad_media_stop_the_run(world):
    for path in (world / "media").glob("*.gif"):
        path.unlink()
    with pytest.raises(MediaError, match="no such file; 4 unreadable media in a row"):
        clips(world, max_bad=3)[0]

def test_captions_and_instructions_do_not_mix(world):
    write(world / "qa.json", [{"video": "a.gif", "QA": [{"q": "", "a": "yes"}]}])
    sources = load_corpus([[str(world / "videos.json"), "", "video"], [str(world / "qa.json"), "", "video"]])
    with pytest.raises(ValueError, match="captions and instructions in one corpus"):
        VideoTextDataset(sources, 4, Transform(32))

def test_the_official_sampling_and_an_unknown_one(world):
    sample = clips(world, sampling="official")[3]
    assert sample["video"].shape == (4, 3, 32, 32) and max(sample["seconds"]) < 7.5    # never the last frame
    with pytest.raises(ValueError, match="frame_sampling 'random': expected one of rand, middle, official, mvbench"):
        clips(world, sampling="random")

def test_other_keys_and_suffixes(world):
    write(world / "own.json", [{"key": "4", "caption": "four"}])
    source = {"anno": "own.json", "root": "media", "media": "video", "media_key": "key", "suffix": ".gif"}
    dataset = VideoTextDataset(load_corpus(write(world / "c.json", [source])), 4, Transform(32))
    assert dataset[0]["text"] == "four"

# ---- order -----------------------------------------------------------------------------------------------------------

def test_an_epoch_holds_every_sample_once_and_one_medium_a_batch(world):
    sampler = Sampler(clips(world), 2)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 3 + 2  # five images: the odd one is left out
    assert all(len({i < 6 for i in batch}) == 1 for batch in batches)
    seen = sorted(i for batch in batches for i in batch)
    assert seen[:6] == list(range(6)) and len(set(seen)) == 10
    sampler.next_epoch()
    assert list(sampler) != batches
    sampler.skip_to(0)
    assert list(sampler) == batches

def test_going_on_in_mid_epoch_equals_not_stopping(world):
    def run(sampler, steps):
        taken = []
        while len(taken) < steps:
            for batch in sampler:
                taken.append((sampler.dataset.epoch, batch))
            sampler.next_epoch()
        return taken[:steps]

    whole = run(Sampler(clips(world), 2, seed=7), 13)
    later = Sampler(clips(world), 2, seed=7)
    later.skip_to(8)
    assert run(later, 5) == whole[8:]

def test_a_batch_holds_texts_of_nearly_the_same_length():
    class Texts:
        def __len__(self):
            return 256

        def lengths(self, indices):
            return np.where(indices % 4 == 0, 500, 20)

    batches = list(Sampler(Texts(), 8))
    assert sorted(i for batch in batches for i in batch) == list(range(256))
    kinds = [{i % 4 == 0 for i in batch} for batch in batches]
    assert sum(len(kind) == 2 for kind in kinds) <= 2                       # one in each window of 16 batches
    assert len({tuple(kind) for kind in kinds[:16]}) > 1                   # and the batches come in any order

def test_weights(world):
    sources = load_corpus(world / "corpus.json")
    sources[0].weight, sources[1].weight = 2.5, 0.4
    dataset = VideoTextDataset(sources, 4, Transform(32))
    drawn = [i for batch in Sampler(dataset, 1) for i in batch]
    assert sum(i < 6 for i in drawn) == 15 and len({i for i in drawn if i >= 6}) == 2
    assert all(drawn.count(i) in (2, 3) for i in range(6))

def test_processes_share_a_batch(world):
    whole = list(Sampler(clips(world), 4))
    shares = [list(Sampler(clips(world), 4, rank=rank, world_size=2)) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in whole]

def test_too_few_samples_for_a_batch(world):
    with pytest.raises(ValueError, match="11 samples do not fill a batch of 7"):
        Sampler(clips(world), 7)
    assert len(Sampler(range(10), 3)) == 3  # any dataset will do

# ---- batches ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tok(golden):
    return SentencePiece(golden / "tokenizer.model")

@pytest.fixture(scope="module")
def wordpiece(golden):
    return WordPiece.load(BERT_VOCAB)

CFG = Config(n_query=5, n_extra=0, question_in_qformer=False, train_separators=False)

def batches_of(dataset, collate, workers=0):
    return list(data.make_loader(dataset, Sampler(dataset, 2), collate, workers))

def test_align_batch(world, wordpiece):
    (world / "media" / "2.gif").unlink()
    batches = batches_of(clips(world), partial(collate_stage1, cfg=CFG, qformer_tok=wordpiece))
    batch = next(batch for batch in batches if batch["medium"] == "video")
    assert batch["video"].shape == (2, 4, 3, 32, 32) and batch["ids"].shape == batch["mask"].shape == (2, 8)
    assert batch["ids"][:, 0].tolist() == [wordpiece.cls_id] * 2 and batch["mask"].sum(1).tolist() == [3, 3]
    assert sum(len(batch["bad"]) for batch in batches) == 1

def test_caption_batch(world, tok):
    for batch in batches_of(clips(world), partial(collate_stage2, cfg=CFG, qformer_tok=None, llm_tok=tok)):
        assert ((batch["ids"] == VIDEO).sum(1) == 5).all()
        for row, path in zip(batch["labels"], batch["paths"], strict=True):
            caption = tok.decode(row[row != IGNORE].tolist())
            assert caption.endswith("###") and path.split("/")[-1][0] in caption
            assert batch["medium"] == "image" or "image" not in caption

def test_instruct_batch(world, tok, wordpiece):
    qas = [{"i": "Watch.", "q": f"{n}?", "a": f"It is {n}."} for n in ("one", "two", "three")]
    write(world / "qa.json", [{"video": f"{k}.gif", "QA": qas, "start": 1, "end": 3} for k in range(4)])
    dataset = VideoTextDataset(load_corpus([[str(world / "qa.json"), str(world / "media"), "video"]]), 4, Transform(32))
    orders = set()
    for batch in batches_of(dataset, partial(collate_stage3, cfg=CFG, qformer_tok=wordpiece, llm_tok=tok)):
        assert batch["instruction_ids"][0, :4].tolist() == [101, 3422, 1012, 102]
        assert batch["instruction_mask"].sum(1).tolist() == [4, 4]
        for ids, row in zip(batch["ids"], batch["labels"], strict=True):
            answers = tok.decode(row[row != IGNORE].tolist())
            assert sorted(a.strip() for a in answers.split("###")) == ["", "It is one.", "It is three.", "It is two."]
            orders.add(answers)
            assert "The video contains 4 frames sampled at 1.0, 1.5, 2.0, 2.5 seconds." in tok.decode(
                ids[ids != VIDEO].tolist())
    assert len(orders) > 1  # the questions come in random order
    assert [qa["q"] for qa in qas] == ["one?", "two?", "three?"]
    assert data.qformer_text(qas[0], True) == "Watch. one?" and data.qformer_text({"q": "one?", "a": ""}, True) == ""

def test_seconds(golden):
    for case in json.loads((golden / "sampling.json").read_text())["seconds"]:
        message = seconds_message([i / case["fps"] for i in case["indices"]])
        assert message == f"The video contains 8 frames sampled at {', '.join(case['train'])} seconds."

@pytest.mark.parametrize("workers", [0, 1])
def test_an_instruction_that_leaves_no_room_names_its_entry(world, tok, wordpiece, workers):
    write(world / "qa.json", [{"video": "4.gif", "QA": [{"i": "Watch. " * 50, "q": "one?", "a": "Yes."}]}] * 2)
    dataset = VideoTextDataset(load_corpus([[str(world / "qa.json"), str(world / "media"), "video"]]), 4, Transform(32))
    collate = partial(collate_stage3, cfg=replace(CFG, max_text=40), qformer_tok=wordpiece, llm_tok=tok)
    (batch,) = batches_of(dataset, collate, workers)
    assert [line.split(" (")[0] for line in batch["no_label"]] == [
        f"{world / 'media' / '4.gif'}: no answer is within the first 40 ids"] * 2
    assert ((batch["ids"] == VIDEO).sum(1) == 5).all() and len(batch["targets"]) == 0        # the step changes nothing

def test_texts_have_no_video(world, tok, wordpiece):
    write(world / "text.json", [{"QA": [{"q": "one?", "a": "Yes."}]}] * 2)
    dataset = VideoTextDataset(load_corpus([[str(world / "text.json"), "", "text"]]), 4, Transform(32))
    (batch,) = batches_of(dataset, partial(collate_stage3, cfg=CFG, qformer_tok=wordpiece, llm_tok=tok))
    assert batch["video"] is None and not (batch["ids"] == VIDEO).any() and batch["medium"] == "text"

def test_workers_change_nothing(world, wordpiece):
    collate = partial(collate_stage1, cfg=CFG, qformer_tok=wordpiece)
    runs = [batches_of(clips(world), collate, workers) for workers in (0, 2)]
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one["video"], two["video"]) and torch.equal(one["ids"], two["ids"])

# ---- python -m training.check_data -----------------------------------------------------------------------------------

def test_check_lists_every_fault(world, capsys):
    assert check_data.main([str(world / "corpus.json"), "--decode"]) == 0
    assert "videos.json: 6 entries of video, 0 faulty" in capsys.readouterr().out
    (world / "media" / "3.gif").write_bytes(b"broken" * 20)
    entries = json.loads((world / "videos.json").read_text())
    entries[1]["caption"], entries[2]["video"] = "", "none.gif"
    write(world / "videos.json", entries)
    assert check_data.main([str(world / "corpus.json")]) == 1
    out = capsys.readouterr().out
    assert 'entry 1: an empty "caption"' in out and "entry 2: " in out and "none.gif: no such file" in out
    assert "videos.json: 6 entries of video, 2 faulty: 1 empty text, 1 missing" in out
    assert check_data.main([str(world / "corpus.json"), "--decode"]) == 1
    assert "3.gif: cannot be decoded as" in capsys.readouterr().out

def test_a_loader_that_is_left_open_does_not_keep_the_process(tmp_path):
    """Its workers heed a SIGTERM from it, by which multiprocessing ends them, and from nobody else."""
    program = ("import data, torch\n"
               "order = torch.utils.data.BatchSampler(range(1000), 4, False)\n"
               "batches = iter(data.make_loader(range(1000), order, list, 2))\n"
               "print(next(batches))\n")
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(data.__file__).parent, capture_output=True,
                          text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0, 1, 2, 3]\n", "")

def test_the_old_command_of_the_checker_names_the_new_one():
    done = subprocess.run([sys.executable, data.__file__, "check", "corpus.json"], capture_output=True, text=True)
    assert done.returncode == 1 and "python -m training.check_data corpus.json" in done.stderr
