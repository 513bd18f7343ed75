"""What the probe counts; tests/test_train.py runs it on a whole run. Run: pytest tests/test_probe.py"""
import pytest

import probe


def test_words_count_where_they_stand():
    assert probe.in_place("a b c".split(), "a b c".split()) == 1
    assert probe.in_place("b c".split(), "a b c d".split()) == 0
    assert probe.in_place("a x c d e f".split(), "a b c d".split()) == 0.75
    assert probe.in_place([], "a b".split()) == 0


@pytest.mark.parametrize(("task", "frames"), [
    ("moving_count", [0, 2, 4, 6, 8, 9, 11, 13]),
    ("episodic_reasoning", [0, 2, 4, 6, 8, 10, 12, 14])])                 # pictures 2 5 8 11 14 16 19 22 of 24, 3 for 2
def test_the_frames_are_the_benchmark_s(task, frames):
    assert probe.frames_seen(task, 8) == frames
