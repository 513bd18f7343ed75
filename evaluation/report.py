"""What an evaluation says: the scores, each with its denominator, its uncertainty and its controls.

    summarise   rows of predictions -> everything that can be said about them, as JSON knows it
    write       summary.json, mvbench.json (percent right by task), leaderboard.json, report.html (report_page.py)
    compare     two runs on the same questions, paired: python mvbench.py compare A B

Not here: what counts as right (scorers.py), how certain a score is (stats.py), the page (report_page.py).
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

from evaluation import report_page, stats
from evaluation.predictions import key_of, read_rows
from evaluation.scorers import SCORERS, compare_scorers, is_right
from evaluation.tasks import missing_media
from infra.files import read_json, save_text, write_json

# they show what there is to see but not when; the score minus the better one is the temporal gain, or "needs time"
TIMELESS = ("single", "shuffle")

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
    """Everything that can be said about a run, as a dict. rows: {name of a condition: its rows}; "" is the run itself.

    questions: also those without a medium. condition: the run itself, whose folder may hold an earlier summary."""
    # if nothing was asked, the times are those of the run that did ask
    plain, old = rows[""], condition.folder / "summary.json"
    if not seconds and old.is_file():
        seconds = read_json(old).get("seconds", {})

    controls = {name: score(rows[name]) for name in rows if name not in ("", "permute")}
    *tasks, average = [task_line(name, plain, questions, controls) for name in score(plain)]

    # 95 % interval of the average's temporal gain, paired by question; in each draw, the better control counts
    if average["needs time"] is not None:
        columns = [{key_of(row): row["correct"] for row in rows[name]} for name in ("", *TIMELESS)]
        paired = [row for row in plain if all(key_of(row) in column for column in columns)]
        low, high = stats.cluster_bootstrap(paired, [[column[key_of(row)] for column in columns] for row in paired],
                                            lambda means: means[:, 0] - means[:, 1:].max(1))
        average |= {"needs time low": 100 * low, "needs time high": 100 * high}

    (scorers, differing), confidence = compare_scorers(plain), stats.calibration(plain)
    return {
        "benchmark": benchmark.name, "tasks": tasks, "average": average, "controls": list(controls),
        "mean of tasks": sum(line["accuracy"] for line in tasks) / max(1, len(tasks)),
        "scorers": scorers, "scorers differ": len(differing), "differing": differing[:20],
        "letters": stats.letter_counts(plain),
        "permutations": stats.option_order_consistency(plain + rows["permute"]) if "permute" in rows else None,
        "calibration": confidence and {"error": confidence[0], "bins": confidence[1]},
        "missing": missing_media(questions, benchmark), "unanswered": sum("unread" in row for row in plain),
        "unread": sorted({row["unread"] for row in plain if "unread" in row}),
        "warned": sum("warning" in row for row in plain),
        "warnings": sorted({row["warning"] for row in plain if "warning" in row}),
        "seconds": {part: round(s, 3) for part, s in seconds.items()}, "software": software(), **condition.saved()}

def task_line(name, rows, questions, controls):
    """A line of the table: one task's, or that of "Avg". controls: {control: score(its rows)}."""
    of_task = [row for row in rows if name in ("Avg", row["task"])]
    right = [row["correct"] for row in of_task]
    low, high = stats.accuracy_interval(of_task, right) if name == "Avg" else stats.wilson(sum(right), len(right))
    accuracy, scores = score(of_task)["Avg"], {control: table[name] for control, table in controls.items()}
    gain = accuracy - max(scores[c] for c in TIMELESS) if all(c in scores for c in TIMELESS) else None
    return {"task": name, "accuracy": accuracy, "low": 100 * low, "high": 100 * high, "right": sum(right),
            "asked": len(of_task), "there are": sum(name in ("Avg", q["task"]) for q in questions),
            "chance": chance(of_task)["Avg"], "controls": scores, "needs time": gain}

def software():
    """Commit, versions and machine."""
    git = f"git -C {shlex.quote(str(Path(__file__).parent))} describe --always --dirty 2>/dev/null"
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {"commit": subprocess.getoutput(git) or "unknown", "python": platform.python_version(),
            "torch": torch.__version__, "machine": machine}

def command_line():
    """The command that is running, as one would type it."""
    n_processes = os.environ.get("WORLD_SIZE")
    launcher = ["torchrun", "--nproc_per_node", n_processes] if n_processes else ["python"]
    return shlex.join([*launcher, Path(sys.argv[0]).name, *sys.argv[1:]])

def write(summary, rows, folder, leaderboard):
    """Writes a run's files into its folder. leaderboard: whether all questions were meant, so that it may take them."""
    # the scores alone, in percent
    tables = {f"mvbench.{name}".rstrip("."): score(rows[name]) for name in rows if name != "permute"}
    for name, table in (tables | {"chance": chance(rows[""])}).items():
        write_json({task: round(percent, 2) for task, percent in table.items()}, folder / f"{name}.json")
    if leaderboard and summary["average"]["asked"] == summary["average"]["there are"]:
        write_json(tables["mvbench"], folder / "leaderboard.json")

    write_json({"written": time.strftime("%Y-%m-%d %H:%M"), **summary}, folder / "summary.json")
    save_text(report_page.page(summary, rows[""]), folder / "report.html")

def show(summary):
    """Prints what the page says in words."""
    for section in report_page.sections(summary):
        print(f"\n{section.title}\n")
        print_table(section.head, section.lines)
        print(*section.notes, sep="\n")

def print_table(head, lines):
    """Prints cells in columns; a rule sets off the line of "Avg"."""
    table = [list(map(str, line)) for line in (head, *lines)]
    widths = [max(map(len, column)) for column in list(zip(*table, strict=True))[1:]]
    for first, *others in table if head else ():
        text = "  ".join([first.ljust(26), *map(str.rjust, others, widths)])
        print("-" * len(text) + "\n" + text if first == "Avg" else text)

# ------------------------------------------------------------------------------------------------------------- two runs

def compare(argv):
    """python mvbench.py compare A B: prints which of two runs is better, by task and over all."""
    p = argparse.ArgumentParser("mvbench.py compare", description="Is one of two runs better, or is it luck (McNemar)?")
    p.add_argument("a", help="a run: the folder of its results, its checkpoint, or a predictions.jsonl")
    p.add_argument("b", help="another run")
    p.add_argument("--scorer", choices=tuple(SCORERS), default="official", help="(default %(default)s)")
    args = p.parse_args(argv)

    # the questions that both have, which must be the same ones
    a, b = rows_of(args.a), rows_of(args.b)
    pairs = [(row, b[key]) for key, row in a.items() if key in b]
    if not pairs:
        raise ValueError(f"{args.a} and {args.b} have no question in common")
    if other := [x for x, y in pairs if any(x.get(k) != y.get(k) for k in ("question", "candidates", "answer"))]:
        raise ValueError(f"{len(other)} questions differ between {args.a} and {args.b}, the first being "
                         f"{other[0]['task']} {other[0]['index']}: they are not of the same benchmark")

    # a line for each task, and one for all
    right, lines = [(x["task"], is_right(args.scorer, x), is_right(args.scorer, y)) for x, y in pairs], []
    for name in [*dict.fromkeys(task for task, *_ in right), "Avg"]:
        of_task = [(in_a, in_b) for task, in_a, in_b in right if name in ("Avg", task)]
        score_a, score_b = (100 * sum(column) / len(of_task) for column in zip(*of_task, strict=True))
        only_a, only_b = of_task.count((True, False)), of_task.count((False, True))
        p = stats.mcnemar(only_a, only_b)
        scores = [f"{score_a:.1f}", f"{score_b:.1f}", f"{score_a - score_b:+.1f}"]
        lines.append([name, *scores, only_a, only_b, f"{p:.3g}"])
    unequal = f" (A has {len(a)}, B {len(b)})" if not len(a) == len(b) == len(pairs) else ""
    print(f"{len(pairs)} questions in common{unequal}; scorer: {args.scorer}\n")
    print_table(["task", "A", "B", "A - B", "only A", "only B", "p"], lines)

    # the verdict is that of the last line, over all tasks
    low, high = stats.cluster_bootstrap([x for x, _ in pairs], [in_a - in_b for _, in_a, in_b in right])
    better = f"{'A' if score_a > score_b else 'B'} is better (p = {p:.3g})."
    print(f"\nA - B over all: {score_a - score_b:+.2f}, 95 % over videos {100 * low:+.2f} to {100 * high:+.2f}.",
          better if p < 0.05 else f"The difference could be luck (p = {p:.2f}).",
          "\nOf 20 tasks, one is at p < 0.05 by luck alone.")
    return 0

def rows_of(path):
    """A run's rows by key: of a file, of a folder's predictions.jsonl, or of a checkpoint's mvbench folder."""
    path = Path(path)
    for place in (path, path / "predictions.jsonl", path / "mvbench" / "predictions.jsonl"):
        if place.is_file():
            return read_rows(place)
    others = ", ".join(map(str, sorted(path.rglob("predictions*.jsonl")))) or "no others"
    raise FileNotFoundError(f"{path} is no finished run: it has no predictions.jsonl; there are {others}")
