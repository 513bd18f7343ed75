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
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from infra.files import read_json
from infra.media import FOLDER_FPS
from prompt import check_text

LETTERS = "ABCDE"
VIDEO_SUFFIXES = (".webm", ".avi", ".mp4", ".mov", ".mkv", ".flv", ".wmv", ".mpg", ".mpeg", ".m4v", ".gif")

@dataclass(frozen=True)
class Task:
    """A row of a benchmark's table."""
    name: str               # "Action Sequence"
    short: str              # "AS"
    file: str               # json/{file}.json
    folder: str             # video/{folder}/
    bound: bool = False     # only the seconds from "start" to "end" of the medium are shown
    fps: float = FOLDER_FPS  # frames per second of media that are folders of frames

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
    """Reader of MVBench's layout: json/{task}.json, or {task}.json where everything is in one folder; or .jsonl."""
    paths = [Path(root, folder, task.file + suffix) for suffix in (".json", ".jsonl") for folder in ("", "json")]
    path = next(filter(Path.is_file, paths), paths[1])
    entries = read_json(path, lines=True) if path.is_file() else None
    if isinstance(entries, dict) and "question" in entries:                            # JSON Lines of one line
        entries = [entries]
    if not isinstance(entries, list | None):
        raise ValueError(f"{path} is a JSON {type(entries).__name__}, not a list of questions")
    for i, entry in enumerate(entries or []):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, entry {i}: expected an object with video, question, candidates and answer, "
                             f"found {shown(entry)}")
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
    """Benchmark folder -> list of dicts: task, index, video, media, size, bound, question, candidates, answer; and fps,
    where the task's is not FOLDER_FPS. only: task names; limit: the first n questions of each task. media is "" where
    it is missing, or where one file, then "shared", would serve tasks of other folders."""
    names = [task.name for task in benchmark.tasks]
    if unknown := sorted(set(only) - set(names)):
        raise ValueError(f"{benchmark.name} has no task {', '.join(unknown)}; its tasks are {', '.join(names)}")

    # one missing file is a task less; if all are missing, the folder is the wrong one
    every_file = [(task, *benchmark.questions(root, task)) for task in benchmark.tasks]
    files = [file for file in every_file if not only or file[0].name in only]
    missing = [path for _, path, entries in files if entries is None]
    if len(missing) == len(files):
        raise FileNotFoundError(f"{missing[0]} does not exist, nor does the file of any other task: --data is the "
                                "folder that holds json/ and video/ of the benchmark")
    for path in missing:
        print(f"{path} does not exist: this task is left out", file=sys.stderr)

    # a faulty entry is a fault of the file, so nothing is computed before it is mended
    media, questions, faults = locate_media(root, every_file), [], []
    for task, path, entries in files:
        for i, entry in enumerate((entries or [])[:limit or None]):
            try:
                q = make_question(task, i, entry)
            except ValueError as error:
                faults.append(f"{path}, entry {i}: {error}")
                continue
            medium, shared = media[task.folder, q["video"]]
            questions.append(q | {"media": medium, "size": size_of(medium)} | ({"shared": shared} if shared else {}))
    if faults:
        more = f"; {len(faults) - 1} more entries are faulty" if faults[1:] else ""
        raise ValueError(f"{faults[0]}: correct the entry, or delete it{more}")
    return questions

def make_question(task, index, entry):
    """One entry of a task's file -> the question, but for its medium. ValueError lists all that is wrong with it."""
    # numbers and texts are compared as text, but 3.0 is 3; seconds may be text, too
    video, question, candidates, answer = map(entry.get, ("video", "question", "candidates", "answer"))
    options = candidates if isinstance(candidates, list) else []
    texts = list(map(str, options))
    keys = [text for text, option in zip(texts, options, strict=True) if str(answer) == text or answer == option]
    start, end = (seconds(entry.get(key)) if task.bound else 0 for key in ("start", "end"))

    # each fault, and whether it is absent
    checks = {
        f"video: expected a text, found {shown(video)}": isinstance(video, str) and video.strip("./ "),
        f"question: expected a text, found {shown(question)}": isinstance(question, str),
        f"candidates: expected a list of 2 to {len(LETTERS)} options, found {len(options) or shown(candidates)}":
            2 <= len(options) <= len(LETTERS),
        f"candidates: expected texts or numbers, found {shown(candidates)}":
            all(isinstance(option, str | int | float) for option in options),
        f"the answer {shown(answer)} is not among the candidates {shown(candidates)}": keys and answer is not None,
        f"start: expected seconds, found {shown(entry.get('start'))}": start is not None,
        f"end: expected seconds, found {shown(entry.get('end'))}": end is not None,
        f"expected an end after the start of {start} s, found {end} s": None in (start, end) or start <= end}
    if faults := [fault for fault, is_absent in checks.items() if not is_absent]:
        raise ValueError("; ".join(faults))
    for text in (video, question, *texts):
        check_text(text)
    q = {"task": task.name, "index": index, "video": video, "bound": (start, end) if task.bound else None,
         "question": question, "candidates": texts, "answer": keys[0]}
    return q if task.fps == FOLDER_FPS else q | {"fps": task.fps}

def shown(value):
    """A value of a JSON file as an error shows it: short, and in ASCII."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

def seconds(value):
    """12.5 or "12.5" -> a finite number; None: it is none."""
    try:
        number = float(value) if isinstance(value, str) else value
        return number if math.isfinite(number) and not isinstance(number, bool) else None
    except (TypeError, ValueError, OverflowError):
        return None

# ------------------------------------------------------------------------------------------------------------ the media

def find_media(root, folder, name):
    """Path of a medium, in the official tree or in one that people have made of its archives; "" if it is missing."""
    # the archives' folders are in video/ or beside it, later files in data0613/; each folder is inside one of its
    # archive's name or not; the media of a task, or of all tasks, may be in one flat folder
    first, last = folder.split("/")[0], folder.split("/")[-1]
    for base, place in product(("video", "video/data0613", "data0613", "."),
                               (folder, f"{first}/{folder}", last, first, "")):
        path = str(Path(root, base, place, name))
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError, ValueError):            # ValueError: no name, as of "a\0b"
            continue
        except OSError:                     # permission, a stale mount, ...: it may be there; its reader will say more
            pass
        return path
    return ""

def locate_media(root, files):
    """[(task, path, entries), ...] of all tasks -> {(folder, name): (path of the medium, "")}; ("", "") if it is
    missing, and ("", path) if this one file would serve several folders."""
    names = {(task.folder, e["video"]): None for task, _, entries in files for e in entries or ()
             if isinstance(e.get("video"), str)}
    media = {key: find_media(root, *key) for key in names}

    # if the original is missing, an .mp4 of the same name will do, unless it is another question's medium: videos of
    # something-something v2 are often converted
    file_of = {key: file_key(path) for key, path in media.items() if path}                # each path is looked at once
    exact = set(file_of.values())
    for folder, name in (key for key, path in media.items() if not path):
        stem, suffix = os.path.splitext(name)
        path = find_media(root, folder, f"{stem}.mp4") if suffix.lower() in VIDEO_SUFFIXES else ""
        if path and (file := file_key(path)) not in exact:
            media[folder, name], file_of[folder, name] = path, file

    # media of different folders are different videos: CLEVRER's and Perception's have the same names. Where both are
    # the same file, as in one flat folder, nobody knows whose it is; nor where two originals have become one .mp4
    users = defaultdict(set)
    for (folder, name), file in file_of.items():
        is_exact = os.path.basename(name) == os.path.basename(media[folder, name])
        users[file].add((folder, "" if is_exact else name))
    return {key: ("", path) if path and len(users[file_of[key]]) > 1 else (path, "") for key, path in media.items()}

def file_key(path):
    """The same for two paths of one file: by symbolic links, or in upper and lower case where that is the same."""
    try:
        return os.path.realpath(path).casefold(), os.stat(path).st_ino
    except OSError:
        return path, 0

def size_of(media):
    """What tells a medium from another of the same name: a file's bytes, a folder's number of frames."""
    try:
        if os.path.isdir(media):
            return sum(not name.startswith(".") for name in os.listdir(media))     # macOS adds hidden files
        return os.path.getsize(media) if media else 0
    except OSError:
        return 0

def missing_media(questions, benchmark=MVBENCH):
    """A line for each task with missing media: how many of its questions have none, and why that may be."""
    lines = []
    for task in benchmark.tasks:
        of_task = [q for q in questions if q["task"] == task.name]
        missing = [q["video"] for q in of_task if not q["media"] and "shared" not in q]
        shared = [q["shared"] for q in of_task if "shared" in q]

        # the first name shows what is missing, if not all are
        hint = f", the first being {shown(missing[0])}" if 0 < len(missing) < len(of_task) else ""
        hint += "; NTU RGB+D's owners give these videos out, on request" if task.short == "FP" else ""
        if missing:
            lines.append(f"{task.name}: {len(missing)} of {len(of_task)} media are missing "
                         f"(video/{task.folder}/){hint}")
        if shared:
            lines.append(f"{task.name}: {len(shared)} of {len(of_task)} questions are not asked, because the same file "
                         f"serves other media ({shared[0]}): put this task's media into video/{task.folder}/")
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
