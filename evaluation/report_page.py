"""What a report shows: tables and sentences for the console, and report.html, which also shows examples.

The page is one file that opens offline, on a phone and on a desk, in light and dark: assets/report.html filled in, with
assets/report.css and the frames (JPEG in base64) inside, and without a script. Not here: the numbers (report.py).

    pytest tests/test_report.py
"""
import base64
import io
import json
import random
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from evaluation.protocol import CONTROLS
from evaluation.scorers import text_of
from evaluation.tasks import LETTERS
from infra.media import MediaError
from video import read_eval_frames

ASSETS = Path(__file__).parent.parent / "assets"
FRAMES, COLUMNS, WIDTH = 8, 4, 112      # of an example: frames, in rows of four, each at most WIDTH pixels wide

# --------------------------------------------------------------------------------------------------------- the sections

class Section(NamedTuple):
    title: str
    notes: list             # sentences
    head: tuple = ()        # of a table; () without one
    lines: tuple = ()       # of the table, each a list of cells
    picture: str = ""       # HTML, for the page alone

def sections(summary):
    """A summary of report.summarise -> the Sections of its report. All but the picture is plain text."""
    # what is missing from the scores
    parts, missing = [task_section(summary)], summary["missing"]
    if unread := [f"  unread: {reason}" for reason in summary["unread"][:20]]:
        n = summary["unanswered"]
        missing = [*missing, f"{n} questions with unreadable media or texts, counted as wrong:", *unread]
    if warnings := [f"  warning: {warning}" for warning in summary["warnings"][:20]]:
        missing = [*missing, f"{summary['warned']} questions with a doubtful medium, asked all the same:", *warnings]
    if missing:
        parts.append(Section("What is missing", missing))

    # how other scorers count the same answers, and which letters these are
    notes = ["unparsed: the scorer took no option from the answer; any key: it would be right under several keys",
             f"they differ on {summary['scorers differ']} questions"]
    lines = [[name, f"{s['percent']:.2f}", f"{s['right']}/{s['counted']}", s["unparsed"], s["any"]]
             for name, s in summary["scorers"].items()]
    parts.append(Section("Four scorers", notes, ("scorer", "right, %", "of", "unparsed", "any key"), lines))
    parts.append(letter_section("Letters", summary["letters"], []))

    # is the answer the same in every order of the options, and right as often as it is sure?
    if orders := summary["permutations"]:
        parts.append(letter_section("When the options change places", orders["letters"], [
            f"all orders of the options, {orders['questions']:,} questions: right {orders['mean']:.1f} in the mean, "
            f"{orders['always']:.1f} in every order; the same option in every order: {orders['same']:.1f}"]))
    if confidence := summary["calibration"]:
        lines = [[f"{p:.2f}", f"{right:.2f}", n] for p, right, n in confidence["bins"]]
        parts.append(Section("Does it know when it knows?", [
            "confidence (the highest probability of a letter, among the options) and the share that is right differ by "
            f"{100 * confidence['error']:.1f} points in the mean (expected calibration error)"],
            ("confidence", "right", "answers"), lines, calibration_picture(confidence["bins"])))
    return parts

def task_section(summary):
    """The score of each task, beside what the same model answers with less to go by."""
    average, controls = summary["average"], summary["controls"]
    timed = average["needs time"] is not None
    notes = [f"mean of the tasks {summary['mean of tasks']:.1f}; intervals are Wilson's, the average's is over videos",
             *(f"{name}: {CONTROLS[name]}" for name in controls)]
    if timed:
        interval = f"{average['needs time low']:+.1f} to {average['needs time high']:+.1f}"
        notes.append(f"temporal gain: normal minus the better of single and shuffle; of the average: {interval} (95 %)")

    # a line and a bar for each task; last comes the average
    lines, bars = [], ""
    for t in (*summary["tasks"], average):
        covered, right = f"{t['asked']}/{t['there are']}", f"{t['accuracy']:.1f}"
        scores = [f"{score:.1f}" for score in t["controls"].values()] + ([f"{t['needs time']:+.1f}"] if timed else [])
        lines.append([t["task"], right, f"{t['low']:.1f}-{t['high']:.1f}", f"{t['chance']:.1f}", *scores, covered])
        missing = f' <span class="bad">{covered}</span>' * (t["asked"] < t["there are"])
        bars += (f'<div class="row{" total" * (t is average)}"><span>{escape(t["task"])}{missing}</span>'
                 f'<span class="bar"><i class="fill" style="width:{right}%"></i>'
                 f'<i class="span" style="left:{t["low"]:.1f}%;width:{t["high"] - t["low"]:.1f}%"></i>'
                 f'<i class="odds" style="left:{t["chance"]:.1f}%"></i></span>'
                 f'<span>{right} <small>{t["low"]:.0f} to {t["high"]:.0f}</small></span></div>')
    head = ("task", "right", "95 %", "chance", *controls, *["temporal gain"] * timed, "asked")
    return Section("Task by task", notes, head, lines, bars)

def letter_section(title, counts, notes):
    """How often each letter is the key, and the answer. counts: of stats.letter_counts."""
    n = max(1, sum(answered for *_, answered in counts.values())) / 100
    lines = [[letter or "none", f"{key / n:.1f}", f"{answered / n:.1f}"]
             for letter, (_, key, answered) in counts.items() if key or answered]
    return Section(title, notes, ("letter", "is key, %", "answered, %"), lines)

def calibration_picture(bins):
    """Confidence (x) against the share that is right (y); a dot on the diagonal is as sure as it should be."""
    most = max(n for *_, n in bins)
    dots = "".join(f'<circle cx="{30 + 200 * p:.1f}" cy="{210 - 200 * right:.1f}" r="{3 + 9 * (n / most) ** 0.5:.1f}" '
                   f'fill="var(--fill)"><title>{n} answers: confidence {p:.2f}, right {right:.2f}</title></circle>'
                   for p, right, n in bins)
    return ('<svg viewBox="0 0 260 240" style="max-width:22rem;width:100%" role="img" aria-label="calibration">'
            '<path d="M30 10V210H230" fill="none" stroke="var(--soft)"/>'
            f'<path d="M30 210L230 10" stroke="var(--line)" stroke-dasharray="4"/>{dots}'
            '<g fill="var(--soft)" font-size="12"><text x="30" y="226">0</text><text x="222" y="226">1</text>'
            '<text x="90" y="236">confidence</text><text x="18" y="16">1</text>'
            '<text x="14" y="130" transform="rotate(-90 14 130)">right</text></g></svg>')

# ------------------------------------------------------------------------------------------------------------- the page

def page(summary, rows):
    """The whole page. rows: those of the run itself; their media are read again, for the frames of the examples."""
    # the numbers that a reader sees first
    average = summary["average"]
    cards = {"right": average["accuracy"], "chance": average["chance"], **average["controls"]}
    if average["needs time"] is not None:
        cards["temporal gain"] = average["needs time"]
    cards = "".join(f'<div class="card"><small>{name}</small><b>{value:.1f}</b></div>' for name, value in cards.items())

    # all that the console shows, and where it comes from
    html, sources = "", ("commands", "checkpoint", "data", "version", "settings", "seconds", "software")
    origin = [f"{what}: {json.dumps(summary[what])}" for what in sources]
    for s in (*sections(summary), Section("Where these numbers come from", origin)):
        notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in s.notes)
        html += f"<h2>{s.title}</h2>{s.picture}{table(s.head, s.lines) if s.head else ''}{notes}"

    # the answers on which the scorers differ
    differing = [[f"{row['task']} {row['index']}", text_of("official", row), f"({row['letter']}) {row['answer']}",
                  ", ".join(name for name, right in row["verdicts"].items() if right)] for row in summary["differing"]]
    return (ASSETS / "report.html").read_text().format(
        style=(ASSETS / "report.css").read_text(), benchmark=summary["benchmark"], average=average, cards=cards,
        version=escape(summary["version"]), sections=html, examples=examples(rows),
        differing=table(("question", "answer", "key", "right for"), differing))

def table(head, lines):
    """A table of text; a wide one scrolls by itself."""
    body = "".join(f'<tr{" class=total" * (line[0] == "Avg")}>'
                   + "".join(f"<td>{escape(str(cell))}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{"".join(f"<th>{name}</th>" for name in head)}</tr>{body}</table></div>'

def examples(rows):
    """Of each task two right answers and two wrong ones, drawn at random."""
    html = ""
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task and "unread" not in row]
        groups = [[row for row in of_task if row["correct"] == right] for right in (True, False)]
        cards = "".join(example(row) for group in groups for row in random.Random(0).sample(group, min(2, len(group))))
        html += f'<details><summary>{escape(task)}</summary><div class="examples">{cards}</div></details>'
    return html

def example(row):
    """A card: frames, question, options with their probabilities."""
    frames = frame_sheet(row)
    image = f'<img alt="frames" src="data:image/jpeg;base64,{frames}">' if frames else "<p>(no frames)</p>"

    # percent of each option, among the options, if they are known
    p = np.array(row["letter_probabilities"] or np.exp(row.get("likelihoods") or []))
    known = [f"<small>{x:.0f} %</small>" for x in 100 * p / p.sum()] if p.sum() > 0 else [""] * len(LETTERS)
    options = ""
    for letter, text, percent in zip(LETTERS, row["candidates"], known, strict=False):
        key = ' class="good"' if letter == row["letter"] else ""
        options += f'<div class="option"><span{key}>{letter}</span><span{key}>{escape(text)}</span>{percent}</div>'
    verdict = '<b class="good">right</b>' if row["correct"] else '<b class="bad">wrong</b>'
    return (f'<div class="example">{image}<p><b>{escape(row["question"])}</b></p>{options}'
            f'<p>{verdict}: <span class="soft">{escape(row["prediction"])}</span></p></div>')

def frame_sheet(row):
    """Eight of the clip's frames side by side, as JPEG in base64; "" if the medium cannot be read."""
    try:
        frames = read_eval_frames(row["media"], FRAMES, row["bound"], row.get("fps"))      # (T, 3, H, W)
        frames = frames.expand(FRAMES, -1, -1, -1)             # a picture is a still video
    except MediaError:
        return ""

    # rows of small pictures
    frames = frames.unflatten(0, (-1, COLUMNS)).permute(0, 3, 1, 4, 2)                 # (rows, H, columns, W, 3)
    sheet, data = Image.fromarray(frames.flatten(2, 3).flatten(0, 1).numpy()), io.BytesIO()
    sheet.thumbnail((COLUMNS * WIDTH, COLUMNS * WIDTH))
    sheet.save(data, "JPEG", quality=70)
    return base64.b64encode(data.getvalue()).decode()
