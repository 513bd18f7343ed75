"""How sure is a number? Intervals, paired comparisons, calibration, and how evenly the letters are used.

    wilson            a share of n questions, 95 %
    over_videos       an average of questions that share videos: the videos are drawn anew, not the questions
    mcnemar           two runs on the same questions: could luck have made the difference?
    calibration       is what is said with 80 % right in 80 of 100 cases?
    letters           is a letter answered more often than it is the key?
    permutations      is the same option chosen when the options change places?

All take rows of predictions.jsonl (mvbench.py). Not here: what counts as right (scorers.py).
Source: Wilson 1927; Efron's percentile bootstrap, by clusters; McNemar 1947, the exact test; expected calibration
error: arXiv 1706.04599; all orders of the options: MMBench's CircularEval, arXiv 2307.06281.

    pytest tests/test_stats.py
"""
import math
from collections import defaultdict

import numpy as np

from evaluation.scorers import official
from evaluation.tasks import LETTERS, letter_of

Z = 1.959964            # 95 % of a normal distribution lie within so many standard deviations
DRAWS = 5000


def wilson(right, n):
    """right of n -> (low, high), 0 to 1: the shares under which the outcome is no rarer than 5 %; n = 0: (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    share, shrink = right / n, 1 + Z * Z / n
    middle = (share + Z * Z / (2 * n)) / shrink
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


def over_videos(rows, values, of=None, seed=0):
    """Mean of values (one per row, e.g. right: 1 or 0) -> (low, high), 95 %, by drawing the rows' videos anew.

    values may be several per row (n, k); `of` then makes one number of their means (draws, k).
    """
    groups = defaultdict(list)
    for row, value in zip(rows, values, strict=True):
        groups[row["media"]].append(value)
    if not groups:
        return 0.0, 1.0
    sums = np.array([np.sum(group, 0) for group in groups.values()], dtype=float)          # (videos,) or (videos, k)
    sizes = np.array([len(group) for group in groups.values()], dtype=float)               # (videos,)
    rng, means = np.random.default_rng(seed), []
    for _ in range(DRAWS // 100):                                                          # in parts: flat memory
        drawn = rng.integers(len(sums), size=(100, len(sums)))
        found = (sums[drawn].sum(1).T / sizes[drawn].sum(1)).T                             # (100,) or (100, k)
        means.append(of(found) if of else found)
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return float(low), float(high)


def share_over_videos(rows, right):
    """As over_videos, of marks right or wrong. All right, or all wrong: draws say nothing, and the interval is Wilson's
    of so many videos."""
    if len(set(right)) == 1:
        videos = len({row["media"] for row in rows})
        return wilson(videos if right[0] else 0, videos)
    return over_videos(rows, right)


def mcnemar(only_a, only_b):
    """Questions that only A, or only B, has right -> the two-sided exact p that they are as good as each other."""
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2 ** n)                                                     # integers: no overflow


def answered_letter(row):
    """The letter that an answer stands for, or "": the one that the official scorer takes from it."""
    accepted = official(row["prediction"], row["candidates"])
    return next(iter(accepted)) if len(accepted) == 1 else ""


def letters(rows):
    """{letter: (how often it is an option, the key, the answer)}, and under "" the answers that are no letter."""
    table = {letter: [0, 0, 0] for letter in LETTERS}
    table[""] = [0, 0, 0]
    for row in rows:
        if row.get("unread"):
            continue
        for letter in LETTERS[:len(row["candidates"])]:
            table[letter][0] += 1
        table[letter_of(row)][1] += 1
        table[answered_letter(row)][2] += 1
    return {letter: tuple(counts) for letter, counts in table.items()}


def calibration(rows, bins=10):
    """Rows with option probabilities -> (expected calibration error, [(mean confidence, share right, n), ...]).

    Confidence: the probability of the most probable option's letter, among the options. None where no row has any.
    """
    found = []
    for row in rows:
        p = np.array(row.get("letter_probabilities") or [])
        if p.sum() > 0:
            found.append((p.max() / p.sum(), LETTERS[int(p.argmax())] == letter_of(row)))
    if not found:
        return None
    confidence, right = np.array(found, dtype=float).T                                     # (n,), (n,)
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    groups = [(float(confidence[places == i].mean()), float(right[places == i].mean()), int((places == i).sum()))
              for i in range(bins) if (places == i).any()]
    return sum(n * abs(sure - share) for sure, share, n in groups) / len(found), groups


def permutations(rows):
    """Rows of all cyclic orders ("shift" 0, 1, ...) -> what became of the questions whose options changed places.

    questions; mean: percent right over all orders; always: right in every order; same: the same option chosen in every
    order, right or wrong; letters: as letters(), each letter being the key equally often by construction.
    """
    by_question = defaultdict(list)
    for row in rows:
        by_question[row["task"], row["index"]].append(row)
    whole = [some for some in by_question.values() if len(some) == len(some[0]["candidates"])]
    asked = [row for some in whole for row in some]
    same = sum(len({chosen_text(row) for row in some}) == 1 and chosen_text(some[0]) != "" for some in whole)
    n = max(1, len(whole))
    return {"questions": len(whole), "mean": 100 * sum(row["correct"] for row in asked) / max(1, len(asked)),
            "always": 100 * sum(all(row["correct"] for row in some) for some in whole) / n, "same": 100 * same / n,
            "letters": letters(asked)}


def chosen_text(row):
    letter = answered_letter(row)
    return row["candidates"][LETTERS.index(letter)] if letter else ""
