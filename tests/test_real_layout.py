"""MVBench as people have it on their disks: all 20 tasks, real encoded videos, frame folders, and what is missing.

Run: pytest tests/test_real_layout.py
"""
import json
import shutil

import pytest
import torch
from videos import number, write_video

import mvbench
from evaluation.engine import Engine
from evaluation.protocol import Protocol
from evaluation.tasks import TASKS, load_questions
from prompt import SYSTEM
from video import read_eval_frames
from weights import checkpoint

def run(ckpt, data, out, *more, name="predictions.jsonl"):
    """The rows of a file of predictions after a run."""
    mvbench.main(["--ckpt", str(ckpt), "--data", str(data), "--out", str(out), "--workers", "0", "--batch", "8", *more])
    return [json.loads(line) for line in (out / name).read_text().splitlines()]

def test_every_medium_of_the_20_tasks_is_found_and_asked(tree, ckpt, tmp_path, capsys):
    rows = run(ckpt, tree, tmp_path)
    assert len(rows) == 40 and not any("unread" in row for row in rows)
    printed = capsys.readouterr().out
    assert "missing" not in printed and printed.count("2/2") == 20 and "40/40" in printed

def test_frames_bounds_and_folders_follow_the_protocol(tree):
    """The frames that reach the model, by the number painted into each."""
    questions = {q["task"]: q for q in load_questions(tree)}

    def seen(task, n=4):
        q = questions[task]
        return [number(frame.permute(1, 2, 0).numpy()) for frame in read_eval_frames(q["media"], n, q["bound"])]

    assert questions["Action Sequence"]["bound"] == (1.0, 3.0) and questions["State Change"]["bound"] is None
    assert seen("State Change") == [4, 14, 24, 33]                         # 40 frames: int(39 / 8 + round(39 / 4 * i))
    assert seen("Action Sequence") == [12, 17, 22, 27]                     # seconds 1 to 3 at 10 per second
    assert seen("Action Antonym") == [4, 14, 24, 33]                       # VP9 in WebM
    assert seen("Fine-grained Pose") == [4, 14, 24, 33]                    # AVI
    assert seen("Episodic Reasoning", 3) == [4, 6, 8]                      # 3 per second, the first is 00001.jpg

def moved(tree, tmp_path, moves):
    """A copy of the tree in which folders lie elsewhere: pairs (from, to), relative to it."""
    root = tmp_path / "moved"
    shutil.copytree(tree, root)
    for source, target in moves:
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        (root / source).rename(root / target)
    return root

@pytest.mark.parametrize("moves", [
    [("video/clevrer", "video/data0613/clevrer"), ("video/star", "video/data0613/star")],      # not yet merged
    [("video/clevrer", "data0613/clevrer")],
    [("video/perception", "perception"), ("video/tvqa", "tvqa")],                              # beside video/
    [("video/sta", "video/sta_zip/sta"), ("video/sta_zip", "video/sta")],                      # unpacked into its name
    [(f"video/ssv2_video/AA_{q}.webm", f"video/AA_{q}.webm") for q in range(2)],               # flat
    [("json", "j"), *[(f"j/{task.file}.json", f"{task.file}.json") for task in TASKS]],
])
def test_trees_as_people_have_them(tree, tmp_path, moves):
    questions = load_questions(moved(tree, tmp_path, moves))
    assert len(questions) == 40 and all(q["media"] for q in questions)

def test_everything_in_one_flat_folder(tree, tmp_path):
    for path in (tree / "json").iterdir():
        shutil.copy(path, tmp_path)
    for task in TASKS:
        for path in (tree / "video" / task.folder).iterdir():
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    assert all(q["media"] == str(tmp_path / q["media"].rpartition("/")[2]) for q in load_questions(tmp_path))

def test_something_videos_made_into_mp4(tree, tmp_path):
    root = moved(tree, tmp_path, [("video/ssv2_video/AA_0.webm", "gone")])
    write_video(root / "video" / "ssv2_video" / "AA_0.mp4", frames=5)
    assert load_questions(root, ["Action Antonym"])[0]["media"].endswith("AA_0.mp4")

def test_what_is_missing_is_told_per_task_and_not_counted(tree, ckpt, tmp_path, capsys):
    root = moved(tree, tmp_path, [("video/nturgbd", "gone"), ("video/clevrer/video_validation/MC_1.mp4", "gone.mp4"),
                                  ("json/scene_transition.json", "gone.json")])
    (root / "video" / "perception" / "videos" / "SC_0.mp4").write_bytes(b"torn" * 99)
    rows = run(ckpt, root, tmp_path / "out")
    out, err = capsys.readouterr()
    assert "Fine-grained Pose: 2 of 2 media are missing (video/nturgbd/); NTU RGB+D's owners" in out
    assert "Moving Count: 1 of 2 media are missing (video/clevrer/video_validation/)" in out
    assert "scene_transition.json does not exist: this task is left out" in err
    assert len(rows) == 40 - 2 - 2 - 1 and sum("unread" in row for row in rows) == 1     # torn is asked, and wrong
    lines = {line[:28].strip(): line.split()[-1] for line in out.splitlines() if line[:28].strip()}
    assert (lines["Moving Count"], lines["State Change"], lines["Avg"]) == ("1/2", "2/2", "35/38")
    assert "1 questions with unreadable media or texts, counted as wrong" in out
    assert "SC_0.mp4: cannot be decoded" in out
    with pytest.raises(FileNotFoundError, match="media are missing"):
        run(ckpt, root, tmp_path / "out", "--strict-data")
    with pytest.raises(ValueError, match="SC_0.mp4: cannot be decoded as a video .--strict-data"):
        run(ckpt, root, tmp_path / "strict", "--strict-data", "--only", "State Change")

def test_only_and_limit(tree, ckpt, tmp_path):
    rows = run(ckpt, tree, tmp_path, "--only", "Action Sequence,Fine-grained Pose", "--limit", "1",
               name="part/predictions.jsonl")
    assert [row["task"] for row in rows] == ["Action Sequence", "Fine-grained Pose"]

def test_wrong_folders_are_named(tree, ckpt, tmp_path):
    with pytest.raises(FileNotFoundError, match="--data is the folder that holds json/ and video/"):
        run(ckpt, tmp_path, tmp_path / "out")
    shutil.copytree(tree / "json", tmp_path / "json")
    with pytest.raises(FileNotFoundError, match="holds none of the media"):
        run(ckpt, tmp_path, tmp_path / "out")

# ---- what the paper's ablations change -------------------------------------------------------------------------------

def make_engine(ckpt, **protocol):
    return Engine(*checkpoint.load_checkpoint(ckpt), Protocol(max_new_tokens=2, **protocol))

def noting(calls, function):
    """function, which notes its arguments in calls."""
    return lambda *args: calls.append(args) or function(*args)

def test_system_answer_prompt_and_question_in_the_qformer(tree, ckpt):
    """The notebook's settings: what the LLM and the Q-Former read under each."""
    (q,) = load_questions(tree, ["State Change"], limit=1)
    shown = []
    for protocol in ({}, {"system": ""}, {"answer_prompt": ""}, {"question_in_qformer": True}):
        engine = make_engine(ckpt, **protocol)
        ids, seen = [], []
        engine.model.llama_model.embed = noting(ids, engine.model.llama_model.embed)
        engine.model.video_tokens = noting(seen, engine.model.video_tokens)
        vision = torch.randn(1, 16, engine.model.cfg.vit.width)
        engine.answer([q], engine.video_tokens(vision, "", [0], [q]))
        _, instruction_ids, instruction_mask = seen[0]
        head, common, rest = (call[0][0].tolist() for call in ids[:3])     # what the LLM reads, part by part
        text = engine.llm_tok.decode(head + common + rest)
        shown.append((text, [engine.qformer_tok.pieces[i] for i in instruction_ids[instruction_mask == 1].tolist()]))
    (normal, read), (bare, nothing), (free, _), (_, with_question) = shown
    assert normal.count(SYSTEM) == 2 and normal.endswith("Best option:(") and read[1:4] == ["carefully", "watch", "the"]
    assert SYSTEM not in bare and nothing == ["[CLS]", "[SEP]"]
    assert free.endswith("Only give the best option.\n###Assistant:")
    assert with_question[1:4] == read[1:4] and with_question[-3:] == ["nothing", ".", "[SEP]"]
    assert "only" not in with_question[-20:]                               # the notebook asks that of the LLM alone

def test_without_an_answer_prompt_the_prediction_is_as_it_was_said(ckpt):
    assert make_engine(ckpt).text([]) == "("
    assert make_engine(ckpt, answer_prompt="").text([]) == ""

def test_frames_stretch_the_position_table(tree, ckpt, tmp_path):
    """8 or 16 frames with a table that was made for 4, by one option."""
    probabilities = [run(ckpt, tree, tmp_path / str(n), "--only", "State Change", "--frames", str(n),
                         name=f"frames{n}.part/predictions.jsonl")[0]["letter_probabilities"] for n in (4, 8, 16)]
    assert len({tuple(p) for p in probabilities}) == 3

@pytest.mark.parametrize("flags, name", [
    (["--no-system"], "no-system"), (["--no-answer-prompt"], "no-answer-prompt"),
    (["--question-in-qformer"], "question-in-qformer"), (["--norm", "clip"], "clip"), (["--llm-int8"], "int8"),
    (["--dtype", "bf16"], "bf16"), (["--decode", "likelihood"], "likelihood")])
def test_flags_reach_the_model_and_the_folders_names(tree, ckpt, base, flags, name):
    """None takes another's place."""
    rows = run(ckpt, tree, base, "--only", "State Change", *flags, name=f"{name}.part/predictions.jsonl")
    plain = [json.loads(line) for line in (base / "part" / "predictions.jsonl").read_text().splitlines()]
    assert [r["letter_probabilities"] for r in rows] != [r["letter_probabilities"] for r in plain]
    told = json.loads((base / f"{name}.part" / "settings.json").read_text())
    assert flags[0] in " ".join(flags) and told["settings"] != json.loads(
        (base / "part" / "settings.json").read_text())["settings"]

@pytest.fixture(scope="module")
def base(tree, ckpt, tmp_path_factory):
    """A folder with a run on one task."""
    out = tmp_path_factory.mktemp("base")
    run(ckpt, tree, out, "--only", "State Change", name="part/predictions.jsonl")
    return out

def test_a_part_and_the_whole_beside_each_other(tree, ckpt, tmp_path):
    run(ckpt, tree, tmp_path)
    whole = (tmp_path / "mvbench.json").read_text()
    assert len(run(ckpt, tree, tmp_path, "--controls", "blank", "--only", "Action Count",
                   name="part/predictions.blank.jsonl")) == 2
    assert (tmp_path / "mvbench.json").read_text() == whole and len(json.loads(whole)) == 21
    assert set(json.loads((tmp_path / "part" / "mvbench.blank.json").read_text())) == {"Action Count", "Avg"}
    assert not (tmp_path / "part" / "leaderboard.json").exists() and (tmp_path / "leaderboard.json").exists()
