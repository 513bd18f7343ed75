"""python -m pytest tests/test_render.py"""

import random

import decord
import numpy as np
import pytest
from PIL import Image

import qagen
import render
import toyworld


@pytest.mark.parametrize("task", qagen.TASKS)
def test_decord_reads_back_what_was_drawn(task, tmp_path):
    """Every frame, those that look like the one before as well, in its very colours."""
    clip = toyworld.simulate(task, random.Random(f"{task} 0"))
    drawn = np.stack([np.asarray(frame.convert("RGB")) for frame in render.render(clip)])
    render.write_gif(render.render(clip), tmp_path / "clip.gif")
    reader = decord.VideoReader(str(tmp_path / "clip.gif"), num_threads=1)
    assert len(reader) == 16 and reader.get_avg_fps() == pytest.approx(2)
    np.testing.assert_array_equal(reader.get_batch(range(16)).asnumpy(), drawn)


def test_a_folder_of_jpegs_comes_at_three_frames_a_second(tmp_path):
    clip = {"objects": [], "background": ["white"] * 8 + ["black"] * 8}
    render.write_frames(render.render(clip), tmp_path / "clip")
    paths = sorted((tmp_path / "clip").iterdir())
    assert [path.name for path in paths] == [f"{i:05d}.jpg" for i in range(1, 25)]
    assert [np.asarray(Image.open(paths[i])).mean() > 128 for i in (0, 11, 12, 23)] == [True, True, False, False]


def test_every_shape_and_place_is_drawn():
    """What the teacher has a class for changes the picture, and no two shapes look alike."""
    shapes = [shape for shape in render.SHAPES[1:] if shape not in render.SCENERY]
    clips = [{"objects": [toyworld.thing(shape, "red", 24, 24, size=30)], "background": ["light"]} for shape in shapes]
    clips += [{"objects": [], "background": [place]} for place in ("light", *render.SCENERY)]
    assert len({render.render(clip)[0].tobytes() for clip in clips}) == len(clips)
    assert set(render.SCENERY) == {*qagen.PLACES, "dark"}


def test_targets_name_the_thing_that_covers_a_patch():
    one = toyworld.thing("square", "red", 12, 12, size=14)
    toyworld.act(one, "blinks", 4, 8)
    clip = {"objects": [one], "background": ["light"] * 8 + ["sea"] * 8}
    targets = render.token_targets(clip, patch=8).reshape(16, 6, 6, 3)
    red = render.COLOURS.index("red"), render.SHAPES.index("square")
    assert targets[0, 1, 1].tolist() == [*red, render.ACTIVITIES.index("still")]
    assert targets[5, 1, 1].tolist() == [*red, render.ACTIVITIES.index("blinks")]
    assert targets[0, 4, 4].tolist() == [0, 0, 0]
    assert targets[12, 4, 4].tolist() == [0, render.SHAPES.index("sea"), 0]
    assert render.token_targets(clip, patch=16, frames=[0, 9]).shape == (2, 9, 3)
    assert render.token_targets(clip).shape == (16, 16, 3)  # patches of 12 units


def test_a_spin_turns_the_mark_clockwise_on_the_screen():
    one = toyworld.thing("circle", "red", 24, 24, size=24)
    toyworld.act(one, "spins clockwise")
    frame = np.asarray(render.render({"objects": [one], "background": ["light"] * 16}, pixels=96)[1])
    ys, xs = np.nonzero(frame == render.INK["white"])
    assert xs.mean() > 56 and abs(ys.mean() - 48) < 2           # from twelve o'clock to three
    assert one["angle"][:5] == [90, 90, 180, 180, 270]


def test_a_thing_counts_from_a_tenth_of_a_patch():
    def classes(size):
        clip = {"objects": [toyworld.thing("square", "red", 24, 24, size)], "background": ["light"] * 16}
        return render.token_targets(clip, patch=48, frames=[0])[0, 0, 0]

    assert (classes(12), classes(24)) == (0, render.COLOURS.index("red"))  # about 5 % and 20 % of 48 x 48


def test_the_contact_sheet_is_a_picture(tmp_path):
    rows = list(toyworld.sheet_rows())
    render.contact_sheet(rows, tmp_path / "sheet.png", columns=4, pixels=24)
    assert len(rows) == 20 and Image.open(tmp_path / "sheet.png").size == (4 * 124, 5 * 198)
