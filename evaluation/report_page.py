"""report.html: one file that opens offline, on a phone and on a desk, in light and dark.

    page(summary, rows) -> HTML: bars and intervals, controls, scorers, letters, calibration, examples with their
    frames, and where the scores come from: command, checkpoint, questions.

assets/report.html is the page's frame, filled in here; the style (assets/report.css) and the pictures (JPEG in base64)
are inside the page, and there is no script. Not here: the numbers (report.py).

    pytest tests/test_report.py
"""
import base64
import io
import random
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

from evaluation.protocol import CONTROLS
from evaluation.tasks import LETTERS
from video import MediaError, read_eval_frames

ASSETS = Path(__file__).parent.parent / "assets"
FRAMES, COLUMNS, WIDTH = 8, 4, 112      # of an example: frames, in rows of four, each at most WIDTH pixels wide

def page(summary, rows):
    """The whole page. rows: those of the run itself; their media are read again, for the frames of the examples."""
    average = summary["average"]
    return Template((ASSETS / "report.html").read_text()).substitute(
        style=(ASSETS / "report.css").read_text(), title=f"{summary['benchmark']}: {average['accuracy']:.1f} %",
        right=f"{average['right']:,}", asked=f"{average['asked']:,}", low=f"{average['low']:.1f}",
        high=f"{average['high']:.1f}", version=escape(summary["version"]), cards=cards(summary),
        unanswered=unanswered(summary), tasks=tasks(summary), controls=controls(summary), scorers=scorers(summary),
        letters=letters(summary["letters"]), permutations=permutations(summary["permutations"]),
        calibration=calibration(summary["calibration"]), examples=examples(rows), provenance=provenance(summary))

# ------------------------------------------------------------------------------------------------------ building blocks

def table(head, lines, last_is_total=False):
    """A table of cells that are HTML already; a wide one scrolls by itself."""
    body = "".join(f'<tr{" class=total" * (last_is_total and line is lines[-1])}>'
                   + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{"".join(f"<th>{name}</th>" for name in head)}</tr>{body}</table></div>'

def bar(percent, low=None, high=None, chance=None):
    """A bar, with an interval, and with a red mark at the chance level."""
    parts = [f'<i class="fill" style="width:{percent:.2f}%"></i>']
    if low is not None:
        parts.append(f'<i class="span" style="left:{low:.2f}%;width:{high - low:.2f}%"></i>')
    if chance is not None:
        parts.append(f'<i class="odds" style="left:{chance:.2f}%"></i>')
    return f'<span class="bar">{"".join(parts)}</span>'

def soft(text):
    return f'<p class="soft">{text}</p>'

# ---------------------------------------------------------------------------------------------------- parts of the page

def cards(summary):
    """The numbers that a reader looks for first."""
    average = summary["average"]
    values = {"right": f"{average['accuracy']:.1f} %", "chance": f"{average['chance']:.1f} %",
              **{control: f"{average['controls'][control]:.1f} %" for control in summary["controls"]}}
    if average["needs time"] is not None:
        values["temporal gain"] = f"{average['needs time']:+.1f}"
    values["mean of tasks"] = f"{summary['mean of tasks']:.1f} %"
    return "".join(f'<div class="card"><small>{name}</small><b>{value}</b></div>' for name, value in values.items())

def unanswered(summary):
    """What is missing from the numbers."""
    html = ""
    if summary["missing"]:
        html += f'<p class="bad">Not asked, and in no score:<br>{"<br>".join(map(escape, summary["missing"]))}</p>'
    if summary["unanswered"]:
        reasons = "".join(f"<p><code>{escape(reason)}</code></p>" for reason in summary["unread"])
        html += (f'<p class="bad">{summary["unanswered"]} questions are about a medium that cannot be read. They have '
                 f"no answer, and count as wrong.</p><details><summary>which</summary>{reasons}</details>")
    return html

def tasks(summary):
    """A bar for each task."""
    html = ""
    for line in (*summary["tasks"], summary["average"]):
        total = line is summary["average"]
        name = "Average" if total else escape(line["task"])
        if line["asked"] < line["there are"]:
            name += f' <span class="bad">{line["asked"]}/{line["there are"]}</span>'
        html += (f'<div class="row{" total" * total}"><span>{name}</span>'
                 f'{bar(line["accuracy"], line["low"], line["high"], line["chance"])}<span>{line["accuracy"]:.1f} '
                 f'<small>{line["low"]:.0f} to {line["high"]:.0f}</small></span></div>')
    return html

def controls(summary):
    """What the same model answers with less to go by."""
    names, average = summary["controls"], summary["average"]
    if not names:
        return ""

    # a line for each task: normal, the controls, and the temporal gain where its two controls are there
    timed = average["needs time"] is not None
    lines = []
    for line in (*summary["tasks"], average):
        scores = [line["accuracy"], *(line["controls"].get(name, float("nan")) for name in names)]
        gain = [f"{line['needs time']:+.1f}"] if timed else []
        lines.append([escape(line["task"]), *(f"{s:.1f}" for s in scores), *gain])
    head = ["task", "normal", *names, *["temporal gain"] * timed]

    # what the columns mean
    legend = [f"<b>{name}</b> {CONTROLS[name]}" for name in names]
    if timed:
        legend.append("<b>temporal gain</b> normal minus the better of single and shuffle; over all "
                      f"{average['needs time']:+.1f}, 95 % {average['needs time low']:+.1f} to "
                      f"{average['needs time high']:+.1f}")
    return ("<h2>The same model with less to go by</h2>" + table(head, lines, last_is_total=True)
            + f'<ul class="soft">{"".join(f"<li>{item}</li>" for item in legend)}</ul>')

def scorers(summary):
    """Four scorers side by side, and the questions on which they disagree."""
    html = table(["scorer", "right, %", "of", "unparsed", "any key"],
                 [[name, f"{s['percent']:.2f}", f"{s['right']}/{s['counted']}", s["unparsed"], s["any"]]
                  for name, s in summary["scorers"].items()])
    html += soft("Unparsed: the scorer took no option from the answer. Any key: it would count the answer as right "
                 "under several keys.")
    if not summary["differing"]:
        return html + "<p>They agree on every question.</p>"
    lines = [[f"{escape(row['task'])} {row['index']}", escape(row["prediction"]),
              f"({row['letter']}) {escape(row['answer'])}",
              ", ".join(name for name, right in row["verdicts"].items() if right)] for row in summary["differing"]]
    return (f"{html}<details><summary>They differ on {summary['scorers differ']} questions</summary>"
            + table(["question", "answer", "key", "right for"], lines) + "</details>")

def letters(counts):
    """How often each letter is the key, and how often it is the answer. counts: of stats.letter_counts."""
    n = max(1, sum(answered for *_, answered in counts.values())) / 100
    lines = [[letter or "no letter", f"{key / n:.1f}", f"{answered / n:.1f}", bar(answered / n, chance=key / n)]
             for letter, (_, key, answered) in counts.items() if key or answered]
    return ('<div class="letters">' + table(["letter", "is key, %", "answered, %", ""], lines) + "</div>"
            + soft("In red: how often the letter is the key."))

def permutations(orders):
    """Whether the same option is chosen when the options change places."""
    if not orders:
        return ""
    return (f"<h2>When the options change places</h2><p>{orders['questions']:,} questions in every cyclic order of "
            f"their options: right {orders['mean']:.1f} % in the mean, {orders['always']:.1f} % in every order. The "
            f"same option is chosen in every order in {orders['same']:.1f} % of the questions.</p>"
            + letters(orders["letters"]))

def calibration(result):
    """Confidence against the share that is right, as a picture."""
    if not result:
        return ""

    # a dot for each bin; its area says how many answers it has
    most = max(n for *_, n in result["bins"])
    dots = "".join(f'<circle cx="{30 + 200 * confidence:.1f}" cy="{210 - 200 * right:.1f}" fill="var(--fill)" '
                   f'r="{3 + 9 * (n / most) ** .5:.1f}"><title>{n} answers: confidence {confidence:.2f}, right '
                   f"{right:.2f}</title></circle>" for confidence, right, n in result["bins"])
    return ('<h2>Does it know when it knows?</h2>'
            '<svg viewBox="0 0 260 240" style="max-width:22rem;width:100%" role="img" aria-label="calibration">'
            '<path d="M30 10V210H230" fill="none" stroke="var(--soft)"/>'
            f'<path d="M30 210L230 10" stroke="var(--line)" stroke-dasharray="4"/>{dots}'
            '<text x="30" y="226">0</text><text x="222" y="226">1</text><text x="90" y="236">confidence</text>'
            '<text x="18" y="16">1</text><text x="14" y="130" transform="rotate(-90 14 130)">right</text></svg>'
            + soft("Confidence: the probability of the most probable option letter, among the options. Answers on the "
                   "dashed line are as often right as they are confident; the mean distance from it is "
                   f"{100 * result['error']:.1f} points."))

def provenance(summary):
    """Command, checkpoint, questions, protocol, time, software."""
    settings = dict(summary["settings"])
    checkpoint, llm, questions = (settings.pop(what, None) for what in ("checkpoint", "LLM", "questions"))
    settings = {what: {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
                for what, value in settings.items() if what != "control"}
    items = {"command": "; then ".join(summary["commands"]),
             "checkpoint": f"{summary['checkpoint']}, fingerprint {checkpoint}", "LLM": f"fingerprint {llm}",
             "questions": f"{summary['data']}, fingerprint {questions}; {summary['version']}",
             "protocol": ", ".join(f"{what}: {value}" for what, value in settings.items()),
             "seconds": ", ".join(f"{part} {seconds:.1f}" for part, seconds in summary["seconds"].items()),
             "software": ", ".join(f"{name} {value}" for name, value in summary["software"].items())}
    return "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in items.items() if text)

# ------------------------------------------------------------------------------------------------------------- examples

def examples(rows):
    """Of each task two right answers and two wrong ones, drawn at random."""
    html = ""
    for task in dict.fromkeys(row["task"] for row in rows):
        html += f'<details><summary>{escape(task)}</summary><div class="examples">'
        for right in (True, False):
            of_task = [row for row in rows if row["task"] == task and "unread" not in row and row["correct"] == right]
            html += "".join(map(example, random.Random(0).sample(of_task, min(2, len(of_task)))))
        html += "</div></details>"
    return html

def example(row):
    """A card: frames, question, options with their probabilities."""
    frames = frame_sheet(row)
    image = f'<img alt="frames" src="data:image/jpeg;base64,{frames}">' if frames else "<p>(no frames)</p>"

    # percent of each option, among the options, if they are known
    p = np.array(row["letter_probabilities"] or np.exp(row.get("likelihoods") or []))
    percent = 100 * p / p.sum() if p.sum() > 0 else None
    options = ""
    for i, (letter, text) in enumerate(zip(LETTERS, row["candidates"], strict=False)):
        key = ' class="good"' if letter == row["letter"] else ""
        known = "<i></i>" if percent is None else f"<small>{percent[i]:.0f} %</small>{bar(percent[i])}"
        options += f'<div class="option"><span{key}>{letter}</span><span{key}>{escape(text)}</span>{known}</div>'

    verdict = '<b class="good">right</b>' if row["correct"] else '<b class="bad">wrong</b>'
    return (f'<div class="example">{image}<p><b>{escape(row["question"])}</b></p>{options}'
            f'<p>{verdict}: <span class="soft">{escape(row["prediction"])}</span></p></div>')

def frame_sheet(row):
    """Eight of the clip's frames side by side, as JPEG in base64; "" if the medium cannot be read."""
    try:
        frames = read_eval_frames(row["media"], FRAMES, row["bound"])                  # (T, 3, H, W)
    except MediaError:
        return ""

    # rows of small pictures
    height, width = frames.shape[-2:]
    w = min(WIDTH, width)
    h = max(1, round(w * height / width))
    sheet = Image.new("RGB", (COLUMNS * w, -(-FRAMES // COLUMNS) * h))
    for i, frame in enumerate(frames):
        image = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())           # (H, W, 3)
        sheet.paste(image.resize((w, h)), (i % COLUMNS * w, i // COLUMNS * h))
    data = io.BytesIO()
    sheet.save(data, "JPEG", quality=70)
    return base64.b64encode(data.getvalue()).decode()
