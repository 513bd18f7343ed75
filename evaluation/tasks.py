"""Benchmarks of multiple-choice questions about videos: their tasks, their questions, and where their media are.

    MVBench/json/action_sequence.json     [{"video", "question", "candidates", "answer", "start", "end"}, ...]
    MVBench/video/star/Charades_v1_480/   the media; find_media knows the other trees that the archives unpack into

A benchmark is a value, like MVBENCH and TVBENCH; the toy world has MVBench's layout.
Not here: how a question is asked (engine.py) and scored (scorers.py), how the toy's questions are made (qagen).
Source: paper table 1; mvbench.ipynb, data_list; TVBench: arXiv 2410.07752, github.com/daniel-cores/tvbench.

    pytest tests/test_real_layout.py
"""
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from infra.files import read_json

LETTERS = "ABCDE"

@dataclass(frozen=True)
class Task:
    """A row of a benchmark's table."""
    name: str               # "Action Sequence"
    short: str              # "AS"
    file: str               # json/{file}.json
    folder: str             # video/{folder}/
    bound: bool = False     # only the seconds from "start" to "end" of the medium are shown

@dataclass(frozen=True)
class Benchmark:
    """A benchmark as a value. One in files of another format needs its own reader: tests/test_mvbench.py has one."""
    name: str                               # as reports show it
    tasks: list                             # of Task, in the order of its table
    questions: Callable                     # (root, task) -> path of its file, entries as in MVBench's; None: no file
    scorer: str = "official"                # of scorers.SCORERS: what "correct" means in predictions.jsonl
    version: Callable | None = None         # entries of all tasks -> which published version this is, in words
    leaderboard: bool = False               # whether a leaderboard takes leaderboard.json

# ------------------------------------------------------------------------------------------------- MVBench and TVBench

TASKS = [
    Task("Action Sequence", "AS", "action_sequence", "star/Charades_v1_480", bound=True),
    Task("Action Prediction", "AP", "action_prediction", "star/Charades_v1_480", bound=True),
    Task("Action Antonym", "AA", "action_antonym", "ssv2_video"),
    Task("Fine-grained Action", "FA", "fine_grained_action", "Moments_in_Time_Raw/videos"),
    Task("Unexpected Action", "UA", "unexpected_action", "FunQA_test/test"),
    Task("Object Existence", "OE", "object_existence", "clevrer/video_validation"),
    Task("Object Interaction", "OI", "object_interaction", "star/Charades_v1_480", bound=True),
    Task("Object Shuffle", "OS", "object_shuffle", "perception/videos"),
    Task("Moving Direction", "MD", "moving_direction", "clevrer/video_validation"),
    Task("Action Localization", "AL", "action_localization", "sta/sta_video", bound=True),
    Task("Scene Transition", "ST", "scene_transition", "scene_qa/video"),
    Task("Action Count", "AC", "action_count", "perception/videos"),
    Task("Moving Count", "MC", "moving_count", "clevrer/video_validation"),
    Task("Moving Attribute", "MA", "moving_attribute", "clevrer/video_validation"),
    Task("State Change", "SC", "state_change", "perception/videos"),
    Task("Fine-grained Pose", "FP", "fine_grained_pose", "nturgbd"),
    Task("Character Order", "CO", "character_order", "perception/videos"),
    Task("Egocentric Navigation", "EN", "egocentric_navigation", "vlnqa"),
    Task("Episodic Reasoning", "ER", "episodic_reasoning", "tvqa/frames_fps3_hq", bound=True),  # folders of frames
    Task("Counterfactual Inference", "CI", "counterfactual_inference", "clevrer/video_validation"),
]
# media that came with the questions of 2024-06-13, which replaced some 30 (Ask-Anything issues 198 and 236)
REVISED = ("EDXBD.mp4", "video_14727.mp4", "video_13446.mp4")

def json_questions(root, task):
    """Reader of MVBench's layout: json/{task}.json, or {task}.json where everything is in one folder."""
    path = Path(root, f"{task.file}.json")
    path = path if path.is_file() else Path(root, "json", path.name)
    entries = read_json(path) if path.is_file() else None
    if entries is not None and not isinstance(entries, list):
        raise ValueError(f"{path} is a JSON {type(entries).__name__}, not a list of questions")
    return path, entries

def mvbench_version(entries):
    """Which of the published versions of MVBench has these entries."""
    if len(entries) != 4000:
        return f"{len(entries):,} questions: none of MVBench's published versions, which have 4,000"
    revised = any(entry.get("video") in REVISED for entry in entries)
    return f"MVBench {'as revised on' if revised else 'before its revision of'} 2024-06-13"

MVBENCH = Benchmark("MVBench", TASKS, json_questions, version=mvbench_version, leaderboard=True)
TVBENCH_NAMES = (
    "Action Count", "Object Count", "Action Sequence", "Object Shuffle", "Scene Transition", "Action Localization",
    "Action Antonym", "Unexpected Action", "Egocentric Sequence", "Moving Direction")
TVBENCH = Benchmark("TVBench", [
    Task(name, re.sub("[^A-Z]", "", name), file, file, bound=name in ("Action Sequence", "Action Localization"))
    for name in TVBENCH_NAMES for file in [name.lower().replace(" ", "_")]], json_questions)
BENCHMARKS = {"mvbench": MVBENCH, "tvbench": TVBENCH}       # as --benchmark names them

# -------------------------------------------------------------------------------------------------------- the questions

def load_questions(root, only=(), limit=0, benchmark=MVBENCH):
    """Benchmark folder -> list of dicts: task, index, video, media, size, bound, question, candidates, answer.

    Where the medium is missing, media is "". only: task names; limit: the first n questions of each task."""
    names = [task.name for task in benchmark.tasks]
    if unknown := sorted(set(only) - set(names)):
        raise ValueError(f"{benchmark.name} has no task {', '.join(unknown)}; its tasks are {', '.join(names)}")

    # one missing file is a task less; if all are missing, the folder is the wrong one
    files = [(task, *benchmark.questions(root, task)) for task in benchmark.tasks if not only or task.name in only]
    missing = [path for _, path, entries in files if entries is None]
    if len(missing) == len(files):
        raise FileNotFoundError(f"{missing[0]} does not exist, nor does the file of any other task: --data is the "
                                "folder that holds json/ and video/ of the benchmark")
    for path in missing:
        print(f"{path} does not exist: this task is left out", file=sys.stderr)
    return [make_question(task, i, entry, path, root)
            for task, path, entries in files for i, entry in enumerate((entries or [])[:limit or None])]

def make_question(task, index, entry, path, root):
    """One entry of a task's file, checked, with its medium found."""
    wrong = [key for key in ("video", "question") if not isinstance(entry.get(key), str)]
    wrong += ["answer"] if not isinstance(entry.get("answer"), str | int | float) else []
    wrong += ["candidates"] if not 2 <= len(entry.get("candidates") or []) <= len(LETTERS) else []
    bound = (entry.get("start"), entry.get("end")) if task.bound else None
    wrong += [key for key, second in zip(("start", "end"), bound or (), strict=False)
              if not isinstance(second, int | float) or not math.isfinite(second)]
    if wrong:
        raise ValueError(f"{path}, entry {index}: missing or malformed {', '.join(wrong)}")
    if entry["answer"] not in entry["candidates"]:
        raise ValueError(f"{path}, entry {index}: the answer {entry['answer']!r} is not among the candidates")

    # its size tells a medium from another of the same name: a file's bytes, a folder's number of files
    media = find_media(root, task.folder, entry["video"])
    size = len(os.listdir(media)) if os.path.isdir(media) else os.path.getsize(media) if media else 0
    return {"task": task.name, "index": index, "video": entry["video"], "media": media, "size": size,
            "bound": bound, "question": entry["question"], "candidates": list(map(str, entry["candidates"])),
            "answer": str(entry["answer"])}

def find_media(root, folder, name):
    """Path of a medium, in the official tree or in one that people have made of its archives; "" if it is missing."""
    # the archives' folders are in video/ or beside it, later files in data0613/; each folder is inside one of its
    # archive's name or not; the media of a task, or of all tasks, may be in one flat folder. If the original is
    # missing, an .mp4 of the same name will do: something-something v2 is often converted
    first, last = folder.split("/")[0], folder.split("/")[-1]
    for variant, base, place in product((name, Path(name).stem + ".mp4"), ("video", "video/data0613", "data0613", "."),
                                        (folder, f"{first}/{folder}", last, first, "")):
        path = Path(root, base, place, variant)
        if variant and path.exists():
            return str(path)
    return ""

def missing_media(questions, benchmark=MVBENCH):
    """A line for each task with missing media: how many of its questions have none, and why that may be."""
    lines = []
    for task in benchmark.tasks:
        has_media = [bool(q["media"]) for q in questions if q["task"] == task.name]
        hint = "; NTU RGB+D's owners give these videos out, on request" if task.short == "FP" else ""
        if not all(has_media):
            lines.append(f"{task.name}: {has_media.count(False)} of {len(has_media)} media are missing "
                         f"(video/{task.folder}/){hint}")
    return lines

def describe(root, benchmark=MVBENCH):
    """Benchmark folder -> (fingerprint of its questions, 16 hexadecimal digits; its version in words)."""
    # the fingerprint covers what is asked, not how the files are formatted
    files = [(task.name, entry) for task in benchmark.tasks for entry in benchmark.questions(root, task)[1] or []]
    keys = ("video", "start", "end", "question", "candidates", "answer")
    content = json.dumps([[task, *map(entry.get, keys)] for task, entry in files])
    version = benchmark.version or (lambda entries: f"{benchmark.name}, {len(entries):,} questions")
    return hashlib.sha256(content.encode()).hexdigest()[:16], version([entry for _, entry in files])

def letter_of(q):
    """The letter of the right answer. QUIRK mvbench.ipynb qa_template: of equal candidates the last one counts."""
    return LETTERS[len(q["candidates"]) - 1 - q["candidates"][::-1].index(q["answer"])]
