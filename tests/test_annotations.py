"""Annotation files: forms, faults, and the index that makes them small. Run: pytest tests/test_annotations.py"""
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from training import annotations
from training.annotations import AnnotationFile, Source, each_entry, load_annotations, load_corpus

def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path

# ---- forms and faults ------------------------------------------------------------------------------------------------

def test_a_corpus_in_all_its_forms(tmp_path):
    entries = [["a.json", "root"], ["b.json", "/abs", "video"], ["c.json", "", "text"],
               {"anno": "d.json", "media": "video", "weight": 0.5, "media_key": "key", "suffix": ".mp4"}]
    a, b, c, d = load_corpus(write(tmp_path / "corpus.json", entries))
    assert a == Source(str(tmp_path / "a.json"), str(tmp_path / "root"), "image", media_key="image")
    assert (b.root, b.media, c.media, d.media_key, d.suffix, d.weight) == ("/abs", "video", "text", "key", ".mp4", 0.5)
    assert load_corpus([["a.json", "root"]])[0].anno == "a.json"

def test_the_old_name_of_on_error_still_counts():
    values = [load_corpus([{"anno": "a.json", "faulty": value}])[0].on_error for value in ("stop", "skip")]
    assert values == ["raise", "skip"]

@pytest.mark.parametrize("content, message", [
    ("{", "corpus.json: not JSON"),
    ({}, "corpus.json: expected a JSON list, found dict"),
    ([], "corpus.json: the corpus has no sources"),
    ([["a.json", "", "video"], ["b.json"]], r"corpus.json: entry 1: expected \[anno, root\]"),
    ([{"video": "a.gif", "caption": "a"}], "corpus.json: entry 0: expected"),
    ([["a.json", "", "audio"]], "corpus.json: entry 0: media 'audio': expected video, image or text"),
    ([{"anno": "a.json", "on_error": "hide"}], "corpus.json: entry 0: on_error 'hide': expected few, raise or skip"),
])
def test_a_faulty_corpus_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(write(tmp_path / "corpus.json", content))

GOOD = {"video": "a.gif", "QA": [{"q": "", "a": "yes"}]}

@pytest.mark.parametrize("content, message", [
    ('[{"video": ', "anno.json: not JSON"),
    ([], "anno.json: the list is empty"),
    ([GOOD, "a.gif"], "anno.json: entry 1: expected an object, found str"),
    ([GOOD, {"caption": "a"}], 'anno.json: entry 1: no "video" with the path of its video; it has caption'),
    ([{"video": "a.gif", "text": "a"}], 'anno.json: entry 0: neither "caption" nor "QA"; it has video, text'),
    ([{"video": "a.gif", "caption": " "}], 'entry 0: an empty "caption"'),
    ([{"video": "a.gif", "caption": []}], 'entry 0: an empty "caption"'),
    ([{"video": "a.gif", "QA": {"q": "", "a": ""}}], 'entry 0: "QA" must be a list'),
    ([{"video": "a.gif", "QA": [{"q": "why?"}]}], 'entry 0: QA 0 has no answer "a"'),
    ([{"video": "a.gif", "QA": [{"q": [3], "a": "b"}]}], 'entry 0: QA 0 has a "q" that is not text'),
    ([GOOD | {"start": 3.0, "end": 1.0}], 'entry 0: "start" and "end" must be seconds, .* found 3.0 and 1.0'),
    ([GOOD | {"start": 3.0}], "found 3.0 and None"),
    ([{"video": "a.gif", "caption": "a", "start": -1, "end": 2}], "found -1 and 2"),
])
def test_a_faulty_entry_is_named(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_annotations(source(write(tmp_path / "anno.json", content), on_error="raise"))

def test_a_missing_annotation_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json: no such annotation file"):
        load_corpus(tmp_path / "none.json")

def source(path, **options):
    return Source(str(path), media="video", media_key="video", **options)

def test_a_null_instruction_is_none(tmp_path):
    entries = load_annotations(source(write(tmp_path / "a.json", [{"video": "a.gif", "QA": [{"i": None, "a": "b"}]}])))
    assert entries[0]["QA"][0]["a"] == "b" and entries.header["qa"] == 1

def test_faulty_entries_are_left_out_where_the_corpus_says_so_and_told(tmp_path):
    good = [{"video": f"{i}.mp4", "caption": f"clip {i}"} for i in range(6)]
    path = write(tmp_path / "a.json", [good[0], {}, good[1], good[2], {"video": "x", "caption": ""}, *good[3:]])
    with pytest.raises(ValueError, match=r"entry 1: no .video.*2 faulty entries in all: python -m training.check_data"):
        load_annotations(source(path, on_error="raise"))
    entries = load_annotations(source(path, on_error="skip"))
    assert [entries[i] for i in range(len(entries))] == good
    assert [entries.entry_number(i) for i in range(6)] == [0, 2, 3, 5, 6, 7]
    first, *lines = entries.faults()
    assert "a.json: 2 faulty entries are left out" in first
    assert [line[:9] for line in lines] == ["  entry 1", "  entry 4"]
    assert entries.header["kinds"] == {"malformed": 1, "empty text": 1}

def test_the_texts_of_many_faults_do_not_spill_into_the_rows(tmp_path):
    wanted = [{"video": f"{i}.mp4", "caption": f"clip {i}"} for i in range(200)]
    (tmp_path / "a.json").write_text(json.dumps([{"视频" * 80: i} for i in range(150)] + wanted, ensure_ascii=False),
                                     encoding="utf-8")
    for _ in range(2):                                                     # made, and opened
        entries = load_annotations(source(tmp_path / "a.json", on_error="skip"))
        assert [entries[i] for i in range(200)] == wanted and 50 < len(entries.header["first"]) <= 100

# ---- reading entry by entry ------------------------------------------------------------------------------------------

LISTS = ["[]", " [ ] ", "[1]", '[1, 23, "a]", {"b": [1, {"c": "}]"}]}, null]\n', '[\n {"a": 1}\n,\t{"a": 2}\r\n]',
         '["ü, 视频", {"😀": "é"}, 12345, -1.5e3]', '\ufeff["with a mark"]', '["\\u00fc \\" [", "\\\\"]']

@pytest.mark.parametrize("text", LISTS)
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 22])
def test_entries_and_their_places_whatever_the_chunks(tmp_path, text, chunk, monkeypatch):
    monkeypatch.setattr(annotations, "CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    found = list(each_entry(path))
    assert [entry for *_, entry in found] == json.loads(text.lstrip("\ufeff"))
    raw = path.read_bytes()
    assert [json.loads(raw[start:start + length]) for start, length, _ in found] == [entry for *_, entry in found]

@pytest.mark.parametrize("text, message", [
    ("", "a.json: not JSON: entry 0, at byte 0"), ("[", "not JSON: entry 0, at byte 1"),
    ("[1, 2", "not JSON: expected , or ] after entry 1, at byte 5"), ("[1 2]", "after entry 0, at byte 3"),
    ("[1, ]", "not JSON: entry 1, at byte 4"), ('["abc', "not JSON: entry 0, at byte 1: Unterminated string"),
    ("[1] 2", "more text after the list, at byte 4"), ('{"a": 1}', "expected a JSON list, found dict"),
    ("3", "expected a JSON list, found int"), ("<html>", "not JSON: entry 0, at byte 0")])
@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_what_is_no_list_is_named_with_its_place(tmp_path, text, message, chunk, monkeypatch):
    monkeypatch.setattr(annotations, "CHUNK", chunk)
    with pytest.raises(ValueError) as caught:
        list(each_entry(write(tmp_path / "a.json", text)))
    assert message in str(caught.value)

def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.json").write_bytes(b'["\xff\xfe"]')
    with pytest.raises(ValueError, match="a.json: not JSON: entry 0, at byte 1: not UTF-8"):
        list(each_entry(tmp_path / "a.json"))

# ---- the index -------------------------------------------------------------------------------------------------------

def many(tmp_path, n=300):
    entries = [{"video": f"{i}.mp4", "caption": "ü" * (i % 7 + 1)} for i in range(n)]
    (tmp_path / "a.json").write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    return entries, tmp_path / "a.json"

def test_entries_come_from_the_index_in_any_order(tmp_path):
    wanted, path = many(tmp_path)
    entries = AnnotationFile(source(path))
    assert len(entries) == 300 and [entries[i] for i in (299, 0, 17, -1)] == [wanted[i] for i in (299, 0, 17, -1)]
    assert entries.chars.tolist() == [i % 7 + 1 for i in range(300)]
    with pytest.raises(IndexError):
        entries[300]
    again = pickle.loads(pickle.dumps(entries))                            # as a spawned worker gets it
    assert again[5] == wanted[5] and len(pickle.dumps(entries)) < 2000

def test_it_is_made_once_and_again_when_it_does_not_fit(tmp_path, monkeypatch):
    made = []
    real = annotations.make_index
    monkeypatch.setattr(annotations, "make_index", lambda *a: made.append(1) or real(*a))
    wanted, path = many(tmp_path)
    index = tmp_path / "a.json.index"

    def times():
        made.clear()
        entries = AnnotationFile(source(path))
        assert [entries[i] for i in range(len(entries))] == wanted
        return len(made)

    assert times() == 1 and times() == 0
    index.write_bytes(index.read_bytes()[:-5])                             # torn
    assert times() == 1 and times() == 0
    index.write_bytes(b"\0" * index.stat().st_size)
    assert times() == 1 and times() == 0
    wanted[3]["caption"] = "another"                                       # an annotation file that is newer
    path.write_text(json.dumps(wanted))
    assert times() == 1 and times() == 0
    os.utime(path, (1, 1))                                                 # or older: another one all the same
    assert times() == 1
    AnnotationFile(Source(str(path), media="image", media_key="video"))       # read in another way
    assert len(made) == 2 and sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.json.index"]

def test_an_interrupted_index_leaves_nothing(tmp_path, monkeypatch):
    _, path = many(tmp_path)

    def stop(entry, source):
        raise KeyboardInterrupt

    monkeypatch.setattr(annotations, "entry_error", stop)
    with pytest.raises(KeyboardInterrupt):
        AnnotationFile(source(path))
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]

def test_a_folder_that_may_not_be_written_to(tmp_path, monkeypatch):
    wanted, path = many(tmp_path)
    monkeypatch.setattr(annotations.os, "access", lambda *_: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert AnnotationFile(source(path))[7] == wanted[7]
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.json"]
    assert len(list((tmp_path / "cache" / "videochat2").iterdir())) == 1
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache2"))
    AnnotationFile(source(path))                                              # beside it, for everybody
    monkeypatch.setattr(annotations.os, "access", lambda *_: False)
    assert annotations.index_path(source(path)).parent == tmp_path
    path.write_text(json.dumps(wanted[:5]))                                # which is soon out of date
    assert len(AnnotationFile(source(path))) == 5 and len(list((tmp_path / "cache2" / "videochat2").iterdir())) == 1

def test_a_file_that_changes_under_a_running_training_is_noticed(tmp_path):
    _, path = many(tmp_path)
    entries = AnnotationFile(source(path))
    with open(path, "r+") as f:
        f.write("[" * 4000)
    with pytest.raises(ValueError, match="a.json has changed: entry 9 is no longer where it was"):
        entries[9]

MEASURE = """
import sys
from training.annotations import AnnotationFile, Source
from tests.process import memory_of
before = memory_of()
entries = AnnotationFile(Source(sys.argv[1], media="video", media_key="video"))
print(len(entries), memory_of() - before)
"""

def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "big.json"
    with open(path, "w") as f:
        entry = json.dumps({"video": "00000000.mp4", "caption": "word " * 40})
        f.write("[" + ",".join([entry] * 200_000) + "]")
    assert path.stat().st_size > 45e6
    result = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True,
                            cwd=Path(annotations.__file__).parent.parent)
    n, grown = result.stdout.split()
    assert int(n) == 200_000 and float(grown) < 40                         # MiB: a chunk, rows before they are written
