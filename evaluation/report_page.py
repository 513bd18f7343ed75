"""report.html: one file that opens offline, on a phone and on a desk, in light and dark.

    page(summary, rows) -> HTML. Bars and intervals, the controls beside, scorers, letters, calibration, examples with
    their frames, and what the numbers are of: command, checkpoint, questions.

Everything is in the file: style, pictures (as JPEG in base64), no script. Not here: the numbers (report.py).

    pytest tests/test_report.py
"""
import base64
import io
import random
from html import escape

import numpy as np
from PIL import Image

from evaluation.engine import CONTROLS
from evaluation.tasks import LETTERS
from video import MediaError, read_eval_frames

FRAMES, COLUMNS, WIDTH = 8, 4, 112      # of an example: shown frames, in rows of four, pixels of each at most

STYLE = """
:root { --bg: #ffffff; --fg: #1b1f24; --soft: #5f6b78; --line: #dfe3e8; --fill: #4a7fd6; --mark: #1b1f24;
  --good: #1f8a46; --bad: #c63a30; --card: #f5f7f9; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171b; --fg: #e7eaee; --soft: #9aa5b1; --line: #2c333b;
  --fill: #5b8fe6; --mark: #e7eaee; --good: #58c27d; --bad: #ff7a6e; --card: #1c2126; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--bg); color: var(--fg);
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
p { margin: .4rem 0; } small, .soft { color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
td, th { padding: .22rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
td:first-child, th:first-child { text-align: left; position: sticky; left: 0; background: var(--bg); }
.wide { overflow-x: auto; } tr.total td { font-weight: 600; border-top: 2px solid var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.3rem, 1fr)); gap: .6rem; margin: .8rem 0; }
.card { background: var(--card); border-radius: .5rem; padding: .5rem .8rem; }
.card b { display: block; font-size: 1.35rem; }
.row { display: grid; grid-template-columns: 12.5rem 1fr 8.2rem; gap: .7rem; align-items: center; padding: .17rem 0; }
.row span:last-child { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { display: block; position: relative; height: 1rem; background: var(--card); border-radius: .2rem; }
.bar i { position: absolute; top: 0; bottom: 0; display: block; }
.bar .fill { left: 0; background: var(--fill); border-radius: .2rem; }
.bar .span { top: calc(50% - 1px); bottom: auto; height: 2px; background: var(--mark); }
.bar .odds { width: 2px; background: var(--bad); top: -.15rem; bottom: -.15rem; }
.row.total { font-weight: 600; border-top: 2px solid var(--soft); margin-top: .3rem; padding-top: .4rem; }
details { border-bottom: 1px solid var(--line); padding: .35rem 0; } summary { cursor: pointer; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)); gap: .8rem;
  margin: .6rem 0; }
.example { background: var(--card); border-radius: .5rem; padding: .6rem; font-size: .9rem; }
.example img { width: 100%; display: block; border-radius: .3rem; margin-bottom: .4rem; }
.option { display: grid; grid-template-columns: 1.1rem 1fr 2.6rem; gap: .3rem; align-items: baseline; }
.option .bar { grid-column: 2 / 4; height: .25rem; margin-bottom: .2rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .8rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; } code { font-size: .85rem; }
svg text { fill: var(--soft); font-size: 11px; }
@media (max-width: 34rem) { .row { grid-template-columns: 1fr auto; gap: 0 .5rem; }
  .row .bar { grid-column: 1 / 3; order: 3; } dl { grid-template-columns: 1fr; } dd { margin-bottom: .3rem; } }
"""


def page(summary, rows):
    """The whole page. rows: of the plain run; their media are read once more, for the examples' frames."""
    name = "TVBench" if summary["version"].startswith("TVBench") else "MVBench"
    average = summary["average"]
    parts = [
        f"<h1>{name}: {average['accuracy']:.1f} %</h1>",
        f"<p>{average['right']:,} of {average['asked']:,} questions right; 95 % interval {average['low']:.1f} to "
        f"{average['high']:.1f}, over videos. {escape(summary['version'])}.</p>", cards(summary), *unanswered(summary),
        "<h2>Task by task</h2>", tasks(summary), *controls(summary), "<h2>Who says what is right</h2>",
        scorers(summary), "<h2>Letters</h2>", letters(summary), *permuted(summary), *calibrated(summary),
        "<h2>Examples</h2>", examples(rows), "<h2>What these numbers are of</h2>", provenance(summary)]
    return ("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
            "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">"
            f"<title>{name} {average['accuracy']:.1f} %</title><style>{STYLE}</style></head><body>\n"
            + "\n".join(parts) + "\n</body></html>\n")


# ---------------------------------------------------------------------------------------------------------- its parts


def cards(summary):
    average = summary["average"]
    found = [("right", f"{average['accuracy']:.1f} %"), ("chance", f"{average['chance']:.1f} %")]
    found += [(control, f"{average['controls'][control]:.1f} %") for control in summary["controls"]]
    if average["needs time"] is not None:
        found.append(("needs time", f"{average['needs time']:+.1f}"))
    found.append(("mean of tasks", f"{summary['mean of tasks']:.1f} %"))
    return '<div class="cards">' + "".join(f'<div class="card"><small>{name}</small><b>{value}</b></div>'
                                           for name, value in found) + "</div>"


def unanswered(summary):
    found = []
    if summary["missing"]:
        lines = "<br>".join(map(escape, summary["missing"]))
        found.append(f'<p class="bad">Not asked, and in no number:<br>{lines}</p>')
    if not summary["unanswered"]:
        return found
    return [*found, f'<p class="bad">{summary["unanswered"]} questions speak of a medium that cannot be read. They are '
            "asked, unanswered, and counted as wrong.</p>",
            "<details><summary>which</summary>" + "".join(f"<p><code>{escape(reason)}</code></p>"
                                                          for reason in summary["unread"]) + "</details>"]


def bar(share, low=None, high=None, odds=None):
    """Percent -> a bar, with an interval and a mark where guessing ends."""
    parts = [f'<i class="fill" style="width:{share:.2f}%"></i>']
    if low is not None:
        parts.append(f'<i class="span" style="left:{low:.2f}%;width:{high - low:.2f}%"></i>')
    if odds is not None:
        parts.append(f'<i class="odds" style="left:{odds:.2f}%"></i>')
    return f'<span class="bar">{"".join(parts)}</span>'


def tasks(summary):
    """A bar for each task."""
    lines = []
    for line in (*summary["tasks"], summary["average"]):
        total = line["task"] == "Avg"
        asked = f"{line['asked']}/{line['there are']}"
        asked = "" if line["asked"] == line["there are"] else f' <span class="bad">{asked}</span>'
        lines.append(f'<div class="row{" total" * total}"><span>{"Average" if total else escape(line["task"])}{asked}'
                     f'</span>{bar(line["accuracy"], line["low"], line["high"], line["chance"])}'
                     f'<span>{line["accuracy"]:.1f} <small>{line["low"]:.0f} to {line["high"]:.0f}</small></span>'
                     "</div>")
    return ("".join(lines) + '<p class="soft">Percent right, with the 95 % interval (Wilson; of the average: over '
            "videos) and, in red, where guessing ends.</p>")


def controls(summary):
    """What the same model answers with less to go by."""
    names = summary["controls"]
    if not names:
        return []
    timed = summary["average"]["needs time"] is not None
    head = "".join(f"<th>{name}</th>" for name in ("task", "normal", *names, *["needs time"] * timed))
    body = ""
    for line in (*summary["tasks"], summary["average"]):
        cells = [line["accuracy"], *[line["controls"].get(name, float("nan")) for name in names]]
        body += (f'<tr{" class=total" * (line["task"] == "Avg")}><td>{escape(line["task"])}</td>'
                 + "".join(f"<td>{cell:.1f}</td>" for cell in cells)
                 + (f"<td>{line['needs time']:+.1f}</td>" if timed else "") + "</tr>")
    told = "".join(f"<li><b>{name}</b> {CONTROLS[name]}</li>" for name in names)
    if timed:
        told += "<li><b>needs time</b> normal minus the best of single and shuffle"
        average = summary["average"]
        told += (f"; over all {average['needs time']:+.1f}, 95 % {average['needs time low']:+.1f} to "
                 f"{average['needs time high']:+.1f}")
        told += "</li>"
    return ["<h2>The same model with less to go by</h2>",
            f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>', f'<ul class="soft">{told}</ul>']


def scorers(summary):
    body = "".join(f"<tr><td>{name}</td><td>{found['percent']:.2f}</td><td>{found['right']}/{found['counted']}</td>"
                   f"<td>{found['unparsed']}</td><td>{found['any']}</td></tr>"
                   for name, found in summary["scorers"].items())
    shown = "".join(f"<tr><td>{escape(row['task'])} {row['index']}</td><td>{escape(row['prediction'])}</td>"
                    f"<td>({row['letter']}) {escape(row['answer'])}</td><td>"
                    + ", ".join(name for name, right in row["verdicts"].items() if right) + "</td></tr>"
                    for row in summary["differing"])
    differ = (f'<details><summary>They differ on {summary["scorers differ"]} questions</summary><div class="wide">'
              "<table><tr><th>question</th><th>said</th><th>key</th><th>right for</th></tr>"
              f"{shown}</table></div></details>" if shown else "<p>They agree on every question.</p>")
    return ('<div class="wide"><table><tr><th>scorer</th><th>right, %</th><th>of</th><th>unparsed</th><th>any key</th>'
            f'</tr>{body}</table></div><p class="soft">Unparsed: it took no option from the answer. Any key: it would '
            f"count the answer as right under several keys.</p>{differ}")


def letters(summary, of="letters"):
    """How often each letter is the key, and how often it is the answer."""
    table = summary[of] if of == "letters" else summary[of]["letters"]
    total = max(1, sum(counts[2] for counts in table.values()))
    body = "".join(f"<tr><td>{letter or 'no letter'}</td><td>{100 * key / total:.1f}</td>"
                   f"<td>{100 * said / total:.1f}</td>"
                   f'<td style="width:45%">{bar(100 * said / total, odds=100 * key / total)}</td></tr>'
                   for letter, (_, key, said) in table.items() if key or said)
    return ("<table><tr><th>letter</th><th>is key, %</th><th>answered, %</th><th></th></tr>" + body
            + '</table><p class="soft">In red: how often the letter is the key.</p>')


def permuted(summary):
    found = summary["permutations"]
    if not found:
        return []
    return ["<h2>When the options change places</h2>",
            f"<p>{found['questions']:,} questions under every cyclic order of their options: right "
            f"{found['mean']:.1f} % in the mean, {found['always']:.1f} % in every order. The same option is chosen in "
            f"every order in {found['same']:.1f} % of the questions.</p>", letters(summary, "permutations")]


def calibrated(summary):
    """Confidence against the share that is right, as a picture."""
    found = summary["calibration"]
    if not found:
        return []
    most = max(n for *_, n in found["bins"])
    dots = "".join(f'<circle cx="{30 + 200 * sure:.1f}" cy="{210 - 200 * right:.1f}" fill="var(--fill)" '
                   f'r="{3 + 9 * (n / most) ** .5:.1f}"><title>{n} answers: confidence {sure:.2f}, right {right:.2f}'
                   "</title></circle>"
                   for sure, right, n in found["bins"])
    return ["<h2>Does it know when it knows?</h2>",
            '<svg viewBox="0 0 260 240" style="max-width:22rem;width:100%" role="img" aria-label="calibration">'
            '<path d="M30 10V210H230" fill="none" stroke="var(--soft)"/>'
            '<path d="M30 210L230 10" stroke="var(--line)" stroke-dasharray="4"/>' + dots +
            '<text x="30" y="226">0</text><text x="222" y="226">1</text><text x="90" y="236">confidence</text>'
            '<text x="18" y="16">1</text><text x="14" y="130" transform="rotate(-90 14 130)">right</text></svg>',
            '<p class="soft">Confidence: the probability of the most probable option letter, among the options. A dot '
            f"on the line says of itself what it is worth; the mean distance is {100 * found['error']:.1f} points.</p>"]


def provenance(summary):
    """Command, checkpoint, questions, protocol, time, software."""
    settings = dict(summary["settings"])
    told = {"command": "; then ".join(summary["commands"]),
            "checkpoint": f"{summary['checkpoint']}, fingerprint {settings.pop('checkpoint')}",
            "LLM": f"fingerprint {settings.pop('LLM', None)}",
            "questions": f"{summary['data']}, fingerprint {settings.pop('questions', None)}; {summary['version']}",
            "protocol": ", ".join(f"{what}: {says(value)}" for what, value in settings.items() if what != "control")}
    if summary["seconds"]:
        told["seconds"] = ", ".join(f"{part} {seconds:.1f}" for part, seconds in summary["seconds"].items())
    told["software"] = ", ".join(f"{name} {value}" for name, value in summary["software"].items())
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in told.items()) + "</dl>"


def says(value):
    return {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value


# --------------------------------------------------------------------------------------------------------- examples


def examples(rows):
    """Of each task two right answers and two wrong ones, drawn at random."""
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task and "unread" not in row]
        chosen = [row for right in (True, False) for row in some_of([r for r in of_task if r["correct"] == right])]
        parts.append(f"<details><summary>{escape(task)}</summary><div class=\"examples\">"
                     + "".join(map(example, chosen)) + "</div></details>")
    return "".join(parts) + ('<p class="soft">Drawn at random. Eight frames of each clip, taken by the rule of the '
                             "benchmark; in green, the key.</p>")


def some_of(rows, n=2):
    return random.Random(0).sample(rows, min(n, len(rows)))


def example(row):
    """A card: frames, question, options with their probabilities."""
    picture = frames_of(row)
    image = f'<img alt="frames" src="data:image/jpeg;base64,{picture}">' if picture else "<p>(no frames)</p>"
    options = "".join(option(row, i) for i in range(len(row["candidates"])))
    mark = '<b class="good">right</b>' if row["correct"] else '<b class="bad">wrong</b>'
    return (f'<div class="example">{image}<p><b>{escape(row["question"])}</b></p>{options}'
            f'<p>{mark}: <span class="soft">{escape(row["prediction"])}</span></p></div>')


def option(row, i):
    letter = LETTERS[i]
    share = probabilities(row)
    key = ' class="good"' if letter == row["letter"] else ""
    text = f'<span{key}>{letter}</span><span{key}>{escape(row["candidates"][i])}</span>'
    known = f"<small>{share[i]:.0f} %</small>{bar(share[i])}" if share else "<i></i>"
    return f'<div class="option">{text}{known}</div>'


def probabilities(row):
    """Percent of each option, among the options; [] where none are known."""
    known = np.array(row["letter_probabilities"] or np.exp(row.get("likelihoods") or []))
    return (100 * known / known.sum()).tolist() if known.sum() > 0 else []


def frames_of(row):
    """Eight of the clip's frames side by side, as JPEG in base64, or "" where the medium is gone."""
    try:
        frames = read_eval_frames(row["media"], FRAMES, row["bound"])               # (T, 3, H, W)
    except MediaError:
        return ""
    height, width = frames.shape[-2:]
    shown = min(WIDTH, width)
    size = (shown, max(1, round(shown * height / width)))
    sheet = Image.new("RGB", (COLUMNS * size[0], -(-FRAMES // COLUMNS) * size[1]))
    for i, frame in enumerate(frames):
        image = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())
        sheet.paste(image.resize(size), (i % COLUMNS * size[0], i // COLUMNS * size[1]))
    data = io.BytesIO()
    sheet.save(data, "JPEG", quality=70)
    return base64.b64encode(data.getvalue()).decode()
