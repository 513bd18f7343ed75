"""python -m pytest tests/test_draw.py"""

import random

import decord
import numpy as np
import pytest
from PIL import Image

from evaluation.tasks import TASKS
from toy import draw, world
from toy.things import PLACES, Object

@pytest.mark.parametrize("task", [task.file for task in TASKS])
def test_decord_reads_back_what_was_drawn(task, tmp_path):
    """Every frame, those that look like the one before as well, in its very colours."""
    clip = world.simulate(task, random.Random(f"{task} 0"))
    drawn = np.stack([np.asarray(frame.convert("RGB")) for frame in draw.render(clip)])
    draw.write_gif(draw.render(clip), tmp_path / "clip.gif")
    reader = decord.VideoReader(str(tmp_path / "clip.gif"), num_threads=1)
    assert len(reader) == 16 and reader.get_avg_fps() == pytest.approx(2)
    np.testing.assert_array_equal(reader.get_batch(range(16)).asnumpy(), drawn)

def test_a_folder_of_jpegs_comes_at_three_frames_a_second(tmp_path):
    clip = {"objects": [], "background": ["white"] * 8 + ["black"] * 8}
    draw.write_frames(draw.render(clip), tmp_path / "clip")
    paths = sorted((tmp_path / "clip").iterdir())
    assert [path.name for path in paths] == [f"{i:05d}.jpg" for i in range(1, 25)]
    assert [np.asarray(Image.open(paths[i])).mean() > 128 for i in (0, 11, 12, 23)] == [True, True, False, False]

def test_every_shape_and_place_is_drawn():
    """What the teacher has a class for changes the picture, and no two shapes look alike."""
    shapes = [shape for shape in draw.SHAPE_CLASSES[1:] if shape not in draw.SCENERY]
    clips = [{"objects": [Object(shape, "red", 24, 24, size=30)], "background": ["light"]} for shape in shapes]
    clips += [{"objects": [], "background": [place]} for place in ("light", *draw.SCENERY)]
    assert len({draw.render(clip)[0].tobytes() for clip in clips}) == len(clips)
    assert set(draw.SCENERY) == {*PLACES, "dark"}

def test_targets_name_the_thing_that_covers_a_patch():
    one = Object("square", "red", 12, 12, size=14)
    one.perform("blinks", 4, 8)
    clip = {"objects": [one], "background": ["light"] * 8 + ["sea"] * 8}
    targets = draw.token_targets(clip, patch=8).reshape(16, 6, 6, 3)
    red = draw.COLOUR_CLASSES.index("red"), draw.SHAPE_CLASSES.index("square")
    assert targets[0, 1, 1].tolist() == [*red, draw.ACTIVITY_CLASSES.index("still")]
    assert targets[5, 1, 1].tolist() == [*red, draw.ACTIVITY_CLASSES.index("blinks")]
    assert targets[0, 4, 4].tolist() == [0, 0, 0]
    assert targets[12, 4, 4].tolist() == [0, draw.SHAPE_CLASSES.index("sea"), 0]
    assert draw.token_targets(clip, patch=16, frames=[0, 9]).shape == (2, 9, 3)
    assert draw.token_targets(clip).shape == (16, 16, 3)  # patches of 12 units

def test_a_spin_turns_the_mark_clockwise_on_the_screen():
    one = Object("circle", "red", 24, 24, size=24)
    one.perform("spins clockwise")
    frame = np.asarray(draw.render({"objects": [one], "background": ["light"] * 16}, pixels=96)[1])
    ys, xs = np.nonzero(frame == draw.INK["white"])
    assert xs.mean() > 56 and abs(ys.mean() - 48) < 2           # from twelve o'clock to three
    assert one["angle"][:5] == [90, 90, 180, 180, 270]

def test_a_thing_counts_from_a_tenth_of_a_patch():
    def classes(size):
        clip = {"objects": [Object("square", "red", 24, 24, size)], "background": ["light"] * 16}
        return draw.token_targets(clip, patch=48, frames=[0])[0, 0, 0]

    assert (classes(12), classes(24)) == (0, draw.COLOUR_CLASSES.index("red"))  # about 5 % and 20 % of 48 x 48

def test_the_contact_sheet_is_a_picture(tmp_path):
    rows = list(world.sheet_rows())
    draw.contact_sheet(rows, tmp_path / "sheet.png", columns=4, pixels=24)
    assert len(rows) == 20 and Image.open(tmp_path / "sheet.png").size == (4 * 124, 5 * 198)
