"""MVBench: 20 kinds of multiple-choice questions that no single frame answers, by the protocol of the paper.

16 frames, the prompt of prompt.mvbench_prompt, greedy decoding behind "Best option:(", the first line of the answer,
the official scorer. Reads the official folder layout (json/<task>.json, video/<folder>/...), which the toy world has.
--control blank asks the same model without the video: what it still gets right, it gets from the text.

Writes into --out (default CKPT/mvbench): predictions.jsonl, one line per question, mvbench.json, the accuracies, and
settings.json; what is not the paper's protocol on the whole benchmark says so in the files' names. It does not train
and knows no question's making (qagen.py).
Source: paper section 3 and table 2; official mvbench.ipynb.

Run:    python mvbench.py --ckpt runs/toy/stage3
"""
import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import add_model_options, open_model
from data import pad_words
from media import NORMS, MediaError, benchmark_video
from prompt import (
    ANSWER_PREFIX,
    SYSTEM,
    answer_text,
    is_complete,
    mvbench_prompt,
    mvbench_question,
    pad_batch,
)
from storage import read_json
from tasks import LETTERS, TASKS, letter_of, load_questions, missing_media

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


@dataclass
class Protocol:
    """How the questions are asked. The defaults are the paper's; what else it has tried is a field away."""
    system: str = SYSTEM                # table 8: without it 49.9
    answer_prefix: str = ANSWER_PREFIX  # table 9: without it 50.1
    question_in_qformer: bool = False   # table 11: with it 50.8
    control: str = "none"
    max_new_tokens: int = 100


class Answerer:
    """A model with its tokenizers; answers questions about clips, a batch at a time."""

    def __init__(self, model, wordpiece, tok, protocol=None):
        self.model, self.wordpiece, self.tok, self.protocol = model, wordpiece, tok, protocol or Protocol()
        self.n_video = model.cfg.n_query + model.cfg.n_extra
        self.letter_ids = letter_ids(tok)

    @torch.no_grad()
    def look(self, video):
        """video (B, T, 3, H, W) -> what the Q-Former sees of it (B, N, C). "blank" zeroes it."""
        vision = self.model.encode(video.to(self.model.device))                                # (B, N, C)
        return torch.zeros_like(vision) if self.protocol.control == "blank" else vision

    @torch.no_grad()
    def read(self, vision, questions):
        """vision (B, N, C) with a question for each -> what the LLM reads (B, Q, D).

        The Q-Former reads the system prompt along, and the question only where the protocol says so.
        """
        texts = [self.protocol.system + (mvbench_question(q["question"], q["candidates"])
                                         if self.protocol.question_in_qformer else "") for q in questions]
        length = min(self.model.cfg.max_text, self.model.cfg.qformer.max_positions)
        rows = [self.wordpiece.encode(text, length, sep=True, truncate="left") for text in texts]
        qf_ids, qf_mask = (t.to(vision.device) for t in pad_words(rows, self.wordpiece))       # (B, S)
        return self.model.queries(vision, qf_ids, qf_mask)

    @torch.no_grad()
    def answer(self, questions, tokens):
        """questions with their video tokens (B, Q, D) -> list of (first line of the answer, letter probabilities)."""
        prompts = [mvbench_prompt(self.tok, q["question"], q["candidates"], self.n_video, self.protocol.system,
                                  self.protocol.answer_prefix, self.model.cfg.style) for q in questions]
        ids, _, mask = (t.to(self.model.device) for t in pad_batch(prompts, self.tok.eos_id, side="left"))
        embeds = self.model.splice(ids, tokens)                                                # (B, S, D)
        rows, logits = self.model.answer(embeds, mask, self.protocol.max_new_tokens, self.complete)
        letters = logits.float().softmax(-1)[:, self.letter_ids]                               # (B, 5)
        return [(self.first_line(row), p[:len(q["candidates"])].tolist())
                for q, row, p in zip(questions, rows, letters, strict=True)]

    def complete(self, ids):
        """An answer ends at ### or </s>, and only its first line counts."""
        return is_complete(self.tok, ids) or "\n" in self.tok.decode(ids[-4:]).lstrip()

    def first_line(self, ids):
        """New ids -> the prediction: the answer's first line, behind the bracket that the prompt has opened."""
        opened = "(" if self.protocol.answer_prefix.endswith("(") else ""
        return opened + answer_text(self.tok, ids).split("\n")[0]


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
    vision = answerer.look(torch.stack(clips))                                                 # (B, N, C)
    tokens = None
    if not answerer.protocol.question_in_qformer:                                              # then all read the same
        tokens = answerer.read(vision, [some[0] for some in questions])                        # (B, Q, D)
    todo = [(q, clip) for clip, some in enumerate(questions) for q in some]
    for i in range(0, len(todo), batch):
        qs, rows = zip(*todo[i:i + batch], strict=True)
        read = answerer.read(vision[list(rows)], qs) if tokens is None else tokens[list(rows)]
        for q, (said, letters) in zip(qs, answerer.answer(qs, read), strict=True):
            yield row_of(q, said, letters)


def row_of(q, said, letters, unread=""):
    """A line of predictions.jsonl. A medium that cannot be read is unanswered, and never right."""
    letter = letter_of(q)
    correct = not unread and check_ans(said, f"({letter}) {q['answer']}")
    return {**q, "letter": letter, "prediction": said, "letter_probabilities": [round(p, 4) for p in letters],
            "correct": bool(correct), **({"unread": unread} if unread else {})}


# ----------------------------------------------------------------------------------------------------------- the report


def print_table(columns, asked=None):
    """columns {title: {task: percent}}, asked {task: "166/200"} -> the 20-task table on the console."""
    titles = list(columns)
    print(f"\n{'task':28}" + "".join(f"{title:>10}" for title in titles) + ("     asked" if asked else ""))
    for name in asked or columns[titles[0]]:
        line = f"{name:28}" + "".join(f"{columns[title].get(name, float('nan')):10.1f}" for title in titles)
        line += f"{asked[name]:>10}" if asked else ""
        print("-" * len(line) + "\n" + line if name == "Avg" else line)


def denominators(rows, questions):
    """{task: "asked/there are"}: how much of the benchmark a table speaks of."""
    names = [*dict.fromkeys(row["task"] for row in rows), "Avg"]
    return {name: "/".join(str(sum(name in ("Avg", q["task"]) for q in some)) for some in (rows, questions))
            for name in names}


def parse(argv=None):
    p = argparse.ArgumentParser(prog="mvbench.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(p)
    p.add_argument("--data", default="data/toy/mvbench", help="MVBench folder: json/ and video/ (default %(default)s)")
    p.add_argument("--out", default="", help="folder for the results (default CKPT/mvbench)")
    p.add_argument("--only", default="", help='task names, separated by commas: "Action Count,State Change"')
    p.add_argument("--limit", type=int, default=0, help="only the first so many questions of each task")
    p.add_argument("--batch", type=int, default=32, help="clips at a time (default %(default)s)")
    p.add_argument("--workers", type=int, default=1, help="processes that decode ahead (default %(default)s)")
    group = p.add_argument_group("protocol (the defaults are the paper's)")
    group.add_argument("--control", choices=("none", "blank"), default="none",
                       help="blank: the video's features are zeros")
    group.add_argument("--frames", type=int, default=0, help="frames of a clip (default: the preset's, 16)")
    group.add_argument("--no-system", action="store_true", help="without the system prompt (paper: 49.9 for 51.1)")
    group.add_argument("--no-answer-prompt", action="store_true",
                       help='without "Best option:(" before the answer (paper: 50.1)')
    group.add_argument("--question-in-qformer", action="store_true",
                       help="the Q-Former reads the question behind the system prompt (paper: 50.8)")
    group.add_argument("--norm", choices=tuple(NORMS), default="",
                       help="pixels: clip, as officially, or imagenet, as in training (default: the preset's)")
    return p.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    every = load_questions(args.data, [name.strip() for name in args.only.split(",") if name.strip()], args.limit)
    questions = [q for q in every if q["media"]]
    for line in missing_media(every):
        print(line, flush=True)
    if not questions:
        raise FileNotFoundError(f"{args.data} holds none of the media that the questions speak of")
    model, wordpiece, tok, autocast = open_model(args)
    model.cfg = replace(model.cfg, eval_frames=args.frames or model.cfg.eval_frames,
                        eval_norm=args.norm or model.cfg.eval_norm)
    protocol = Protocol("" if args.no_system else SYSTEM, "" if args.no_answer_prompt else ANSWER_PREFIX,
                        args.question_in_qformer, args.control)
    out = Path(args.out or Path(args.ckpt) / "mvbench")
    out.mkdir(parents=True, exist_ok=True)
    print(f"MVBench: {len(questions)} questions, {model.cfg.eval_frames} frames, control {args.control}", flush=True)
    begun, rows = time.time(), []
    suffix = suffix_of(args)
    (out / f"settings{suffix}.json").write_text(json.dumps(vars(args), indent=2))
    with open(out / f"predictions{suffix}.jsonl", "w") as f, autocast:
        for row in evaluate(Answerer(model, wordpiece, tok, protocol), questions, args.batch, args.workers):
            f.write(json.dumps(row) + "\n")
            rows.append(row)
    report(rows, every, out, suffix, args.control)
    unread = [row for row in rows if "unread" in row]
    for row in unread[:5]:
        print(f"unread: {row['unread']}")
    seconds = time.time() - begun
    print(f"\n{len(rows)} questions ({len(unread)} with an unreadable medium, counted as wrong) in {seconds:.0f} s, "
          f"{len(rows) / seconds:.1f} per second; written to {out}")


def suffix_of(args):
    """What the file names say of a run that is not the paper's protocol on the whole benchmark: ".blank.frames8"."""
    parts = {"blank": args.control == "blank", f"frames{args.frames}": args.frames, "no-system": args.no_system,
             "no-answer-prompt": args.no_answer_prompt, "question-in-qformer": args.question_in_qformer,
             args.norm: args.norm, "part": args.only or args.limit}
    return "".join(f".{part}" for part, said in parts.items() if said)


def report(rows, every, out, suffix, control):
    """Writes the accuracies into the folder out; prints them, beside those without the control where they are known."""
    table, odds = score(rows), chance(rows)
    without = suffix.replace(f".{control}", "", 1)
    for name, numbers in ((f"mvbench{suffix}", table), (f"chance{without}", odds)):
        (out / f"{name}.json").write_text(json.dumps({k: round(v, 2) for k, v in numbers.items()}, indent=2))
    normal = out / f"mvbench{without}.json"
    columns = {"accuracy" if control == "none" else control: table, "chance": odds}
    if control != "none" and normal.is_file():
        columns = {"normal": read_json(normal), **columns}
    print_table(columns, denominators(rows, every))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped before the end; nothing is scored", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"mvbench.py: {error}", file=sys.stderr)
        sys.exit(2)
