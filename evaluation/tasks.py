"""The 20 tasks of MVBench: their questions, and where the media that these speak of lie on people's disks.

    MVBench/json/action_sequence.json     [{"video", "question", "candidates", "answer", "start", "end"}, ...]
    MVBench/video/star/Charades_v1_480/   the media; other trees that the archives give are found as well: find_media

The toy world has the same layout, and so has TVBench, whose 10 tasks are here too. Not here: how the questions are
asked (ask.py) and scored (scorers.py), how the toy's are made (qagen.py). Source: paper table 1; mvbench.ipynb,
data_list; TVBench: arXiv 2410.07752, github.com/daniel-cores/tvbench, infer.ipynb.

    pytest tests/test_real_layout.py
"""
import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from infra.files import read_json

LETTERS = "ABCDE"


@dataclass(frozen=True)
class Task:
    """A row of the paper's table: where a task's questions and media lie."""
    name: str       # "Action Sequence"
    short: str      # "AS"
    file: str       # json/{file}.json
    folder: str     # video/{folder}/
    bound: bool = False     # only the seconds from "start" to "end" of the medium are shown


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
TVBENCH = [
    Task("Action Count", "AC", "action_count", "action_count"),
    Task("Object Count", "OC", "object_count", "object_count"),
    Task("Action Sequence", "AS", "action_sequence", "action_sequence", bound=True),
    Task("Object Shuffle", "OS", "object_shuffle", "object_shuffle"),
    Task("Scene Transition", "ST", "scene_transition", "scene_transition"),
    Task("Action Localization", "AL", "action_localization", "action_localization", bound=True),
    Task("Action Antonym", "AA", "action_antonym", "action_antonym"),
    Task("Unexpected Action", "UA", "unexpected_action", "unexpected_action"),
    Task("Egocentric Sequence", "ES", "egocentric_sequence", "egocentric_sequence"),
    Task("Moving Direction", "MD", "moving_direction", "moving_direction"),
]
# media that came with the questions of 2024-06-13, which replaced some 30 (Ask-Anything issues 198 and 236)
REVISED = ("EDXBD.mp4", "video_14727.mp4", "video_13446.mp4")

# -------------------------------------------------------------------------------------------------------- the questions


def load_questions(root, only=(), limit=0, tasks=TASKS):
    """MVBench folder -> list of dicts: task, index, video, media, size, bound, question, candidates, answer.

    only: task names; limit: the first so many of each task; tasks: TASKS or TVBENCH. A medium that is nowhere has media
    "". ValueError names file, entry and fault; FileNotFoundError a folder without any of the tasks.
    """
    unknown = sorted(set(only) - {task.name for task in tasks})
    if unknown:
        raise ValueError(f"the benchmark has no task {', '.join(unknown)}; it has "
                         + ", ".join(task.name for task in tasks))
    questions, absent = [], []
    for task in tasks:
        if only and task.name not in only:
            continue
        path = annotation_file(root, task)
        if not path.is_file():
            absent.append(path)
            continue
        items = read_json(path)
        if not isinstance(items, list):
            raise ValueError(f"{path} is not a list of questions")
        for index, item in enumerate(items[:limit or None]):
            questions.append(question_of(task, index, item, path, root))
    if not questions:
        raise FileNotFoundError(f"{absent[0]} does not exist, nor any other task's file: --data is the folder that "
                                "holds json/ and video/ of the benchmark")
    for path in absent:
        print(f"{path} does not exist: this task is left out", file=sys.stderr)
    return questions


def annotation_file(root, task):
    """json/{task}.json, or beside the media where all lies in one folder."""
    flat = Path(root) / f"{task.file}.json"
    return flat if flat.is_file() else Path(root) / "json" / f"{task.file}.json"


def question_of(task, index, item, path, root):
    """One entry of a task's file, checked."""
    wrong = [key for key in ("video", "question") if not isinstance(item.get(key), str)]
    wrong += ["answer"] if not isinstance(item.get("answer"), str | int | float) else []
    wrong += ["candidates"] if not 2 <= len(item.get("candidates") or []) <= len(LETTERS) else []
    wrong += [key for key in ("start", "end") if task.bound and not is_second(item.get(key))]
    if wrong:
        raise ValueError(f"{path}, entry {index}: missing or malformed {', '.join(wrong)}")
    if item["answer"] not in item["candidates"]:
        raise ValueError(f"{path}, entry {index}: the answer {item['answer']!r} is not among the candidates")
    bound = (item["start"], item["end"]) if task.bound else None
    media = find_media(root, task.folder, item["video"])
    return {"task": task.name, "index": index, "video": item["video"], "media": media, "size": size_of(media),
            "bound": bound, "question": item["question"], "candidates": [str(text) for text in item["candidates"]],
            "answer": str(item["answer"])}


def is_second(value):
    return isinstance(value, int | float) and math.isfinite(value)


def size_of(media):
    """By which a medium is known again: its bytes, or a folder's number of files; 0 for none."""
    path = Path(media)
    return 0 if not media else len(os.listdir(path)) if path.is_dir() else path.stat().st_size


def find_media(root, folder, name):
    """Where a medium lies, or "": in the official tree, or in one of the trees that people have made of its archives.

    The archives' folders may lie in video/ or beside it, each in a folder of its archive's name or not; the files that
    came later in data0613/, merged or not; and all media of a task, or of all tasks, in one flat folder. Silent copies
    in another format (ssv2 as mp4) are taken where the original is missing.
    """
    first, last = folder.split("/")[0], folder.split("/")[-1]
    bases = [Path(root) / base for base in ("video", "video/data0613", "data0613", ".")]
    places = [base / sub for base in bases for sub in (folder, f"{first}/{folder}", last, first, "")]
    for variant in (name, Path(name).stem + ".mp4"):
        for place in places:
            if (place / variant).exists() and (place / variant) != place:
                return str(place / variant)
    return ""


def missing_media(questions, tasks=TASKS):
    """Lines that say, per task, how many questions have no medium, and why that may be."""
    lines = []
    for task in tasks:
        asked = [q for q in questions if q["task"] == task.name]
        gone = sum(not q["media"] for q in asked)
        if gone:
            hint = "; NTU RGB+D's owners give these videos out, on request" if task.short == "FP" else ""
            lines.append(f"{task.name}: {gone} of {len(asked)} media are missing (video/{task.folder}/){hint}")
    return lines


def describe(root, tasks=TASKS):
    """Benchmark folder -> (16 hexadecimal digits of what is asked, which of the published versions it is, in words).

    The digits are those of videos by name, bounds, questions, options and answers, however the files are written.
    """
    found = [(task, item) for task in tasks if annotation_file(root, task).is_file()
             for item in read_json(annotation_file(root, task))]
    keys = ("video", "start", "end", "question", "candidates", "answer")
    asked = [[task.name, *map(item.get, keys)] for task, item in found]
    digits = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    revised = [name for name in REVISED if any(item.get("video") == name for _, item in found)]
    if tasks is not TASKS:
        return digits, f"TVBench, {len(found):,} questions"
    if len(found) != 4000:
        return digits, f"{len(found):,} questions: none of MVBench's published versions, which have 4,000"
    if revised:
        return digits, f"MVBench as revised on 2024-06-13 (it asks about {revised[0]})"
    return digits, "MVBench before its revision of 2024-06-13 (it asks about none of " + ", ".join(REVISED) + ")"


def letter_of(q):
    """The right answer's letter. QUIRK mvbench.ipynb qa_template: of equal candidates the last one counts."""
    return LETTERS[len(q["candidates"]) - 1 - q["candidates"][::-1].index(q["answer"])]
