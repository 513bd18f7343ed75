"""Annotation files of any size: the corpus that lists them, checks of their entries, and an index for random access.

    corpus.json      [["captions.json", "videos", "video"], ...]        load_corpus -> list of Source
    captions.json    [{"video": "0.mp4", "caption": "A cat."}, ...]     load_annotations(source) -> AnnotationFile

25 million captions as Python objects take many GB in every process. So each file is read once, and the place of each
entry is written to an index next to it, which all processes share: opening takes no time, an entry is two small reads.
Not here: media, samples, batches (data.py). Source of the formats: the official dataset/, {pt,it}_dataset.py.

    pytest tests/test_annotations.py
"""
import hashlib
import json
import os
import re
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

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
        return str(Path(self.root) / (entry[self.media_key] + self.suffix))

def load_corpus(corpus):
    """Sources of a corpus: a JSON file or a list, of [anno, root], [anno, root, "video" | "text"] or dicts of Source.

    Paths in a file are relative to the file's folder. Two items mean images, as in the official configs."""
    name, folder, sources = "corpus", Path(), []
    if not isinstance(corpus, list | tuple):
        name, folder, corpus = corpus, Path(corpus).parent, [item for *_, item in each_entry(corpus)]
    if not corpus:
        raise ValueError(f"{name}: the corpus has no sources")
    for i, item in enumerate(corpus):
        # on_error was once called faulty, and its "raise" "stop"
        if isinstance(item, dict) and "faulty" in item:
            item = {"on_error": "raise" if item["faulty"] == "stop" else item["faulty"], **item}
            del item["faulty"]

        # a short form is the first fields in their order; in the long form, every field is known, and so is its value
        is_short = isinstance(item, list | tuple) and 2 <= len(item) <= 3
        try:
            source = Source(*item) if is_short else Source(**item)
        except TypeError:
            raise ValueError(f"{name}: entry {i}: expected [anno, root], [anno, root, medium] or an object of "
                             f"{', '.join(Source.__annotations__)}, found {str(item)[:80]}") from None
        if source.media not in ("video", "image", "text"):
            raise ValueError(f"{name}: entry {i}: media {source.media!r}: expected video, image or text")
        if source.on_error not in ("raise", "skip"):
            raise ValueError(f"{name}: entry {i}: on_error {source.on_error!r}: expected raise or skip")
        source.anno, source.root = str(folder / source.anno), str(folder / source.root)
        source.media_key = source.media_key or source.media
        sources.append(source)
    return sources

# ---- checks of an entry ----------------------------------------------------------------------------------------------

def is_text(value):
    return isinstance(value, str) and value.strip() != ""

def entry_error(entry, source):
    """What is wrong with an entry -> (kind, text), of kind "malformed" or "empty text", or None."""
    # the medium, and the part of it that the text is about
    if not isinstance(entry, dict):
        return "malformed", f"expected an object, found {type(entry).__name__}"
    if source.media != "text" and not is_text(entry.get(source.media_key)):
        keys = ", ".join(entry) or "nothing"
        return "malformed", f'no "{source.media_key}" with the path of its {source.media}; it has {keys}'
    start, end = entry.get("start"), entry.get("end")
    are_seconds = isinstance(start, int | float) and isinstance(end, int | float) and 0 <= start < end
    if (start, end) != (None, None) and not are_seconds:
        return "malformed", f'"start" and "end" must be seconds, start before end; found {start} and {end}'

    # captions: one, or several of which each sample draws one
    if "QA" not in entry:
        if "caption" not in entry:
            return "malformed", f'neither "caption" nor "QA"; it has {", ".join(entry) or "nothing"}'
        captions = entry["caption"] if isinstance(entry["caption"], list) else [entry["caption"]]
        valid = captions and all(map(is_text, captions))
        return None if valid else ("empty text", 'an empty "caption", or one that is not text')

    # a conversation: every turn needs an answer, may have a question, and the first an instruction
    turns = entry["QA"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return "malformed", '"QA" must be a list of {"i", "q", "a"}'
    for n, turn in enumerate(turns):
        if not is_text(turn.get("a")):
            return "empty text", f'QA {n} has no answer "a"'
        if not all(isinstance(turn.get(key) or "", str) for key in "iq"):
            return "malformed", f'QA {n} has an "i" or "q" that is not text'
    return None

def text_length(entry):
    """Characters of an entry's text: of its longest caption, or of its conversation."""
    if "QA" in entry:
        return sum(len(turn.get(key) or "") for turn in entry["QA"] for key in "iqa")
    return max(map(len, entry["caption"])) if isinstance(entry["caption"], list) else len(entry["caption"])

# ---- reading a long list, entry by entry -----------------------------------------------------------------------------

CHUNK = 1 << 22            # bytes per read
LONGEST = 1 << 26          # bytes; a longer entry means that the file is no list of entries
SCAN = json.JSONDecoder().raw_decode
NEXT = re.compile(r"[ \t\n\r]*([^ \t\n\r]?)")              # white space, then the character after it, if any
EDGE = 1 << 16             # bytes that are read for what comes before the first entry and after the last
OPENING = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:(\[)\s*(\]?))?")  # a byte order mark, [ and perhaps ]

def each_entry(path):
    """Yields (first byte, number of bytes, entry) of a JSON list, with a few MB in memory. ValueError if it is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such annotation file")
    with open(path, "rb") as f:
        # the opening bracket; a closing one right after it makes an empty list
        opening = OPENING.match(f.read(EDGE))
        is_list, done, base = opening[1] == b"[", opening[2] == b"]", opening.end()
        f.seek(base)

        # subtle: Latin-1 makes one character of each byte, so text[at] is byte base + at of the file, and the signs of
        # JSON are the same; a value with other characters is decoded again, as UTF-8
        text, at, number = "", 0, 0
        while not done:
            at, problem = NEXT.match(text, at).start(1), ""
            try:
                value, end = SCAN(text, at)
                raw, after = text[at:end], NEXT.match(text, end)
                value = value if raw.isascii() else json.loads(raw.encode("latin-1").decode())
            except ValueError as error:
                problem = getattr(error, "msg", "not UTF-8")         # of a JSONDecodeError, or a UnicodeDecodeError

            # only , or ] shows that a value is complete: "12" at the end of a chunk may become "1234"
            if is_list and not problem and after[1] in (",", "]"):
                yield base + at, end - at, value
                at, number, done = after.end(), number + 1, after[1] == "]"
            elif len(text) - at <= LONGEST and (chunk := f.read(CHUNK)):
                base, text, at = base + at, text[at:] + chunk.decode("latin-1"), 0
            elif problem:
                raise ValueError(f"{path}: not JSON: entry {number}, at byte {base + at}: {problem}")
            elif not is_list:
                raise ValueError(f"{path}: expected a JSON list, found {type(value).__name__}")
            else:
                where = f"after entry {number}, at byte {base + after.start(1)}"
                raise ValueError(f"{path}: not JSON: expected , or ] {where}")

        # nothing may come after the closing bracket
        f.seek(base + at)
        rest = f.read(EDGE)
        if more := rest.lstrip():
            raise ValueError(f"{path}: not JSON: more text after the list, at byte {base + at + len(rest) - len(more)}")

# ---- the index -------------------------------------------------------------------------------------------------------

HEADER = 1 << 16               # bytes of JSON; then a row for each good entry, then the faulty ones' numbers ("<i8")
ROW = struct.Struct("<qii")    # first byte and number of bytes of the entry, characters of its text
SHOWN = 60                     # faulty entries whose text is in the header: 160 characters of up to 6 bytes each

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
        size = HEADER + header["entries"] * ROW.size + header["faulty"] * 8
        return header if header["index_key"] == index_key(source) and os.path.getsize(path) == size else None
    except (OSError, ValueError, KeyError, TypeError):
        return None

def index_path(source):
    """Next to the annotation file; in the user's cache if no index is there and none may be written there."""
    path = Path(f"{source.anno}.index")
    if os.access(path.parent, os.W_OK) or read_header(path, source):
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "videochat2"
    return cache / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}.index"

def make_index(source, path):
    """Reads the annotation file once and writes its index, whole or not at all -> its header."""
    header = {"index_key": index_key(source), "entries": 0, "qa": 0, "has_bounds": 0, "kinds": Counter(), "first": []}
    bar, faulty = tqdm(desc=f"index of {Path(source.anno).name}", total=header["index_key"]["bytes"], unit="B",
                       unit_scale=True, leave=False, disable=None), []
    with bar, atomic_file(path) as temporary, open(temporary, "wb") as f:
        f.seek(HEADER)
        for number, (start, length, entry) in enumerate(each_entry(source.anno)):
            bar.update(start - bar.n)
            # a faulty entry is counted and gets no row
            if error := entry_error(entry, source):
                kind, text = error
                header["kinds"][kind] += 1
                header["first"] += [f"entry {number}: {text[:160]}"] * (len(faulty) < SHOWN)
                faulty.append(number)
                continue
            header["entries"] += 1
            header["qa"] += "QA" in entry
            header["has_bounds"] += entry.get("start") is not None
            f.write(ROW.pack(start, length, text_length(entry)))

        # the header comes last, when all is counted
        f.write(np.array(faulty, "<i8").tobytes())
        f.seek(0)
        header["faulty"] = len(faulty)
        f.write(json.dumps(header, ensure_ascii=False).encode().ljust(HEADER))
    return header

class AnnotationFile:
    """The good entries of a source: len() and entries[i], read from the file at each access.

    header: how many are conversations ("qa"), have a start and an end ("has_bounds"), and what was faulty.
    chars: (n,), the text length of each entry. It is mapped into memory, and nothing else is in memory."""

    def __init__(self, source):
        self.source, self.index = source, index_path(source)
        self.header = read_header(self.index, source) or make_index(source, self.index)
        self.files = [open(self.index, "rb"), open(source.anno, "rb")]
        n = self.header["entries"]
        self.chars = np.memmap(self.index, "<i4", "r", HEADER, (n, 4))[:, 3] if n else np.empty(0, "<i4")

    def __reduce__(self):
        return AnnotationFile, (self.source,)              # a spawned process opens the files itself

    def __len__(self):
        return self.header["entries"]

    def __getitem__(self, i):
        i = range(len(self))[i]                            # a negative one counts from the end; IndexError
        index, anno = (f.fileno() for f in self.files)
        start, length, _ = ROW.unpack(os.pread(index, ROW.size, HEADER + i * ROW.size))
        try:
            return json.loads(os.pread(anno, length, start))
        except ValueError:
            raise ValueError(f"{self.source.anno} has changed: entry {i} is no longer where it was") from None

    def entry_number(self, i):
        """Position in the file of good entry i, with the faulty ones counted."""
        faulty = np.fromfile(self.index, "<i8", -1, "", HEADER + len(self) * ROW.size)
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
