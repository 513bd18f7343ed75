"""MVBench: 20 kinds of multiple-choice questions that no single frame answers, by the protocol of the paper.

16 frames, the prompt of prompt.mvbench_prompt, greedy decoding behind "Best option:(", the first line of the answer.
Reads the official folder layout (json/<task>.json, video/<folder>/...), which the toy world and TVBench have too.

A number alone says little about watching. --controls all asks the same model without video, of one frame, and of the
frames in another order; the report (report.html in --out, default CKPT/mvbench) puts them beside each other, with
intervals, four scorers, and how each letter is used. What has been answered is on disk (predictions*.jsonl): after any
interruption the same command goes on; started again when all is answered, it writes the report anew.

    python mvbench.py --ckpt runs/toy/stage3 --controls all
    torchrun --nproc_per_node 8 mvbench.py --ckpt ...          # the same answers, from 8 processes
    python mvbench.py compare RUN_A RUN_B                      # which of two runs is better, and is it luck?

This file knows the order of things: files, clips, batches, processes. How a question is asked: ask.py; what is right:
scorers.py; what it is worth: stats.py, report.py. Source: paper section 3 and table 2; official mvbench.ipynb.
"""
import argparse
import os
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from evaluation import report
from evaluation.engine import CONTROLS, DECODES, Engine, Protocol, clip_seed
from evaluation.predictions import Predictions, key_of
from evaluation.scorers import is_right
from evaluation.tasks import TASKS, TVBENCH, describe, letter_of, load_questions, missing_media
from infra.cli import ignore_signals
from infra.distributed import init_distributed, raise_together
from infra.files import lock_folder
from lora import merge_lora
from prompt import ANSWER_PROMPT, QUESTION_PROMPT, SYSTEM
from video import NORMS, MediaError, load_eval_clip
from weights.checkpoint import add_model_options, checkpoint_hash, device_of, dtype_of, load_from_args, read_config

CHUNK = 8       # clips that a worker hands over at a time

# ------------------------------------------------------------------------------------------------------ what is asked


@dataclass
class Job:
    """One way of asking all questions."""
    control: str            # "" or one of CONTROLS
    permuted: bool          # the options in every cyclic order but their own, instead of in their own
    predictions: Predictions
    rows: dict              # what is answered so far, by key_of
    chosen: bool = True     # or only found, finished, from an earlier run

    def variants(self, q):
        """The question as this job asks it: once, or once for each order."""
        return [turned(q, shift) for shift in range(1, len(q["candidates"]))] if self.permuted else [q]

    def is_open(self, q):
        """Whether it has no answer yet; a medium that could not be read is tried again in each run."""
        return key_of(q) not in self.rows or "unread" in self.rows[key_of(q)]

    def open(self, questions):
        """What this job still has to ask of these questions."""
        return [v for q in questions for v in self.variants(q) if self.is_open(v)]


def turned(q, shift):
    """The question with its options moved on by `shift` places."""
    return {**q, "candidates": q["candidates"][shift:] + q["candidates"][:shift], "shift": shift}


def row_of(q, answer, unread=""):
    """A line of predictions.jsonl. A medium that cannot be read is unanswered, and never right."""
    said = {"prediction": "", "letter_probabilities": []} if unread else {
        "prediction": answer.said, "letter_probabilities": [round(p, 4) for p in answer.letters]}
    if not unread and answer.likelihoods:
        said["likelihoods"] = [round(p, 4) for p in answer.likelihoods]
    row = {**q, "letter": letter_of(q), **said, **({"unread": unread} if unread else {})}
    return {**row, "correct": is_right("official", row)}


# ------------------------------------------------------------------------------------------------------------ the clips


class Clips(torch.utils.data.Dataset):
    """Groups of (medium, bounds), each decoded once -> (B, T, 3, H, W) of those that can be read, and a reason for each
    of the group, "" where it can."""

    def __init__(self, groups, cfg):
        self.groups, self.cfg = groups, cfg

    def __len__(self):
        return len(self.groups)

    def __getitem__(self, index):
        clips, reasons = [], []
        for media, bound in self.groups[index]:
            try:
                clip = load_eval_clip(media, self.cfg, bound)
                clips.append(clip.expand(self.cfg.eval_frames, -1, -1, -1))                # a picture is a still video
                reasons.append("")
            except MediaError as error:
                reasons.append(str(error))
            except Exception as error:                         # whatever a decoder dies of, the others are asked
                reasons.append(f"{media}: {type(error).__name__}: {error}")
        return torch.stack(clips) if clips else None, reasons


def windows(questions, prompts, batch):
    """Questions by clip, the clips with the longest prompts first, `batch` clips at a time: lists of lists of
    questions. prompts: by key_of.

    Neighbours are then of like length, and what does not fit into memory fails at once, not at the end. All is asked in
    the same company whatever is answered already and whoever asks, so the numbers are the same to the last bit.
    """
    by_clip = defaultdict(list)
    for q in questions:
        by_clip[q["media"], q["bound"]].append(q)
    clips = sorted(by_clip.values(), key=lambda some: -max(len(prompts[key_of(q)].ids) for q in some))
    return [clips[i:i + batch] for i in range(0, len(clips), batch)]


def evaluate(answerer, questions, jobs, batch=32, workers=1, rank=0, world=1, progress=True):
    """Asks every question that is not yet answered, in all jobs; yields (job, its new rows) as they come."""
    prompts = {key_of(q): answerer.prompt(q) for q in questions}
    mine = [window for window in windows(questions, prompts, batch)[rank::world]
            if any(job.open(some) for job in jobs for some in window)]
    groups = [[(some[0]["media"], some[0]["bound"]) for some in window[i:i + CHUNK]]
              for window in mine for i in range(0, len(window), CHUNK)]
    loader = iter(torch.utils.data.DataLoader(Clips(groups, answerer.model.cfg), None, num_workers=workers,
                                              worker_init_fn=ignore_signals))
    total = sum(len(job.open(some)) for job in jobs for window in mine for some in window)
    bar = tqdm(total=total, unit="answer", disable=not (progress and sys.stderr.isatty()), leave=False)
    for window in mine:
        videos, reasons = [], []
        with answerer.clock("waiting for data"):
            for _ in range(0, len(window), CHUNK):
                clips, why = next(loader)
                videos += [] if clips is None else [clips]
                reasons += why
        unread = [(q, why) for some, why in zip(window, reasons, strict=True) if why for q in some]
        seen = [some for some, why in zip(window, reasons, strict=True) if not why]
        found = asked(answerer, torch.cat(videos), seen, prompts, jobs, batch) if videos else [[] for _ in jobs]
        for job, rows in zip(jobs, found, strict=True):
            rows += [row_of(v, None, why) for q, why in unread for v in job.variants(q)]
            new = [row for row in rows if job.is_open(row)]
            yield job, new
            bar.update(len(new))
    bar.close()


def asked(answerer, video, questions, prompts, jobs, batch):
    """Clips (B, T, 3, H, W) with the questions of each -> a list of rows per job; a job with nothing to do: [].

    prompts: of the questions in their own order, by key_of.
    """
    seeds = [clip_seed(some[0]["video"], some[0]["bound"]) for some in questions]
    seen, found = {}, []
    for job in jobs:
        if not any(job.open(some) for some in questions):
            found.append([])
            continue
        if job.control not in seen:                            # what is read of the clips is the same for all orders
            vision = answerer.watch(video, job.control, seeds)                                 # (B, N, C)
            tokens = None
            if not answerer.protocol.question_in_qformer:
                tokens = answerer.tokens(vision, job.control, seeds, [some[0] for some in questions])  # (B, Q, D)
            seen[job.control] = vision, tokens
        vision, tokens = seen[job.control]
        variants = [(v, clip) for clip, some in enumerate(questions) for q in some for v in job.variants(q)]
        todo = [(v, clip, prompts.get(key_of(v)) or answerer.prompt(v)) for v, clip in variants]
        todo.sort(key=lambda each: -len(each[2].ids))
        rows = []
        for i in range(0, len(todo), batch):
            some, clips, texts = zip(*todo[i:i + batch], strict=True)
            places, read = list(clips), tokens
            if tokens is None:                                 # then each question is a clip of its own
                read = answerer.tokens(vision[places], job.control, [seeds[clip] for clip in clips], some)
                places = list(range(len(some)))
            rows += [row_of(q, a) for q, a in zip(some, answerer.answer(some, read, places, texts), strict=True)]
        found.append(rows)
    return found


# --------------------------------------------------------------------------------------------------------- command line


def parse(argv=None):
    p = argparse.ArgumentParser(prog="mvbench.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(p)
    p.add_argument("--data", default="data/toy/mvbench", help="MVBench folder: json/ and video/ (default %(default)s)")
    p.add_argument("--tvbench", default="", metavar="DIR", help="TVBench's folder: its 10 tasks instead of MVBench's")
    p.add_argument("--out", default="", help="folder for the results (default CKPT/mvbench)")
    p.add_argument("--restart", action="store_true", help="forget what has been answered, and ask anew")
    p.add_argument("--only", default="", help='task names, separated by commas: "Action Count,State Change"')
    p.add_argument("--limit", type=int, default=0, help="only the first so many questions of each task")
    p.add_argument("--batch", type=int, default=32, help="clips, and questions, at a time (default %(default)s)")
    p.add_argument("--workers", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)),
                   help="processes that decode ahead (default %(default)s)")
    p.add_argument("--strict-data", action="store_true", help="stop at a medium that is missing or cannot be read")
    group = p.add_argument_group("controls: the same model, with less to go by")
    group.add_argument("--controls", default="", metavar="NAMES", help="all, or some, separated by commas: "
                       + "; ".join(f"{name}: {what}" for name, what in CONTROLS.items()))
    group.add_argument("--permute", action="store_true",
                       help="each question under all cyclic orders of its options: consistency and position bias")
    group = p.add_argument_group("protocol (the defaults are the paper's)")
    group.add_argument("--decode", choices=tuple(DECODES), default="generate",
                       help="; ".join(f"{name}: {what}" for name, what in DECODES.items()) + " (default %(default)s)")
    group.add_argument("--frames", type=int, default=0, help="frames of a clip (default: the preset's, 16)")
    group.add_argument("--no-system", action="store_true", help="without the system prompt (paper: 49.9 for 51.1)")
    group.add_argument("--no-answer-prompt", action="store_true",
                       help='without "Best option:(" before the answer (paper: 50.1)')
    group.add_argument("--question-in-qformer", action="store_true",
                       help="the Q-Former reads the question behind the system prompt (paper: 50.8)")
    group.add_argument("--norm", choices=tuple(NORMS), default="",
                       help="pixels: clip, as officially, or imagenet, as in training (default: the preset's)")
    args = p.parse_args(argv)
    args.out = args.out or str(Path(args.ckpt) / "mvbench")
    names = dict.fromkeys(name.strip() for name in args.controls.split(",") if name.strip())
    args.controls = list(CONTROLS) if "all" in names else list(names)
    unknown = sorted(set(args.controls) - set(CONTROLS))
    if unknown:
        p.error(f"--controls knows no {', '.join(unknown)}: choose among {', '.join(CONTROLS)}, or all")
    if args.no_answer_prompt and args.decode == "letter":
        p.error("--decode letter needs the answer prompt: the letter is looked for behind its bracket")
    if args.decode == "likelihood" and (args.question_in_qformer or args.no_answer_prompt):
        p.error("--decode likelihood shows nobody the options and has no answer prompt: leave out "
                "--question-in-qformer and --no-answer-prompt")
    if args.batch < 1 or args.limit < 0 or args.frames < 0 or args.workers < 0:
        p.error("--batch must be 1 or more, --limit, --frames and --workers 0 or more")
    return args


def suffix_of(args):
    """What the file names say of a run that is not the paper's protocol on the whole of MVBench: ".frames8.part"."""
    parts = {"tvbench": args.tvbench, args.decode: args.decode != "generate", f"frames{args.frames}": args.frames,
             "no-system": args.no_system, "no-answer-prompt": args.no_answer_prompt,
             "question-in-qformer": args.question_in_qformer, args.norm: args.norm, args.dtype: args.dtype,
             "int8": args.llm_int8, "part": args.only or args.limit}
    return "".join(f".{part}" for part, said in parts.items() if said)


def settings_of(args, cfg, record, digits):
    """Everything that an answer depends on, but the control: {what: value}."""
    return {
        "checkpoint": checkpoint_hash(args.ckpt), "LLM": (record["llm"] or {}).get("fingerprint"), "questions": digits,
        "frames": args.frames or cfg.eval_frames, "norm": args.norm or cfg.eval_norm,
        "system prompt": "" if args.no_system else SYSTEM, "asked for": QUESTION_PROMPT,
        "answer prompt": "" if args.no_answer_prompt else ANSWER_PROMPT,
        "question in the Q-Former": args.question_in_qformer, "decode": args.decode, "dtype": dtype_of(args),
        "8 bits": args.llm_int8}


def begin(args, cfg, record, rank):
    """-> (the questions that are meant, the jobs). By the first process: checks what is there, and says what is not.

    Controls that an earlier run has finished are jobs, too: they belong into the report.
    """
    tasks, root = (TVBENCH, args.tvbench) if args.tvbench else (TASKS, args.data)
    wanted = load_questions(root, [name.strip() for name in args.only.split(",") if name.strip()], args.limit, tasks)
    digits, version = describe(root, tasks)
    settings, jobs = settings_of(args, cfg, record, digits), []
    for control in ("", *CONTROLS, "permute"):
        predictions = Predictions(args.out, f"{'.' * bool(control)}{control}{suffix_of(args)}",
                                  {"control": control, **settings}, rank)
        chosen = control in ("", *args.controls) or control == "permute" and args.permute
        if chosen or predictions.is_of_these_settings():
            jobs.append(Job("" if control == "permute" else control, control == "permute", predictions, {}, chosen))
    if rank > 0:
        return wanted, jobs
    missing = missing_media(wanted, tasks)
    print("\n".join(missing), end="\n" * bool(missing), flush=True)
    if missing and args.strict_data:
        raise FileNotFoundError("media are missing, and --strict-data was said")
    if not any(q["media"] for q in wanted):
        raise FileNotFoundError(f"{root} holds none of the media that the questions speak of")
    for job in jobs:
        if job.chosen:
            job.predictions.begin(args.restart, {"commands": [report.command_line()], "version": version,
                                                 "checkpoint": str(args.ckpt), "data": str(root)})
        refuse_other_media(job, wanted)
    return wanted, jobs


def refuse_other_media(job, wanted):
    """ValueError if an answer is about another file than the one that lies there now."""
    sizes = {(q["task"], q["index"]): q["size"] for q in wanted if q["media"]}
    other = [row for key, row in job.predictions.read().items()
             if "unread" not in row and sizes.get(key[:2], row["size"]) != row["size"]]
    if other:
        raise ValueError(f"{job.predictions.path} speaks of other media: {len(other)} have another size now, the first "
                         f"being {other[0]['video']} of {other[0]['task']}; choose another folder by --out, or "
                         "--restart to ask anew")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return report.compare(argv[1:])
    args = parse(argv)
    world = init_distributed(device_of(args), gloo_only=True)
    args.device = world.device
    with lock_folder(args.out) if world.is_main else nullcontext():
        run(args, world)
    world.close()
    return 0


def run(args, world):
    """Asks what has not been answered, together with the other processes; the first one reports."""
    cfg, record = read_config(args.ckpt)
    problem = None
    try:
        wanted, jobs = begin(args, cfg, record, world.rank)
    except (ValueError, OSError) as error:
        problem = error
    raise_together(problem, world)
    for job in jobs:
        job.rows = job.predictions.read()
    world.barrier()                                            # nobody writes while others read
    questions = [q for q in wanted if q["media"]]
    jobs = [job for job in jobs if job.chosen or all(key_of(v) in job.rows for q in questions for v in job.variants(q))]
    left = sum(len(job.open(questions)) for job in jobs if job.chosen)
    times = {}
    if left:
        if world.is_main:
            print(f"{'TVBench' if args.tvbench else 'MVBench'}: {len(questions)} questions, "
                  f"{args.frames or cfg.eval_frames} frames, {sum(job.chosen for job in jobs)} way(s) of asking; "
                  f"{left} answers to come", flush=True)
        times = ask_all(args, questions, [job for job in jobs if job.chosen], world)
    begun = time.perf_counter()
    world.barrier()
    if left and world.size > 1:
        times["waiting for other processes"] = time.perf_counter() - begun
        times["in all"] += times["waiting for other processes"]
    if world.is_main:
        finish(args, wanted, questions, jobs, times, left)


def ask_all(args, questions, jobs, world):
    """Asks what is open, this process's part of it -> {part: seconds}."""
    begun = time.perf_counter()
    model, wordpiece, tok, autocast = load_from_args(args)
    if dtype_of(args) == "fp32" and not args.llm_int8:         # in fewer bits, the update would be rounded away
        merge_lora(model.llama_model)
    model.cfg = replace(model.cfg, eval_frames=args.frames or model.cfg.eval_frames,
                        eval_norm=args.norm or model.cfg.eval_norm)
    protocol = Protocol("" if args.no_system else SYSTEM, "" if args.no_answer_prompt else ANSWER_PROMPT,
                        args.question_in_qformer, args.decode)
    answerer, loaded = Engine(model, wordpiece, tok, protocol), time.perf_counter() - begun
    with autocast:
        for job, rows in evaluate(answerer, questions, jobs, args.batch, args.workers, world.rank, world.size,
                                  world.is_main):
            if args.strict_data and any("unread" in row for row in rows):
                raise ValueError(next(row["unread"] for row in rows if "unread" in row) + " (--strict-data)")
            job.predictions.write(rows)
    for job in jobs:
        job.predictions.close()
    whole = time.perf_counter() - begun
    parts = {"loading the model": loaded, **answerer.clock.seconds}
    return {**parts, "all else": whole - sum(parts.values()), "in all": whole}


def finish(args, wanted, questions, jobs, times, left):
    """Joins the files, scores, and writes the report."""
    keys = [[key_of(v) for q in questions for v in job.variants(q)] for job in jobs]
    rows = [job.predictions.merge(order) for job, order in zip(jobs, keys, strict=True)]
    plain = {job.control: some for job, some in zip(jobs, rows, strict=True) if not job.permuted}
    orders = next((plain[""] + some for job, some in zip(jobs, rows, strict=True) if job.permuted), None)
    first = jobs[0].predictions
    missing = missing_media(wanted, TVBENCH if args.tvbench else TASKS)
    summary = report.summarise(plain, wanted, orders, first, times, missing)
    report.write(summary, plain, first.out, suffix_of(args))
    report.show(summary)
    if left:
        print(f"\n{left} answers in {times['in all']:.0f} s, {left / times['in all']:.1f} per second: "
              + ", ".join(f"{part} {seconds:.1f} s" for part, seconds in times.items() if part != "in all"))
    else:
        print(f"\nAll had been answered before, nothing was asked; --restart asks anew. ({first.path})")
    print(f"written to {first.out}, to be looked at: {first.out / f'report{suffix_of(args)}.html'}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; what has been answered is kept, and the same command goes on", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"mvbench.py: {error}", file=sys.stderr)
        sys.exit(2)
