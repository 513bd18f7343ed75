"""python -m pytest tests/test_world.py"""

import hashlib
import json
import random
import re
from functools import partial

import decord
import numpy as np
import pytest
from PIL import Image

from evaluation.tasks import TASKS
from infra.cli import run
from toy import draw
from toy import world as toyworld
from toy.scenarios import SCENARIOS
from training import annotations

SMALL = dict(clips=40, questions=4, texts=60)

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "toy"
    assert build(out, workers=2)
    return out

def build(out, **options):
    return toyworld.build(toyworld.WorldConfig(str(out), **SMALL, **options))

def command(*argv):
    """The exit code of `python -m toy.world`."""
    with pytest.raises(SystemExit) as stop:
        run(partial(toyworld.main, argv), "toy.world")
    return stop.value.code or 0

def clips(task, count=30, split="train"):
    return [toyworld.simulate(task, random.Random(f"{task} {i}"), split) for i in range(count)]

def digest(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".index"}

def test_the_layout_is_complete(world):
    lines = (world / "annotations.jsonl").read_text().splitlines()
    (source,) = annotations.load_corpus(world / "corpus_caption.json")
    captions = list(annotations.load_annotations(source))
    instructions = json.loads((world / "instructions.json").read_text())
    assert [json.loads(line)["id"] for line in lines] == [entry["video"] for entry in captions] and len(lines) == 40
    # five clips in eight are of the tasks; of the playground's every second is talked about
    assert {e["video"] for e in instructions} == {c["video"] for i, c in enumerate(captions) if i < 25 or i % 2 == 0}
    assert all(set(turn) == {"i", "q", "a"} for entry in instructions for turn in entry["QA"])
    assert all((world / "videos" / entry["video"]).is_file() for entry in captions + instructions)
    assert len((world / "text.jsonl").read_text().splitlines()) == 60
    assert np.load(world / "targets.npy", mmap_mode="r").shape == (40, 16, 16, 3)  # 48 / 12 = 4 patches a side
    assert json.loads((world / "meta.json").read_text())["activities"] == list(draw.ACTIVITY_CLASSES)

def test_the_benchmark_has_the_official_layout(world):
    for task in TASKS:
        entries = json.loads((world / "mvbench" / "json" / f"{task.file}.json").read_text())
        assert len(entries) == 4
        for entry in entries:
            assert entry["answer"] in entry["candidates"] and ("start" in entry) == ("end" in entry) == task.bound
            media = world / "mvbench" / "video" / task.folder / entry["video"]
            if task.short == "ER":
                assert [p.name for p in sorted(media.iterdir())] == [f"{i:05d}.jpg" for i in range(1, 25)]
            else:
                assert len(decord.VideoReader(str(media))) == 16

def test_same_seed_same_bytes_whatever_the_workers(world, tmp_path):
    build(tmp_path / "again", workers=1)
    assert digest(tmp_path / "again") == digest(world)
    build(tmp_path / "other", seed=1, workers=2)
    assert digest(tmp_path / "other") != digest(world)

def test_training_never_shows_a_held_out_pair():
    assert [len(set(part)) for part in zip(*toyworld.HELD_OUT, strict=True)] == [6, 6]
    novel = {"train": 0, "test": 0}
    for task in SCENARIOS:
        for split in novel:
            for clip in clips(task, split=split):
                held = [(one["shape"], one["colour"]) in toyworld.HELD_OUT for one in clip["objects"]]
                novel[split] += any(held)
    assert novel["train"] == 0 and novel["test"] > 100  # of 390: half of the 13 tasks with a coloured hero

@pytest.mark.parametrize("task", [task.file for task in TASKS])
def test_things_stay_in_view_and_annotations_are_plain(task):
    for clip in clips(task):
        assert json.loads(json.dumps(clip)) == clip
        for one in clip["objects"]:
            assert one["shape"] in draw.SHAPE_CLASSES and one["colour"] in draw.COLOUR_CLASSES
            assert set(one["activity"]) <= set(draw.ACTIVITY_CLASSES)
            assert all(len(one[key]) == 16 for key in ("x", "y", "size", "angle", "look", "activity"))
            assert all(1 <= c <= 47 for key in "xy" for c, look in zip(one[key], one["look"], strict=True)
                       if look != "hidden")

def test_a_finished_world_is_kept_and_another_is_refused(world, capsys):
    assert build(world) is False
    assert command("--out", str(world), "--clips", "40", "--questions", "4", "--texts", "60") == 0
    assert capsys.readouterr().out == f"{world}: already there\n"
    assert command("--out", str(world), "--clips", "41", "--questions", "4", "--texts", "60") == 2
    message = capsys.readouterr().err
    assert "Choose another --out or delete it" in message and message.count("\n") == 1

@pytest.mark.parametrize("settings, message", [
    (["--patch", "7"], "--patch 7: expected a divisor of 48"), (["--clips", "0"], "--clips 0: expected 1 or more")])
def test_settings_that_cannot_be(settings, message, tmp_path, capsys):
    assert command("--out", str(tmp_path / "toy"), *settings) == 2
    assert message in capsys.readouterr().err and not any(tmp_path.iterdir())

def test_a_stopped_run_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(toyworld, "write_world", stop)
    assert command("--out", str(tmp_path / "toy")) == 130
    assert not any(tmp_path.iterdir())

def test_where_nobody_watches_there_are_no_bars_but_the_time(tmp_path, capsys):
    settings = ["--clips", "4", "--questions", "1", "--texts", "2", "--workers", "1"]
    assert command("--out", str(tmp_path / "toy"), *settings, "--sheet", str(tmp_path / "sheet.png")) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r".*/toy: written in \d+ s\n", out) and err == ""
    assert Image.open(tmp_path / "sheet.png").width > 1000
