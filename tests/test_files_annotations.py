"""Annotations as people have them: other forms, odd entries, texts with nothing to learn, files that change.

Run: pytest tests/test_files_annotations.py
"""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import BERT_VOCAB
from PIL import Image

import data
import train
from data import VideoTextDataset, collate_stage1, collate_stage2, collate_stage3
from infra.containers import MediaError, SampleError
from infra.distributed import Distributed
from infra.files import read_tensors
from model import PRESETS, Config, VideoChat2
from prompt import IGNORE, VIDEO, conversation_prompt, learnable_conversation, seconds_message
from tokenizer import SentencePiece, WordPiece
from toy import pretrain
from training import annotations, check_data, feature_cache, optim, resume
from training.annotations import AnnotationFile, Source, each_entry, load_annotations, load_corpus, normalize
from video import Transform

CASES = Path(__file__).resolve().parent / "cases"

@pytest.fixture(scope="module")
def tok(golden):
    return SentencePiece(golden / "tokenizer.model")

@pytest.fixture(scope="module")
def wordpiece():
    return WordPiece.load(BERT_VOCAB)

@pytest.fixture
def cases(tmp_path):
    """The cases, in a folder where indexes may be written."""
    shutil.copytree(CASES / "anno", tmp_path / "anno", ignore=shutil.ignore_patterns("*.index"))
    (tmp_path / "video").mkdir()
    shutil.copy(CASES / "video" / "plain_6s.mp4", tmp_path / "video")
    return tmp_path / "anno"

def source(path, **options):
    return Source(str(path), media="video", media_key="video", **options)

def write(path, value):
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return path

def clip(folder, name="a.png"):
    Image.new("RGB", (60, 50), (200, 20, 20)).save(folder / name)

# ---- the cases -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, faulty, words", [
    ("end_beyond", 0, ""), ("lines", 0, ""), ("seconds_as_text", 0, ""),
    ("end_infinity", 1, 'entry 0: "start" and "end" must be seconds, start before end; found 0 and inf'),
    ("lone_surrogate", 1, 'entry 0: a "caption" with half of a character'),
    ("name_too_long", 1, "entry 3: "),
    ("long_question", 4, "entry 3: QA 0: a question of about 2106 ids leaves no room for its answer in 512"),
    ("trailing_comma", 1, "trailing_comma.json: not JSON: entry 1, at byte 74: a comma after the last entry")])
@pytest.mark.parametrize("decode", [(), ("--decode",)])
def test_the_check_finds_what_is_wrong_with_each_case(cases, name, faulty, words, decode, capsys):
    assert check_data.main([str(cases / f"corpus_{name}.json"), *decode]) == min(1, faulty)
    out = capsys.readouterr().out
    assert words in out and (f"{faulty} faulty" in out or name == "trailing_comma")

@pytest.mark.parametrize("name, n", [("end_beyond", 4), ("lines", 3), ("seconds_as_text", 1), ("end_infinity", 1),
                                     ("lone_surrogate", 1), ("name_too_long", 4), ("long_question", 4)])
def test_training_reads_the_good_entries_of_each_case(cases, name, n):
    dataset = VideoTextDataset(load_corpus(cases / f"corpus_{name}.json"), 4, Transform(32))
    assert len(dataset) == n and all(dataset[i]["video"].shape == (4, 3, 32, 32) for i in range(n))
    assert sum(len(dataset[i]["bad"]) for i in range(n)) == (name == "name_too_long")

# ---- other forms of a file -------------------------------------------------------------------------------------------

OBJECTS = [{"a": 1}, {"b": "ü, 视频 😀"}, {"c": [{"d": "}{"}]}]
ROWS = [json.dumps(value, ensure_ascii=i % 2 == 0) for i, value in enumerate(OBJECTS)]

@pytest.mark.parametrize("text", [
    "\n".join(ROWS), "\n".join(ROWS) + "\n", "\r\n".join(ROWS) + "\r\n", "\n\n" + "\n \n".join(ROWS) + "\n\n\n",
    "\ufeff" + "\n".join(ROWS), "".join(ROWS), json.dumps(OBJECTS[0], indent=1) + "\n" + "\n".join(ROWS[1:])])
@pytest.mark.parametrize("chunk", [1, 3, 1 << 22])
def test_lines_are_read_whatever_separates_them(tmp_path, text, chunk, monkeypatch):
    monkeypatch.setattr(annotations, "CHUNK", chunk)
    path = write(tmp_path / "a.json", text.encode())
    entries = list(each_entry(path))
    assert [entry for *_, entry in entries] == OBJECTS
    raw = path.read_bytes()
    assert [json.loads(raw[start:start + length]) for start, length, _ in entries] == OBJECTS

def test_one_line_is_a_list_where_the_name_says_so(tmp_path):
    row = {"video": "a.mp4", "caption": "a walk"}
    assert [entry for *_, entry in each_entry(write(tmp_path / "a.jsonl", row))] == [row]
    with pytest.raises(ValueError, match="a.json: expected a JSON list, found dict$"):
        list(each_entry(write(tmp_path / "a.json", row)))

@pytest.mark.parametrize("content, message", [
    (b'{"annotations": [{"a": 1}]}', 'expected a JSON list, found dict with a list under "annotations": save '),
    (b'[{"a": 1}, ]', "not JSON: entry 1, at byte 11: a comma after the last entry"),
    (b'[{"a": 1},, {"a": 2}]', "not JSON: entry 1, at byte 10: two commas in a row"),
    (b'[{"a": 1}, {"a": 2}', "not JSON: expected , or ] after entry 1, at byte 19, found the end of the file"),
    (b'[{"a": 1} {"a": 2}]', "not JSON: expected , or ] after entry 0, at byte 10, found {"),
    (b'{"a": 1},\n{"a": 2}', "not JSON: expected an object after entry 0, at byte 8, found ,"),
    (b'{"a": 1}\n{"a": ', "not JSON: entry 1, at byte 15: Expecting value: the file ends"),
    (b'{"a": 1}\n{"a" 2}', "not JSON: entry 1, at byte 14: Expecting ':' delimiter, found '2}'"),
    (b"[{'a': 1}]", "not JSON: entry 0, at byte 2: Expecting property name enclosed in double quotes, found \"'a': 1"),
    (b"version https://git-lfs", "not JSON: entry 0, at byte 0: Expecting value, found 'version https://git-"),
    ('[{"a": 1}]'.encode("utf-16"), "UTF-16 text: save it as UTF-8"),
    ('[{"a": 1}]'.encode("utf-16-le"), "UTF-16 text: save it as UTF-8"),
    ('[{"a": 1}]'.encode("utf-16-be"), "UTF-16 text: save it as UTF-8"),
    (b"[" * 100_000, "recursion"), (b"[" + b"1" * 5000 + b"]", "Exceeds the limit"), (b"", "entry 0, at byte 0"),
    (b"1 2 3", "expected an object after entry 0, at byte 2")])
def test_what_is_no_list_is_told_in_words(tmp_path, content, message):
    with pytest.raises(ValueError) as caught:
        list(each_entry(write(tmp_path / "a.json", content)))
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)

def test_long_lines_take_no_more_memory_than_a_list(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"video": f"{i}.mp4", "caption": "word " * 40}) + "\n" for i in range(50_000)))
    entries = AnnotationFile(source(path))
    assert len(entries) == 50_000 and entries[49_999]["video"] == "49999.mp4"

@pytest.mark.parametrize("found, expected", [
    ({"video": 17, "caption": 3}, {"video": "17", "caption": "3"}),
    ({"caption": [2.5, "a", 4]}, {"caption": ["2.5", "a", "4"]}),
    ({"QA": [{"i": None, "q": 1, "a": 2.5}]}, {"QA": [{"i": None, "q": "1", "a": "2.5"}]}),
    ({"start": "1.0", "end": " 3 "}, {"start": 1.0, "end": 3.0}),
    ({"start": "soon", "end": "0:01"}, {"start": "soon", "end": "0:01"}),
    ({"caption": True, "QA": {"a": 1}}, {"caption": True, "QA": {"a": 1}}), ([1], [1]), ({"QA": [3]}, {"QA": [3]})])
def test_numbers_as_text_and_texts_as_seconds(found, expected):
    assert normalize(found, source("a.json")) == expected

def test_an_entry_is_read_in_its_usual_form(tmp_path):
    row = {"video": 12, "start": "1", "end": " 2.0 ", "QA": [{"q": "How many?", "a": 3}]}
    entries = load_annotations(source(write(tmp_path / "a.json", [row])))
    assert entries[0] == {"video": "12", "start": 1.0, "end": 2.0, "QA": [{"q": "How many?", "a": "3"}]}
    assert entries.chars.tolist() == [len("How many?3")]

# ---- odd entries -----------------------------------------------------------------------------------------------------

HALF = "\ud83d"
ENTRY = {"video": "a.mp4", "caption": "a walk"}

@pytest.mark.parametrize("entry, kind, words", [
    (ENTRY | {"start": 0, "end": float("nan")}, "malformed", "found 0 and nan"),
    (ENTRY | {"start": float("-inf"), "end": 1}, "malformed", "found -inf and 1"),
    (ENTRY | {"start": False, "end": True}, "malformed", "found False and True"),
    (ENTRY | {"start": "soon", "end": 3}, "malformed", "found 'soon' and 3"),
    (ENTRY | {"start": [0], "end": 3}, "malformed", "found [0] and 3"),
    (ENTRY | {"caption": f"nice {HALF}"}, "malformed", 'a "caption" with half of a character'),
    (ENTRY | {"caption": ["fine", HALF]}, "malformed", 'a "caption" with half of a character'),
    (ENTRY | {"video": f"{HALF}.mp4"}, "malformed", 'a "video" with half of a character'),
    ({f"vid{HALF}": "a"}, "malformed", 'no "video" with the path'),
    (ENTRY | {"caption": {"en": "a"}}, "malformed", 'a "caption" that is not text'),
    (ENTRY | {"caption": "\u200b"}, "empty text", 'an empty "caption", or one without a word'),
    (ENTRY | {"caption": "\x00\x07 \ufe0f"}, "empty text", 'an empty "caption"'),
    (ENTRY | {"caption": "😀 🎉"}, "empty text", 'an empty "caption"'),
    (ENTRY | {"caption": None}, "empty text", 'an empty "caption"'),
    ({"video": "a", "QA": [{"a": "\u200b"}]}, "empty text", 'QA 0 has no answer "a"'),
    ({"video": "a", "QA": [{"a": "yes"}, {"a": HALF}]}, "malformed", 'QA 1 has a "a" with half of a character'),
    ({"video": "a", "QA": [{"a": "yes", "i": f"x{HALF}"}]}, "malformed", 'QA 0 has a "i" with half of a character'),
    ({"video": "a", "QA": ["yes"]}, "malformed", '"QA" must be a list of')])
def test_an_odd_entry_is_a_fault_and_no_more(tmp_path, entry, kind, words, capsys):
    (tmp_path / "a.mp4").write_bytes(b"not opened")
    write(tmp_path / "a.json", [entry, ENTRY])
    write(tmp_path / "corpus.json", [["a.json", "", "video"]])
    for _ in range(2):                                                          # made, and read again
        entries = AnnotationFile(source(tmp_path / "a.json"))
        assert len(entries) == 1 and entries.header["kinds"] == {kind: 1} and words in entries.header["first"][0]
    assert check_data.main([str(tmp_path / "corpus.json")]) == 1
    assert f"1 {kind}" in capsys.readouterr().out

@pytest.mark.parametrize("text", ["+", "😀", "?", "a\u0301", "視", "½", "3"])
def test_an_answer_needs_no_word(text):
    assert annotations.text_error('"a"', text) is None

def test_names_that_the_terminal_cannot_show_are_printed_all_the_same(tmp_path):
    write(tmp_path / "a.json", [{f"vid{HALF}\u4f60": 1}, {"video": "\u4f60.mp4", "caption": "a"}])
    write(tmp_path / "corpus.json", [["a.json", "", "video"]])
    done = subprocess.run([sys.executable, "-m", "training.check_data", str(tmp_path / "corpus.json")], text=True,
                          cwd=CASES.parents[1], env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and r"it has vid\ud83d\u4f60" in done.stdout

@pytest.mark.parametrize("option, words", [
    ({"fps": -1}, "fps -1: expected a number, 0 or more"), ({"fps": True}, "fps True: expected a number"),
    ({"fps": float("nan")}, "fps nan"), ({"weight": "2"}, "weight '2': expected a number"),
    ({"weight": float("inf")}, "weight inf"), ({"suffix": 3}, "suffix 3: expected text"),
    ({"root": None}, "root None: expected text"), ({"anno": 5}, "anno 5: expected text")])
def test_a_corpus_says_which_option_is_wrong(tmp_path, option, words):
    with pytest.raises(ValueError, match=f"entry 0: {words}"):
        load_corpus(write(tmp_path / "corpus.json", [{"anno": "a.json"} | option]))

def test_a_few_faults_are_left_out_and_more_refuse_the_file(tmp_path):
    def load(n_faulty, n_good, **options):
        path = write(tmp_path / "a.json", [{}] * n_faulty + [ENTRY] * n_good)
        return load_annotations(source(path, **options))

    assert len(load(10, 5)) == 5 and len(load(11, 1100)) == 1100 and len(load(0, 5, on_error="raise")) == 5
    assert load(0, 5).faults() == [] and load(11, 1100).faults()[-1] == "  ... and 1 more"
    for n_faulty, n_good, options in ((11, 5, {}), (12, 1100, {}), (3, 0, {}), (1, 9, {"on_error": "raise"}),
                                      (3, 0, {"on_error": "skip"})):
        with pytest.raises(ValueError, match=rf"a.json: entry 0: no .* \({n_faulty} faulty entries in all: "
                           'python -m training.check_data lists them; "on_error": "skip"'):
            load(n_faulty, n_good, **options)
    assert len(load(300, 5, on_error="skip")) == 5

# ---- media that cannot be reached ------------------------------------------------------------------------------------

@pytest.fixture
def pictures(tmp_path):
    """Six good images with captions, as a corpus."""
    for k in range(6):
        clip(tmp_path, f"{k}.png")
    write(tmp_path / "a.json", [{"image": f"{k}.png", "caption": f"picture {k}"} for k in range(6)])
    return write(tmp_path / "corpus.json", [["a.json", ""]])

def failing_stat(monkeypatch, name, error):
    real = os.stat
    def stat(path, *args, **kwargs):
        if str(path).endswith(name):
            raise error
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(Path, "stat", lambda path, **options: stat(path, **options))

@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO, errno.ENAMETOOLONG])
def test_a_medium_that_cannot_be_reached_is_a_fault(pictures, number, monkeypatch, capsys):
    failing_stat(monkeypatch, "2.png", OSError(number, os.strerror(number)))
    for decode in ((), ("--decode",)):
        assert check_data.main([str(pictures), "--workers", "0", *decode]) == 1
        out = capsys.readouterr().out
        assert "1 faulty" in out and "entry 2: " in out and os.strerror(number) in out
    sample = VideoTextDataset(load_corpus(pictures), 4, Transform(32))[2]
    assert sample["text"] == "picture 3" and "2.png" in sample["bad"][0] and os.strerror(number) in sample["bad"][0]

@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a\x00b.png", "x/" * 3000 + "a.png"])
def test_a_name_that_no_file_can_have_is_a_fault(pictures, name, capsys):
    write(pictures.parent / "a.json", [{"image": name, "caption": "one"}, {"image": "1.png", "caption": "two"}])
    assert check_data.main([str(pictures)]) == 1 and "2 entries of image, 1 faulty" in capsys.readouterr().out
    sample = VideoTextDataset(load_corpus(pictures), 4, Transform(32))[0]
    assert sample["text"] == "two" and len(sample["bad"]) == 1

@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_folder_without_permission(pictures, capsys):
    locked = pictures.parent / "locked"
    locked.mkdir()
    clip(locked)
    rows = [{"image": "locked/a.png", "caption": "one"}, {"image": "1.png", "caption": "two"}]
    write(pictures.parent / "a.json", rows)
    locked.chmod(0)
    try:
        assert check_data.main([str(pictures)]) == 1 and "Permission denied" in capsys.readouterr().out
        assert VideoTextDataset(load_corpus(pictures), 4, Transform(32))[0]["text"] == "two"
    finally:
        locked.chmod(0o700)

@pytest.mark.parametrize("error", [RuntimeError("odd\nframe"), KeyError("stream"), OSError(5, "Input/output error"),
                                   ZeroDivisionError(), MemoryError(), RecursionError("deep"), AssertionError("no")])
@pytest.mark.parametrize("workers", [0, 1])
def test_whatever_a_decoder_raises_is_a_replaced_sample(pictures, wordpiece, error, workers, monkeypatch, capsys):
    real = data.read_media
    def read_media(path, *args, **options):
        if path.endswith("4.png"):
            raise error
        return real(path, *args, **options)

    monkeypatch.setattr(data, "read_media", read_media)
    monkeypatch.setattr(check_data, "read_media", read_media)
    check_data.medium_fault.cache_clear()
    dataset = VideoTextDataset(load_corpus(pictures), 4, Transform(32))
    collate = partial(collate_stage1, cfg=Config(), qformer_tok=wordpiece)
    batches = list(data.make_loader(dataset, data.Sampler(dataset, 2), collate, workers))
    (line,) = [line for batch in batches for line in batch["bad"]]
    assert line == f"{pictures.parent / '4.png'}: {error!r}" and "\n" not in line
    assert check_data.main([str(pictures), "--decode", "--workers", str(workers)]) == 1
    assert f"entry 4: {line}" in capsys.readouterr().out

@pytest.mark.parametrize("workers", [0, 1])
def test_replacements_are_clips_that_the_batch_lacks(pictures, workers):
    """Else matching would find a single clip in a small batch, and the run would end over two files."""
    for k in (1, 2):
        (pictures.parent / f"{k}.png").write_bytes(b"torn")
    dataset = VideoTextDataset(load_corpus(pictures), 4, Transform(32))
    (batch,) = torch.utils.data.DataLoader(dataset, batch_sampler=[[1, 2, 3]], collate_fn=list, num_workers=workers)
    assert [sample["idx"] for sample in batch] == [4, 5, 3] and [len(sample["bad"]) for sample in batch] == [1, 1, 0]
    assert [sample["idx"] for sample in dataset.__getitems__([0, 1, 2, 3, 4, 5])] == [0, 3, 3, 3, 4, 5]

def test_an_error_in_every_sample_stops_the_run_with_its_name(pictures, monkeypatch):
    monkeypatch.setattr(data, "read_media", lambda *args, **options: 1 / 0)
    with pytest.raises(MediaError, match=r"png: ZeroDivisionError\('division by zero'\); 6 unreadable media, and its"):
        VideoTextDataset(load_corpus(pictures), 4, Transform(32))[0]

def test_a_crashing_decoder_is_a_fault_of_its_file(pictures, monkeypatch, capsys):
    """It kills the process that reads; the check goes on, and training says what to do."""
    def read_media(path, *args, **options):
        if path.endswith("1.png"):
            os.kill(os.getpid(), signal.SIGSEGV)

    monkeypatch.setattr(check_data, "read_media", read_media)
    monkeypatch.setattr(check_data, "BATCH", 3)
    assert check_data.main([str(pictures), "--decode", "--workers", "2"]) == 1
    out = capsys.readouterr().out
    assert "6 entries of image, 1 faulty: 1 unreadable" in out and "1.png: DataLoader worker" in out

    monkeypatch.setattr(data, "read_media", read_media)
    dataset = VideoTextDataset(load_corpus(pictures), 4, Transform(32))
    sampler = data.Sampler(dataset, 2)
    with pytest.raises(OSError, match="^DataLoader worker .* python -m training.check_data CORPUS --decode names it"):
        list(train.cycle(data.make_loader(dataset, sampler, list, 1), sampler))

# ---- bounds and rates ------------------------------------------------------------------------------------------------

def test_start_end_and_fps_reach_the_reader(tmp_path, monkeypatch):
    calls = []
    def read_media(path, select, limit=None, **options):
        calls.append(options)
        return torch.zeros(4, 3, 8, 8, dtype=torch.uint8), [0.0] * 4

    write(tmp_path / "a.json", [ENTRY | {"start": "1", "end": 3}, ENTRY, ENTRY, ENTRY | {"start": 1.0, "end": 3}])
    corpus = write(tmp_path / "corpus.json", [{"anno": "a.json", "media": "video", "fps": 24}])
    (tmp_path / "a.mp4").write_bytes(b"x")
    monkeypatch.setattr(data, "read_media", read_media)
    monkeypatch.setattr(check_data, "read_media", read_media)
    check_data.medium_fault.cache_clear()
    dataset = VideoTextDataset(load_corpus(corpus), 4, Transform(32))
    assert [dataset[0]["idx"], dataset[1]["idx"]] == [0, 1]
    part, all_of_it = ({"as_image": False, "fps": 24, "start": a, "end": b} for a, b in ((1.0, 3), (None, None)))
    assert calls == [part, all_of_it]
    calls.clear()
    assert check_data.main([str(corpus), "--decode", "--workers", "0"]) == 0
    assert calls == [part, all_of_it]                                          # the same part only once
    images = Source("a.json", media="image", media_key="image")
    assert images.read_options({"start": 5, "end": 9}) == {"as_image": True, "fps": None}

def test_a_start_beyond_the_end_is_a_kind_of_its_own(cases, capsys):
    write(cases / "late.json", [{"video": "plain_6s.mp4", "caption": "a", "start": 30, "end": 40},
                                {"video": "plain_6s.mp4", "caption": "b", "start": 4, "end": 40}])
    write(cases / "corpus.json", [["late.json", "../video", "video"]])
    assert check_data.main([str(cases / "corpus.json"), "--decode"]) == 1
    out = capsys.readouterr().out
    assert "2 entries of video, 1 faulty: 1 beyond the end" in out and "start 30 s is beyond its end" in out
    sample = VideoTextDataset(load_corpus(cases / "corpus.json"), 4, Transform(32))[0]
    assert sample["text"] == "b" and "is beyond its end" in sample["bad"][0]

# ---- the check itself ------------------------------------------------------------------------------------------------

def test_the_check_finishes_whatever_a_source_is(pictures, capsys):
    folder = pictures.parent
    write(folder / "torn.json", b'[{"image": "0.png"')
    write(folder / "wide.json", '[{"a": 1}]'.encode("utf-16"))
    corpus = write(folder / "c.json", [["none.json", ""], ["torn.json", ""], ["wide.json", ""], ["a.json", ""]])
    assert check_data.main([str(corpus)]) == 1
    out = capsys.readouterr().out
    assert "none.json" in out and "torn.json: not JSON: entry 0" in out and "wide.json: UTF-16" in out
    assert "a.json: 6 entries of image, 0 faulty" in out

def test_ctrl_c_prints_what_was_found(pictures, monkeypatch, capsys):
    def read_media(path, *args, **options):
        if path.endswith("3.png"):
            raise KeyboardInterrupt
        raise MediaError(f"{path}: torn")

    monkeypatch.setattr(check_data, "read_media", read_media)
    monkeypatch.setattr(check_data, "BATCH", 1)
    check_data.medium_fault.cache_clear()
    with pytest.raises(KeyboardInterrupt):
        check_data.main([str(pictures), "--decode", "--workers", "0"])
    assert "6 entries of image, stopped after 3, 3 faulty: 3 unreadable" in capsys.readouterr().out

def test_ids_are_counted_with_the_llm_s_tokenizer(tmp_path, tok, golden, capsys):
    """A text of 1,900 letters is no fault by the estimate, and may be one for a tokenizer."""
    rows = [{"QA": [{"q": "x " * n, "a": "Yes."}]} for n in (10, 940)]
    corpus = write(tmp_path / "corpus.json", [["a.json", "", "text"]])
    write(tmp_path / "a.json", rows)
    assert check_data.main([str(corpus)]) == 0
    capsys.readouterr()
    assert check_data.main([str(corpus), "--llm", str(golden)]) == 1
    n_ids = len(tok.encode(" " + rows[1]["QA"][0]["q"]))
    assert f"entry 1: QA 0: a question of {n_ids} ids leaves no room for its answer in 512" in capsys.readouterr().out
    assert check_data.main([str(corpus), "--llm", str(golden), "--max-text", str(n_ids + 40)]) == 0

# ---- nothing to learn ------------------------------------------------------------------------------------------------

CFG = Config(n_query=5, n_extra=0, add_timestamps=False)

def conversation_of(i="", q="", a="Yes."):
    return {"idx": 7, "medium": "video", "path": "a.mp4", "seconds": [], "prompt_choice": 0.5, "bad": [],
            "qas": [{"i": i, "q": q, "a": a}]}

@pytest.mark.parametrize("separators", [False, True])
@pytest.mark.parametrize("long", ["i", "q"])
def test_a_text_too_long_is_named_and_harmless(tok, wordpiece, separators, long):
    cfg = Config(n_query=5, n_extra=0, max_text=64, train_separators=separators, prompt_style="vicuna")
    samples = [conversation_of(**{long: "What is it? " * 60}), conversation_of(q="What?")]
    batch = collate_stage3(samples, cfg, wordpiece, tok)
    (line,) = batch["no_label"]
    assert line.startswith("a.mp4: no answer is within the first 64 ids")
    assert ((batch["ids"] == VIDEO).sum(1) == 5).all() and len(batch["targets"]) > 0
    good = collate_stage3(samples[1:], cfg, wordpiece, tok)
    assert good["no_label"] == []
    if not separators:
        assert len(good["targets"]) == len(batch["targets"])

def test_what_fits_is_the_same_prompt_as_before(tok):
    turns = [{"i": "Look.", "q": "What moves? " * n, "a": "A kite."} for n in (1, 9)]
    for max_text in (24, 60, 512):
        for separators in (False, True):
            prompt, learns = learnable_conversation(tok, turns, 5, [0.5, 1.0], "video", "vicuna", max_text, separators)
            message = seconds_message([0.5, 1.0])
            assert prompt == conversation_prompt(tok, turns, 5, message, "video", "vicuna", max_text, separators)
            plain = conversation_prompt(tok, turns, 5, message, "video", "vicuna", max_text)
            assert learns == any(label != IGNORE for label in plain.labels)

@pytest.mark.parametrize("collate", [collate_stage1, collate_stage2, collate_stage3])
def test_a_loss_of_nothing_is_no_nan(tok, wordpiece, collate):
    """Also where a caption without a word comes in by another way than an annotation file."""
    stage = int(collate.__name__[-1])
    cfg = PRESETS["micro"]()
    cfg.llama.vocab_size, cfg.qformer.vocab_size, cfg.max_text = tok.vocab_size, wordpiece.vocab_size, 40
    samples = [conversation_of(q="What is it? " * 60) | {"text": "\u200b", "idx": i, "video": torch.zeros(4, 3, 64, 64)}
               for i in range(2)]
    batch = collate(samples, cfg, wordpiece, tok)
    model = VideoChat2(cfg, stage)
    losses = {"lm": model.lm_loss(batch)} if stage > 1 else model.stage1_losses(batch, wordpiece.dec_id, Distributed())
    if stage == 3:
        assert losses["lm"] == 0 and train.count_targets(batch) == 0
    (0 * sum(losses.values())).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(loss.isfinite() for loss in losses.values())

@pytest.mark.parametrize("fp16", [False, True])
def test_a_step_without_targets_moves_nothing(fp16):
    model = torch.nn.Linear(3, 2)
    optimizers = optim.make_optimizers(model, train.TrainConfig(lr=0.1))
    scaler = torch.amp.GradScaler("cpu", enabled=fp16, init_scale=4.0)
    for skip in (False, True, True, False):
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale((0.0 if skip else 1.0) * model(torch.ones(1, 3)).sum()).backward()
        norm = optim.clip_gradients(model, optimizers, scaler, 1.0)
        optim.optimizer_step(optimizers, 0.1, scaler, norm, skip=skip)
        assert all(torch.equal(a, b) == skip for a, b in zip(before, model.parameters(), strict=True))

# ---- runs ------------------------------------------------------------------------------------------------------------

def options(folder, stage, *more):
    return ["--stage", str(stage), "--preset", "micro", "--data", str(folder), "--corpus", str(folder / "corpus.json"),
            "--out", str(folder.parent / "run"), "--batch", "2", "--steps", "4", "--no-cache-features", *more]

@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A micro run with its first two stages."""
    out = tmp_path_factory.mktemp("trained") / "run"
    more = ["--preset", "micro", "--data", str(world), "--out", str(out), "--steps", "2"]
    pretrain.main(more)
    for stage in ("1", "2"):
        train.main(["--stage", stage, *more])
    return out

@pytest.fixture
def folder(trained, tmp_path):
    """A folder for annotations, beside a run that is ready for stage 3."""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "data").mkdir()
    shutil.copy(CASES / "video" / "plain_6s.mp4", tmp_path / "data")
    write(tmp_path / "data" / "corpus.json", [["a.json", "", "video"]])
    return tmp_path / "data"

def conversations(*questions):
    return [{"video": "plain_6s.mp4", "QA": [{"q": q, "a": "A walk."}]} for q in questions]

def test_a_run_names_the_first_sample_with_nothing_to_learn(folder, capsys):
    write(folder / "a.json", conversations("What is it? " * 300, "What is it? " * 300, "What?", "Who?"))
    train.main(options(folder, 3, "--max-text", "100"))
    out = capsys.readouterr().out
    assert out.count("nothing to learn in ") == 1 and "plain_6s.mp4: no answer is within the first 100 ids" in out
    assert "samples without a label: 4, of which" in out and " | samples without a label " in out and "nan" not in out

def test_a_run_with_nothing_to_learn_changes_nothing(folder, capsys):
    write(folder / "a.json", conversations(*["What is it? " * 300] * 4))
    train.main(options(folder, 3, "--max-text", "100", "--log-every", "1"))
    out = capsys.readouterr().out
    assert "loss -" in out and "nan" not in out and "loss 0.000" not in out
    before, after = (read_tensors(folder.parent / "run" / name / "model.safetensors") for name in ("stage2", "stage3"))
    assert all(torch.equal(before[name], t) for name, t in after.items() if name in before)

def test_a_run_survives_a_few_odd_entries_and_names_them(folder, capsys):
    text = json.dumps([*conversations("What?", "Who?", "Where?", "When?"), {"video": "plain_6s.mp4", "QA": []}])
    (folder / "a.json").write_text(text[:-1] + r', {"video": "plain_6s.mp4", "QA": [{"a": "\ud83d"}]}]')
    train.main(options(folder, 3))
    out = capsys.readouterr().out
    assert "a.json: 2 faulty entries are left out" in out and "entry 4: " in out and "entry 5: QA 0 has" in out
    assert "stage 3: finished" in out

def interrupted(folder, monkeypatch):
    write(folder / "a.json", conversations("What?", "Who?", "Where?", "When?"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(resume, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        train.main(options(folder, 3, "--save-every", "2"))

def test_a_run_does_not_resume_with_other_data_unasked(folder, monkeypatch, capsys):
    interrupted(folder, monkeypatch)
    write(folder / "a.json", conversations("What?", "Who?", "Where?", "When?", "Why?", "How?"))
    with pytest.raises(ValueError, match=r"a.json has changed since the run was interrupted \(4 entries then, 6 now\): "
                       ".*--accept-changed-data"):
        train.main(options(folder, 3))
    train.main(options(folder, 3, "--accept-changed-data"))
    out = capsys.readouterr().out
    assert "resuming from step 2" in out and "resuming with changed data: " in out and "stage 3: finished" in out

def test_other_words_in_as_many_entries_are_other_data_and_a_new_time_is_not(folder, monkeypatch, capsys):
    interrupted(folder, monkeypatch)
    os.utime(folder / "a.json", (1, 1))
    saved = folder.parent / "saved"
    shutil.copytree(folder.parent / "run", saved)
    train.main(options(folder, 3))                                              # the time alone is nothing
    assert "resuming from step 2" in capsys.readouterr().out
    shutil.rmtree(folder.parent / "run")
    saved.rename(folder.parent / "run")
    write(folder / "a.json", conversations("What?", "Who?", "Where?", "Whom"))
    with pytest.raises(ValueError, match=r"\(4 entries as before, but not the same\)"):
        train.main(options(folder, 3))
    path = resume.latest(folder.parent / "run" / "stage3.unfinished") / "trainer.json"
    record = json.loads(path.read_text())
    del record["data"]                                                          # as an older version wrote it
    path.write_text(json.dumps(record))
    train.main(options(folder, 3))
    assert "resuming from step 2" in capsys.readouterr().out

def test_changes_of_a_corpus_are_told():
    a = {"anno": "a.json", "media": "video", "weight": 1.0, "entries": 4, "sha256": "1"}
    assert resume.data_changes([a], [a | {"anno": "moved/a.json"}]) == [] == resume.data_changes(None, [a])
    (line,) = resume.data_changes([a], [a, a])
    assert line == "the corpus had 1 annotation files when the run was interrupted and has 2 now"
    (line,) = resume.data_changes([a, a], [a, a | {"weight": 0.5, "anno": "b.json"}])
    assert line == "b.json has changed since the run was interrupted (1.0 weight then, 0.5 now)"

def test_annotations_that_change_in_a_run_end_it_in_one_sentence(pictures, wordpiece):
    dataset = VideoTextDataset(load_corpus(pictures), 4, Transform(32))
    path, raw = pictures.parent / "a.json", (pictures.parent / "a.json").read_bytes()
    os.utime(path, (1, 1))
    assert dataset[2]["text"] == "picture 2"                                    # the time alone is nothing
    path.write_bytes(raw.replace(b"picture 2", b"nothing 2"))                   # JSON all the same
    collate = partial(collate_stage1, cfg=Config(), qformer_tok=wordpiece)
    for workers in (0, 1):
        with pytest.raises(SampleError) as caught:
            list(data.make_loader(dataset, data.Sampler(dataset, 2), collate, workers))
        assert str(caught.value).startswith(f"{path} has changed: entry ") and "\n" not in str(caught.value)

def test_features_are_cached_around_an_unreadable_clip(folder, monkeypatch, capsys):
    rows = [{"video": name, "caption": "a walk"} for name in ("plain_6s.mp4", "x" * 300 + ".mp4", "x/" * 3000)]
    dataset = VideoTextDataset(load_corpus([[str(write(folder / "a.json", rows)), str(folder), "video"]]), 4,
                               Transform(64, crop=False), "mvbench")
    vit = VideoChat2(PRESETS["micro"](), 1).vision_encoder
    dataset.features = feature_cache.cache_features(vit, dataset, folder / "features", "cpu")
    assert dataset[1]["idx"] == 0 and len(dataset[1]["bad"]) == 2 and "features" in dataset[0]
