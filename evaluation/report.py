"""What an evaluation says: the scores, each with its denominator, its uncertainty and its controls.

    summarise      rows of predictions -> everything that can be said about them, as JSON knows it
    write          summary.json, mvbench.json (percent right by task), leaderboard.json, report.html (report_page.py)
    show           the table on the console
    compare        two runs on the same questions, paired: python mvbench.py compare A B

The temporal gain is the score minus the better one of the controls "single" and "shuffle", which show what there is to
see but not when ("needs time" in summary.json).
Not here: what counts as right (scorers.py), how certain a score is (stats.py), the page's HTML (report_page.py).
Source of leaderboard.json: mvbench.ipynb, upload_leaderboard.json.

    pytest tests/test_report.py
"""
import argparse
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
from evaluation.stats import (
    accuracy_interval,
    calibration,
    cluster_bootstrap,
    letter_counts,
    mcnemar,
    option_order_consistency,
    wilson,
)
from evaluation.tasks import missing_media
from infra.files import read_json, save_text, write_json

TIMELESS = ("single", "shuffle")

# ----------------------------------------------------------------------------------------------------------- the scores

def score(rows):
    """Rows -> {task: percent right, ..., "Avg": percent right of all questions}, the tasks in the rows' order."""
    by_task = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row["correct"])
    table = {task: 100 * sum(right) / len(right) for task, right in by_task.items()}
    return table | {"Avg": 100 * sum(row["correct"] for row in rows) / max(1, len(rows))}

def chance(questions):
    """The expected score of uniform guessing, as score (27.95 on the real benchmark)."""
    return score([{"task": q["task"], "correct": 1 / len(q["candidates"])} for q in questions])

def summarise(rows, questions, condition, benchmark, seconds):
    """Everything that can be said about a run, as a dict.

    rows: {name of a condition: its rows}; "" is the run itself. questions: all that were meant, also those whose medium
    is missing. condition: the run itself, whose folder may hold an earlier summary. seconds: {part: seconds}, or {}.
    """
    # if nothing was asked, the times are those of the run that did ask
    plain, info, old = rows[""], condition.saved(), condition.folder / "summary.json"
    if not seconds and old.is_file():
        seconds = read_json(old).get("seconds", {})

    controls = {name: score(rows[name]) for name in rows if name not in ("", "permute")}
    *tasks, average = [task_line(name, plain, questions, controls) for name in score(plain)]
    scorers, differing = compare_scorers(plain)
    confidence = calibration(plain)
    return {
        "benchmark": benchmark.name, "tasks": tasks, "average": average | temporal_gain_interval(rows),
        "mean of tasks": sum(line["accuracy"] for line in tasks) / max(1, len(tasks)), "controls": list(controls),
        "scorers": scorers, "scorers differ": len(differing), "differing": differing[:20],
        "letters": letter_counts(plain),
        "permutations": option_order_consistency(plain + rows["permute"]) if "permute" in rows else None,
        "calibration": confidence and {"error": confidence[0], "bins": confidence[1]},
        "missing": missing_media(questions, benchmark),
        "unread": sorted({row["unread"] for row in plain if "unread" in row}),
        "unanswered": sum("unread" in row for row in plain), "seconds": seconds, "software": software(), **info}

def task_line(name, rows, questions, controls):
    """A line of the table: one task's, or that of "Avg". controls: {control: score(its rows)}."""
    of_task = [row for row in rows if name in ("Avg", row["task"])]
    right = [row["correct"] for row in of_task]
    low, high = accuracy_interval(of_task, right) if name == "Avg" else wilson(sum(right), len(right))
    accuracy = score(of_task)["Avg"]
    scores = {control: table[name] for control, table in controls.items() if name in table}
    gain = accuracy - max(scores[c] for c in TIMELESS) if all(c in scores for c in TIMELESS) else None
    return {"task": name, "accuracy": accuracy, "low": 100 * low, "high": 100 * high, "right": sum(right),
            "asked": len(of_task), "there are": sum(name in ("Avg", q["task"]) for q in questions),
            "chance": chance(of_task)["Avg"], "controls": scores, "needs time": gain}

def temporal_gain_interval(rows):
    """95 % interval of the average's temporal gain, paired by question; {} without the two controls."""
    if not all(control in rows for control in TIMELESS):
        return {}
    columns = [{key_of(row): row["correct"] for row in rows[name]} for name in ("", *TIMELESS)]
    paired = [row for row in rows[""] if all(key_of(row) in column for column in columns)]
    low, high = cluster_bootstrap(paired, [[column[key_of(row)] for column in columns] for row in paired],
                                  lambda means: means[:, 0] - means[:, 1:].max(1))     # the better one in each draw
    return {"needs time low": 100 * low, "needs time high": 100 * high}

def software():
    """Commit, versions and machine."""
    git = ["git", "-C", str(Path(__file__).parent.parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {"commit": commit, "python": platform.python_version(), "torch": torch.__version__, "machine": machine}

def command_line():
    """The command that is running, as one would type it."""
    n_processes = os.environ.get("WORLD_SIZE")
    launcher = ["torchrun", "--nproc_per_node", n_processes] if n_processes else ["python"]
    return shlex.join([*launcher, Path(sys.argv[0]).name, *sys.argv[1:]])

# ------------------------------------------------------------------------------------------------------------ the files

def write(summary, rows, folder, leaderboard):
    """Writes a run's files into its folder. leaderboard: whether all questions were meant, so that it may take them."""
    def percent(table):
        return {name: round(value, 2) for name, value in table.items()}
    for name in rows:
        if name != "permute":
            write_json(percent(score(rows[name])), folder / f"mvbench{'.' * bool(name)}{name}.json")
    write_json(percent(chance(rows[""])), folder / "chance.json")
    write_json({"written": time.strftime("%Y-%m-%d %H:%M"), **summary}, folder / "summary.json")
    if leaderboard and summary["average"]["asked"] == summary["average"]["there are"]:
        write_json(score(rows[""]), folder / "leaderboard.json")
    save_text(report_page.page(summary, rows[""]), folder / "report.html")

# ---------------------------------------------------------------------------------------------------------- the console

def show(summary):
    """Prints the table, the scorers, and what else a reader of the scores should know."""
    average, controls = summary["average"], summary["controls"]
    timed = average["needs time"] is not None
    print(f"\n{'task':26}{'right':>7}{'95 %':>13}{'chance':>8}" + "".join(f"{control:>9}" for control in controls)
          + f"{'temporal gain':>15}" * timed + f"{'asked':>11}")
    for line in (*summary["tasks"], average):
        interval = f"{line['low']:.1f}-{line['high']:.1f}"
        text = f"{line['task']:26}{line['accuracy']:7.1f}{interval:>13}{line['chance']:8.1f}"
        text += "".join(f"{line['controls'].get(control, float('nan')):9.1f}" for control in controls)
        text += f"{line['needs time']:+15.1f}" if timed else ""
        text += f"{line['asked']}/{line['there are']}".rjust(11)
        print("-" * len(text) + "\n" + text if line is average else text)
    print(f"\nmean of the tasks {summary['mean of tasks']:.1f}; intervals are Wilson's, the average's is over videos")
    if timed:
        print(f"temporal gain: normal minus the better of single and shuffle; over all {average['needs time']:+.1f} "
              f"({average['needs time low']:+.1f} to {average['needs time high']:+.1f})")

    print(f"\n{'scorer':14}{'right':>8}{'of':>12}{'unparsed':>10}{'any key':>9}")
    for name, s in summary["scorers"].items():
        print(f"{name:14}{s['percent']:8.2f}{s['right']:>6}/{s['counted']:<5}{s['unparsed']:10}{s['any']:9}")
    print(f"they differ on {summary['scorers differ']} questions")
    show_biases(summary)

    # what is missing from the scores
    if summary["missing"]:
        print("\nnot asked, and in no score:\n  " + "\n  ".join(summary["missing"]))
    if summary["unanswered"]:
        print(f"\n{summary['unanswered']} questions with an unreadable medium, counted as wrong:")
        print("\n".join(f"  unread: {reason}" for reason in summary["unread"][:5]))

def show_biases(summary):
    """Prints how letters, confidence and the order of the options go with the answers."""
    letters = summary["letters"]
    print(f"\n{'letter':10}" + "".join(f"{letter or 'none':>8}" for letter in letters))
    for what, i in (("is key", 1), ("answered", 2)):
        print(f"{what:10}" + "".join(f"{counts[i]:8}" for counts in letters.values()))

    # is it right as often as it is sure, and does the order of the options matter?
    if summary["calibration"]:
        print(f"\nconfidence and the share that is right differ by {100 * summary['calibration']['error']:.1f} points "
              "in the mean (expected calibration error)")
    if orders := summary["permutations"]:
        n = max(1, sum(answered for *_, answered in orders["letters"].values())) / 100
        shares = ", ".join(f"{letter or 'none'} {answered / n:.1f} %" + f" (key {key / n:.1f})" * bool(options)
                           for letter, (options, key, answered) in orders["letters"].items())
        print(f"\nall orders of the options, {orders['questions']} questions: right {orders['mean']:.1f} in the mean, "
              f"{orders['always']:.1f} in every order; the same option in every order: {orders['same']:.1f}\n"
              f"  answered {shares}")

# ------------------------------------------------------------------------------------------------------------- two runs

def compare(argv):
    """python mvbench.py compare A B: prints which of two runs is better, by task and over all."""
    p = argparse.ArgumentParser(prog="mvbench.py compare", description="Two runs on the same questions: which one is "
                                "better, and could luck explain the difference (McNemar's exact test)?")
    p.add_argument("a", help="a run: the folder of its results, its checkpoint, or a predictions.jsonl")
    p.add_argument("b", help="another run")
    p.add_argument("--scorer", choices=tuple(SCORERS), default="official", help="(default %(default)s)")
    args = p.parse_args(argv)

    # the questions that both have, which must be the same ones
    a, b = rows_of(args.a), rows_of(args.b)
    pairs = [(row, b[key]) for key, row in a.items() if key in b]
    other = [x for x, y in pairs if any(x.get(k) != y.get(k) for k in ("question", "candidates", "answer"))]
    if not pairs:
        raise ValueError(f"{args.a} and {args.b} have no question in common")
    if other:
        raise ValueError(f"{len(other)} questions differ between {args.a} and {args.b}, the first being "
                         f"{other[0]['task']} {other[0]['index']}: they are not of the same benchmark")
    unequal = f" (A has {len(a)}, B {len(b)})" if not len(a) == len(b) == len(pairs) else ""
    print(f"{len(pairs)} questions in common{unequal}; scorer: {args.scorer}\n\n"
          f"{'task':26}{'A':>7}{'B':>7}{'A - B':>8}{'only A':>8}{'only B':>8}{'p':>9}")

    # a line for each task, and one for all
    right = [(x["task"], is_right(args.scorer, x), is_right(args.scorer, y)) for x, y in pairs]
    for name in [*dict.fromkeys(task for task, *_ in right), "Avg"]:
        of_task = [(in_a, in_b) for task, in_a, in_b in right if name in ("Avg", task)]
        score_a, score_b = (100 * sum(column) / len(of_task) for column in zip(*of_task, strict=True))
        only_a, only_b = of_task.count((True, False)), of_task.count((False, True))
        p = mcnemar(only_a, only_b)
        line = (f"{name:26}{score_a:7.1f}{score_b:7.1f}{score_a - score_b:+8.1f}{only_a:8}{only_b:8}"
                + (f"{p:9.4f}" if p >= 1e-4 else f"{'<0.0001':>9}"))
        print("-" * len(line) + "\n" + line if name == "Avg" else line)

    # the verdict is that of the last line, over all tasks
    low, high = cluster_bootstrap([x for x, _ in pairs], [in_a - in_b for _, in_a, in_b in right])
    verdict = f"The difference could be luck (p = {p:.2f})."
    if p < 0.05:
        verdict = f"{'A' if score_a > score_b else 'B'} is better (p {f'= {p:.4f}' if p >= 1e-4 else '< 0.0001'})."
    print(f"\nA - B over all: {score_a - score_b:+.2f}, 95 % over videos {100 * low:+.2f} to {100 * high:+.2f}. "
          f"{verdict}\nOf 20 tasks, one is at p < 0.05 by luck alone.")
    return 0

def rows_of(path):
    """A run's rows by key: of a file, of a folder's predictions.jsonl, or of a checkpoint's mvbench folder."""
    places = [Path(path), Path(path) / "predictions.jsonl", Path(path) / "mvbench" / "predictions.jsonl"]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        others = [str(f) for pattern in ("predictions*.jsonl", "*/predictions*.jsonl", "mvbench/*/predictions*.jsonl")
                  for f in sorted(Path(path).glob(pattern))]
        hint = f"; there are {', '.join(others)}" if others else ""
        raise FileNotFoundError(f"{path} is no finished run: it has no predictions.jsonl{hint}")
    return read_rows(file)
