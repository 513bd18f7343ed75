"""What an evaluation has found: the numbers, each with its denominator, its uncertainty and its controls.

    summarise      rows of predictions -> everything that can be said about them, as JSON knows it
    show           the table on the console
    write          summary.json, mvbench.json (percent right by task), leaderboard.json, report.html (page.py)
    compare        two runs on the same questions, paired: python mvbench.py compare A B

Not here: what counts as right (scorers.py), how sure a number is (stats.py), what the page looks like (page.py).
Source of leaderboard.json: mvbench.ipynb, upload_leaderboard.json.

    pytest tests/test_report.py
"""
import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

from evaluation import report_page
from evaluation.predictions import key_of, read_rows
from evaluation.scorers import SCORERS, compare_scorers, is_right
from evaluation.stats import calibration, letters, mcnemar, over_videos, permutations, share_over_videos, wilson
from infra.files import read_json, save_text

MOVING = ("single", "shuffle")      # controls that leave what there is to see, but not when

# ---------------------------------------------------------------------------------------------------------- the numbers


def score(rows):
    """Prediction rows -> {task: accuracy in percent, ..., "Avg": right / asked}, the tasks in the rows' order."""
    by_task = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row["correct"])
    table = {task: 100 * sum(right) / len(right) for task, right in by_task.items()}
    return table | {"Avg": 100 * sum(row["correct"] for row in rows) / max(1, len(rows))}


def chance(questions):
    """Expected score of uniform guessing, per task and over all (27.95 on the real benchmark)."""
    return score([{"task": q["task"], "correct": 1 / len(q["candidates"])} for q in questions])


def summarise(plain, wanted, orders, predictions, times, missing=()):
    """Everything that can be said, as a dict.

    plain: {control: rows}, "" being the run itself; wanted: the questions that were meant; orders: rows under all
    orders of the options, or None; predictions: of the run itself; times: {part: seconds}; missing: lines about media
    that are not there, whose questions were not asked.
    """
    rows = plain[""]
    normal, odds = score(rows), chance(rows)
    controls = {control: score(some) for control, some in plain.items() if control}
    scorers, differ = compare_scorers(rows)
    found = calibration(rows)
    tasks = [task_line(name, rows, wanted, normal, odds, controls) for name in normal]
    told, before = read_json(predictions.told), predictions.out / f"summary{predictions.name}.json"
    if not times and before.is_file():                         # nothing was asked: what it took is known from before
        times = read_json(before).get("seconds", {})
    return {
        "tasks": tasks[:-1], "average": tasks[-1] | time_interval(plain),
        "mean of tasks": sum(task["accuracy"] for task in tasks[:-1]) / max(1, len(tasks) - 1),
        "controls": list(controls), "scorers": scorers, "scorers differ": len(differ), "differing": differ[:20],
        "letters": letters(rows), "permutations": permutations(orders) if orders else None,
        "calibration": found and {"error": found[0], "bins": found[1]},
        "missing": list(missing), "unread": sorted({row["unread"] for row in rows if "unread" in row}),
        "unanswered": sum("unread" in row for row in rows), "seconds": times,
        "software": {"commit": commit(), "python": platform.python_version(), "torch": torch.__version__,
                     "machine": machine()}, **told}


def task_line(name, rows, wanted, normal, odds, controls):
    """A line of the table: one task's, or that of "Avg"."""
    of_task = [row for row in rows if name in ("Avg", row["task"])]
    marks = [row["correct"] for row in of_task]
    right = sum(marks)
    low, high = share_over_videos(of_task, marks) if name == "Avg" else wilson(right, len(marks))
    found = {control: table[name] for control, table in controls.items() if name in table}
    moving = [found[control] for control in MOVING] if all(control in found for control in MOVING) else []
    return {"task": name, "accuracy": normal[name], "low": 100 * low, "high": 100 * high, "right": right,
            "asked": len(of_task), "there are": sum(name in ("Avg", q["task"]) for q in wanted), "chance": odds[name],
            "controls": found, "needs time": normal[name] - max(moving) if moving else None}


def time_interval(plain):
    """The interval of the average's "needs time", paired by question, where single and shuffle are there."""
    if not all(control in plain for control in MOVING):
        return {}
    columns = [{key_of(row): row["correct"] for row in plain[control]} for control in ("", *MOVING)]
    rows = [row for row in plain[""] if all(key_of(row) in column for column in columns)]
    low, high = over_videos(rows, [[column[key_of(row)] for column in columns] for row in rows],
                            lambda means: means[:, 0] - means[:, 1:].max(1))               # the better in each draw
    return {"needs time low": 100 * low, "needs time high": 100 * high}


def machine():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"


def commit():
    """The code's commit, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent.parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command_line():
    """The command that is running, as one would type it."""
    world = os.environ.get("WORLD_SIZE")
    begin = ["torchrun", "--nproc_per_node", world] if world else ["python"]
    return shlex.join([*begin, Path(sys.argv[0]).name, *sys.argv[1:]])


# ------------------------------------------------------------------------------------------------------------ the files


def write(summary, plain, out, suffix):
    """Writes the run's files into the folder out. plain: {control: rows}."""
    for control, rows in plain.items():
        put_json(out / f"mvbench{'.' * bool(control)}{control}{suffix}.json", rounded(score(rows)))
    put_json(out / f"chance{suffix}.json", rounded(chance(plain[""])))
    put_json(out / f"summary{suffix}.json", {"written": time.strftime("%Y-%m-%d %H:%M"), **summary})
    if is_complete(summary) and "part" not in suffix:
        put_json(out / f"leaderboard{suffix}.json", score(plain[""]))
    save_text(report_page.page(summary, plain[""]), out / f"report{suffix}.html")


def is_complete(summary):
    """Whether the numbers are of a whole MVBench: its leaderboard takes no others."""
    return len(summary["tasks"]) == 20 and summary["average"]["asked"] == summary["average"]["there are"]


def put_json(path, found):
    save_text(json.dumps(found, indent=2) + "\n", path)


def rounded(table):
    return {name: round(value, 2) for name, value in table.items()}


# ---------------------------------------------------------------------------------------------------------- the console


def show(summary):
    """Prints the table, the scorers, and what else a reader of the number should know."""
    controls = summary["controls"]
    moving = summary["average"]["needs time"] is not None
    print(f"\n{'task':26}{'right':>7}{'95 %':>13}{'chance':>8}" + "".join(f"{control:>9}" for control in controls)
          + f"{'needs time':>12}" * moving + f"{'asked':>11}")
    for line in (*summary["tasks"], summary["average"]):
        text = f"{line['task']:26}{line['accuracy']:7.1f}{span(line):>13}{line['chance']:8.1f}"
        text += "".join(f"{line['controls'].get(control, float('nan')):9.1f}" for control in controls)
        text += f"{line['needs time']:+12.1f}" if moving else ""
        text += f"{line['asked']}/{line['there are']}".rjust(11)
        print("-" * len(text) + "\n" + text if line["task"] == "Avg" else text)
    print(f"\nmean of the tasks {summary['mean of tasks']:.1f}; the average's interval is over videos, the tasks' are "
          "Wilson's")
    if "needs time low" in summary["average"]:
        print(f"needs time: normal minus the best of single and shuffle, over all "
              f"{summary['average']['needs time']:+.1f} ({summary['average']['needs time low']:+.1f} to "
              f"{summary['average']['needs time high']:+.1f})")
    print(f"\n{'scorer':14}{'right':>8}{'of':>12}{'unparsed':>10}{'any key':>9}")
    for name, found in summary["scorers"].items():
        print(f"{name:14}{found['percent']:8.2f}{found['right']:>6}/{found['counted']:<5}{found['unparsed']:10}"
              f"{found['any']:9}")
    print(f"they differ on {summary['scorers differ']} questions")
    show_habits(summary)
    if summary["missing"]:
        print("\nnot asked, and in no number:\n  " + "\n  ".join(summary["missing"]))
    if summary["unanswered"]:
        print(f"\n{summary['unanswered']} questions with an unreadable medium, counted as wrong:")
        print("\n".join(f"  unread: {reason}" for reason in summary["unread"][:5]))


def span(line):
    return f"{line['low']:.1f}-{line['high']:.1f}"


def show_habits(summary):
    """Letters, calibration, orders of the options."""
    print(f"\n{'letter':10}" + "".join(f"{letter or 'none':>8}" for letter in summary["letters"]))
    for i, what in ((1, "is key"), (2, "answered")):
        print(f"{what:10}" + "".join(f"{counts[i]:8}" for counts in summary["letters"].values()))
    if summary["calibration"]:
        error = 100 * summary["calibration"]["error"]
        print(f"\nconfidence differs from the share that is right by {error:.1f} points in the mean (expected "
              "calibration error)")
    if found := summary["permutations"]:
        print(f"\nall orders of the options, {found['questions']} questions: right {found['mean']:.1f} in the mean, "
              f"{found['always']:.1f} in every order; the same option in every order: {found['same']:.1f}\n  answered "
              + ", ".join(f"{letter or 'none'} {share(found['letters'], letter)}" for letter in found["letters"]))


def share(table, letter):
    """How often a letter is answered, and, where that is known, how often it is the key."""
    options, key, answered = table[letter]
    total = max(1, sum(counts[2] for counts in table.values()))
    return f"{100 * answered / total:.1f} %" + (f" (key {100 * key / total:.1f})" if options else "")


# --------------------------------------------------------------------------------------------------------- two runs


def compare(argv):
    """python mvbench.py compare A B: prints which of two runs is better, by task and over all."""
    p = argparse.ArgumentParser(prog="mvbench.py compare", description="Two runs on the same questions: who is better, "
                                "and could luck have made the difference (McNemar's exact test)?")
    p.add_argument("a", help="a run: its results' folder, its checkpoint, or a predictions.jsonl")
    p.add_argument("b", help="another one")
    p.add_argument("--scorer", choices=tuple(SCORERS), default="official", help="(default %(default)s)")
    args = p.parse_args(argv)
    a, b = (rows_of(path) for path in (args.a, args.b))
    pairs = [(row, b[key]) for key, row in a.items() if key in b]
    other = [row for row, same in pairs if any(row.get(k) != same.get(k) for k in ("question", "candidates", "answer"))]
    if not pairs:
        raise ValueError(f"{args.a} and {args.b} have no question in common")
    if other:
        raise ValueError(f"{len(other)} questions differ between {args.a} and {args.b}, the first being "
                         f"{other[0]['task']} {other[0]['index']}: they are not of the same benchmark")
    print(f"{len(pairs)} questions in common" + f" (A has {len(a)}, B {len(b)})" * (not len(a) == len(b) == len(pairs))
          + f"; scorer: {args.scorer}\n\n{'task':26}{'A':>7}{'B':>7}{'A - B':>8}{'only A':>8}{'only B':>8}{'p':>9}")
    for name in [*dict.fromkeys(row["task"] for row, _ in pairs), "Avg"]:
        found = compared([(x, y) for x, y in pairs if name in ("Avg", x["task"])], args.scorer)
        line = (f"{name:26}{found['a']:7.1f}{found['b']:7.1f}{found['a'] - found['b']:+8.1f}{found['only a']:8}"
                f"{found['only b']:8}{p_value(found['p']):>9}")
        print("-" * len(line) + "\n" + line if name == "Avg" else line)
    differences = [is_right(args.scorer, x) - is_right(args.scorer, y) for x, y in pairs]
    low, high = over_videos([x for x, _ in pairs], differences)
    print(f"\nA - B over all: {found['a'] - found['b']:+.2f}, 95 % over videos {100 * low:+.2f} to {100 * high:+.2f}. "
          f"{verdict(found)}\nOf 20 tasks, one is at p < 0.05 by luck alone.")
    return 0


def rows_of(path):
    """A run's rows by key: of a file, or of a folder's predictions.jsonl, or of a checkpoint's mvbench folder."""
    places = [Path(path), Path(path) / "predictions.jsonl", Path(path) / "mvbench" / "predictions.jsonl"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        others = [str(found) for place in places for found in sorted(place.parent.glob("predictions*.jsonl"))]
        hint = f"; there are {', '.join(dict.fromkeys(others))}" if others else ""
        raise FileNotFoundError(f"{path} is no finished run: it has no predictions.jsonl{hint}")
    return read_rows(file)


def compared(pairs, scorer):
    right = [(is_right(scorer, x), is_right(scorer, y)) for x, y in pairs]
    only_a, only_b = right.count((True, False)), right.count((False, True))
    n = len(right)
    return {"a": 100 * sum(x for x, _ in right) / n, "b": 100 * sum(y for _, y in right) / n, "only a": only_a,
            "only b": only_b, "p": mcnemar(only_a, only_b)}


def p_value(p, equals=""):
    return f"{equals}{p:.4f}" if p >= 1e-4 else f"{'< ' if equals else '<'}0.0001"


def verdict(found):
    if found["p"] < 0.05:
        return f"{'A' if found['a'] > found['b'] else 'B'} is better (p {p_value(found['p'], '= ')})."
    return f"The difference could be luck (p = {found['p']:.2f})."
