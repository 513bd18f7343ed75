"""The numbers, the page and the comparison of two runs. Run: pytest tests/test_report.py"""
import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

import mvbench
from evaluation import report, report_page
from evaluation.predictions import Condition
from evaluation.tasks import MVBENCH, load_questions

def row(task, index, correct, media=None, **more):
    said = "(A) yes" if correct else "(B) no"
    return {"task": task, "index": index, "video": "v", "media": media or f"{task}{index}.mp4", "bound": None,
            "question": "Is it?", "candidates": ["yes", "no", "<i>&"], "answer": "yes", "letter": "A",
            "prediction": said, "letter_probabilities": [0.6, 0.2, 0.1], "correct": correct, **more}

def summary_of(tmp_path, rows, questions=None, seconds=None):
    condition = Condition(tmp_path, "", {"checkpoint": "ab12", "LLM": None, "questions": "cd34", "control": "",
                                         "frames": 16})
    condition.prepare(False, {"commands": ["python mvbench.py --x '<b>'"], "version": "20 questions",
                              "checkpoint": "run", "data": "data"})
    return report.summarise(rows, questions or rows[""], condition, MVBENCH, seconds or {})

@pytest.fixture
def plain():
    """Two tasks of ten: 8 and 5 right; of one frame 3 and 5; shuffled 6 and 4."""
    def run(first, second):
        return [row("State Change", i, i < first) for i in range(10)] + [row("Action Count", i, i < second)
                                                                          for i in range(10)]
    return {"": run(8, 5), "blank": run(2, 3), "single": run(3, 5), "shuffle": run(6, 4)}

def test_average_is_right_over_asked_and_chance_follows_the_options():
    rows = [row("Action Count", 0, True)] + [row("State Change", i, False) for i in range(3)]
    assert report.score(rows) == {"Action Count": 100, "State Change": 0, "Avg": 25}
    questions = [row("Action Count", 0, True), {**row("Action Count", 1, True), "candidates": list("1234")}]
    assert report.chance(questions)["Avg"] == pytest.approx(100 * (1 / 3 + 1 / 4) / 2)

def test_the_summary_s_numbers(tmp_path, plain):
    wanted = [*plain[""], row("Action Count", 10, True)]
    found = summary_of(tmp_path, plain, wanted)
    first, second = found["tasks"]
    assert (first["accuracy"], first["right"], first["asked"], first["there are"]) == (80, 8, 10, 10)
    assert (second["asked"], second["there are"], found["average"]["there are"]) == (10, 11, 21)
    assert (first["low"], first["high"]) == pytest.approx((49.02, 94.33), abs=0.01)      # Wilson, 8 of 10
    assert first["controls"] == {"blank": 20, "single": 30, "shuffle": 60}
    assert first["needs time"] == 20 and second["needs time"] == 0         # minus the better of single and shuffle
    average = found["average"]
    assert average["accuracy"] == 65 == found["mean of tasks"] and average["needs time"] == 15
    assert average["needs time low"] <= 15 <= average["needs time high"] < 40
    assert found["scorers"]["strict"]["right"] == 13 and found["scorers differ"] == 0
    assert found["letters"]["A"] == (20, 20, 13) and found["calibration"]["error"] == pytest.approx(1 - 0.6 / 0.9)
    json.dumps(found)

def test_without_controls_nothing_is_said_of_time(tmp_path, plain, capsys):
    found = summary_of(tmp_path, {"": plain[""]})
    assert found["average"]["needs time"] is None
    report.show(found)
    assert "temporal gain" not in capsys.readouterr().out

def test_the_console(tmp_path, plain, capsys):
    rows = [*plain[""], row("Action Count", 10, False, unread="a.mp4: no such file", prediction="")]
    orders = [row("State Change", 0, shift != 1, shift=shift) for shift in (1, 2)]      # beside the run itself
    report.show(summary_of(tmp_path, {**plain, "": rows, "permute": orders}))
    out = capsys.readouterr().out
    assert re.search(r"State Change +80\.0 +49\.0-94\.3 +33\.3 +20\.0 +30\.0 +60\.0 +\+20\.0 +10/10", out)
    assert "1 questions with unreadable media or texts, counted as wrong:\n  unread: a.mp4: no such file" in out
    assert "all orders of the options, 1 questions: right 66.7 in the mean, 0.0 in every order" in out
    assert re.search(r"strict +61\.90 +13/21 +0 +0", out)

# ---- the page --------------------------------------------------------------------------------------------------------

class Tags(HTMLParser):
    """Checks that every tag is closed, in order, and keeps what refers to something outside."""

    def __init__(self):
        super().__init__()
        self.open, self.outside, self.images = [], [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.outside += [v for k, v in found.items() if k in ("src", "href") and not v.startswith("data:")]
        self.images += [found["src"]] if tag == "img" else []
        if tag not in ("meta", "img", "circle", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("circle", "path"):
            assert self.open.pop() == tag

def parsed(html):
    tags = Tags()
    tags.feed(html)
    assert not tags.open and not tags.outside and "<script" not in html and "http" not in html
    return tags

def test_the_page_is_whole_and_needs_nothing_from_outside(ckpt, tree, tmp_path):
    mvbench.main(["--ckpt", str(ckpt), "--data", str(tree), "--out", str(tmp_path), "--workers", "0", "--controls",
                  "all", "--permute"])
    html = (tmp_path / "report.html").read_text()
    tags = parsed(html)
    assert len(tags.images) == 40                                          # all questions are examples here
    image = Image.open(io.BytesIO(base64.b64decode(tags.images[0].split(",")[1])))
    assert image.size == (4 * report_page.WIDTH, 2 * report_page.WIDTH * 3 // 4)
    digits = json.loads((tmp_path / "settings.json").read_text())["settings"]
    for part in (digits["checkpoint"], digits["questions"], digits["LLM"], "temporal gain", "the middle frame alone",
                 "When the options change places", "prefers-color-scheme: dark", "40 questions: none of MVBench"):
        assert part in html
    assert ">nan" not in html

def test_what_stands_in_questions_and_commands_stays_text(tmp_path, plain):
    html = report_page.page(summary_of(tmp_path, plain), plain[""])
    parsed(html)
    assert "&lt;i&gt;&amp;" in html and "&lt;b&gt;" in html and "<i>&" not in html
    assert "(no frames)" in html                                           # their media are nowhere

def test_unanswered_questions_are_on_the_page(tmp_path, plain):
    rows = [*plain[""], row("Action Count", 10, False, unread="<a>.mp4: no such file", prediction="")]
    html = report_page.page(summary_of(tmp_path, {"": rows}), rows)
    assert "1 questions with unreadable media or texts, counted as wrong" in html
    assert "&lt;a&gt;.mp4: no such file" in html

# ---- files and comparisons -------------------------------------------------------------------------------------------

def test_the_leaderboard_s_file_is_the_notebook_s(ckpt, tree, tmp_path):
    mvbench.main(["--ckpt", str(ckpt), "--data", str(tree), "--out", str(tmp_path), "--workers", "0"])
    found = json.loads((tmp_path / "leaderboard.json").read_text())
    assert list(found) == [*dict.fromkeys(q["task"] for q in load_questions(tree)), "Avg"] and len(found) == 21
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert found["Avg"] == 100 * sum(r["correct"] for r in rows) / 40

def put(folder, rows):
    folder.mkdir()
    (folder / "predictions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder)

def test_two_runs(tmp_path, capsys):
    """B has 15 right that A has wrong, A has 5 that B has wrong: p = 0.0414."""
    one = [row("State Change", i, i < 25) for i in range(40)]
    other = [row("State Change", i, 5 <= i < 40) for i in range(40)]
    a, b = put(tmp_path / "a", one), put(tmp_path / "b", [*other, row("Action Count", 0, True)])
    assert mvbench.main(["compare", a, b]) == 0
    out = capsys.readouterr().out
    assert "40 questions in common (A has 40, B 41); scorer: official" in out
    assert re.search(r"State Change +62\.5 +87\.5 +-25\.0 +5 +15 +0\.0414", out) and "B is better (p = 0.0414)" in out
    mvbench.main(["compare", a, a, "--scorer", "strict"])
    assert "The difference could be luck (p = 1.00)" in capsys.readouterr().out

def test_what_cannot_be_compared_is_named(tmp_path):
    a = put(tmp_path / "a", [row("State Change", 0, True)])
    b = put(tmp_path / "b", [row("State Change", 0, True, question="Was it?")])
    c = put(tmp_path / "c", [row("State Change", 1, True)])
    for one, other, message in ((a, b, "1 questions differ between .* State Change 0"), (a, c, "no question in common"),
                                (a, str(tmp_path), "is no finished run")):
        with pytest.raises((ValueError, OSError), match=message):
            mvbench.main(["compare", one, other])
    for line in ("[1]", "garbage", "{}"):
        (tmp_path / "c" / "predictions.jsonl").write_text(f"{line}\n")
        with pytest.raises(ValueError, match="c/predictions.jsonl, line 1 is no prediction: delete the line"):
            mvbench.main(["compare", a, c])
    (tmp_path / "c" / "predictions.jsonl").rename(tmp_path / "c" / "predictions.part.jsonl")
    with pytest.raises(OSError, match=r"it has no predictions.jsonl; there are .*c/predictions.part.jsonl"):
        mvbench.main(["compare", a, c])
