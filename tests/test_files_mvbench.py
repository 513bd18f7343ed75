"""MVBench, chat and LLM folders as people have them: what is wrong has a sentence, and everything else is answered.

Run: pytest tests/test_files_mvbench.py
"""
import codecs
import io
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_mvbench import copied
from test_real_layout import run

import chat
import mvbench
from evaluation import report_page
from evaluation.engine import Engine
from evaluation.predictions import make_row
from evaluation.scorers import SCORERS, is_right
from evaluation.tasks import BENCHMARKS, MVBENCH, TASKS, TVBENCH, load_questions, missing_media, size_of
from infra import files
from infra.distributed import Distributed
from llama import Llama, LlamaConfig
from prompt import check_text, decode_answer, decode_official
from tokenizer import SentencePiece
from weights import checkpoint, hf_llama

CASES = Path(__file__).parent / "cases" / "mvbench"
OE, AC, AA, ER = (next(task for task in TASKS if task.short == short) for short in ("OE", "AC", "AA", "ER"))

def entry(**changes):
    return {"video": "a.mp4", "question": "How often?", "candidates": ["2", "3"], "answer": "3", **changes}

def benchmark(root, media=(), **entries):
    """A benchmark of these tasks, by file name, and of empty media at these paths."""
    (root / "json").mkdir(parents=True, exist_ok=True)
    for name, of_task in entries.items():
        (root / "json" / f"{name}.json").write_text(json.dumps(of_task))
    for path in media:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"video")
    return root

def media_of(root, **more):
    return {(q["task"], q["video"]): os.path.relpath(q["media"], root) if q["media"] else ""
            for q in load_questions(root, **more)}

# ---- one file for two videos -----------------------------------------------------------------------------------------

def test_one_flat_folder(ckpt, tmp_path, capsys):
    questions = load_questions(CASES / "flat_same_name")
    assert [q["media"] for q in questions] == ["", ""]
    for line, task, folder in zip(missing_media(questions), ("Object Existence", "Action Count"),
                                  ("clevrer/video_validation", "perception/videos"), strict=True):
        assert line.startswith(f"{task}: 1 of 1 questions are not asked, because the same file serves other media (")
        assert "video_10142.mp4)" in line
        assert line.endswith(f": put this task's media into video/{folder}/")
    with pytest.raises(FileNotFoundError, match="none of the media"):
        run(ckpt, CASES / "flat_same_name", tmp_path / "out")
    assert "the same file serves" in capsys.readouterr().out

def test_what_can_be_told_apart_is_asked(ckpt, tmp_path, capsys):
    root = Path(shutil.copytree(CASES / "flat_same_name", tmp_path / "data"))
    shutil.copy(root / "video_10142.mp4", root / "other.mp4")
    (root / "moving_count.json").write_text(json.dumps([entry(video="video_10142.mp4"), entry(video="other.mp4")]))
    with pytest.raises(FileNotFoundError, match="--strict-data"):
        run(ckpt, root, tmp_path / "out", "--strict-data")
    (row,) = run(ckpt, root, tmp_path / "out")
    assert (row["task"], row["video"]) == ("Moving Count", "other.mp4") and "unread" not in row
    assert row["media"] == str(root / "other.mp4") and "shared" not in row
    html = (tmp_path / "out" / "report.html").read_text()
    for n, task in ((1, "Object Existence"), (1, "Moving Count"), (1, "Action Count")):
        assert f"{task}: {n} of " in html and "questions are not asked, because the same file serves" in html
    assert "Moving Count: 1 of 2 questions are not asked" in capsys.readouterr().out

def test_one_task_alone_does_not_hide_the_other(tmp_path):
    """Neither --only nor --limit makes the file of two tasks the file of one."""
    counts = [entry(video="b.mp4"), entry()]
    root = benchmark(tmp_path, ["a.mp4", "b.mp4"], object_existence=[entry()], action_count=counts)
    assert media_of(root, only=["Object Existence"]) == {("Object Existence", "a.mp4"): ""}
    assert media_of(root, limit=1) == {("Object Existence", "a.mp4"): "", ("Action Count", "b.mp4"): "b.mp4"}

def test_tasks_of_one_folder_share_its_files(tmp_path):
    root = benchmark(tmp_path, ["a.mp4"], object_existence=[entry()], moving_count=[entry(video="./a.mp4")])
    assert set(media_of(root).values()) == {"a.mp4"}

def test_links_do_not_make_two_videos_of_one(tmp_path):
    """Folders, or files, that are links to one place; two files in their own folders are two."""
    tasks = {"object_existence": [entry()], "action_count": [entry()]}
    (tmp_path / "one").mkdir()
    root = benchmark(tmp_path / "one", ["flat/a.mp4"], **tasks)
    for task in (OE, AC):
        (root / "video" / task.folder).parent.mkdir(parents=True)
        (root / "video" / task.folder).symlink_to(root / "flat")
    assert set(media_of(root).values()) == {""}
    places = [f"video/{task.folder}/a.mp4" for task in (OE, AC)]
    root = benchmark(tmp_path / "two", places[:1], **tasks)
    (root / places[1]).parent.mkdir(parents=True)
    (root / places[1]).symlink_to(root / places[0])
    assert set(media_of(root).values()) == {""}
    assert set(media_of(benchmark(tmp_path / "three", places, **tasks)).values()) == set(places)
    absolute = str(tmp_path / "three" / places[0])
    root = benchmark(tmp_path / "four", object_existence=[entry(video=absolute)], action_count=[entry(video=absolute)])
    assert set(media_of(root).values()) == {""}

def test_a_benchmark_whose_tasks_have_folders_of_their_own(tmp_path):
    places = [f"video/{task.folder}/a.mp4" for task in TVBENCH.tasks]
    entries = {task.file: [entry(start=0, end=1)] for task in TVBENCH.tasks}
    root = benchmark(tmp_path, places, **entries)
    assert sorted(media_of(root, benchmark=TVBENCH).values()) == sorted(places)

# ---- names -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, there, found", [
    ("a/b.c.webm", "a/b.c.mp4", True), ("a/b.c.webm", "b.c.mp4", False), ("a/b.c.webm", "a/b.mp4", False),
    ("a.webm", "a.mp4", True), ("a.MP4", "a.mp4", True), ("clip.01", "clip.mp4", False), ("a b .avi", "a b .mp4", True),
    ("12:30.webm", "12:30.mp4", True), ("a.mp4 ", "a.mp4", False), ("a.mp4 ", "a.mp4 ", True),
    ("../a.webm", "a.mp4", False)])
def test_an_mp4_instead_of_the_original_has_its_whole_name(tmp_path, name, there, found):
    root = benchmark(tmp_path, [f"video/{AA.folder}/{there}"], action_antonym=[entry(video=name)])
    assert bool(media_of(root)["Action Antonym", name]) == found

def test_an_mp4_that_is_another_question_s_medium_is_no_substitute(tmp_path):
    """In the same task, in another one; and one .mp4 is not two originals."""
    root = benchmark(tmp_path / "1", ["a.mp4"], action_antonym=[entry(video="a.webm"), entry(video="a.mp4")])
    assert list(media_of(root).values()) == ["", "a.mp4"]
    root = benchmark(tmp_path / "2", ["a.mp4"], action_antonym=[entry(video="a.webm")], action_count=[entry()])
    assert list(media_of(root).values()) == ["", "a.mp4"]
    root = benchmark(tmp_path / "3", ["a.mp4"], action_antonym=[entry(video="a.webm"), entry(video="a.avi")])
    assert list(media_of(root).values()) == ["", ""]

def test_media_that_cannot_be_reached_are_unread_and_the_others_asked(ckpt, tree, tmp_path):
    data = copied(tree, tmp_path / "data", "State Change")
    path = data / "json" / "state_change.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), entry(video="x" * 300 + ".mp4")]))
    *_, row = rows = run(ckpt, data, tmp_path / "out")
    assert len(rows) == 3 and ["unread" in row for row in rows] == [False, False, True] and "too long" in row["unread"]

def test_the_first_missing_name_is_shown(tmp_path):
    root = benchmark(tmp_path, ["a.mp4"], action_count=[entry(), entry(video="b.mp4 ")])
    assert missing_media(load_questions(root)) == [
        'Action Count: 1 of 2 media are missing (video/perception/videos/), the first being "b.mp4 "']

# ---- what is in the task files ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("write", [
    lambda text: codecs.BOM_UTF8 + text.encode(), lambda text: text.encode("utf-16"),
    lambda text: "\n".join(json.dumps(e, ensure_ascii=False) for e in json.loads(text)).encode()])
def test_encodings_and_json_lines(tmp_path, write):
    path = benchmark(tmp_path, action_count=[]) / "json" / "action_count.json"
    path.write_bytes(write(json.dumps([entry(question="Wie oft, Zoë\u2028?"), entry()], ensure_ascii=False)))
    assert [q["question"] for q in load_questions(tmp_path)] == ["Wie oft, Zoë\u2028?", "How often?"]
    path.rename(path.with_suffix(".jsonl"))
    assert len(load_questions(tmp_path)) == 2
    path.with_suffix(".jsonl").write_text(json.dumps(entry()) + "\n")
    assert len(load_questions(tmp_path)) == 1

@pytest.mark.parametrize("text, message", [
    ("[1, 2", "action_count.json is not JSON"), ('{"a": 1}', "is a JSON dict, not a list of questions"),
    ("[" * 100_000, "is not JSON"), ('["a"]', 'entry 0: expected an object with video, question, .*found "a"'),
    (b"\xff\xfe\xff", "is not JSON"), ('{"video": 1}\n{"vid', "is not JSON.* line 2 column 2"),
    ("", "is not JSON"), ("[" + "9" * 5000 + "]", "is not JSON")])
def test_task_files_that_are_none(tmp_path, text, message):
    path = benchmark(tmp_path, action_count=[]) / "json" / "action_count.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        load_questions(tmp_path)

@pytest.mark.parametrize("options, answer, key", [
    ([2, 3], 3, "3"), (["2", "3"], 3, "3"), ([2, 3], "3", "3"), ([2, 3], 3.0, "3"), ([0.5, 1], 0.5, "0.5")])
def test_numbers_are_compared_as_text(tmp_path, options, answer, key):
    root = benchmark(tmp_path, ["a.mp4"], action_count=[entry(candidates=options, answer=answer)])
    (q,) = load_questions(root)
    assert q["candidates"] == list(map(str, options)) and q["answer"] == key

@pytest.mark.parametrize("start, end, bound", [
    (1, "12.5", (1, 12.5)), ("1", "2", (1.0, 2.0)), (2, 2, (2, 2)), (-1, 3, (-1, 3)),
    ("1:30", 100, 'start: expected seconds, found "1:30"'), (0, math.inf, "end: expected seconds, found Infinity"),
    (None, 3, "start: expected seconds, found null"), (True, 3, "start: expected seconds, found true"),
    ("nan", 3, "start: expected seconds"), (5, 3, "expected an end after the start of 5 s, found 3 s"),
    (0, 10 ** 400, "end: expected seconds")])
def test_seconds(tmp_path, start, end, bound):
    root = benchmark(tmp_path, ["a.mp4"], action_sequence=[entry(start=start, end=end)])
    if isinstance(bound, tuple):
        assert load_questions(root)[0]["bound"] == bound
        return
    with pytest.raises(ValueError, match=f"action_sequence.json, entry 0: {bound}"):
        load_questions(root)

def test_faulty_entries_are_counted(tmp_path):
    counts = [entry(), entry(answer="9"), entry(candidates=[])]
    root = benchmark(tmp_path, action_count=counts, object_existence=[entry()])
    with pytest.raises(ValueError, match=r"entry 1: the answer .*: correct the entry, or delete it; 1 more entries"):
        load_questions(root)
    assert len(load_questions(root, ["Object Existence"])) == 1

# ---- start beyond the end, and folders of frames ---------------------------------------------------------------------

def test_a_start_beyond_the_end_is_a_warning(ckpt, tree, tmp_path, capsys):
    data = copied(tree, tmp_path / "data", "Action Sequence")
    path = data / "json" / "action_sequence.json"
    first, second = json.loads(path.read_text())
    path.write_text(json.dumps([first, second | {"start": 30, "end": 40}]))
    one, other = run(ckpt, data, tmp_path / "out", "--controls", "reverse")
    assert "warning" not in one and other["warning"].endswith("AS_1.mp4: start 30 s is beyond its end (4.0 s)")
    assert other["prediction"] and "unread" not in other
    out = capsys.readouterr().out
    assert "1 questions with a doubtful medium, asked all the same:\n  warning: " in out
    assert "start 30 s is beyond its end" in (tmp_path / "out" / "report.html").read_text()

@pytest.mark.parametrize("name", ["frames_png", "frames_from_zero"])
def test_folders_of_frames(ckpt, tmp_path, name):
    (row,) = run(ckpt, CASES / name, tmp_path)
    assert "unread" not in row and "warning" not in row and row["size"] == 18

def test_frames_per_second_of_a_task(tree, ckpt, tmp_path, monkeypatch):
    """Of the table where they are not TVQA's: they reach the reader, the row, and the report's pictures."""
    assert ER.fps == 3 and all("fps" not in q for q in load_questions(tree))
    monkeypatch.setitem(BENCHMARKS, "slow", replace(MVBENCH, tasks=[replace(ER, fps=1)]))
    args = mvbench.parse(["--ckpt", str(ckpt), "--out", str(tmp_path / "out"), "--workers", "0"])
    shown, real = [], report_page.read_eval_frames
    monkeypatch.setattr(report_page, "read_eval_frames", lambda *a, **k: shown.append(a[3]) or real(*a, **k))
    mvbench.run(replace(args, benchmark="slow", data=str(tree)), Distributed())
    rows = [json.loads(line) for line in next((tmp_path / "out").rglob("predictions.jsonl")).read_text().splitlines()]
    assert [row["fps"] for row in rows] == [1, 1] and set(shown) == {1}

def test_the_size_of_a_folder_is_its_number_of_frames(tmp_path):
    for name in ("00001.jpg", "00002.JPG", "._00001.jpg", ".DS_Store"):
        (tmp_path / name).write_bytes(b"1")
    assert size_of(tmp_path) == 2 and size_of(tmp_path / "00001.jpg") == 1 and size_of("") == 0 == size_of("gone")

# ---- too long for the LLM --------------------------------------------------------------------------------------------

def test_a_question_too_long_for_the_llm_is_unread(ckpt, tree, tmp_path, capsys):
    data = copied(tree, tmp_path / "data", "State Change")
    path = data / "json" / "state_change.json"
    first, second = json.loads(path.read_text())
    path.write_text(json.dumps([first, second | {"question": "What " * 3000}]))
    for decode in ("generate", "letter", "likelihood"):
        options = ("--decode", decode) if decode != "generate" else ("--permute",)
        one, other = run(ckpt, data, tmp_path / decode, *options,
                         name=f"{decode}/predictions.jsonl" if decode != "generate" else "predictions.jsonl")
        assert one["prediction"] and "unread" not in one and not other["correct"]
        assert other["unread"].startswith("State Change, entry 1: its prompt has 3")
        assert other["unread"].endswith("but the LLM takes at most 2048: shorten the question or its options")
    assert "1 questions with unreadable media or texts, counted as wrong" in capsys.readouterr().out

@pytest.mark.parametrize("spare", [0, 5, 30])
def test_an_answer_ends_where_the_llm_does(ckpt, tree, monkeypatch, spare):
    """The engine and answer_one, which agree; too little room for the longest option is too long."""
    model, *toks = checkpoint.load_checkpoint(ckpt)
    engine, (q,) = Engine(model, *toks), load_questions(tree, ["State Change"], limit=1)
    prompt = engine.prompt(q)
    longest = max(map(len, engine.drafts(q)))
    monkeypatch.setattr(model.cfg.llama, "max_positions", len(prompt.ids) + spare)
    assert bool(engine.too_long(q, prompt)) == (spare < longest) and longest > 5
    video = mvbench.load_eval_clip(q["media"], model.cfg)[None]
    tokens = engine.video_tokens(engine.encode_clips(video, "", [0]), "", [0], [q])
    (answer,) = engine.answer([q], tokens)
    assert answer.text == mvbench.answer_one(model, *toks, q, engine.protocol)

# ---- the official answer text ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tok(golden):
    return SentencePiece(golden / "tokenizer.model")

@pytest.mark.parametrize("written, clean, official, right", [   # the key is B
    ("B) yes ###", "(B) yes", "(B) yes", (True, True)),
    ("B) yes</s>", "(B) yes", "(B) yes</s>", (True, True)),     # "(b)" is the first word
    ("B</s>", "(B", "(B</s>", (True, False)),                   # "(b</s>" is no part of "(b)"
    ("</s>", "(", "(</s>", (True, False)),                      # the empty answer
    ("B)</s>", "(B)", "(B)</s>", (True, True)),
    ("C) no Assistant: B) yes ###", "(C) no Assistant: B) yes", "(B) yes", (False, True)),
    ("C) no\nHuman: why?\nAssistant: B) yes", "(C) no", "(B) yes", (False, True)),
    ("A) ### Assistant: B)", "(A)", "(A)", (False, False)),     # cut at ### first
    ("<unk><s>B) yes</s>", None, "(B) yes</s>", (None, True)),
])
def test_what_the_official_scorer_sees(tok, written, clean, official, right):
    ids = tok.encode(written)
    text = "(" + decode_answer(tok, ids).split("\n")[0].rstrip()
    assert "(" + decode_official(tok, ids).split("\n")[0] == official and clean in (None, text)
    row = {"task": "AC", "index": 0, "candidates": ["a", "yes", "no"], "answer": "yes", "prediction": text}
    seen = row if official == text else row | {"official": official}
    assert right in ((None, is_right("official", seen)), (is_right("official", row), is_right("official", seen)))
    for name in SCORERS:                                        # the others see the answer without its marks
        assert name == "official" or is_right(name, seen) == is_right(name, row)

def test_the_engine_keeps_both_texts(ckpt, tree, monkeypatch):
    """A row has the official text only where it differs; Mistral's official code removes </s> itself."""
    model, *toks = checkpoint.load_checkpoint(ckpt)
    engine, (q,) = Engine(model, *toks), load_questions(tree, ["State Change"], limit=1)
    ids = [engine.llm_tok.encode(text) for text in ("B</s>", "B) It spins. ###")]
    monkeypatch.setattr(engine, "generate_with_drafts", lambda *_: ids)
    tokens = torch.zeros(2, engine.n_video, model.cfg.llama.width)
    rows = [make_row(q, answer, "official") for answer in engine.answer([q, q], tokens)]
    assert [row["prediction"] for row in rows] == ["(B", "(B) It spins."] and [row["correct"] for row in rows] == [0, 1]
    assert rows[0]["official"] == "(B</s>" and "official" not in rows[1]
    monkeypatch.setattr(model.cfg, "prompt_style", "mistral")
    assert engine.official_text(ids[0]) == "(B" == engine.text(ids[0])

# ---- chat ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def talk(ckpt, tree):
    video = next((tree / "video" / "perception" / "videos").glob("*.mp4"))
    return chat.Chat(*checkpoint.load_checkpoint(ckpt), str(video), max_new_tokens=20)

def test_a_long_conversation_forgets_its_oldest_turns(talk, monkeypatch):
    monkeypatch.setattr(talk.model.cfg.llama, "max_positions", 200)
    for i in range(12):
        talk.ask(f"What happens at {i} seconds?")
        assert talk.history[-1][0] == f"What happens at {i} seconds?" and len(talk.history) + talk.n_dropped == i + 1
    assert 0 < talk.n_dropped < 12
    before = list(talk.history), talk.n_dropped
    with pytest.raises(ValueError, match="the question makes a prompt of .* the LLM takes at most 200 .*: shorten it"):
        talk.ask("What " * 300)
    assert (talk.history, talk.n_dropped) == before
    assert isinstance(talk.ask("And then?"), str)

def test_a_conversation_on_the_console(ckpt, tree, monkeypatch, capsys):
    """Odd questions get a sentence, and the conversation goes on; what is forgotten is said once."""
    video = str(next((tree / "video" / "perception" / "videos").glob("*.mp4")))
    load = chat.load_from_args

    def short(args):
        model, *rest = load(args)
        model.cfg.llama.max_positions = 200
        return model, *rest

    monkeypatch.setattr(chat, "load_from_args", short)
    lines = ["What \udcff?", "a\0b", "What " * 300, *["What happens?"] * 8, ""]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    chat.main(["--ckpt", str(ckpt), "--video", video, "--max-new-tokens", "20"])
    out, err = capsys.readouterr()
    assert out.count("forgets the oldest turns") == 1 and out.count("> ") == 12
    assert [line[:30] for line in err.splitlines()] == [
        "chat.py: 'What \\udcff?' holds ", "chat.py: 'a\\x00b' holds '\\x00'", "chat.py: the question makes a "]

@pytest.mark.parametrize("options", [["--temperature", "-1"], ["--temperature", "nan"], ["--max-new-tokens", "0"]])
def test_options_of_chat_that_mean_nothing(options, capsys):
    with pytest.raises(SystemExit):
        chat.main(["--ckpt", "x", "--video", "x", *options])
    assert "must be 0 or more" in capsys.readouterr().err

def test_odd_input_of_chat_is_one_line(ckpt, tmp_path):
    (tmp_path / "torn.mp4").write_bytes(b"torn")
    for ask, message in (("What?", b"chat.py: torn.mp4: "), (b"a\xff", b"chat.py: 'a\\udcff' holds")):
        command = [sys.executable, Path(chat.__file__), "--ckpt", ckpt, "--video", "torn.mp4", "--ask", ask]
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert process.returncode == 2 and process.stderr.splitlines()[-1].startswith(message)

def test_check_text():
    check_text("Zoë 🙂\n\t")
    for text in ("\0", "\ud83d", "a\udfffb"):
        with pytest.raises(ValueError, match="no character"):
            check_text(text)

# ---- LLM folders -----------------------------------------------------------------------------------------------------

@pytest.fixture
def llm(tmp_path, golden):
    torch.manual_seed(0)
    llama = Llama(LlamaConfig(vocab_size=40, width=16, depth=2, heads=2, kv_heads=1, ffn=32))
    with files.atomic_folder(tmp_path / "llm") as folder:
        hf_llama.write_llm(llama, golden / "tokenizer.model", folder)
    return tmp_path / "llm"

def test_what_is_no_llm_folder_is_named(llm, ckpt, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3")
    (tmp_path / "model.bin").write_bytes(b"PK")
    (tmp_path / "tok").mkdir()
    shutil.copy(llm / "tokenizer.model", tmp_path / "tok")
    (tmp_path / "empty").mkdir()
    for name, message in (("gone", "gone does not exist: expected the folder of a LLaMA model"),
                          ("model.gguf", r"model.gguf is a file of llama.cpp \(GGUF\), which is not read: expected"),
                          ("model.bin", "model.bin is a file: expected the folder"),
                          ("tok", "tok has no config.json, only tokenizer.model: expected"),
                          ("empty", "empty has no config.json, only nothing: expected"),
                          (ckpt, r"stage3 is a VideoChat2 checkpoint, not an LLM \(its LLM is .*llm\): expected")):
        for read in (hf_llama.llm_config, hf_llama.llm_tokenizer):
            with pytest.raises((ValueError, OSError), match=message):
                read(tmp_path / name)

def test_llama_1_calls_its_length_otherwise(llm):
    path = llm / "config.json"
    config = json.loads(path.read_text())
    config["max_sequence_length"] = config.pop("max_position_embeddings") - 48
    path.write_text(json.dumps(config))
    assert hf_llama.llm_config(llm).max_positions == 2000
    path.write_text("[]")
    with pytest.raises(ValueError, match="has a config.json that holds a list: expected"):
        hf_llama.llm_config(llm)

def test_a_lora_adapter_is_merged_by_the_command_that_its_error_names(llm, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = transformers.LlamaForCausalLM.from_pretrained(llm)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapter = tmp_path / "it's mine"
    model.save_pretrained(adapter)
    with pytest.raises(ValueError, match="is a LoRA adapter of .*llm, not an LLM: merge the two") as error:
        hf_llama.llm_config(adapter)
    python, *command = shlex.split(str(error.value).splitlines()[1])
    assert python == "python"
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    merged, _ = hf_llama.load_llm(f"{adapter}_merged")
    ids = torch.arange(12).view(2, 6)
    logits = merged.lm_head(merged(merged.embed(ids)))
    torch.testing.assert_close(logits, model.eval()(ids).logits, atol=1e-6, rtol=1e-5)
    with model.disable_adapter():
        assert (logits - model(ids).logits).abs().max() > 1e-4
