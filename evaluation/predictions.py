"""A condition is one way to ask all questions; its answers are on disk as they come, and never mixed with others.

    FOLDER/predictions.jsonl            a row for each question, in the benchmark's order, once all are answered
    FOLDER/predictions.rank0.jsonl      until then: what each process has answered so far
    FOLDER/settings.json                what the answers depend on: checkpoint, prompt, frames, questions, ...
    FOLDER/predictions.blank.jsonl ...  the same for every other condition: a control, or "permute"

Not here: how the answers are made (engine.py), what the rows are worth (scorers.py, stats.py).

    pytest tests/test_predictions.py
"""
import json
import os
from pathlib import Path

from evaluation.scorers import is_right
from evaluation.tasks import letter_of
from infra.files import read_json, save_text, write_json

def key_of(row):
    """Which question, with its options in which order, a row answers."""
    return row["task"], row["index"], row.get("shift", 0)

def rotate_options(q, n):
    """The question with its options rotated by n: with 1, option B comes first."""
    return {**q, "candidates": q["candidates"][n:] + q["candidates"][:n], "shift": n}

def make_row(q, answer, scorer):
    """A row of predictions.jsonl. answer: an engine.Answer, or None: q["unread"] says why, and counts as wrong."""
    row = {**q, "letter": letter_of(q), "prediction": "", "letter_probabilities": []}
    if answer:
        row |= {"prediction": answer.text, "letter_probabilities": [round(p, 4) for p in answer.letters]}
        row |= {"official": answer.official} if answer.official not in ("", answer.text) else {}
        row |= {"likelihoods": [round(p, 4) for p in answer.likelihoods]} if answer.likelihoods else {}
    return {**row, "correct": is_right(scorer, row)}

def read_rows(path):
    """{key: row} of a file of predictions; ValueError names a line that is none."""
    rows = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows[key_of(row)] = row
            row["prediction"], row["candidates"], row["answer"]          # without these, it is no prediction
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number} is no prediction: delete the line, or --restart") from None
    return rows

OLD_SETTINGS = {"asked for": "question prompt", "8 bits": "int8"}   # older name -> name

class Condition:
    """One process's view of a condition. name: "" for the protocol itself, one of CONTROLS, or "permute".

    settings: {what: value}, as JSON knows them. requested: False for one that an earlier run has finished."""

    def __init__(self, folder, name="", settings=None, rank=0, requested=True):
        self.folder, self.name, self.settings, self.requested = Path(folder), name, settings or {}, requested
        self.control = "" if name == "permute" else name
        kind = f".{name}" if name else ""
        self.path, self.settings_path = self.folder / f"predictions{kind}.jsonl", self.folder / f"settings{kind}.json"
        self.rank_path = self.folder / f"predictions{kind}.rank{rank}.jsonl"
        self.rows = {}                                         # what read() found on disk, by key_of

    def variants(self, q):
        """The question as this condition asks it: once, or in each cyclic order of its options but their own."""
        return [rotate_options(q, n) for n in range(1, len(q["candidates"]))] if self.name == "permute" else [q]

    def needs_answer(self, q):
        """Whether it has none yet; a medium that could not be read is tried again in each run."""
        return "unread" in self.rows.get(key_of(q), {"unread": ""})

    def todo(self, questions):
        """The variants of these questions that have no answer yet."""
        return [v for q in questions for v in self.variants(q) if self.needs_answer(v)]

    # ---- files

    def files(self):
        """The files with answers that exist: the final one, and those of processes that have not been merged."""
        return [p for p in (self.path, *sorted(self.folder.glob(f"{self.path.stem}.rank*.jsonl"))) if p.is_file()]

    def saved(self):
        """settings.json: {"settings", "commands", ...}, or {} where there is none; older versions' names are read."""
        info = read_json(self.settings_path) if self.settings_path.is_file() else {}
        return info and info | {"settings": {OLD_SETTINGS.get(k, k): value for k, value in info["settings"].items()}}

    def is_finished(self):
        """Whether an earlier run with these settings has finished it."""
        return self.path.is_file() and self.saved().get("settings") == self.settings

    def prepare(self, restart, notes):
        """In one process, before all others read: ValueError if the files have other settings; or deletes the files."""
        files = self.files()
        while restart and files:
            files.pop().unlink()

        # what is left must have these settings
        info = self.saved() if files else {}
        old = info.get("settings", {})
        differences = [f"{what}: {json.dumps(old.get(what)):.40} there, {json.dumps(value):.40} now"
                       for what, value in self.settings.items() if old.get(what) != value]
        if files and differences:
            raise ValueError(f"{files[0]} holds answers under other settings ({'; '.join(differences)}): choose "
                             "another folder with --out, or --restart to delete them and ask again")

        # a process that was killed while it wrote has left half a line
        for path in files:
            complete = path.read_bytes().rfind(b"\n") + 1
            if complete < path.stat().st_size:
                os.truncate(path, complete)

        # notes: more to know later; commands are added to those of earlier runs, each once
        commands = list(dict.fromkeys([*info.get("commands", []), *notes["commands"]]))
        write_json({"settings": self.settings, **notes, "commands": commands}, self.settings_path)

    def check_media(self, questions):
        """ValueError if an answer is about another medium than the one that is there now."""
        sizes = {key_of(q)[:2]: q["size"] for q in questions if q["media"]}
        other = [row for key, row in self.read().items()
                 if "unread" not in row and sizes.get(key[:2], row["size"]) != row["size"]]
        if other:
            raise ValueError(f"{self.path} is about other media: {len(other)} have another size now, the first being "
                             f"{other[0]['video']} of {other[0]['task']}; choose another --out, or --restart")

    def read(self):
        """{key: row} of everything on disk."""
        rows = {}                                              # of two for a question, the one with an answer stays
        for path in self.files():
            rows |= {key: row for key, row in read_rows(path).items() if key not in rows or "unread" in rows[key]}
        return rows

    def write(self, rows):
        """Appends rows to this process's file; they survive the end of the process, however it comes."""
        with open(self.rank_path, "a", encoding="utf-8") as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows))

    def merge(self, order):
        """In one process, when all are done: makes one file of all, sorted by these keys -> their rows, in order."""
        rows, parts = self.read(), [path for path in self.files() if path != self.path]
        merged = {key: rows[key] for key in order if key in rows}
        if parts:
            everything = merged | dict(sorted(rows.items()))   # rows of a larger run: last
            save_text("".join(json.dumps(row) + "\n" for row in everything.values()), self.path)
        for path in parts:
            path.unlink()
        return list(merged.values())
