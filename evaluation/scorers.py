"""Was the answer right? Four scorers of multiple-choice answers, as pure functions.

A scorer takes what a model said and the options, and returns the letters that it would count as right, were they the
key. None: it could not parse the answer. One: it understood. More: it lets the answer through whatever is asked, as the
official scorer does with "(". So one definition serves for all four, and says what each is worth:

    official     mvbench.ipynb, check_ans: the first word is part of "(b)", or "(b)" is part of it
    lmms-eval    the first letter from A to E that stands alone; "a man (C)" is A, an option's text is nothing
    vlmevalkit   official's rule; failing that, the one letter that stands alone, or the one option whose text occurs
    strict       exactly one option is named, by its letter or by its text, and nothing contradicts it

Not here: who asks (mvbench.py), how sure a number is (stats.py).
Source: mvbench.ipynb; lmms_eval/tasks/mvbench/utils.py, mcq_acc; without a judge LLM, vlmeval/dataset/utils/mvbench.py,
check_ans_with_model, and vlmeval/utils/matching_util.py, can_infer, at 18fc37a (later ones look at the answer's length
and the letter's place too).

    pytest tests/test_scorers.py
"""
import re
from collections import Counter

from evaluation.tasks import LETTERS, letter_of

# what lmms-eval takes out of an answer before it looks for a letter
PUNCTUATION = ';/[]"{}()=+\\_->,<@`?!'
# what VLMEvalKit takes for a refusal; the first one counts as right on every question, for its score of -1 is "true"
FAILED = "Failed to obtain answer via API"
REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")


def official(said, candidates):
    """QUIRK mvbench.ipynb check_ans: substrings count both ways, so the empty answer "(" is right on every question."""
    first = said.lower().split(" ")[0]
    options = {letter: f"({letter.lower()})" for letter in LETTERS[:len(candidates)]}
    return {letter for letter, option in options.items() if first.replace(".", "") in option or option in first}


def lmms_eval(said, candidates):
    """The letter of "B. text", or the first of A to E that stands alone, in capitals or not."""
    listed = re.match(r"([a-e])\.\s*.", said.strip(), re.I)
    found = listed or re.search(r"\b([a-e])\b", without_punctuation(" ".join(re.split(r"[\n\t]", said)).strip()), re.I)
    return {found[1].upper()} & set(LETTERS[:len(candidates)]) if found else set()


def without_punctuation(text):
    """Punctuation beside a space, or with a number like 1,000 about, is dropped; elsewhere it becomes a space."""
    cleaned, thousands = text, re.search(r"\d,\d", text)
    for mark in PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text or thousands
        cleaned = cleaned.replace(mark, "" if beside else " ")
    return re.sub(r"\.(?!\d)", "", cleaned)


def vlmevalkit(said, candidates):
    """The official rule, or else one letter or one text that occurs; a failed request is right on every question."""
    letters = set(LETTERS[:len(candidates)])
    if FAILED in said:
        return letters
    return official(said, candidates) | inferred(said, candidates)


def inferred(said, candidates):
    """The one option letter that stands alone, in capitals; without one, the one option whose text occurs."""
    if any(refusal in said for refusal in REFUSALS):
        return set()
    words = set(re.sub(r"[.()\[\],:;!*#{}]", " ", said).split())
    letters = words & set(LETTERS[:len(candidates)])
    if len(letters) == 1:
        return letters
    if "Z" in words and not letters:
        return set()                                                       # its own sign for "none of them"
    texts = {letter for letter, text in zip(LETTERS, candidates, strict=False) if str(text).lower() in said.lower()}
    return texts if len(texts) == 1 else set()


def strict(said, candidates):
    """One option, named by letter ("(B)" anywhere; "B", "B.", "B)", "B:" at the beginning) or by its whole text.

    Letter and text that speak of different options, two letters, two texts, a letter that is no option: nothing. A
    letter at the beginning that is not set off ("B He ran.") names no option, but no other text counts beside it.
    """
    begun = re.match(r"([A-E])(?:[.):]|$)", said.strip())
    letters = set(re.findall(r"\(([A-Z])\)", said.upper())) | ({begun[1]} if begun else set())
    texts, hint = texts_named(said, candidates), re.match(r"\(?([A-E])\b", said.strip())
    if letters:
        agree = not texts or letters <= texts
        return letters if len(letters) == 1 and agree and letters <= set(LETTERS[:len(candidates)]) else set()
    same = {candidates[LETTERS.index(letter)] for letter in texts}
    return texts if len(same) == 1 and (hint is None or hint[1] in texts) else set()


def texts_named(said, candidates):
    """Letters of the options whose text occurs, as whole words; "red" within a "dark red" that occurs does not."""
    left, found = normal(said), set()
    for text in sorted(set(map(normal, candidates)), key=len, reverse=True):
        pattern = rf"(?<!\w){re.escape(text)}(?!\w)"
        if text and re.search(pattern, left):
            left = re.sub(pattern, "\0", left)
            found.add(text)
    return {letter for letter, text in zip(LETTERS, candidates, strict=False) if normal(text) in found}


def normal(text):
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(str(text).lower().split()).rstrip(".")


SCORERS = {"official": official, "lmms-eval": lmms_eval, "vlmevalkit": vlmevalkit, "strict": strict}


def keys_of(scorer, row):
    """The letters that are right. Of equal options lmms-eval takes the first, strict takes any, the others the last."""
    letters = [letter for letter, text in zip(LETTERS, row["candidates"], strict=False) if text == row["answer"]]
    return {"lmms-eval": set(letters[:1]), "strict": set(letters)}.get(scorer, {letter_of(row)})


def is_right(scorer, row):
    """Whether a scorer counts a row of predictions.jsonl as right. What could not be watched is never right."""
    if row.get("unread"):
        return False
    accepted = SCORERS[scorer](row["prediction"], row["candidates"])
    return bool(accepted & keys_of(scorer, row))


def is_counted(scorer, row):
    """Whether a row is in the scorer's denominator: lmms-eval leaves empty answers out."""
    return scorer != "lmms-eval" or row["prediction"] != "" or bool(row.get("unread"))


def compare_scorers(rows):
    """Rows -> ({scorer: {"right", "counted", "percent", "unparsed", "any"}}, the rows on which they do not agree).

    unparsed: answers that it took no option from; any: answers that it would count as right under several keys.
    """
    table, verdicts = {}, []
    for name, scorer in SCORERS.items():
        understood = Counter(min(2, len(scorer(row["prediction"], row["candidates"]))) for row in rows
                             if not row.get("unread"))
        right = [is_right(name, row) for row in rows]
        counted = sum(is_counted(name, row) for row in rows)
        verdicts.append(right)
        table[name] = {"right": sum(right), "counted": counted, "percent": 100 * sum(right) / max(1, counted),
                       "unparsed": understood[0], "any": understood[2]}
    differ = [dict(row, verdicts=dict(zip(SCORERS, each, strict=True)))
              for row, each in zip(rows, zip(*verdicts, strict=True), strict=True) if len(set(each)) > 1]
    return table, differ
