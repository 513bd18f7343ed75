"""The answers on disk: written as they come, gone on with after any interruption, and never mixed.

    predictions.jsonl            a line per question, in the benchmark's order, once all are answered
    predictions.rank0.jsonl      until then: what each process has answered so far
    settings.json                what the answers depend on: checkpoint, prompt, frames, questions, ...

Another checkpoint, prompt or number of frames is refused, with both named. A line that a killed process has left half
written is dropped. Not here: who answers (mvbench.py), what the rows are worth (scorers.py, stats.py).

    pytest tests/test_predictions.py
"""
import json
from pathlib import Path

from infra.files import read_json, save_text


def key_of(row):
    """What a row is the answer to."""
    return row["task"], row["index"], row.get("shift", 0)


def read_rows(path):
    """{key: row} of a file of predictions; ValueError names a line that is none."""
    rows = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows[key_of(row)] = row
            row["prediction"], row["candidates"], row["answer"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number} is no prediction: delete the line, or --restart") from None
    return rows


class Predictions:
    """The rows of one way of asking: one control, or the permuted options. Several processes may fill it."""

    def __init__(self, out, name, settings, rank=0):
        """out: a folder; name: e.g. ".blank", "" for the plain run; settings: {what: value} as JSON knows them."""
        self.out, self.name, self.settings = Path(out), name, settings
        self.path = self.out / f"predictions{name}.jsonl"
        self.part = self.out / f"predictions{name}.rank{rank}.jsonl"
        self.file = None

    @property
    def parts(self):
        return sorted(self.out.glob(f"predictions{self.name}.rank*.jsonl"))

    def begin(self, restart, notes):
        """By one process, before all others: checks that what is there belongs to these settings, or removes it.

        notes: what else settings.json shall tell; commands are collected. Raises ValueError naming what differs.
        """
        known = [path for path in (self.path, *self.parts) if path.exists()]
        found = read_json(self.told) if self.told.is_file() and not restart else {}
        if restart:
            for path in known:
                path.unlink()
        elif known:
            differ = [f"{what}: {short(found.get('settings', {}).get(what))} there, {short(value)} now"
                      for what, value in self.settings.items() if found.get("settings", {}).get(what) != value]
            if differ:
                raise ValueError(f"{known[0]} holds answers under other settings ({'; '.join(differ)}): choose another "
                                 "folder by --out, or --restart to ask anew and lose them")
            for path in known:
                drop_torn_line(path)
        self.out.mkdir(parents=True, exist_ok=True)
        commands = list(dict.fromkeys([*(found.get("commands", []) if known else []), *notes["commands"]]))
        save_text(json.dumps({"settings": self.settings, **notes, "commands": commands}, indent=2), self.told)

    @property
    def told(self):
        return self.out / f"settings{self.name}.json"

    def is_of_these_settings(self):
        """Whether a finished file is there, with these settings."""
        return (self.path.is_file() and self.told.is_file()
                and read_json(self.told).get("settings") == self.settings)

    def read(self):
        """{key: row} of everything that has been answered; of two rows, the one that could be watched."""
        rows = {}
        for path in (self.path, *self.parts):
            if path.exists():
                rows |= {key: row for key, row in read_rows(path).items() if key not in rows or "unread" in rows[key]}
        return rows

    def write(self, rows):
        """Appends rows to this process's part; they are on disk when it returns, whatever happens to the process."""
        if self.file is None:
            self.file = open(self.part, "a", encoding="utf-8")
        self.file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.file.flush()

    def close(self):
        if self.file is not None:
            self.file.close()
            self.file = None

    def merge(self, order):
        """By one process, when all are done: the one file, its rows in the order of these keys, others behind."""
        rows, parts = self.read(), self.parts
        if parts:
            place = {key: i for i, key in enumerate(order)}
            lines = [json.dumps(rows[key]) for key in sorted(rows, key=lambda key: (place.get(key, len(place)), key))]
            save_text("\n".join(lines) + "\n", self.path)
            for path in parts:
                path.unlink()
        return [rows[key] for key in order if key in rows]


def short(value):
    """A setting as an error shows it."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def drop_torn_line(path):
    """Cuts off what stands behind the last line end."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with open(path, "r+b") as f:
            f.truncate(data.rfind(b"\n") + 1)
