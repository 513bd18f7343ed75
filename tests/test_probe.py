"""What the probe counts; tests/test_train.py runs it on a whole run. Run: pytest tests/test_probe.py"""
import pytest
import torch

from toy import probe

@pytest.mark.parametrize(("task", "frames"), [
    ("moving_count", [0, 2, 4, 6, 8, 9, 11, 13]),
    ("episodic_reasoning", [0, 2, 4, 6, 8, 10, 12, 14])])                 # pictures 2 5 8 11 14 16 19 22 of 24, 3 for 2
def test_the_frames_are_the_benchmark_s(task, frames):
    assert probe.sampled_frames(task, 8) == frames

def test_alike_is_the_mean_cosine_of_two_queries():
    assert probe.alike(torch.ones(2, 5, 3)) == pytest.approx(1)
    assert probe.alike(torch.eye(4)[None]) == pytest.approx(0)
    x = torch.randn(1, 3, 8)
    pairs = [torch.cosine_similarity(x[0, i], x[0, j], 0).item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert probe.alike(x) == pytest.approx(sum(pairs) / 3, abs=1e-6)
