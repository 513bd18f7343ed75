"""Was the answer right? Four scorers of multiple-choice answers, as pure functions.

A scorer maps an answer and its options to the letters that it would count as right if they were the key. None: it could
not parse the answer. Several: it accepts the answer whatever the key is, as the official scorer does with "(".

    official     mvbench.ipynb, check_ans: the first word is part of "(b)", or "(b)" is part of it
    lmms-eval    the first letter from A to E that stands alone: "a man (C)" is A, the text of an option is nothing
    vlmevalkit   the official rule; failing that, the one letter that stands alone, or the one option whose text occurs
    strict       exactly one option is named, by its letter or by its text, and nothing contradicts it

Not here: how questions are asked (engine.py), how certain a score is (stats.py).
Source: mvbench.ipynb; lmms_eval/tasks/mvbench/utils.py, mcq_acc; without a judge LLM, vlmeval/dataset/utils/mvbench.py,
check_ans_with_model, and vlmeval/utils/matching_util.py, can_infer, at 18fc37a (later versions also look at the
answer's length and at the letter's position).

    pytest tests/test_scorers.py
"""
import re

from evaluation.tasks import LETTERS, letter_of

# what lmms-eval removes from an answer before it looks for a letter
PUNCTUATION = ';/[]"{}()=+\\_->,<@`?!'
# what VLMEvalKit writes when a request fails, and what it takes for a refusal
FAILED = "Failed to obtain answer via API"
REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")

def official(text, candidates):
    """QUIRK mvbench.ipynb check_ans: substrings count both ways, so the empty answer "(" is right on every question."""
    first = text.lower().split(" ")[0]
    options = {letter: f"({letter.lower()})" for letter in LETTERS[:len(candidates)]}
    return {letter for letter, option in options.items() if first.replace(".", "") in option or option in first}

def lmms_eval(text, candidates):
    """The letter of "B. text", or else the first letter from A to E that stands alone, in upper or lower case."""
    match = re.match(r"([a-e])\.\s*.", text.strip(), re.I)
    if not match:
        # punctuation beside a space disappears, elsewhere it becomes a space; with a number like 1,000, all disappears
        cleaned = line = " ".join(re.split(r"[\n\t]", text)).strip()
        thousands = re.search(r"\d,\d", line)
        for char in PUNCTUATION:
            remove = thousands or f"{char} " in line or f" {char}" in line
            cleaned = cleaned.replace(char, "" if remove else " ")
        match = re.search(r"\b([a-e])\b", re.sub(r"\.(?!\d)", "", cleaned), re.I)
    return {match[1].upper()} & set(LETTERS[:len(candidates)]) if match else set()

def vlmevalkit(text, candidates):
    """The official rule, or the one letter that stands alone, in upper case, or the one option whose text occurs."""
    # subtle: a failed request is right on every question, for its score of -1 is "true"
    if FAILED in text:
        return set(LETTERS[:len(candidates)])
    if any(refusal in text for refusal in REFUSALS):
        return official(text, candidates)

    # Z is VLMEvalKit's sign for "none of them"
    words = set(re.sub(r"[.()\[\],:;!*#{}]", " ", text).split())
    options = words & set(LETTERS[:len(candidates)])
    if len(options) > 1 or not options and "Z" not in words:
        options = {c for c, option in zip(LETTERS, candidates, strict=False) if str(option).lower() in text.lower()}
    return official(text, candidates) | (options if len(options) == 1 else set())

def strict(text, candidates):
    """One option, named by its letter ("(B)" anywhere; "B", "B.", "B)", "B:" at the start) or by its whole text."""
    # nothing, if letter and text name different options, or for two letters, two texts, or a letter that is no option
    start = re.match(r"([A-E])(?:[.):]|$)", text.strip())
    letters = set(re.findall(r"\(([A-Z])\)", text.upper())) | ({start[1]} if start else set())
    texts = options_in(text, candidates)
    if letters:
        agree = letters <= set(LETTERS[:len(candidates)]) and (not texts or letters <= texts)
        return letters if len(letters) == 1 and agree else set()

    # a letter at the start that is not set off ("B He ran.") names no option, but rules out the texts of all others
    hint = re.match(r"\(?([A-E])\b", text.strip())
    different = {candidates[LETTERS.index(letter)] for letter in texts}
    return texts if len(different) == 1 and (hint is None or hint[1] in texts) else set()

def options_in(text, candidates):
    """Letters of the options whose text occurs as whole words; case, extra spaces and final full stops do not count."""
    rest, *options = [" ".join(str(t).lower().split()).rstrip(".") for t in (text, *candidates)]
    occurring = set()
    for option in sorted(set(options), key=len, reverse=True):
        pattern = rf"(?<!\w){re.escape(option)}(?!\w)"
        if option and re.search(pattern, rest):
            rest = re.sub(pattern, "\0", rest)                 # "red" inside a "dark red" that occurs does not count
            occurring.add(option)
    return {letter for letter, option in zip(LETTERS, options, strict=False) if option in occurring}

SCORERS = {"official": official, "lmms-eval": lmms_eval, "vlmevalkit": vlmevalkit, "strict": strict}

def text_of(scorer, row):
    """What a scorer sees of an answer. The toolkits decode without special tokens; see prompt.decode_official."""
    return row.get("official", row["prediction"]) if scorer == "official" else row["prediction"]

def is_right(scorer, row):
    """Whether a scorer counts a row of predictions.jsonl as right. An unreadable medium is never right."""
    if row.get("unread"):
        return False

    # of equal options, lmms-eval counts the first as the key, strict any of them, the others the last
    letters = [letter for letter, text in zip(LETTERS, row["candidates"], strict=False) if text == row["answer"]]
    keys = {"lmms-eval": set(letters[:1]), "strict": set(letters)}.get(scorer, {letter_of(row)})
    return bool(SCORERS[scorer](text_of(scorer, row), row["candidates"]) & keys)

def is_counted(scorer, row):
    """Whether a row is in the scorer's denominator: lmms-eval leaves empty answers out."""
    return scorer != "lmms-eval" or row["prediction"] != "" or bool(row.get("unread"))

def compare_scorers(rows):
    """Rows -> ({scorer: {"right", "counted", "percent", "unparsed", "any"}}, the rows on which they disagree)."""
    # unparsed: answers from which the scorer took no option; any: those that it counts as right under several keys
    verdicts, table = [{name: is_right(name, row) for name in SCORERS} for row in rows], {}
    for name, scorer in SCORERS.items():
        n_letters = [len(scorer(text_of(name, row), row["candidates"])) for row in rows if not row.get("unread")]
        right, counted = sum(v[name] for v in verdicts), sum(is_counted(name, row) for row in rows)
        table[name] = {"right": right, "counted": counted, "percent": 100 * right / max(1, counted),
                       "unparsed": n_letters.count(0), "any": sum(n > 1 for n in n_letters)}
    return table, [{**row, "verdicts": v} for row, v in zip(rows, verdicts, strict=True) if len(set(v.values())) > 1]
