"""Intervals, tests and tables against known values. Run: pytest tests/test_stats.py"""
import random

import pytest
from scipy import stats as scipy_stats

from evaluation import stats

@pytest.mark.parametrize("right, n, low, high", [                          # Newcombe 1998, table I; Wilson's own limits
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
    (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)])
def test_wilson_against_published_values(right, n, low, high):
    assert stats.wilson(right, n) == pytest.approx((low, high), abs=1e-4)

def test_wilson_against_scipy():
    for right, n in ((137, 200), (50, 200), (200, 200), (0, 1)):
        found = scipy_stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
        assert stats.wilson(right, n) == pytest.approx((found.low, found.high), abs=1e-6)
    assert stats.wilson(0, 0) == (0, 1)

def rows_of(videos, each):
    return [{"media": f"{v}.mp4"} for v in range(videos) for _ in range(each)]

def test_videos_are_drawn_not_questions():
    """All questions of a video alike: the interval is that of the videos, however many questions each has."""
    rng = random.Random(0)
    right = [rng.random() < 0.6 for _ in range(200)]
    one = stats.cluster_bootstrap(rows_of(200, 1), right)
    many = stats.cluster_bootstrap(rows_of(200, 9), [r for r in right for _ in range(9)])
    assert many == pytest.approx(one, abs=1e-9)
    share = sum(right) / 200
    normal = 1.96 * (share * (1 - share) / 200) ** 0.5
    assert one == pytest.approx((share - normal, share + normal), abs=0.01)
    free = stats.cluster_bootstrap(rows_of(1800, 1), [r for r in right for _ in range(9)])
    assert free[1] - free[0] < (many[1] - many[0]) / 2.5                   # as if 1,800 videos had been seen

def test_all_right_is_no_certainty_and_no_difference_is_none():
    rows = rows_of(4, 2)
    assert stats.accuracy_interval(rows, [True] * 8) == stats.wilson(4, 4)
    assert stats.accuracy_interval(rows, [False] * 8) == stats.wilson(0, 4)
    assert stats.cluster_bootstrap(rows, [0] * 8) == (0, 0)                      # of two runs that agree everywhere
    mixed = [True, False] * 4
    assert stats.accuracy_interval(rows, mixed) == stats.cluster_bootstrap(rows, mixed)

def test_the_same_draws_every_time():
    rows, right = rows_of(50, 2), [i % 3 == 0 for i in range(100)]
    assert stats.cluster_bootstrap(rows, right) == stats.cluster_bootstrap(rows, right)
    assert stats.cluster_bootstrap([], []) == (0, 1)

@pytest.mark.parametrize("a, b", [(5, 15), (0, 6), (0, 0), (7, 7), (30, 12), (900, 1100)])
def test_mcnemar_against_the_binomial_test(a, b):
    expected = scipy_stats.binomtest(a, a + b).pvalue if a + b else 1.0
    assert stats.mcnemar(a, b) == pytest.approx(expected, rel=1e-6) == stats.mcnemar(b, a)

def row(said, key="A", p=(), index=0, n=3, shift=0):
    texts = ["one", "two", "three", "four"][:n]
    texts = texts[shift:] + texts[:shift]
    return {"task": "AC", "index": index, "media": "a", "prediction": said, "candidates": texts, "letter_probabilities":
            list(p), "answer": texts["ABCD".index(key)], "correct": said[1:2] == key}

def test_letters():
    rows = [row("(A)"), row("(A)", "B"), row("(", "C"), row("(D)", "D", n=4), {**row(""), "unread": "x"}]
    table = stats.letter_counts(rows)
    assert table == {"A": (4, 1, 2), "B": (4, 1, 0), "C": (4, 1, 0), "D": (1, 1, 1), "E": (0, 0, 0), "": (0, 0, 1)}

def test_calibration_by_hand():
    """Four answers at 0.8 of which two are right, and one at 1.0 that is right: 4/5 of 0.3."""
    sure = (0.4, 0.1)                                                      # 0.8 among the options
    rows = [row("", key, sure, n=2) for key in "AABB"] + [row("", "A", (0.5, 0.0), n=2), row("")]
    error, bins = stats.calibration(rows)
    assert error == pytest.approx(0.8 * 0.3)
    assert [n for *_, n in bins] == [4, 1] and bins[0][:2] == pytest.approx((0.8, 0.5))
    assert stats.calibration([row("")]) is None

def test_permutations_by_hand():
    """One question always answered by its text, one always by the letter A, one not asked in all orders."""
    by_text = [row(f"({letter})", letter, index=1, shift=shift) for shift, letter in enumerate("BAC")]
    by_letter = [row("(A)", letter, index=2, shift=shift) for shift, letter in enumerate("BAC")]
    found = stats.option_order_consistency(by_text + by_letter + [row("(A)", index=3)])
    assert found["questions"] == 2 and found["same"] == 50 and found["always"] == 50
    assert found["mean"] == pytest.approx(100 * 4 / 6)
    assert found["letters"]["A"] == (6, 2, 4) and found["letters"]["B"] == (6, 2, 1)
