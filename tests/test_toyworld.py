"""python -m pytest tests/test_toyworld.py"""

import hashlib
import json
import random

import decord
import numpy as np
import pytest
from PIL import Image

import qagen
import toyworld

SMALL = dict(clips=40, questions=4, texts=60)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "toy"
    assert toyworld.build(out, **SMALL, workers=2)
    return out


def clips(task, count=30, split="train"):
    return [toyworld.simulate(task, random.Random(f"{task} {i}"), split) for i in range(count)]


def digest(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_layout_is_complete(world):
    lines = (world / "annotations.jsonl").read_text().splitlines()
    captions = json.loads((world / "captions.json").read_text())
    instructions = json.loads((world / "instructions.json").read_text())
    assert len(lines) == len(captions) == 40 and {e["video"] for e in instructions} == {c["video"] for c in captions}
    assert all(set(turn) == {"i", "q", "a"} for entry in instructions for turn in entry["QA"])
    for kind in ("caption", "instruct"):
        (anno, root, medium), = json.loads((world / f"corpus_{kind}.json").read_text())
        entries = json.loads((world / anno).read_text())
        assert medium == "video" and all((world / root / entry["video"]).is_file() for entry in entries)
    assert len((world / "text.jsonl").read_text().splitlines()) == 60
    assert np.load(world / "targets.npy", mmap_mode="r").shape == (40, 16, 36, 3)
    assert json.loads((world / "meta.json").read_text())["activities"] == list(toyworld.ACTIVITIES)


def test_the_benchmark_has_the_official_layout(world):
    for task, row in qagen.TASKS.items():
        entries = json.loads((world / "mvbench" / "json" / f"{task}.json").read_text())
        assert len(entries) == 4
        for entry in entries:
            assert entry["answer"] in entry["candidates"] and ("start" in entry) == ("end" in entry) == row.bound
            media = world / "mvbench" / "video" / row.folder / entry["video"]
            if task == "episodic_reasoning":
                assert [p.name for p in sorted(media.iterdir())] == [f"{i:05d}.jpg" for i in range(1, 25)]
            else:
                assert len(decord.VideoReader(str(media))) == 16


@pytest.mark.parametrize("task", qagen.TASKS)
def test_decord_reads_back_what_was_drawn(task, tmp_path):
    """Every frame, those that look like the one before as well, in its very colours."""
    clip, = clips(task, 1)
    drawn = np.stack([np.asarray(frame.convert("RGB")) for frame in toyworld.render(clip)])
    toyworld.write_gif(toyworld.render(clip), tmp_path / "clip.gif")
    reader = decord.VideoReader(str(tmp_path / "clip.gif"), num_threads=1)
    assert len(reader) == 16 and reader.get_avg_fps() == pytest.approx(2)
    np.testing.assert_array_equal(reader.get_batch(range(16)).asnumpy(), drawn)


def test_same_seed_same_bytes_whatever_the_workers(world, tmp_path):
    toyworld.build(tmp_path / "again", **SMALL, workers=1)
    assert digest(tmp_path / "again") == digest(world)
    toyworld.build(tmp_path / "other", **SMALL, seed=1, workers=2)
    assert digest(tmp_path / "other") != digest(world)


def test_training_never_shows_a_held_out_pair():
    assert [len(set(part)) for part in zip(*toyworld.HELD_OUT, strict=True)] == [6, 6]
    novel = {"train": 0, "test": 0}
    for task in qagen.TASKS:
        for split in novel:
            for clip in clips(task, split=split):
                held = [(one["shape"], one["colour"]) in toyworld.HELD_OUT for one in clip["objects"]]
                novel[split] += any(held)
    assert novel["train"] == 0 and novel["test"] > 100  # of 390: half of the 13 tasks with a coloured hero


@pytest.mark.parametrize("task", qagen.TASKS)
def test_things_stay_in_view_and_annotations_are_plain(task):
    for clip in clips(task):
        assert json.loads(json.dumps(clip)) == clip
        for one in clip["objects"]:
            assert one["shape"] in toyworld.SHAPES and one["colour"] in toyworld.COLOURS
            assert set(one["activity"]) <= set(toyworld.ACTIVITIES)
            assert all(len(one[key]) == 16 for key in ("x", "y", "size", "angle", "look", "activity"))
            assert all(1 <= c <= 47 for key in "xy" for c, look in zip(one[key], one["look"], strict=True)
                       if look != "hidden")


def test_targets_name_the_thing_that_covers_a_patch():
    one = toyworld.thing("square", "red", 12, 12, size=14)
    toyworld.act(one, "blinks", 4, 8)
    clip = {"objects": [one], "background": ["light"] * 8 + ["sea"] * 8}
    targets = toyworld.token_targets(clip, patch=8).reshape(16, 6, 6, 3)
    red = toyworld.COLOURS.index("red"), toyworld.SHAPES.index("square")
    assert targets[0, 1, 1].tolist() == [*red, toyworld.ACTIVITIES.index("still")]
    assert targets[5, 1, 1].tolist() == [*red, toyworld.ACTIVITIES.index("blinks")]
    assert targets[0, 4, 4].tolist() == [0, 0, 0]
    assert targets[12, 4, 4].tolist() == [0, toyworld.SHAPES.index("sea"), 0]
    assert toyworld.token_targets(clip, patch=16, frames=[0, 9]).shape == (2, 9, 3)


def test_a_spin_turns_the_mark_clockwise_on_the_screen():
    one = toyworld.thing("circle", "red", 24, 24, size=24)
    toyworld.act(one, "spins clockwise")
    frame = np.asarray(toyworld.render({"objects": [one], "background": ["light"] * 16}, pixels=96)[1])
    ys, xs = np.nonzero(frame == toyworld.INK["white"])
    assert xs.mean() > 48 and one["angle"][:3] == [40, 80, 120]  # from twelve o'clock to the right


def test_a_finished_world_is_kept_and_another_is_refused(world, capsys):
    assert toyworld.build(world, **SMALL) is False
    arguments = ["--out", str(world), "--clips", "41", "--questions", "4", "--texts", "60"]
    assert toyworld.main(arguments) == 2
    message = capsys.readouterr().err
    assert "Choose another --out or delete it" in message and message.count("\n") == 1


@pytest.mark.parametrize("settings, message", [
    (["--patch", "7"], "--patch 7: expected a divisor of 48"), (["--clips", "0"], "--clips 0: expected 1 or more")])
def test_settings_that_cannot_be(settings, message, tmp_path, capsys):
    assert toyworld.main(["--out", str(tmp_path / "toy"), *settings]) == 2
    assert message in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_a_stopped_run_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(toyworld, "write_world", stop)
    assert toyworld.main(["--out", str(tmp_path / "toy")]) == 130
    assert not any(tmp_path.iterdir())


def test_the_contact_sheet_is_a_picture(tmp_path):
    toyworld.contact_sheet(tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width > 1000
