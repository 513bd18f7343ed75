"""Annotation files, of any size: which there are (the corpus), what stands in them, and an index to reach every entry.

    corpus.json -> load_corpus -> Source -> load_annotations -> Annotations: entries[i], without reading the whole file

A file of 25 million captions as Python objects takes many GB in every process. So each file is read through once, entry
by entry, and where each begins is written beside it (NAME.index):

    header (JSON, 64 KiB)    what the index is of, how many entries, what was wrong
    rows                     of each good entry: first byte, bytes, characters of its text
    numbers                  of the faulty entries

After that, to open it takes no time, an entry is two small reads, and processes share all of it. An index that does not
fit its annotation file any more, or was torn, is made again. Not here: media, samples, batches (data.py). Formats are
the official ones: dataset/__init__.py, pt_dataset.py, it_dataset.py.

    pytest tests/test_annotations.py
"""
import codecs
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

# ---- the corpus ------------------------------------------------------------------------------------------------------

@dataclass
class Source:
    """One annotation file of a corpus, and how it is to be read."""
    anno: str              # JSON list of entries
    root: str = ""         # folder that the entries' paths start from
    media: str = "image"   # "video", "image" or "text"
    weight: float = 1.0    # passes over the file in one epoch
    media_key: str = ""    # key of the path in an entry; default: the name of the medium
    suffix: str = ""       # put behind each path, where the file leaves ".mp4" off
    faulty: str = "stop"   # or "skip": leave faulty entries out instead of refusing the file

    def path(self, entry):
        """Of the entry's medium."""
        return str(Path(self.root) / (entry[self.media_key] + self.suffix))


def load_corpus(corpus):
    """Sources of a corpus: a JSON file or a list, of [anno, root], [anno, root, "video" | "text"] or dicts of Source.

    In a file, relative paths start from the file's folder. Two items mean images, as in the official configs.
    """
    name, folder = "corpus", Path()
    if not isinstance(corpus, list | tuple):
        name, folder, corpus = corpus, Path(corpus).parent, [entry for *_, entry in each_entry(corpus)]
    known = {f.name for f in fields(Source)}
    sources = []
    for i, item in enumerate(corpus):
        if isinstance(item, list | tuple) and 2 <= len(item) <= 3:
            item = dict(zip(("anno", "root", "media")[:len(item)], item, strict=True))
        if not isinstance(item, dict) or "anno" not in item or set(item) - known:
            raise ValueError(f"{name}: entry {i}: expected [anno, root], [anno, root, medium] or an object of "
                             f"{', '.join(sorted(known))}, found {str(item)[:80]}")
        source = Source(**item)
        for key, allowed in (("media", ("video", "image", "text")), ("faulty", ("stop", "skip"))):
            if getattr(source, key) not in allowed:
                raise ValueError(f"{name}: entry {i}: {key} {getattr(source, key)!r}: expected "
                                 f"{', '.join(allowed[:-1])} or {allowed[-1]}")
        source.anno, source.root = str(folder / source.anno), str(folder / source.root)
        source.media_key = source.media_key or source.media
        sources.append(source)
    if not sources:
        raise ValueError(f"{name}: the corpus has no sources")
    return sources


# ---- what may be wrong with an entry ---------------------------------------------------------------------------------

class EntryError(NamedTuple):
    kind: str      # "malformed" or "empty text"; with the medium (data.py) also "missing" and "undecodable"
    text: str


def entry_error(entry, source):
    """What is wrong with an entry, or None."""
    if not isinstance(entry, dict):
        return EntryError("malformed", f"expected an object, found {type(entry).__name__}")
    if source.media != "text" and not is_text(entry.get(source.media_key)):
        return EntryError("malformed", f'no "{source.media_key}" with the path of its {source.media}; '
                                  f'it has {", ".join(entry) or "nothing"}')
    span = [entry.get("start"), entry.get("end")]
    if span != [None, None] and not (all(isinstance(s, int | float) for s in span) and 0 <= span[0] < span[1]):
        return EntryError("malformed", f'"start" and "end" must be seconds, start before end; found {span[0]} and {span[1]}')
    if "QA" in entry:
        return fault_of_qa(entry)
    if "caption" not in entry:
        return EntryError("malformed", f'neither "caption" nor "QA"; it has {", ".join(entry) or "nothing"}')
    captions = entry["caption"] if isinstance(entry["caption"], list) else [entry["caption"]]
    if not captions or not all(map(is_text, captions)):
        return EntryError("empty text", 'an empty "caption", or one that is not text')
    return None


def fault_of_qa(entry):
    qas = entry["QA"]
    if not isinstance(qas, list) or not qas or not all(isinstance(qa, dict) for qa in qas):
        return EntryError("malformed", '"QA" must be a list of {"i", "q", "a"}')
    for n, qa in enumerate(qas):
        if not is_text(qa.get("a")):
            return EntryError("empty text", f'QA {n} has no answer "a"')
        if not all(isinstance(qa.get(key) or "", str) for key in "iq"):
            return EntryError("malformed", f'QA {n} has an "i" or "q" that is not text')
    return None


def is_text(value):
    return isinstance(value, str) and value.strip() != ""


def text_length(entry):
    """Characters of an entry's text: of its longest caption, or of its whole conversation."""
    if "QA" in entry:
        return sum(len(qa.get(key) or "") for qa in entry["QA"] for key in "iqa")
    captions = entry["caption"]
    return len(captions) if isinstance(captions, str) else max(map(len, captions))


# ---- reading a long list, entry by entry -----------------------------------------------------------------------------

CHUNK = 1 << 22            # bytes that are read together
LONGEST = 1 << 26          # characters; an entry of more is taken for a file that is no list of entries
GAP = re.compile(r"[ \t\n\r]*")
SCAN = json.JSONDecoder().raw_decode


class Window:
    """The part of a JSON file that is being looked at: text from `at` on, which is `byte` in the file."""

    def __init__(self, f):
        self.f, self.utf8 = f, codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.byte = "", 0, 0
        if f.read(3) == codecs.BOM_UTF8:
            self.byte = 3
        f.seek(self.byte)

    def more(self):
        """Appends another chunk -> whether there was one."""
        raw = self.f.read(CHUNK)
        self.text += self.utf8.decode(raw, final=not raw)
        return bool(raw)

    def go(self, to):
        """Moves on to this place of the text, and forgets what lies far behind."""
        self.byte += to - self.at if self.text.isascii() else len(self.text[self.at:to].encode())
        self.at = to
        if self.at > CHUNK:
            self.text, self.at = self.text[self.at:], 0

    def peek(self):
        """The next character that is no gap; "" at the end."""
        while True:
            self.go(GAP.match(self.text, self.at).end())
            if self.at < len(self.text) or not self.more():
                return self.text[self.at:self.at + 1]

    def entry(self, number):
        """Takes the next value -> (first byte, bytes, value). number: for the error, where there is no value."""
        self.peek()
        while True:
            # subtle: a value is whole when its end stands behind it: 12 at the end of the text may be the half of 1234
            try:
                (value, end), fault = SCAN(self.text, self.at), None
                rest = GAP.match(self.text, end).end()
                whole = rest < len(self.text) and (rest > end or self.text[rest] in ",]")
            except json.JSONDecodeError as error:
                whole, fault = False, error
            if whole or len(self.text) - self.at > LONGEST or not self.more():
                break
        if fault:
            raise NotAList(f"not JSON: entry {number}, at byte {self.byte}: {fault.msg}")
        begin = self.byte
        self.go(end)
        return begin, self.byte - begin, value


def each_entry(path, progress=lambda done: None):
    """Yields (first byte, bytes, entry) of a JSON list, with a few MB in memory. ValueError where it is none.

    progress: called with the bytes that are done, now and then.
    """
    try:
        with open(path, "rb") as f:
            yield from entries_of(Window(f), progress)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such annotation file") from None
    except NotAList as error:
        raise ValueError(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not JSON: not UTF-8 ({error.reason})") from None


class NotAList(Exception):
    """Why a file is no JSON list."""


def entries_of(window, progress):
    if window.peek() != "[":
        _, _, other = window.entry(0)
        raise NotAList(f"expected a JSON list, found {type(other).__name__}")
    window.go(window.at + 1)
    number = 0
    while number or window.peek() != "]":
        yield window.entry(number)
        number += 1
        if number % 10_000 == 0:
            progress(window.byte)
        if window.peek() != ",":
            break
        window.go(window.at + 1)
    if window.peek() != "]":
        raise NotAList(f"not JSON: expected , or ] behind entry {number - 1}, at byte {window.byte}")
    window.go(window.at + 1)
    if window.peek():
        raise NotAList(f"not JSON: more behind the list, at byte {window.byte}")


# ---- the index -------------------------------------------------------------------------------------------------------

HEADER = 1 << 16
ROW = np.dtype([("start", "<i8"), ("length", "<i4"), ("chars", "<i4")])
SHOWN = 100                # faulty entries whose text the header keeps


def index_path(source):
    """Beside the annotation file; where none fits and nothing may be written there, in the user's cache."""
    beside = Path(f"{source.anno}.index")
    if os.access(beside.parent, os.W_OK) or read_header(beside, source):
        return beside
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "videochat2"
    cache.mkdir(parents=True, exist_ok=True)
    return cache / f"{hashlib.sha256(str(beside.resolve()).encode()).hexdigest()[:16]}.index"


def made_for(source):
    """What an index has to be of, or it is made again: this file as it is now, read in this way."""
    stat = os.stat(source.anno)
    return {"format": 1, "bytes": stat.st_size, "modified": stat.st_mtime_ns, "media": source.media,
            "media_key": source.media_key}


def read_header(path, source):
    """The header of a whole index that fits its annotation file, or None."""
    try:
        with open(path, "rb") as f:
            header = json.loads(f.read(HEADER))
        whole = HEADER + header["entries"] * ROW.itemsize + header["faulty"] * 8
        return header if header["made_for"] == made_for(source) and os.path.getsize(path) == whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make_index(source, path):
    """Reads the annotation file through and writes its index, whole or not at all -> its header."""
    header = {"made_for": made_for(source), "entries": 0, "faulty": 0, "qa": 0, "cut": 0, "kinds": {}, "first": []}
    temporary, numbers, size = Path(f"{path}.{os.getpid()}.partial"), [], header["made_for"]["bytes"]
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=f"index of {Path(source.anno).name}", leave=False,
               disable=size < 1e7 or not sys.stderr.isatty())
    try:
        with open(temporary, "wb") as f:
            f.write(b" " * HEADER)
            for rows in good_rows(source, header, numbers, lambda done: bar.update(done - bar.n)):
                f.write(np.array(rows, ROW).tobytes())
            f.write(np.array(numbers, "<i8").tobytes())
            f.seek(0)
            f.write(header_bytes(header))
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        bar.close()
        temporary.unlink(missing_ok=True)
    return header


def header_bytes(header):
    """HEADER bytes; of the faults' texts as many as find room."""
    while len(text := json.dumps(header, ensure_ascii=False).encode()) > HEADER:
        header["first"].pop()
    return text.ljust(HEADER)


def good_rows(source, header, numbers, progress):
    """Yields lists of rows of the good entries; notes in header and numbers what there is, and what is faulty."""
    rows = []
    for number, (start, length, entry) in enumerate(each_entry(source.anno, progress)):
        fault = entry_error(entry, source)
        if fault:
            numbers.append(number)
            header["faulty"] += 1
            header["kinds"][fault.kind] = header["kinds"].get(fault.kind, 0) + 1
            header["first"] += [f"entry {number}: {fault.text[:160]}"] * (len(numbers) <= SHOWN)
            continue
        header["entries"] += 1
        header["qa"] += "QA" in entry
        header["cut"] += entry.get("start") is not None
        rows.append((start, length, text_length(entry)))
        if len(rows) == 1 << 16:
            yield rows
            rows = []
    yield rows


class AnnotationFile:
    """The good entries of a source: len(), and entries[i] read from the file.

    header["qa"] of them are conversations, header["cut"] have a start and an end. Costs a process next to nothing:
    chars, one number per entry, is mapped into memory, and all else stays on the disk.
    """

    def __init__(self, source):
        if not Path(source.anno).is_file():
            raise FileNotFoundError(f"{source.anno}: no such annotation file")
        self.source, self.index = source, index_path(source)
        self.header = read_header(self.index, source) or make_index(source, self.index)
        self.open()

    def open(self):
        self.files = [open(self.index, "rb"), open(self.source.anno, "rb")]
        n = self.header["entries"]
        rows = np.memmap(self.index, ROW, "r", HEADER, (n,)) if n else np.empty(0, ROW)
        self.chars = rows["chars"]

    def __len__(self):
        return self.header["entries"]

    def __getitem__(self, i):
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.source.anno} has {len(self)} entries, not entry {i}")
        index, anno = (f.fileno() for f in self.files)
        row = np.frombuffer(os.pread(index, ROW.itemsize, HEADER + i % len(self) * ROW.itemsize), ROW)[0]
        try:
            return json.loads(os.pread(anno, row["length"], row["start"]))
        except ValueError:
            raise ValueError(f"{self.source.anno} has changed: entry {i} is no longer where it was") from None

    def number(self, i):
        """Of a good entry, in the file, where the faulty ones count, too."""
        faulty = np.fromfile(self.index, "<i8", -1, "", HEADER + len(self) * ROW.itemsize)
        return i + int(np.searchsorted(faulty - np.arange(len(faulty)), i, side="right"))

    def __getstate__(self):                                # a process that is spawned opens the files anew
        return {"source": self.source, "index": self.index, "header": self.header}

    def __setstate__(self, state):
        self.__dict__ |= state
        self.open()


def load_annotations(source):
    """The entries of a source. A faulty one is a ValueError that names file and entry, or is left out and told."""
    entries = AnnotationFile(source)
    header = entries.header
    if header["faulty"] and source.faulty == "stop":
        rest = f" ({header['faulty']} faulty entries in all: python data.py check lists them; " \
               '"faulty": "skip" in the corpus leaves them out)'
        raise ValueError(f"{source.anno}: {header['first'][0]}{rest}")
    if header["faulty"]:
        print(f"{source.anno}: {header['faulty']} faulty entries are left out, the first: {header['first'][0]}")
    if not len(entries):
        raise ValueError(f"{source.anno}: the list is empty")
    return entries
