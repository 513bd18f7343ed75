"""What each scorer takes for an answer, and what it lets through. Run: pytest tests/test_scorers.py"""
import json

import pytest

from evaluation.scorers import SCORERS, compare_scorers, is_counted, is_right, lmms_eval, official, strict, vlmevalkit

OPTIONS = ["He sat.", "He took a red box.", "He ran.", "Not sure."]
TRUTH = [  # what is said; the letters that official, lmms-eval, vlmevalkit and strict would count as right
    ("(B) He took a red box.", "B", "B", "B", "B"),
    ("(B", "B", "B", "B", ""),                               # strict wants the bracket closed, or no bracket
    ("B", "B", "B", "B", "B"),
    ("B.", "B", "B", "B", "B"),
    ("b", "B", "B", "B", ""),
    ("B) he took", "B", "B", "B", "B"),                      # "b)" is part of "(b)"
    ("B: he took", "", "B", "B", "B"),
    ("(", "ABCD", "", "ABCD", ""),                           # the empty answer behind "Best option:("
    ("", "ABCD", "", "ABCD", ""),
    (")", "ABCD", "", "ABCD", ""),
    (".", "ABCD", "", "ABCD", ""),
    ("(A)(B)(C)(D)", "ABCD", "A", "ABCD", ""),
    ("(A) or (B)", "A", "A", "A", ""),
    ("It is not A, it is B", "", "A", "", ""),
    ("a man (C)", "A", "A", "AC", "C"),                      # the article
    ("The person took a box (B)", "", "A", "B", "B"),
    ("Best option: (C)", "", "C", "C", "C"),
    ("He ran.", "", "", "C", "C"),                           # the option's text alone
    ("I think he ran", "", "", "", "C"),                     # the option ends in a full stop, which VLMEvalKit wants
    ("He sat. He ran.", "", "", "", ""),
    ("(C) He sat.", "C", "C", "C", ""),                      # letter and text contradict each other
    ("(E) He sat.", "", "", "A", ""),                        # a letter that is no option here
    ("(F) He ran.", "", "", "C", ""),
    ("(b) He ran.", "B", "B", "BC", ""),
    ("(c) He ran.", "C", "C", "C", "C"),
    ("B He ran.", "B", "B", "B", ""),
    ("(B, He ran.", "", "B", "B", ""),
    ("E", "", "", "", ""),
    ("Z", "", "", "", ""),
    ("D. 1,000 times", "D", "D", "D", "D"),
    ("I can't process this file.", "", "", "", ""),
    ("Failed to obtain answer via API", "", "", "ABCD", ""),  # its score of -1 is "true"
    ("（C）", "", "C", "", ""),                               # brackets of full width
]

@pytest.mark.parametrize("said, by_official, by_lmms_eval, by_vlmevalkit, by_strict", TRUTH)
def test_truth_table(said, by_official, by_lmms_eval, by_vlmevalkit, by_strict):
    found = tuple("".join(sorted(scorer(said, OPTIONS))) for scorer in SCORERS.values())
    assert found == (by_official, by_lmms_eval, by_vlmevalkit, by_strict)

def test_official_scorer_pair_by_pair(golden):
    """Every recorded pair whose key is a letter that MVBench has."""
    tried = 0
    for case in json.loads((golden / "sampling.json").read_text())["check_ans"]:
        key = case["gt"][1:2]
        if isinstance(case["out"], bool) and case["gt"][:3] == f"({key})" and key in "ABCDE":
            assert (key in official(case["pred"], ["option"] * 5)) == case["out"], case
            tried += 1
    assert tried > 20

def row(said, answer="He ran.", candidates=OPTIONS, **more):
    return {"task": "Action Count", "index": 0, "prediction": said, "candidates": candidates, "answer": answer, **more}

def test_what_could_not_be_watched_is_right_for_nobody():
    for name in SCORERS:
        assert not is_right(name, row("", unread="a.mp4: no such file"))
        assert not is_right(name, row("(C)", unread="a.mp4: no such file"))
        assert is_right(name, row("(C)"))
    assert is_right("official", row("(")) and not is_right("strict", row("("))

def test_of_equal_options_each_has_its_own_key():
    """The official code takes the last one, lmms-eval the first, strict either."""
    same = ["He ran.", "He sat.", "He ran."]
    right = {name: [said for said in ("(A)", "(C)") if is_right(name, row(said, candidates=same))] for name in SCORERS}
    assert right == {"official": ["(C)"], "lmms-eval": ["(A)"], "vlmevalkit": ["(C)"], "strict": ["(A)", "(C)"]}
    assert strict("He ran.", same) == {"A", "C"}

def test_empty_answers_leave_lmms_eval_s_denominator_but_unread_media_do_not():
    assert [is_counted("lmms-eval", r) for r in (row(""), row("("), row("", unread="gone"))] == [False, True, True]
    table, _ = compare_scorers([row(""), row("(C)"), row("(A)"), row("", unread="gone")])
    assert (table["lmms-eval"]["right"], table["lmms-eval"]["counted"]) == (1, 3)
    assert (table["strict"]["right"], table["strict"]["counted"], table["strict"]["unparsed"]) == (1, 4, 1)
    assert table["official"] == {"right": 2, "counted": 4, "percent": 50.0, "unparsed": 0, "any": 1}

def test_where_they_differ():
    _, differ = compare_scorers([row("(C)"), row("He ran."), row("(")])
    assert [d["prediction"] for d in differ] == ["He ran.", "("]
    assert differ[0]["verdicts"] == {"official": False, "lmms-eval": False, "vlmevalkit": True, "strict": True}

def test_one_text_within_another():
    colours = ["red", "dark red", "blue"]
    assert strict("It is dark red.", colours) == {"B"} and strict("It is red", colours) == {"A"}
    assert strict("red or dark red", colours) == set() and strict("coloured", colours) == set()
    assert vlmevalkit("It is dark red.", colours) == set()                 # both texts occur in it

def test_letters_that_are_no_option_are_none():
    assert lmms_eval("(D)", ["yes", "no"]) == set() and official("(d)", ["yes", "no"]) == set()
