"""The benchmark as a whole: any batch, any number of processes, any interruption, the same answers.

Run: pytest tests/test_mvbench.py
"""
import csv
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import mvbench
from evaluation import batches
from evaluation.engine import Engine
from evaluation.predictions import Condition, key_of, rotate_options
from evaluation.protocol import Protocol
from evaluation.scorers import is_right
from evaluation.stats import wilson
from evaluation.tasks import BENCHMARKS, MVBENCH, TASKS, TVBENCH, Benchmark, describe, letter_of, load_questions
from infra.distributed import Distributed
from infra.files import lock_folder
from toy import world
from weights.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent

def test_the_table_is_the_paper_s():
    assert len(TASKS) == 20
    assert " ".join(task.short for task in TASKS) == "AS AP AA FA UA OE OI OS MD AL ST AC MC MA SC FP CO EN ER CI"
    assert [task.short for task in TASKS if task.bound] == ["AS", "AP", "OI", "AL", "ER"]
    assert len(TVBENCH.tasks) == 10 and [task.short for task in TVBENCH.tasks if task.bound] == ["AS", "AL"]

def question(**changes):
    return {"task": "Action Count", "index": 0, "video": "a.gif", "media": "a.gif", "bound": None,
            "question": "How often?", "candidates": ["2", "3", "4"], "answer": "3", **changes}

def test_of_equal_candidates_the_last_one_counts():
    assert letter_of(question()) == "B"
    assert letter_of(question(candidates=["3", "3", "4"])) == "B"

def test_options_move_on_and_the_key_with_them():
    turned = rotate_options(question(), 1)
    assert turned["candidates"] == ["3", "4", "2"] and letter_of(turned) == "A" and turned["shift"] == 1
    assert key_of(turned) == ("Action Count", 0, 1) != key_of(question())

@pytest.mark.parametrize("broken, message", [
    ({"candidates": ["3"]}, "entry 0: candidates: expected a list of 2 to 5 options, found 1: correct the entry"),
    ({"candidates": list("345678")}, "entry 0: candidates: expected a list of 2 to 5 options, found 6"),
    ({"candidates": {"A": "2", "B": "3"}}, 'candidates: expected a list of 2 to 5 options, found {"A": "2", "B": "3"}'),
    ({"candidates": "23"}, 'candidates: expected a list of 2 to 5 options, found "23"'),
    ({"candidates": ["2", None, "3"]}, r'candidates: expected texts or numbers, found \["2", null, "3"\]'),
    ({"answer": "5"}, r'entry 0: the answer "5" is not among the candidates \["2", "3"\]'),
    ({"answer": None}, "the answer null is not among the candidates"),
    ({"question": None, "video": 7}, "entry 0: video: expected a text, found 7; question: expected a text, found null"),
    ({"video": "./"}, 'video: expected a text, found "./"'),
    ({"video": ["a.gif"]}, r'video: expected a text, found \["a.gif"\]'),
    ({"candidates": 7}, "candidates: expected a list of 2 to 5 options, found 7"),
    ({"candidates": ["None", "b"], "answer": None}, "the answer null is not among the candidates"),
    ({"question": "How \ud83d?"}, r"entry 0: 'How .ud83d.' holds '.ud83d', which is no character of a text"),
    ({"candidates": ["2", "3\0"], "answer": "2"}, r"entry 0: '3.x00' holds '.x00', which is no character"),
    ({"video": "a\0.gif"}, r"entry 0: 'a.x00.gif' holds '.x00'"),
])
def test_malformed_entries_are_named(tmp_path, broken, message):
    entry = {"video": "a.gif", "question": "How often?", "candidates": ["2", "3"], "answer": "3", **broken}
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "action_count.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match=message):
        load_questions(tmp_path, ["Action Count"])

def test_unknown_tasks_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no task Juggling"):
        load_questions(tmp_path, ["Juggling"])
    with pytest.raises(FileNotFoundError, match="action_count.json does not exist"):
        load_questions(tmp_path, ["Action Count"])

def test_which_version_of_mvbench_it_is(tmp_path):
    (tmp_path / "json").mkdir()
    entries = [{"video": f"{i}.mp4", "question": "?", "candidates": ["a", "b"], "answer": "a"} for i in range(200)]
    for task in TASKS:
        (tmp_path / "json" / f"{task.file}.json").write_text(json.dumps(entries))
    digits, version = describe(tmp_path)
    assert version.startswith("MVBench before its revision") and describe(tmp_path)[0] == digits
    (tmp_path / "json" / "action_sequence.json").write_text(json.dumps(entries, indent=4))
    assert describe(tmp_path)[0] == digits                                 # what is asked, not how it is written
    entries[7] = {**entries[7], "video": "EDXBD.mp4"}
    (tmp_path / "json" / "action_sequence.json").write_text(json.dumps(entries))
    changed, version = describe(tmp_path)
    assert version.startswith("MVBench as revised on 2024-06-13") and changed != digits
    (tmp_path / "json" / "action_sequence.json").write_text("[]")
    assert describe(tmp_path)[1].startswith("3,800 questions: none of MVBench's published versions")

def test_wrong_options_are_named(capsys):
    for argv, message in ((["--controls", "blank,dark"], "knows no dark: choose among blank, noise"),
                          (["--decode", "letter", "--no-answer-prompt"], "needs the answer prompt"),
                          (["--batch", "0"], "--batch must be 1 or more")):
        with pytest.raises(SystemExit):
            mvbench.parse(["--ckpt", "x", *argv])
        assert message in capsys.readouterr().err

# ---- the same answers, however they are come by ----------------------------------------------------------------------

def run(ckpt, tree, out, *more):
    mvbench.main(["--ckpt", str(ckpt), "--data", str(tree), "--out", str(out), "--workers", "0", *more])
    return files(out)

def files(out):
    return {path.name: path.read_bytes() for path in sorted(out.rglob("predictions*.jsonl"))}

def same(one, other):
    """The same predictions; probabilities up to the last of the four digits that are kept."""
    assert one.keys() == other.keys()
    for name, data in one.items():
        for a, b in zip(data.splitlines(), other[name].splitlines(), strict=True):
            a, b = json.loads(a), json.loads(b)
            assert a.pop("letter_probabilities") == pytest.approx(b.pop("letter_probabilities"), abs=2e-4)
            assert a == b

ALL = ("--controls", "all", "--permute")
NAMES = {"predictions.jsonl"} | {f"predictions.{name}.jsonl"
                                 for name in ("blank", "noise", "single", "shuffle", "reverse", "permute")}

@pytest.fixture(scope="module")
def whole_run(ckpt, tree, tmp_path_factory):
    """An undisturbed run in all ways, 32 clips at a time: its folder."""
    out = tmp_path_factory.mktemp("whole")
    run(ckpt, tree, out, *ALL)
    return out

@pytest.fixture(scope="module")
def whole(whole_run):
    """Its predictions."""
    return files(whole_run)

def test_every_way_of_asking_has_its_file_in_the_benchmark_s_order(whole, tree):
    assert whole.keys() == NAMES
    order = [key_of(q) for q in load_questions(tree)]
    for name, data in whole.items():
        keys = [key_of(json.loads(line)) for line in data.splitlines()]
        assert keys == ([(*key[:2], shift) for key in order for shift in (1, 2)] if "permute" in name else order)

@pytest.mark.parametrize("batch", ["1", "7"])
def test_any_batch(whole, ckpt, tree, tmp_path, batch):
    found = run(ckpt, tree, tmp_path, "--controls", "noise,shuffle", "--permute", "--batch", batch)
    assert len(found) == 4
    same({name: whole[name] for name in found}, found)

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def start(ckpt, tree, out, *more, rank=None, port=0):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    if rank is not None:
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port)}
    command = [sys.executable, str(ROOT / "mvbench.py"), "--ckpt", ckpt, "--data", tree, "--out", out, "--workers", "0"]
    return subprocess.Popen([*map(str, command), *more], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=hear_ctrl_c, start_new_session=True)

def hear_ctrl_c():
    """Even where these tests run in the background of a shell, which has them ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)

def test_two_processes(whole, ckpt, tree, tmp_path):
    port = free_port()
    both = [start(ckpt, tree, tmp_path, *ALL, "--batch", "8", rank=rank, port=port) for rank in (0, 1)]
    for process in both:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err.decode()
    same(whole, files(tmp_path))
    assert not list(tmp_path.glob("*rank*"))

SMALL = ("--controls", "reverse", "--batch", "2", "--limit", "1")

@pytest.fixture(scope="module")
def undisturbed(ckpt, tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    process = start(ckpt, tree, out, *SMALL)
    assert process.communicate(timeout=120) and process.returncode == 0
    return files(out)

@pytest.mark.parametrize("how, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_killed_at_any_question_and_started_again(undisturbed, ckpt, tree, tmp_path, how, code):
    """The same final files, bit for bit, as of a run that nothing has disturbed."""
    process = start(ckpt, tree, tmp_path / "killed", *SMALL)
    part = tmp_path / "killed" / "part" / "predictions.rank0.jsonl"
    begun = time.time()
    while not part.exists() or not part.stat().st_size:
        assert time.time() - begun < 60
        time.sleep(0.002)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and (how == signal.SIGKILL or "the same command resumes" in err.decode())
    process = start(ckpt, tree, tmp_path / "killed", *SMALL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()
    assert files(tmp_path / "killed") == undisturbed

def test_cut_off_anywhere_even_within_a_line(whole_run, whole, ckpt, tree, tmp_path):
    """Of each file a random part is left, as by a process that was killed while writing."""
    generator = torch.Generator().manual_seed(0)
    out = shutil.copytree(whole_run, tmp_path / "out")
    for name, data in whole.items():
        (out / name).unlink()
        left = data[:int(torch.randint(len(data), (), generator=generator))]
        (out / name.replace(".jsonl", ".rank1.jsonl")).write_bytes(left)
    assert run(ckpt, tree, out, *ALL) == whole

def test_started_again_when_all_is_answered_asks_nothing(ckpt, tree, tmp_path, capsys, monkeypatch):
    first = run(ckpt, tree, tmp_path, "--only", "State Change")
    monkeypatch.setattr(mvbench, "load_from_args", None)                       # no model is needed
    (tmp_path / "part" / "report.html").unlink()
    assert run(ckpt, tree, tmp_path, "--only", "State Change") == first
    assert "Everything was answered before" in capsys.readouterr().out and (tmp_path / "part" / "report.html").exists()

def test_a_larger_part_goes_on_from_a_smaller_one(ckpt, tree, tmp_path, capsys):
    run(ckpt, tree, tmp_path, "--limit", "1")
    run(ckpt, tree, tmp_path, "--limit", "2")
    assert "20 answers to come" in capsys.readouterr().out.split("written to")[-2]

def test_other_settings_are_refused(ckpt, tree, tmp_path):
    small = ("--only", "State Change")
    run(ckpt, tree, tmp_path, *small)
    path = tmp_path / "part" / "settings.json"
    found = json.loads(path.read_text())
    found["settings"]["checkpoint"], found["settings"]["frames"] = "0123456789abcdef", 8
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match='checkpoint: "0123456789abcdef" there, .* now; frames: 8 there, 4 now'):
        run(ckpt, tree, tmp_path, *small)
    path.unlink()
    with pytest.raises(ValueError, match="under other settings"):          # nobody knows under which
        run(ckpt, tree, tmp_path, *small)
    assert len(run(ckpt, tree, tmp_path, *small, "--restart")["predictions.jsonl"].splitlines()) == 2

def copied(tree, out, *tasks):
    """A benchmark of a few tasks of the tree."""
    for task in TASKS:
        if task.name in tasks:
            (out / "json").mkdir(parents=True, exist_ok=True)
            shutil.copy(tree / "json" / f"{task.file}.json", out / "json")
            shutil.copytree(tree / "video" / task.folder, out / "video" / task.folder, dirs_exist_ok=True)
    return out

def test_other_media_under_the_same_names_are_refused(ckpt, tree, tmp_path):
    data = copied(tree, tmp_path / "data", "State Change")
    run(ckpt, data, tmp_path / "out")
    with open(data / "video" / "perception" / "videos" / "SC_1.mp4", "ab") as f:
        f.write(b"more")
    with pytest.raises(ValueError, match="is about other media: 1 have another size now, the first being SC_1.mp4 of"):
        run(ckpt, data, tmp_path / "out")

def test_what_could_not_be_read_is_tried_again(ckpt, tree, tmp_path):
    data = copied(tree, tmp_path / "data", "State Change")
    clip = data / "video" / "perception" / "videos" / "SC_1.mp4"
    whole, others = clip.read_bytes(), ("--controls", "reverse")
    clip.write_bytes(b"torn")
    found = run(ckpt, data, tmp_path / "out", *others)
    assert all(b"unread" in data for data in found.values())
    with pytest.raises(ValueError, match="SC_1.mp4: cannot be decoded as a video .--strict-data"):
        run(ckpt, data, tmp_path / "out", "--strict-data")
    clip.write_bytes(whole)
    found = run(ckpt, data, tmp_path / "out", *others)
    assert not any(b"unread" in data for data in found.values())
    assert all(len(data.splitlines()) == 2 for data in found.values())

def test_pictures_are_still_videos_and_whatever_a_decoder_dies_of_has_a_name(ckpt, tree, tmp_path, monkeypatch):
    data = copied(tree, tmp_path / "data", "State Change")
    entries = json.loads((data / "json" / "state_change.json").read_text())
    Image.new("RGB", (80, 60), "red").save(data / "video" / "perception" / "videos" / "a.png")
    (data / "json" / "state_change.json").write_text(json.dumps([{**entries[0], "video": "a.png"}, entries[1]]))
    real = batches.load_eval_clip
    monkeypatch.setattr(batches, "load_eval_clip", lambda path, *more: 1 / 0 if "SC_1" in path else real(path, *more))
    (lines,) = run(ckpt, data, tmp_path / "out").values()
    one, other = map(json.loads, lines.splitlines())
    assert one["prediction"].startswith("(") and other["unread"].endswith("SC_1.mp4: ZeroDivisionError: division "
                                                                           "by zero")

def test_a_second_without_an_end_is_named(tmp_path):
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "action_sequence.json").write_text(
        '[{"video": "a.mp4", "question": "?", "candidates": [1, 2], "answer": 1, "start": 0, "end": NaN}]')
    with pytest.raises(ValueError, match="action_sequence.json, entry 0: end: expected seconds, found NaN"):
        load_questions(tmp_path)

def test_missing_media_are_told_in_the_report_and_controls_that_are_there_stay_in_it(ckpt, tree, tmp_path):
    data = copied(tree, tmp_path / "data", "State Change", "Fine-grained Pose")
    run(ckpt, data, tmp_path / "out", "--controls", "reverse,blank", "--permute")
    html = (tmp_path / "out" / "report.html").read_text()
    assert ">reverse<" in html and "media are missing" not in html and "When the options change places" in html
    shutil.rmtree(data / "video" / "nturgbd")
    run(ckpt, data, tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text()
    assert ">reverse<" in html and "When the options change places" in html    # they are still true
    assert "Fine-grained Pose: 2 of 2 media are missing" in html
    told = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert told["seconds"]["in all"] > 0 and told["average"]["asked"] == 2 and len(told["commands"]) == 1

def test_ctrl_c_with_workers_is_one_line(ckpt, tree, tmp_path):
    process = start(ckpt, tree, tmp_path, *ALL, "--batch", "1", "--workers", "2")
    part, begun = tmp_path / "predictions.rank0.jsonl", time.time()
    while not part.exists() or not part.stat().st_size:
        assert time.time() - begun < 60
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().strip() == "stopped; the answers so far are saved, and the same command resumes"

def test_two_runs_in_one_folder_are_refused(ckpt, tree, tmp_path):
    with lock_folder(tmp_path):
        process = start(ckpt, tree, tmp_path)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and f"another process is writing into {tmp_path}" in err.decode()
    assert not list(tmp_path.glob("*.json*"))

def test_a_medium_that_cannot_be_read_is_nobody_s_answer(ckpt, tree, tmp_path):
    """In every way of asking: unanswered, counted, wrong; though the official scorer lets the empty answer through."""
    broken = tmp_path / "data"
    (broken / "video" / "perception" / "videos").mkdir(parents=True)
    (broken / "json").mkdir()
    for name in ("SC_0.mp4", "SC_1.mp4"):
        source = tree / "video" / "perception" / "videos" / name
        (broken / "video" / "perception" / "videos" / name).write_bytes(
            b"torn" * 99 if name == "SC_0.mp4" else source.read_bytes())
    (broken / "json" / "state_change.json").write_text((tree / "json" / "state_change.json").read_text())
    found = run(ckpt, broken, tmp_path / "out", *ALL)
    for data in found.values():
        rows = [json.loads(line) for line in data.splitlines()]
        for row in rows:
            torn = row["video"] == "SC_0.mp4"
            assert ("unread" in row) == torn and (not torn or not row["correct"] and row["prediction"] == "")
        assert sum("unread" in row for row in rows) == len(rows) / 2

@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "toy"
    world.build(world.WorldConfig(str(folder), clips=40, questions=24, texts=200, patch=12, workers=1))
    return folder / "mvbench"

def test_answer_one_is_the_definition_of_all_answers(ckpt, tree, toy, tmp_path):
    """One question at a time, its prompt as a whole, its answer token by token: what the engine answers, it answers."""
    model, qformer_tok, llm_tok = load_checkpoint(ckpt)
    for data, protocol, options in ((tree, Protocol(), ()), (toy, Protocol(), ("--limit", "2")),
                                    (toy, Protocol(system="", answer_prompt="", question_in_qformer=True),
                                     ("--limit", "1", "--no-system", "--no-answer-prompt", "--question-in-qformer"))):
        (lines,) = run(ckpt, data, tmp_path / "-".join(map(str, (data.parent.name, *options))), *options).values()
        rows = [json.loads(line) for line in lines.splitlines()]
        assert len({row["task"] for row in rows}) == 20
        for row in rows:
            assert mvbench.answer_one(model, qformer_tok, llm_tok, row, protocol) == row["prediction"]

def test_a_benchmark_is_a_value(ckpt, tree, tmp_path, monkeypatch):
    """One in other files, with its own reader and scorer, on the media of the tree."""
    def columns(root, task):
        path = Path(root) / f"{task.file}.csv"
        rows = csv.DictReader(path.read_text().splitlines()) if path.is_file() else None
        return path, rows and [{"video": r["video"], "question": r["question"], "candidates": [r["a0"], r["a1"]],
                                "answer": r[f"a{r['key']}"]} for r in rows]

    task = replace(MVBENCH.tasks[14], name="Change", file="change")        # State Change
    benchmark = Benchmark("CSVBench", [task, replace(task, name="Gone", file="gone")], columns, scorer="strict")
    (tmp_path / "change.csv").write_text("video,question,a0,a1,key\nSC_0.mp4,What?,It jumps.,It spins.,1\n")
    (tmp_path / "video").symlink_to(tree / "video")
    (q,) = load_questions(tmp_path, benchmark=benchmark)
    assert (q["task"], q["answer"], q["bound"]) == ("Change", "It spins.", None) and q["media"].endswith("SC_0.mp4")
    digits, version = describe(tmp_path, benchmark)
    assert version == "CSVBench, 1 questions" and len(digits) == 16
    monkeypatch.setitem(BENCHMARKS, "csv", benchmark)
    args = mvbench.parse(["--ckpt", str(ckpt), "--out", str(tmp_path / "out"), "--workers", "0"])
    mvbench.run(replace(args, benchmark="csv", data=str(tmp_path)), Distributed())
    summary = json.loads((tmp_path / "out" / "csv" / "summary.json").read_text())
    assert (summary["benchmark"], summary["average"]["asked"], summary["tasks"][0]["task"]) == ("CSVBench", 1, "Change")
    (row,) = map(json.loads, (tmp_path / "out" / "csv" / "predictions.jsonl").read_text().splitlines())
    assert row["answer"] == "It spins." and row["correct"] == is_right("strict", row)

def test_controls_of_the_toy_are_at_chance(ckpt, toy, tmp_path):
    """Whoever does not watch guesses: letters and texts are balanced, and one frame of a clip tells nothing."""
    run(ckpt, toy, tmp_path / "out", "--controls", "all", "--decode", "letter")
    found = json.loads((tmp_path / "out" / "letter" / "summary.json").read_text())
    assert found["average"]["asked"] == 480 and found["average"]["low"] < found["average"]["chance"]
    for control in ("blank", "noise", "single"):
        right = round(4.8 * found["average"]["controls"][control])
        low, high = wilson(right, 480)
        assert 100 * low < found["average"]["chance"] < 100 * high, control

def test_tvbench(ckpt, tree, tmp_path):
    (tmp_path / "json").mkdir()
    for task in TVBENCH.tasks:
        (tmp_path / "video" / task.folder).mkdir(parents=True)
        (tmp_path / "video" / task.folder / "a.mp4").write_bytes(
            (tree / "video" / "perception" / "videos" / "SC_0.mp4").read_bytes())
        entry = {"video": "a.mp4", "question": "What?", "candidates": ["It jumps.", "It spins."], "answer": "It spins."}
        (tmp_path / "json" / f"{task.file}.json").write_text(
            json.dumps([entry | ({"start": 1.0, "end": 2.0} if task.bound else {})]))
    mvbench.main(["--ckpt", str(ckpt), "--tvbench", str(tmp_path), "--out", str(tmp_path / "out"), "--workers", "0"])
    rows = [json.loads(line) for line in (tmp_path / "out" / "tvbench" / "predictions.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == [task.name for task in TVBENCH.tasks] and rows[2]["bound"] == [1.0, 2.0]
    assert "<h1>TVBench" in (tmp_path / "out" / "tvbench" / "report.html").read_text()
    assert not list((tmp_path / "out").rglob("leaderboard*"))               # MVBench's takes MVBench alone

def test_memory_does_not_grow_with_the_questions(ckpt, tree, monkeypatch):
    """Of the clips no more is alive than a few groups, however many there are."""
    alive, most, seen = set(), [0], []

    def counting(group, cfg):
        clips, *texts = load_clips(group, cfg)
        seen.append(group)
        alive.add(len(seen))
        weakref.finalize(clips.untyped_storage(), alive.discard, len(seen))
        gc.collect()
        most[0] = max(most[0], len(alive))
        return clips, *texts

    load_clips = batches.load_clips
    monkeypatch.setattr(batches, "load_clips", counting)
    engine = Engine(*load_checkpoint(ckpt))
    questions, condition = load_questions(tree), Condition("unused")
    rows = [row for _, some in batches.evaluate(engine, questions, [condition], batch=2, workers=0) for row in some]
    assert len(rows) == 40 and len(seen) == 20 and most[0] <= 3
