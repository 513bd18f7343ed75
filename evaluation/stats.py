"""How certain is a score? Intervals, paired comparisons, calibration, and how evenly the letters are used.

All take rows of predictions.jsonl. Not here: what counts as right (scorers.py).
Source: Wilson 1927; Efron's percentile bootstrap, by clusters; McNemar 1947, the exact test; expected calibration
error: arXiv 1706.04599; all orders of the options: MMBench's CircularEval, arXiv 2307.06281.

    pytest tests/test_stats.py
"""
import math
from collections import Counter, defaultdict

import numpy as np

from evaluation.scorers import official, text_of
from evaluation.tasks import LETTERS, letter_of

Z = 1.959964            # 95 % of a normal distribution are within Z standard deviations
DRAWS = 5000

def wilson(right, n):
    """right of n -> (low, high), from 0 to 1: the shares that are compatible with it at 5 %; n = 0: (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    share, shrink = right / n, 1 + Z * Z / n
    middle = (share + Z * Z / (2 * n)) / shrink
    half = Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n)) / shrink
    return max(0.0, middle - half), min(1.0, middle + half)

def cluster_bootstrap(rows, values, statistic=lambda means: means, seed=0):
    """Mean of values, one for each row (right: 1 or 0) -> (low, high), 95 %, by drawing the rows' videos again.

    With k values for each row, (n, k), `statistic` maps the means of many draws (draws, k) to a number each (draws,).
    """
    groups = defaultdict(list)
    for row, value in zip(rows, values, strict=True):
        groups[row["media"]].append(value)
    if not groups:
        return 0.0, 1.0                                        # nothing is known

    sums = np.array([np.sum(group, 0) for group in groups.values()], dtype=float)          # (videos,) or (videos, k)
    sizes = np.array([len(group) for group in groups.values()], dtype=float)               # (videos,)

    # 100 draws at a time, so that memory stays flat
    rng, results = np.random.default_rng(seed), []
    for _ in range(DRAWS // 100):
        drawn = rng.integers(len(sums), size=(100, len(sums)))
        results.append(statistic((sums[drawn].sum(1).T / sizes[drawn].sum(1)).T))          # of (100,) or (100, k)
    low, high = np.percentile(np.concatenate(results), (2.5, 97.5))
    return float(low), float(high)

def accuracy_interval(rows, right):
    """cluster_bootstrap of booleans. If they are all the same, draws show nothing: Wilson's interval of n videos."""
    n_videos = len({row["media"] for row in rows})
    return cluster_bootstrap(rows, right) if len(set(right)) != 1 else wilson(n_videos * right[0], n_videos)

def mcnemar(only_a, only_b):
    """How many questions only A, and only B, has right -> the exact two-sided p of "both are equally good"."""
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2 ** n)                                                     # integers: no overflow

def answered_letter(row):
    """The letter that the official scorer takes from an answer, or "" if it takes none or several."""
    accepted = official(text_of("official", row), row["candidates"])
    return accepted.pop() if len(accepted) == 1 else ""

def letter_counts(rows):
    """{letter: (how often it is an option, the key, the answer)}; "" counts the answers that are no letter."""
    rows = [row for row in rows if not row.get("unread")]
    options = Counter(letter for row in rows for letter in LETTERS[:len(row["candidates"])])
    keys, answers = Counter(map(letter_of, rows)), Counter(map(answered_letter, rows))
    return {letter: (options[letter], keys[letter], answers[letter]) for letter in (*LETTERS, "")}

def calibration(rows, bins=10):
    """Rows -> (expected calibration error, [(mean confidence, share right, n), ...]); None without probabilities."""
    # confidence: the highest probability of a letter, as a share of all options' letters
    by_bin = defaultdict(list)
    for row in rows:
        p = row.get("letter_probabilities") or [0]
        if sum(p) > 0:
            confidence, right = max(p) / sum(p), LETTERS[p.index(max(p))] == letter_of(row)
            by_bin[min(int(confidence * bins), bins - 1)].append((confidence, right))
    if not by_bin:
        return None

    # the error: how far the two are apart, in the mean over all answers
    groups = [(*map(float, np.mean(points, 0)), len(points)) for _, points in sorted(by_bin.items())]
    return sum(n * abs(mean - share) for mean, share, n in groups) / sum(n for *_, n in groups), groups

def option_order_consistency(rows):
    """Rows of all cyclic orders ("shift" 0, 1, ...) -> {"questions": how many have them all, and of these, in percent,
    "mean": right, "always": right in every order, "same": the same option in every order; "letters": as letter_counts}.
    """
    by_question = defaultdict(list)
    for row in rows:
        by_question[row["task"], row["index"]].append(row)
    complete = [group for group in by_question.values() if len(group) == len(group[0]["candidates"])]

    # the texts that are chosen in any order; "" for none
    texts = [{row["candidates"][LETTERS.index(letter)] if (letter := answered_letter(row)) else "" for row in group}
             for group in complete]
    n_same = sum(len(chosen) == 1 and chosen != {""} for chosen in texts)
    n_always = sum(all(row["correct"] for row in group) for group in complete)
    answers, n = [row for group in complete for row in group], max(1, len(complete))
    return {"questions": len(complete), "mean": 100 * sum(row["correct"] for row in answers) / max(1, len(answers)),
            "always": 100 * n_always / n, "same": 100 * n_same / n, "letters": letter_counts(answers)}
