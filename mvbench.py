"""MVBench: 20 kinds of multiple-choice questions that no single frame answers, by the protocol of the paper.

16 frames, the prompt of prompt.mvbench_prompt, greedy decoding behind "Best option:(", the first line of the answer,
the official scorer. Reads the official folder layout (json/<task>.json, video/<folder>/...), which the toy world has.
--control blank asks the same model without the video: what it still gets right, it gets from the text.

Writes into --out (default CKPT/mvbench): predictions.jsonl, one line per question, and mvbench.json, the accuracies;
with a control, the same two with the control's name. It does not train and knows no question's making (qagen.py).
Source: paper section 3 and table 2; official mvbench.ipynb.

Run:    python mvbench.py --ckpt runs/toy/stage3
"""
import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
from media import MediaError, benchmark_video
from prompt import SYSTEM, answer_text, is_complete, mvbench_prompt, pad_batch

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

# -------------------------------------------------------------------------------------------------------- the questions


def load_questions(root, only=(), limit=0):
    """MVBench folder -> list of dicts: task, index, media, start, end, question, candidates, answer.

    only: task names; limit: the first so many of each task. ValueError names file, entry and fault.
    """
    unknown = sorted(set(only) - {task.name for task in TASKS})
    if unknown:
        raise ValueError(f"MVBench has no task {', '.join(unknown)}; it has {', '.join(task.name for task in TASKS)}")
    questions = []
    for task in TASKS:
        if only and task.name not in only:
            continue
        path = Path(root) / "json" / f"{task.file}.json"
        items = checkpoint.read_json(path)
        if not isinstance(items, list):
            raise ValueError(f"{path} is not a list of questions")
        for index, item in enumerate(items[:limit or None]):
            questions.append(question_of(task, index, item, path, Path(root) / "video" / task.folder))
    return questions


def question_of(task, index, item, path, folder):
    """One entry of a task's file, checked."""
    wrong = [key for key in ("video", "question", "answer") if not isinstance(item.get(key), str)]
    wrong += ["candidates"] if not 2 <= len(item.get("candidates") or []) <= len(LETTERS) else []
    wrong += [key for key in ("start", "end") if task.bound and not isinstance(item.get(key), int | float)]
    if wrong:
        raise ValueError(f"{path}, entry {index}: missing or malformed {', '.join(wrong)}")
    if item["answer"] not in item["candidates"]:
        raise ValueError(f"{path}, entry {index}: the answer {item['answer']!r} is not among the candidates")
    bound = (item["start"], item["end"]) if task.bound else None
    return {"task": task.name, "index": index, "media": str(folder / item["video"]), "bound": bound,
            "question": item["question"], "candidates": item["candidates"], "answer": item["answer"]}


def letter_of(q):
    """The right answer's letter. QUIRK mvbench.ipynb qa_template: of equal candidates the last one counts."""
    return LETTERS[len(q["candidates"]) - 1 - q["candidates"][::-1].index(q["answer"])]


# ------------------------------------------------------------------------------------------------------------- scoring


def check_ans(prediction, truth):
    """The official scorer: prediction "(b) ..." against truth "(B) text" -> bool.

    # QUIRK mvbench.ipynb check_ans: substrings count both ways, so the empty answer "(" is right on every question.
    """
    said = prediction.lower().split(" ")[0].replace(".", "")
    option, _, content = truth.lower().partition(" ")
    if not content:
        raise ValueError(f"the right answer {truth!r} has no text behind its letter")
    return said in option or option in prediction.lower().split(" ")[0]


def score(rows):
    """Prediction rows -> {task: accuracy in percent, ..., "Avg": right / asked}, in the order of TASKS."""
    by_task = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row["correct"])
    table = {t.name: 100 * sum(by_task[t.name]) / len(by_task[t.name]) for t in TASKS if t.name in by_task}
    return table | {"Avg": 100 * sum(row["correct"] for row in rows) / max(1, len(rows))}


def chance(questions):
    """Expected score of uniform guessing, per task and over all (27.95 on the real benchmark)."""
    return score([{"task": q["task"], "correct": 1 / len(q["candidates"])} for q in questions])


# ---------------------------------------------------------------------------------------------------------- the answers


class Clips(torch.utils.data.Dataset):
    """Each (medium, bounds) that the questions speak of, once: (T, 3, H, W) normalised, or the reason why not."""

    def __init__(self, keys, cfg):
        self.keys, self.cfg = keys, cfg

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, index):
        media, bound = self.keys[index]
        try:
            return benchmark_video(media, self.cfg, bound)
        except MediaError as error:
            return str(error)


def letter_ids(tok):
    """The ids that name the options, behind a bracket."""
    return [tok.encode(f"({letter}")[-1] for letter in LETTERS]


class Answerer:
    """A model with its tokenizers; answers questions about clips, a batch at a time."""

    def __init__(self, model, wordpiece, tok, control="none", max_new_tokens=100):
        self.model, self.tok, self.control, self.max_new_tokens = model, tok, control, max_new_tokens
        cfg = model.cfg
        self.n_video = cfg.n_query + cfg.n_extra
        # the Q-Former reads the system prompt, not the question: paper table 11
        self.qf_ids = torch.tensor([wordpiece.encode(SYSTEM, cfg.qformer.max_positions, sep=True, truncate="left")])
        self.letter_ids = letter_ids(tok)

    @torch.no_grad()
    def look(self, video):
        """video (B, T, 3, H, W) -> what the LLM reads of it (B, Q, D). "blank" zeroes the patch features."""
        vision = self.model.encode(video.to(self.model.device))                                # (B, N, C)
        if self.control == "blank":
            vision = torch.zeros_like(vision)
        qf_ids = self.qf_ids.to(vision.device).expand(len(vision), -1)                         # (B, S)
        return self.model.queries(vision, qf_ids, torch.ones_like(qf_ids))

    @torch.no_grad()
    def answer(self, questions, tokens):
        """questions with their video tokens (B, Q, D) -> list of (first line of the answer, letter probabilities)."""
        prompts = [mvbench_prompt(self.tok, q["question"], q["candidates"], self.n_video, style=self.model.cfg.style)
                   for q in questions]
        ids, _, mask = (t.to(self.model.device) for t in pad_batch(prompts, self.tok.eos_id, side="left"))
        rows, logits = self.model.answer(self.model.splice(ids, tokens), mask, self.max_new_tokens, self.complete)
        letters = logits.float().softmax(-1)[:, self.letter_ids]                               # (B, 5)
        return [(self.first_line(row), p[:len(q["candidates"])].tolist())
                for q, row, p in zip(questions, rows, letters, strict=True)]

    def complete(self, ids):
        """An answer ends at ### or </s>, and only its first line counts."""
        return is_complete(self.tok, ids) or "\n" in self.tok.decode(ids[-4:]).lstrip()

    def first_line(self, ids):
        return answer_text(self.tok, ids).split("\n")[0]


def evaluate(answerer, questions, batch=32, workers=1):
    """Asks every question once, clip by clip; yields a row per question, in the order of the clips."""
    asked = defaultdict(list)
    for q in questions:
        asked[q["media"], q["bound"]].append(q)
    keys = list(asked)
    loader = torch.utils.data.DataLoader(Clips(keys, answerer.model.cfg), batch, num_workers=workers, collate_fn=list)
    bar = tqdm(total=len(questions), unit="question", disable=not sys.stderr.isatty(), leave=False)
    for start, clips in zip(range(0, len(keys), batch), loader, strict=True):
        pairs = list(zip(keys[start:start + batch], clips, strict=True))
        unread = [(q, clip) for key, clip in pairs if isinstance(clip, str) for q in asked[key]]
        for q, reason in unread:
            yield row_of(q, "", [], reason)
        good = [(asked[key], clip) for key, clip in pairs if not isinstance(clip, str)]
        if good:
            yield from answers(answerer, *zip(*good, strict=True), batch)
        bar.update(sum(len(asked[key]) for key, _ in pairs))
    bar.close()


def answers(answerer, questions, clips, batch):
    """questions: a list for each of the clips (T, 3, H, W) -> a row per question."""
    tokens = answerer.look(torch.stack(clips))                                                 # (B, Q, D)
    todo = [(q, clip) for clip, some in enumerate(questions) for q in some]
    for i in range(0, len(todo), batch):
        qs, rows = zip(*todo[i:i + batch], strict=True)
        for q, (said, letters) in zip(qs, answerer.answer(qs, tokens[list(rows)]), strict=True):
            yield row_of(q, said, letters)


def row_of(q, said, letters, unread=""):
    """A line of predictions.jsonl. A medium that cannot be read is unanswered, and never right."""
    letter = letter_of(q)
    correct = not unread and check_ans("(" + said, f"({letter}) {q['answer']}")
    return {**q, "letter": letter, "prediction": "(" + said, "letter_probabilities": [round(p, 4) for p in letters],
            "correct": bool(correct), **({"unread": unread} if unread else {})}


# ----------------------------------------------------------------------------------------------------------- the report


def print_table(columns):
    """columns {title: {task: percent}} -> the 20-task table on the console."""
    titles = list(columns)
    print(f"\n{'task':28}" + "".join(f"{title:>10}" for title in titles))
    first = columns[titles[0]]
    for name in first:
        line = f"{name:28}" + "".join(f"{columns[title].get(name, float('nan')):10.1f}" for title in titles)
        print("-" * len(line) + "\n" + line if name == "Avg" else line)


def parse(argv=None):
    p = argparse.ArgumentParser(prog="mvbench.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", required=True, help="checkpoint folder of stage 3 (or 2)")
    p.add_argument("--data", default="data/toy/mvbench", help="MVBench folder: json/ and video/ (default %(default)s)")
    p.add_argument("--llm", default="", help="the LLM's folder, if it moved since training")
    p.add_argument("--out", default="", help="folder for the results (default CKPT/mvbench)")
    p.add_argument("--control", choices=("none", "blank"), default="none", help="blank: the video's features are zeros")
    p.add_argument("--only", default="", help='task names, separated by commas: "Action Count,State Change"')
    p.add_argument("--limit", type=int, default=0, help="only the first so many questions of each task")
    p.add_argument("--batch", type=int, default=32, help="clips at a time (default %(default)s)")
    p.add_argument("--workers", type=int, default=1, help="processes that decode ahead (default %(default)s)")
    p.add_argument("--device", default="", help="cpu or cuda (default: cuda where there is one)")
    p.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the LLM's weights, and autocast")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    questions = load_questions(args.data, [name.strip() for name in args.only.split(",") if name.strip()], args.limit)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model, wordpiece, tok = checkpoint.load_model(args.ckpt, args.llm, device, dtype)
    if tok is None:
        raise ValueError(f"{args.ckpt} is of stage 1 and has no LLM; MVBench needs a checkpoint of stage 2 or 3")
    out = Path(args.out or Path(args.ckpt) / "mvbench")
    out.mkdir(parents=True, exist_ok=True)
    suffix = "" if args.control == "none" else f".{args.control}"
    print(f"MVBench: {len(questions)} questions, {model.cfg.eval_frames} frames, control {args.control}", flush=True)
    begun, rows = time.time(), []
    answerer = Answerer(model, wordpiece, tok, args.control)
    with open(out / f"predictions{suffix}.jsonl", "w") as f, \
            torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bf16"):
        for row in evaluate(answerer, questions, args.batch, args.workers):
            f.write(json.dumps(row) + "\n")
            rows.append(row)
    table = score(rows)
    for name, numbers in ((f"mvbench{suffix}", table), ("chance", chance(questions))):
        (out / f"{name}.json").write_text(json.dumps({k: round(v, 2) for k, v in numbers.items()}, indent=2))
    normal = out / "mvbench.json"
    columns = {"chance": chance(questions)}
    if args.control != "none" and normal.is_file():
        columns = {"normal": checkpoint.read_json(normal), args.control: table, **columns}
    else:
        columns = {"accuracy" if args.control == "none" else args.control: table, **columns}
    print_table(columns)
    unread = [row for row in rows if "unread" in row]
    for row in unread[:5]:
        print(f"unread: {row['unread']}")
    seconds = time.time() - begun
    print(f"\n{len(rows)} questions ({len(unread)} with an unreadable medium, counted as wrong) in {seconds:.0f} s, "
          f"{len(rows) / seconds:.1f} per second; written to {out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped before the end; nothing is scored", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"mvbench.py: {error}", file=sys.stderr)
        sys.exit(2)
