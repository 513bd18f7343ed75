"""Annotation files of any size: the corpus that lists them, checks of their entries, and an index for random access.

    corpus.json      [["captions.json", "videos", "video"], ...]        load_corpus -> list of Source
    captions.json    [{"video": "0.mp4", "caption": "A cat."}, ...]     load_annotations(source) -> AnnotationFile

25 million captions as Python objects take many GB in every process. So each file is read once, and the place of each
entry is written next to it, in NAME.index: a header (JSON, 64 KiB), a row for each good entry, and the numbers of the
faulty ones. From then on opening takes no time, an entry is two small reads, and all processes share the index. An
index that is torn or does not fit its annotation file is made again. Not here: media, samples, batches (data.py).
Source of the formats: the official dataset/__init__.py, pt_dataset.py and it_dataset.py.

    pytest tests/test_annotations.py
"""
import codecs
import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from infra.files import atomic_file

# ---- the corpus ------------------------------------------------------------------------------------------------------

@dataclass
class Source:
    """One annotation file of a corpus, and how to read it."""
    anno: str               # JSON list of entries
    root: str = ""          # folder of the media: entries have paths relative to it
    media: str = "image"    # "video", "image" or "text"
    weight: float = 1.0     # passes over the file in one epoch
    media_key: str = ""     # key of the path in an entry; default: the same word as media
    suffix: str = ""        # appended to each path, for files that omit ".mp4"
    on_error: str = "raise" # or "skip": leave faulty entries out instead of refusing the file

    def path(self, entry):
        """Path of the entry's medium."""
        return str(Path(self.root) / (entry[self.media_key] + self.suffix))

def load_corpus(corpus):
    """Sources of a corpus: a JSON file or a list, of [anno, root], [anno, root, "video" | "text"] or dicts of Source.

    Paths in a file are relative to the file's folder. Two items mean images, as in the official configs.
    """
    name, folder = "corpus", Path()
    if not isinstance(corpus, list | tuple):
        name, folder, corpus = corpus, Path(corpus).parent, [item for *_, item in each_entry(corpus)]
    if not corpus:
        raise ValueError(f"{name}: the corpus has no sources")

    known = {f.name for f in fields(Source)}
    sources = []
    for i, item in enumerate(corpus):
        # a short form is the first fields in their order; on_error was once called faulty, and its "raise" "stop"
        if isinstance(item, list | tuple) and 2 <= len(item) <= 3:
            item = dict(zip(("anno", "root", "media"), item, strict=False))
        if isinstance(item, dict) and "faulty" in item:
            item = {"on_error": "raise" if item["faulty"] == "stop" else item["faulty"], **item}
            del item["faulty"]

        # every field is known, and so is its value
        if not isinstance(item, dict) or "anno" not in item or set(item) - known:
            raise ValueError(f"{name}: entry {i}: expected [anno, root], [anno, root, medium] or an object of "
                             f"{', '.join(sorted(known))}, found {str(item)[:80]}")
        source = Source(**item)
        if source.media not in ("video", "image", "text"):
            raise ValueError(f"{name}: entry {i}: media {source.media!r}: expected video, image or text")
        if source.on_error not in ("raise", "skip"):
            raise ValueError(f"{name}: entry {i}: on_error {source.on_error!r}: expected raise or skip")
        source.anno, source.root = str(folder / source.anno), str(folder / source.root)
        source.media_key = source.media_key or source.media
        sources.append(source)
    return sources

# ---- checks of an entry ----------------------------------------------------------------------------------------------

class EntryError(NamedTuple):
    kind: str      # "malformed" or "empty text"; check_data.py adds "missing" and "undecodable"
    text: str

def entry_error(entry, source):
    """What is wrong with an entry -> EntryError or None."""
    # the medium, and the part of it that the text is about
    if not isinstance(entry, dict):
        return EntryError("malformed", f"expected an object, found {type(entry).__name__}")
    if source.media != "text" and not is_text(entry.get(source.media_key)):
        return EntryError("malformed", f'no "{source.media_key}" with the path of its {source.media}; '
                                       f'it has {", ".join(entry) or "nothing"}')
    start, end = entry.get("start"), entry.get("end")
    are_seconds = isinstance(start, int | float) and isinstance(end, int | float) and 0 <= start < end
    if (start, end) != (None, None) and not are_seconds:
        return EntryError("malformed", f'"start" and "end" must be seconds, start before end; found {start} and {end}')

    # captions: one, or several of which each sample draws one
    if "QA" not in entry:
        if "caption" not in entry:
            return EntryError("malformed", f'neither "caption" nor "QA"; it has {", ".join(entry) or "nothing"}')
        captions = entry["caption"] if isinstance(entry["caption"], list) else [entry["caption"]]
        valid = captions and all(map(is_text, captions))
        return None if valid else EntryError("empty text", 'an empty "caption", or one that is not text')

    # a conversation: every turn needs an answer, may have a question, and the first an instruction
    turns = entry["QA"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return EntryError("malformed", '"QA" must be a list of {"i", "q", "a"}')
    for n, turn in enumerate(turns):
        if not is_text(turn.get("a")):
            return EntryError("empty text", f'QA {n} has no answer "a"')
        if not all(isinstance(turn.get(key) or "", str) for key in "iq"):
            return EntryError("malformed", f'QA {n} has an "i" or "q" that is not text')
    return None

def is_text(value):
    return isinstance(value, str) and value.strip() != ""

def text_length(entry):
    """Characters of an entry's text: of its longest caption, or of its conversation."""
    if "QA" in entry:
        return sum(len(turn.get(key) or "") for turn in entry["QA"] for key in "iqa")
    captions = entry["caption"]
    return len(captions) if isinstance(captions, str) else max(map(len, captions))

# ---- reading a long list, entry by entry -----------------------------------------------------------------------------

CHUNK = 1 << 22            # bytes per read
LONGEST = 1 << 26          # bytes; a longer entry means that the file is no list of entries
SCAN = json.JSONDecoder().raw_decode
NEXT = re.compile(r"[ \t\n\r]*([^ \t\n\r]?)")  # white space, then the character after it, if any

def each_entry(path):
    """Yields (first byte, number of bytes, entry) of a JSON list, with a few MB in memory. ValueError if it is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such annotation file")
    with open(path, "rb") as f:
        # the opening bracket; a closing one right after it makes an empty list
        f.seek(3 if f.read(3) == codecs.BOM_UTF8 else 0)
        first = next_char(f)
        if first != "[":
            base = f.tell() - len(first)
            value, *_, problem = scan_value(first + f.read(LONGEST).decode("latin-1"), 0)
            raise ValueError(f"{path}: not JSON: entry 0, at byte {base}: {problem}" if problem else
                             f"{path}: expected a JSON list, found {type(value).__name__}")
        delimiter = next_char(f)
        if delimiter not in ("", "]"):
            f.seek(-1, os.SEEK_CUR)                        # it is the first value's
        base, text, at, number = f.tell(), "", 0, 0

        # subtle: Latin-1 makes one character of each byte, so text[at] is byte base + at of the file; only the , or ]
        # after a value shows that it is complete, because "12" at the end of a chunk may become "1234"
        while delimiter != "]":
            at = NEXT.match(text, at).start(1)
            value, end, after, problem = scan_value(text, at)
            complete = after and after[1] in (",", "]")
            chunk = "" if complete or len(text) - at > LONGEST else f.read(CHUNK).decode("latin-1")
            if complete:
                yield base + at, end - at, value
                at, delimiter, number = after.end(), after[1], number + 1
            elif chunk:
                base, text, at = base + at, text[at:] + chunk, 0
            else:
                problem = (f"entry {number}, at byte {base + at}: {problem}" if problem else
                           f"expected , or ] after entry {number}, at byte {base + after.start(1)}")
                raise ValueError(f"{path}: not JSON: {problem}")

        # nothing may come after the closing bracket
        f.seek(base + at)
        if next_char(f):
            raise ValueError(f"{path}: not JSON: more text after the list, at byte {f.tell() - 1}")

def next_char(f):
    """Reads past white space -> the next character, "" at the end of the file."""
    while (byte := f.read(1)) and byte in b" \t\n\r":
        pass
    return byte.decode("latin-1")

def scan_value(text, at):
    """-> the JSON value at text[at], where it ends, the match of NEXT there; what is wrong, if there is no value.

    JSON's own signs are ASCII, so a value's end is right in Latin-1; other words are decoded again, as UTF-8.
    """
    try:
        value, end = SCAN(text, at)
        if not (raw := text[at:end]).isascii():
            value, _ = SCAN(raw.encode("latin-1").decode(), 0)
        return value, end, NEXT.match(text, end), ""
    except UnicodeDecodeError as error:
        return None, at, None, f"not UTF-8 ({error.reason})"
    except json.JSONDecodeError as error:
        return None, at, None, error.msg

# ---- the index -------------------------------------------------------------------------------------------------------

HEADER = 1 << 16           # bytes
ROW = np.dtype([("start", "<i8"), ("length", "<i4"), ("chars", "<i4")])  # first byte, bytes, characters of the text
BLOCK = 1 << 16            # rows per write
SHOWN = 100                # faulty entries whose text is in the header

def index_key(source):
    """What an index is made of: this version of the file, read in this way. With another key it is made again."""
    stat = os.stat(source.anno)
    return {"format": 2, "bytes": stat.st_size, "modified": stat.st_mtime_ns, "media": source.media,
            "media_key": source.media_key}

def read_header(path, source):
    """The header of a complete index that fits its annotation file, or None."""
    try:
        with open(path, "rb") as f:
            header = json.loads(f.read(HEADER))
        size = HEADER + header["entries"] * ROW.itemsize + header["faulty"] * 8
        return header if header["index_key"] == index_key(source) and os.path.getsize(path) == size else None
    except (OSError, ValueError, KeyError, TypeError):
        return None

def index_path(source):
    """Next to the annotation file; in the user's cache if no index is there and none may be written there."""
    path = Path(f"{source.anno}.index")
    if os.access(path.parent, os.W_OK) or read_header(path, source):
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "videochat2"
    cache.mkdir(parents=True, exist_ok=True)
    return cache / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}.index"

def make_index(source, path):
    """Reads the annotation file once and writes its index, whole or not at all -> its header."""
    key = index_key(source)
    header = {"index_key": key, "entries": 0, "faulty": 0, "qa": 0, "has_bounds": 0, "kinds": Counter(), "first": []}
    rows, faulty = [], []
    bar = tqdm(total=key["bytes"], unit="B", unit_scale=True, desc=f"index of {Path(source.anno).name}", leave=False,
               disable=key["bytes"] < 1e7 or None)
    with bar, atomic_file(path) as temporary, open(temporary, "wb") as f:
        f.seek(HEADER)
        for number, (start, length, entry) in enumerate(each_entry(source.anno)):
            # a faulty entry is counted and gets no row
            error = entry_error(entry, source)
            if error and len(faulty) < SHOWN:
                header["first"].append(f"entry {number}: {error.text[:160]}")
            if error:
                faulty.append(number)
                header["kinds"][error.kind] += 1
                continue

            # a row for a good one, written in blocks so that memory does not grow with the file
            header["entries"] += 1
            header["qa"] += "QA" in entry
            header["has_bounds"] += entry.get("start") is not None
            rows.append((start, length, text_length(entry)))
            if len(rows) == BLOCK:
                f.write(np.array(rows, ROW).tobytes())
                rows.clear()
                bar.update(start - bar.n)
        f.write(np.array(rows, ROW).tobytes() + np.array(faulty, "<i8").tobytes())

        # the header comes last, when all is counted; it holds as many of the faults' texts as fit
        header["faulty"] = len(faulty)
        while len(text := json.dumps(header, ensure_ascii=False).encode()) > HEADER:
            header["first"].pop()
        f.seek(0)
        f.write(text.ljust(HEADER))
    return header

class AnnotationFile:
    """The good entries of a source: len() and entries[i], read from the file at each access.

    header: how many are conversations ("qa"), have a start and an end ("has_bounds"), and what was faulty.
    chars: (n,), the text length of each entry. It is mapped into memory, and nothing else is in memory.
    """

    def __init__(self, source):
        if not Path(source.anno).is_file():
            raise FileNotFoundError(f"{source.anno}: no such annotation file")
        self.source, self.index = source, index_path(source)
        self.header = read_header(self.index, source) or make_index(source, self.index)
        self.files = [open(self.index, "rb"), open(source.anno, "rb")]
        rows = np.memmap(self.index, ROW, "r", HEADER, (len(self),)) if len(self) else np.empty(0, ROW)
        self.chars = rows["chars"]

    def __reduce__(self):
        return AnnotationFile, (self.source,)              # a spawned process opens the files itself

    def __len__(self):
        return self.header["entries"]

    def __getitem__(self, i):
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.source.anno} has {len(self)} entries, not entry {i}")
        # pread has no file position, so processes can share the open files
        index, anno = (f.fileno() for f in self.files)
        row = np.frombuffer(os.pread(index, ROW.itemsize, HEADER + i % len(self) * ROW.itemsize), ROW)[0]
        try:
            return json.loads(os.pread(anno, row["length"], row["start"]))
        except ValueError:
            raise ValueError(f"{self.source.anno} has changed: entry {i} is no longer where it was") from None

    def entry_number(self, i):
        """Position in the file of good entry i, with the faulty ones counted."""
        faulty = np.fromfile(self.index, "<i8", -1, "", HEADER + len(self) * ROW.itemsize)
        return i + int(np.searchsorted(faulty - np.arange(len(faulty)), i, side="right"))

def load_annotations(source):
    """The entries of a source. A faulty one raises a ValueError that names it or, with on_error "skip", is reported."""
    entries = AnnotationFile(source)
    n_faulty, first = entries.header["faulty"], entries.header["first"]
    if n_faulty and source.on_error == "raise":
        raise ValueError(f"{source.anno}: {first[0]} ({n_faulty} faulty entries in all: python -m training.check_data "
                         'lists them; "on_error": "skip" in the corpus leaves them out)')
    if n_faulty:
        print(f"{source.anno}: {n_faulty} faulty entries are left out, the first: {first[0]}")
    if not len(entries):
        raise ValueError(f"{source.anno}: the list is empty")
    return entries
