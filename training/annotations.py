"""Annotation files of any size: the corpus that lists them, checks of their entries, and an index for random access.

    corpus.json      [["captions.json", "videos", "video"], ...]        load_corpus -> list of Source
    captions.json    [{"video": "0.mp4", "caption": "A cat."}, ...]     load_annotations(source) -> AnnotationFile
    captions.jsonl   the same entries without [ ], one after another (JSON Lines)

25 million captions as Python objects take many GB in every process. So each file is read once, and the place of each
entry is written to an index next to it, which all processes share: opening takes no time, an entry is two small reads.
Not here: media, samples, batches (data.py). Source of the formats: the official dataset/, {pt,it}_dataset.py.

    pytest tests/test_annotations.py
"""
import hashlib
import json
import math
import os
import re
import struct
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

from infra.containers import SampleError
from infra.files import atomic_file, hash_file
from tokenizer import basic_tokenize

# ---- the corpus ------------------------------------------------------------------------------------------------------

@dataclass
class Source:
    """One annotation file of a corpus, and how to read it."""
    anno: str               # JSON list of entries, or JSON Lines
    root: str = ""          # folder of the media: entries have paths relative to it
    media: str = "image"    # "video", "image" or "text"
    weight: float = 1.0     # passes over the file in one epoch
    media_key: str = ""     # key of the path in an entry; default: the same word as media
    suffix: str = ""        # appended to each path, for files that omit ".mp4"
    fps: float = 0          # frames per second of folders of frames; 0: infra.media.FOLDER_FPS
    on_error: str = "few"   # faulty entries: leave out a few (load_annotations), "skip" any number, or "raise"

    def path(self, entry):
        return str(Path(self.root) / (entry[self.media_key] + self.suffix))

    def read_options(self, entry):
        """Arguments of read_media for an entry's medium, besides the path and the selector."""
        bounds = {key: entry.get(key) for key in ("start", "end")} if self.media == "video" else {}
        return {"as_image": self.media == "image", "fps": self.fps or None, **bounds}

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
        if source.on_error not in ("few", "raise", "skip"):
            raise ValueError(f"{name}: entry {i}: on_error {source.on_error!r}: expected few, raise or skip")
        for f in fields(Source):
            value, types = getattr(source, f.name), (int, float) if f.type is float else (str,)
            if type(value) not in types or f.type is float and not 0 <= value < math.inf:
                expected = "a number, 0 or more" if f.type is float else "text"
                raise ValueError(f"{name}: entry {i}: {f.name} {value!r}: expected {expected}")
        source.anno, source.root = str(folder / source.anno), str(folder / source.root)
        source.media_key = source.media_key or source.media
        sources.append(source)
    return sources

# ---- checks of an entry ----------------------------------------------------------------------------------------------

SURROGATE = re.compile("[\ud800-\udfff]")               # half of a character, which no file can hold
WORD = re.compile(r"\w")

def to_text(value):
    """A number, or each number of a list, as text; any other value stays as it is."""
    def convert(item):
        return str(item) if type(item) in (int, float) and -math.inf < item < math.inf else item
    return list(map(convert, value)) if isinstance(value, list) else convert(value)

def normalize(entry, source):
    """Changes an entry to its usual form and returns it: seconds are numbers, paths, captions and turns are text."""
    turns = []
    if isinstance(entry, dict):
        turns = entry["QA"] if isinstance(entry.get("QA"), list) else []
        for key in [key for key in ("start", "end") if isinstance(entry.get(key), str)]:
            with suppress(ValueError):
                entry[key] = float(entry[key])
    for texts, keys in (entry, (source.media_key, "caption")), *((turn, "iqa") for turn in turns):
        for key in keys if isinstance(texts, dict) else ():
            if not isinstance(texts.get(key), str | None):
                texts[key] = to_text(texts[key])
    return entry

def text_error(name, value, needs_word=False):
    """What is wrong with a text -> (kind, text), or None. A caption needs a word, an answer any visible character."""
    if not isinstance(value, str | None):
        return "malformed", f"a {name} that is not text"
    if value and not value.isascii() and SURROGATE.search(value):
        return "malformed", f"a {name} with half of a character (a lone surrogate, such as \\ud83d)"
    if not value or not WORD.search(value) and (needs_word or not basic_tokenize(value)):
        return "empty text", f"an empty {name}" + ", or one without a word" * bool(value)
    return None

def entry_error(entry, source):
    """What is wrong with an entry in its usual form -> (kind, text), of kind "malformed" or "empty text", or None."""
    # the medium, and the part of it that the text is about
    if not isinstance(entry, dict):
        return "malformed", f"expected an object, found {type(entry).__name__}"
    path, start, end = entry.get(source.media_key), entry.get("start"), entry.get("end")
    if source.media != "text" and (error := text_error(f'"{source.media_key}"', path)):
        keys = ", ".join(entry) or "nothing"
        return error if isinstance(path, str) and path.strip() else (
            "malformed", f'no "{source.media_key}" with the path of its {source.media}; it has {keys}')
    if not (start is None and end is None or {type(start), type(end)} <= {int, float} and 0 <= start < end < 1e300):
        return "malformed", f'"start" and "end" must be seconds, start before end; found {start!r} and {end!r}'

    # captions: one, or several of which each sample draws one
    if "QA" not in entry:
        if "caption" not in entry:
            return "malformed", f'neither "caption" nor "QA"; it has {", ".join(entry) or "nothing"}'
        captions = entry["caption"] if isinstance(entry["caption"], list) else [entry["caption"]]
        for caption in captions or [""]:
            if error := text_error('"caption"', caption, needs_word=True):
                return error
        return None

    # a conversation: every turn needs an answer, may have a question, and the first an instruction
    turns = entry["QA"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return "malformed", '"QA" must be a list of {"i", "q", "a"}'
    for n, turn in enumerate(turns):
        if error := text_error('"a"', turn.get("a")):
            return error[0], f'QA {n} has no answer "a"' if error[0] == "empty text" else f"QA {n} has {error[1]}"
        for key in "iq":
            if (error := text_error(f'"{key}"', turn.get(key) or "")) and error[0] == "malformed":
                return "malformed", f"QA {n} has {error[1]}"
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
    """Yields (first byte, number of bytes, entry) of a JSON list, or of objects one after another (JSON Lines), with a
    few MB in memory. ValueError if the file is neither."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such annotation file")
    with open(path, "rb") as f:
        # the opening bracket, which lines do not have; a closing one right after it makes an empty list
        head = f.read(EDGE)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head[:2]:
            raise ValueError(f"{path}: UTF-16 text: save it as UTF-8 (iconv -f UTF-16 -t UTF-8 FILE > NEW)")
        opening = OPENING.match(head)
        is_list, done, base = opening[1] == b"[", opening[2] == b"]", opening.end()
        f.seek(base)

        # subtle: Latin-1 makes one character of each byte, so text[at] is byte base + at of the file, and the signs of
        # JSON are the same; a value with other characters is decoded again, as UTF-8
        text, at, number, at_end = "", 0, 0, False
        while not done:
            at, error = NEXT.match(text, at).start(1), None
            try:
                value, end = SCAN(text, at)
                raw, after = text[at:end], NEXT.match(text, end)
                value = value if raw.isascii() else json.loads(raw.encode("latin-1").decode())
            except (ValueError, RecursionError) as problem:
                error = problem

            # only what comes next shows that a value is complete, for "12" at the end of a chunk may become "1234": in
            # a list , or ]; in lines the next object or the end, but a file of one object is no list by mistake
            may_end = at_end and not is_list and (number > 0 or Path(path).suffix in (".jsonl", ".ndjson"))
            if not error and after[1] in ((",", "]") if is_list else ("{", "") if may_end else ("{",)):
                yield base + at, end - at, value
                at, number, done = after.end() if is_list else end, number + 1, after[1] in ("]", "")
            elif not at_end and len(text) - at <= LONGEST:
                chunk = f.read(CHUNK)
                base, text, at, at_end = base + at, text[at:] + chunk.decode("latin-1"), 0, not chunk
            elif error:
                place, reason = describe_error(error, text, at, number)
                raise ValueError(f"{path}: not JSON: entry {number}, at byte {base + place}: {reason}")
            elif not is_list and number == 0 and not after[1]:
                raise ValueError(f"{path}: expected a JSON list, found {describe_value(value)}")
            else:
                where = f"after entry {number}, at byte {base + after.start(1)}"
                raise ValueError(f"{path}: not JSON: expected {', or ]' if is_list else 'an object'} {where}, "
                                 f"found {after[1] or 'the end of the file'}")

        # nothing may come after the closing bracket
        f.seek(base + at)
        rest = f.read(EDGE)
        if more := rest.lstrip():
            raise ValueError(f"{path}: not JSON: more text after the list, at byte {base + at + len(rest) - len(more)}")

def describe_error(error, text, at, number):
    """Why there is no value at text[at] -> (its place in the text, the reason)."""
    if len(text) - at > LONGEST:
        return at, f"no end within {LONGEST >> 20} MB; expected a list of entries, or one object per line"
    if text[at:at + 1] in ("]", ",") and number:
        return at, "a comma after the last entry" if text[at] == "]" else "two commas in a row"
    if not isinstance(error, json.JSONDecodeError):
        return at, "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
    excerpt = text[error.pos:error.pos + 20].encode("latin-1").decode(errors="replace")
    return error.pos, f"{error.msg}, found {excerpt!r}" if excerpt else f"{error.msg}: the file ends"

def describe_value(value):
    """The kind of a value; of an object also what it holds, for the entries may be one level deeper."""
    lists = [f'"{key}"' for key, part in value.items() if isinstance(part, list)] if isinstance(value, dict) else []
    return type(value).__name__ + bool(lists) * f" with a list under {', '.join(lists)}: save that list alone"

# ---- the index -------------------------------------------------------------------------------------------------------

HEADER = 1 << 16               # bytes of JSON; then a row for each good entry, then the faulty ones' numbers ("<i8")
ROW = struct.Struct("<qii")    # first byte and number of bytes of the entry, characters of its text
SHOWN = 60                     # faulty entries whose text is in the header: 160 characters of up to 6 bytes each

def index_key(source):
    """What an index is made of: this version of the file, read in this way. With another key it is made again."""
    stat = os.stat(source.anno)
    return {"format": 3, "bytes": stat.st_size, "modified": stat.st_mtime_ns, "media": source.media,
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
    header = {"index_key": index_key(source), "entries": 0, "qa": 0, "has_bounds": 0, "kinds": Counter(), "first": [],
              "sha256": hash_file(source.anno, hashlib.sha256()).hexdigest()}
    bar, faulty = tqdm(desc=f"index of {Path(source.anno).name}", total=header["index_key"]["bytes"], unit="B",
                       unit_scale=True, leave=False, disable=None), []
    with bar, atomic_file(path) as temporary, open(temporary, "wb") as f:
        f.seek(HEADER)
        for number, (start, length, entry) in enumerate(each_entry(source.anno)):
            bar.update(start - bar.n)
            # a faulty entry is counted and gets no row
            if error := entry_error(entry := normalize(entry, source), source):
                kind, text = error
                header["kinds"][kind] += 1
                text = text[:160].encode("utf-8", "backslashreplace").decode()         # it may have half a character
                header["first"] += [f"entry {number}: {text}"] * (len(faulty) < SHOWN)
                faulty.append(number)
                continue
            header["entries"] += 1
            header["qa"] += "QA" in entry
            header["has_bounds"] += entry.get("start") is not None
            f.write(ROW.pack(start, length, text_length(entry)))

        # the header comes last, when all is counted
        if index_key(source) != header["index_key"]:
            raise ValueError(f"{source.anno} has changed while it was read; run the same command again")
        f.write(np.array(faulty, "<i8").tobytes())
        f.seek(0)
        header["faulty"] = len(faulty)
        f.write(json.dumps(header, ensure_ascii=False).encode().ljust(HEADER))
    return header

class AnnotationFile:
    """The good entries of a source: len() and entries[i], read from the file at each access, in their usual form.

    header: how many are conversations ("qa"), have a start and an end ("has_bounds"), and what was faulty.
    chars: (n,), the text length of each entry. It is mapped into memory, and nothing else is in memory."""

    def __init__(self, source):
        self.source, self.index = source, index_path(source)
        self.header = read_header(self.index, source) or make_index(source, self.index)
        self.files = [open(self.index, "rb"), open(source.anno, "rb")]
        self.stamp = [self.header["index_key"][key] for key in ("bytes", "modified")]
        n = self.header["entries"]
        self.chars = np.memmap(self.index, "<i4", "r", HEADER, (n, 4))[:, 3] if n else np.empty(0, "<i4")

    def __reduce__(self):
        return AnnotationFile, (self.source,)              # a spawned process opens the files itself

    def __len__(self):
        return self.header["entries"]

    def __getitem__(self, i):
        """Entry i. SampleError if the file is no longer the one that the index was made of."""
        i = range(len(self))[i]                            # a negative one counts from the end; IndexError
        index, anno = (f.fileno() for f in self.files)
        start, length, _ = ROW.unpack(os.pread(index, ROW.size, HEADER + i * ROW.size))
        try:
            # a new time stamp alone changes nothing
            stat = os.fstat(anno)
            if [stat.st_size, stat.st_mtime_ns] != self.stamp:
                if hash_file(self.source.anno, hashlib.sha256()).hexdigest() != self.header["sha256"]:
                    raise ValueError
                self.stamp = [stat.st_size, stat.st_mtime_ns]
            return normalize(json.loads(os.pread(anno, length, start)), self.source)
        except ValueError:
            raise SampleError(f"{self.source.anno} has changed: entry {i} is no longer where it was; the same command "
                              "reads the file again") from None

    def entry_number(self, i):
        """Position in the file of good entry i, with the faulty ones counted."""
        faulty = np.fromfile(self.index, "<i8", -1, "", HEADER + len(self) * ROW.size)
        return i + int(np.searchsorted(faulty - np.arange(len(faulty)), i, side="right"))

    def faults(self, show=10):
        """Lines for the log: how many entries are faulty and left out, and what is wrong with the first of them."""
        n, first = self.header["faulty"], self.header["first"][:show]
        if n == 0:
            return []
        more = [f"  ... and {n - len(first)} more"] if n > len(first) else []
        return [f"{self.source.anno}: {n} faulty entries are left out (python -m training.check_data lists them):",
                *(f"  {line}" for line in first), *more]

def load_annotations(source):
    """The entries of a source without the faulty ones: by default up to 10, or one in a hundred if that is more.
    ValueError, with the first fault, if there are more than on_error allows or no good entry is left."""
    entries = AnnotationFile(source)
    n_faulty = entries.header["faulty"]
    total = len(entries) + n_faulty
    limit = {"few": max(10, total // 100), "skip": total, "raise": 0}[source.on_error]
    if n_faulty > limit or n_faulty == total > 0:
        raise ValueError(f"{source.anno}: {entries.header['first'][0]} ({n_faulty} faulty entries in all: python "
                         '-m training.check_data lists them; "on_error": "skip" in the corpus leaves them out)')
    if not total:
        raise ValueError(f"{source.anno}: the list is empty")
    return entries
