"""MVBench: 20 kinds of multiple-choice questions that no single frame answers, asked by the paper's protocol.

answer_one is the definition: 16 frames, the ViT and the Q-Former, a prompt that ends in "Best option:(", greedy
generation, the first line of the answer. The rest of the file asks all questions: the same answers, many times faster.

A score alone does not show that a model watches the video: --controls all asks it without video, with one frame, and
with the frames in another order. OUT/report.html (default: CKPT/mvbench) shows the scores, their intervals, four
scorers, and how often each letter is chosen. Answers are on disk at once (predictions*.jsonl), so a run can resume.

    python mvbench.py --ckpt runs/toy/stage3 --controls all
    torchrun --nproc_per_node 8 mvbench.py --ckpt ...          # the same answers, from 8 processes
    python mvbench.py compare RUN_A RUN_B                      # which of two runs is better, and is it luck?

Not here: batches, questions, what counts as right, what a score is worth (evaluation/engine.py, tasks.py, scorers.py,
stats.py). Source: paper section 3 and table 2; official mvbench.ipynb, infer_mvbench.
"""
import argparse
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from evaluation import report
from evaluation.batches import evaluate
from evaluation.engine import Engine
from evaluation.predictions import Condition, key_of
from evaluation.protocol import CONTROLS, DECODES, Protocol
from evaluation.tasks import BENCHMARKS, describe, load_questions, missing_media
from infra import cli
from infra.cli import option
from infra.distributed import init_distributed, raise_together
from infra.files import lock_folder
from lora import merge_lora
from prompt import ANSWER_PROMPT, QUESTION_PROMPT, SYSTEM, decode_answer, is_finished, mvbench_prompt
from video import NORMS, load_eval_clip
from weights.checkpoint import add_model_options, checkpoint_hash, device_of, dtype_of, load_from_args, read_config

@torch.inference_mode()
def answer_one(model, qformer_tok, llm_tok, q, protocol):
    """The model's answer to one question of evaluation.tasks.load_questions, such as "(B) It jumps."."""
    cfg, device = model.cfg, model.device

    # the video: 16 frames, each from the middle of one of 16 equal parts, resized and normalised for the ViT
    video = load_eval_clip(q["media"], cfg, q["bound"], q.get("fps"))[None].to(device)  # (1, T, 3, H, W)

    # the ViT turns N patches into features, the Q-Former turns these into Q = 96 tokens for the LLM. The Q-Former reads
    # the system prompt too, but not the question: with it, the paper's score is 0.3 points lower (table 11)
    vision = model.encode_video(video)                                                  # (1, N, C)
    instruction = qformer_tok.encode(protocol.instruction(q), sep=True)                 # S ids
    video_tokens = model.video_tokens(vision, torch.tensor([instruction], device=device))   # (1, Q, D)

    # the LLM reads the system prompt, the video, the question and its options, and "Best option:(": so the next token
    # is the letter of an option. Without this ending, the paper's score is 1.0 point lower (table 9)
    prompt = mvbench_prompt(llm_tok, q["question"], q["candidates"], video_tokens.shape[1], protocol.system,
                            protocol.answer_prompt, cfg.prompt_style)
    embeds = model.insert_video_tokens(torch.tensor([prompt.ids], device=device), video_tokens)     # (1, S, D)

    # the LLM answers greedily, until it writes ### or </s>; the first line of the answer counts
    room = cfg.llama.max_positions - len(prompt.ids) + 1       # the last token is not read again
    (new_ids,) = model.llama_model.generate(embeds, max_new_tokens=min(protocol.max_new_tokens, room),
                                            stop=partial(is_finished, llm_tok))
    return protocol.opening + decode_answer(llm_tok, new_ids).split("\n")[0].rstrip()

# --------------------------------------------------------------------------------------------------------- the options

QUESTIONS, PROTOCOL, RUN = "questions", "protocol (the defaults are the paper's)", "run"         # the groups of --help
CONTROL = "controls: the same model with less to go by"

def listed(table):
    return "; ".join(f"{name}: {what}" for name, what in table.items())

@dataclass
class EvalConfig:
    """Every option of the command line. Those without a text load the model: weights.checkpoint.add_model_options."""
    ckpt: str                       # a checkpoint of stage 2 or 3
    llm: str = ""                   # the folder of its LLM, if it has moved
    device: str = ""                # default: cuda where there is one
    dtype: str = ""                 # default: bf16 on a GPU, fp32 on the CPU
    llm_int8: bool = False          # the frozen LLM's matrices in 8 bits

    benchmark: str = option("mvbench", "the benchmark whose questions are asked", QUESTIONS, tuple(BENCHMARKS))
    data: str = option("data/toy/mvbench", "the benchmark's folder, which holds json/ and video/", QUESTIONS)
    tvbench: str = option("", "TVBench's folder; short for --benchmark tvbench --data TVBENCH", QUESTIONS)
    only: str = option("", 'names of tasks, separated by commas: "Action Count,State Change"', QUESTIONS)
    limit: int = option(0, "ask only the first LIMIT questions of each task", QUESTIONS)
    strict_data: bool = option(False, "stop at a medium that is missing or cannot be read", QUESTIONS)

    frames: int = option(0, "frames of a clip (default: the preset's; paper: 16)", PROTOCOL)
    norm: str = option("", "mean and deviation of pixels: clip, as in the official evaluation, or imagenet, as in "
                       "training (default: the preset's)", PROTOCOL, tuple(NORMS))
    system: bool = option(True, "the system prompt (paper: 51.1 with it, 49.9 without)", PROTOCOL)
    answer_prompt: bool = option(True, 'end the prompt in "Best option:(" (paper: 50.1 without)', PROTOCOL)
    question_in_qformer: bool = option(False, "the Q-Former reads the question too (paper: 50.8)", PROTOCOL)
    decode: str = option("generate", listed(DECODES), PROTOCOL, tuple(DECODES))

    controls: str = option("", f"all, or names separated by commas; {listed(CONTROLS)}", CONTROL)
    permute: bool = option(False, "ask each question in all cyclic orders of its options: are the answers consistent, "
                           "and which letters are preferred?", CONTROL)

    out: str = option("", "folder of the results (default: CKPT/mvbench)", RUN)
    restart: bool = option(False, "delete the answers of an earlier run and ask again", RUN)
    batch: int = option(32, "clips, and questions, that are computed together", RUN)
    workers: int = option(max(1, min(8, (os.cpu_count() or 1) // 2)), "processes that decode ahead", RUN)

    @property
    def protocol(self):
        return Protocol(SYSTEM if self.system else "", ANSWER_PROMPT if self.answer_prompt else "",
                        self.question_in_qformer, self.decode)

    @property
    def setting(self):
        """What differs from the paper's protocol on all of MVBench, as the name of a folder: "", or "frames8.part"."""
        parts = {self.benchmark: self.benchmark != "mvbench", self.decode: self.decode != "generate",
                 f"frames{self.frames}": self.frames, "no-system": not self.system,
                 "no-answer-prompt": not self.answer_prompt, "question-in-qformer": self.question_in_qformer,
                 self.norm: self.norm, self.dtype: self.dtype, "int8": self.llm_int8, "part": self.only or self.limit}
        return ".".join(part for part, differs in parts.items() if differs)

def parse(argv=None):
    """Command line -> EvalConfig. Exits with code 2 for options that contradict each other."""
    p = argparse.ArgumentParser("mvbench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(p)
    cli.add_options(p, EvalConfig)
    args, _ = cli.read_options(p, EvalConfig, argv)

    # options that stand for others
    if args.tvbench:
        args.benchmark, args.data = "tvbench", args.tvbench
    args.out = args.out or str(Path(args.ckpt) / "mvbench")
    names = split_names(args.controls)
    args.controls = ",".join(CONTROLS if "all" in names else names)

    # options that contradict each other, or have no meaning
    if unknown := sorted(set(names) - {*CONTROLS, "all"}):
        p.error(f"--controls knows no {', '.join(unknown)}: choose among {', '.join(CONTROLS)}, or all")
    if args.decode == "letter" and not args.answer_prompt:
        p.error("--decode letter needs the answer prompt: the letter is the token after its bracket")
    if args.decode == "likelihood" and (args.question_in_qformer or not args.answer_prompt):
        p.error("--decode likelihood shows no options and has no answer prompt: leave out --question-in-qformer and "
                "--no-answer-prompt")
    if args.batch < 1 or min(args.limit, args.frames, args.workers) < 0:
        p.error("--batch must be 1 or more, --limit, --frames and --workers 0 or more")
    return args

def split_names(text):
    """"a, b" -> ["a", "b"], each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))

# ------------------------------------------------------------------------------------------------------------- a run

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return report.compare(argv[1:])                                # two runs that are finished
    args = parse(argv)
    dist = init_distributed(device_of(args), gloo_only=True)
    args.device = dist.device                                          # this process's GPU

    # a second run in the same folder is refused, by all of its processes
    with ExitStack() as stack:
        with raise_together(dist):
            if dist.is_main:
                stack.enter_context(lock_folder(args.out))
        run(args, dist)
    dist.close()
    return 0                                                           # the exit code

def run(args, dist):
    """Asks what has no answer yet, together with the other processes; the first one writes the report."""
    # the first process prepares the files, and all have read them before anybody writes
    with raise_together(dist):
        questions, conditions = prepare(args, dist)
    for condition in conditions:
        condition.rows = condition.read()                              # answers of earlier runs, by every process
    dist.barrier()

    # conditions of earlier runs belong in the report if they cover all questions of this one
    benchmark, with_media = BENCHMARKS[args.benchmark], [q for q in questions if q["media"]]
    conditions = [c for c in conditions
                  if c.requested or all(key_of(v) in c.rows for q in with_media for v in c.variants(q))]
    requested = [condition for condition in conditions if condition.requested]
    n_todo, seconds = sum(len(condition.todo(with_media)) for condition in requested), {}
    if n_todo and dist.is_main:
        print(f"{benchmark.name}: {len(with_media)} questions, {len(requested)} condition(s), {n_todo} answers to come",
              flush=True)
    if n_todo:
        seconds = answer_all(args, with_media, requested, dist)        # by part: loading, reading, the ViT, ...
    if not dist.is_main:
        return

    # one file for each condition, and the report
    rows = {c.name: c.merge([key_of(v) for q in with_media for v in c.variants(q)]) for c in conditions}
    summary = report.summarise(rows, questions, conditions[0], benchmark, seconds)
    report.write(summary, rows, conditions[0].folder, benchmark.leaderboard and not (args.only or args.limit))
    report.show(summary)                                               # on the console
    if n_todo:
        parts = ", ".join(f"{part} {s:.1f} s" for part, s in seconds.items() if part != "in all")
        print(f"\n{n_todo} answers in {seconds['in all']:.0f} s, {n_todo / seconds['in all']:.1f} per second: {parts}")
    else:
        print(f"\nEverything was answered before; --restart asks again. ({conditions[0].path})")
    print(f"written to {conditions[0].folder}; open {conditions[0].folder / 'report.html'}")

def prepare(args, dist):
    """-> (questions, also those without media; conditions). The first process checks files."""
    benchmark = BENCHMARKS[args.benchmark]
    questions = load_questions(args.data, split_names(args.only), args.limit, benchmark)

    # what an answer depends on, besides its condition
    cfg, record = read_config(args.ckpt)                               # record: which LLM it needs, by its fingerprint
    fingerprint, version = describe(args.data, benchmark)
    settings = {
        "checkpoint": checkpoint_hash(args.ckpt), "LLM": (record["llm"] or {}).get("fingerprint"),
        "questions": fingerprint, "frames": args.frames or cfg.eval_frames, "norm": args.norm or cfg.eval_norm,
        "system prompt": args.protocol.system, "question prompt": QUESTION_PROMPT,
        "answer prompt": args.protocol.answer_prompt, "question in the Q-Former": args.question_in_qformer,
        "decode": args.decode, "dtype": dtype_of(args), "int8": args.llm_int8}

    # the conditions that are requested, and those that an earlier run has finished
    requested = {"", *split_names(args.controls), *["permute"] * args.permute}  # "": the protocol itself
    conditions = [Condition(Path(args.out) / args.setting, name, {"control": name, **settings}, dist.rank,
                            name in requested) for name in ("", *CONTROLS, "permute")]
    conditions = [condition for condition in conditions if condition.requested or condition.is_finished()]
    if not dist.is_main:
        return questions, conditions

    # missing media are reported before anything is computed, and so are files that do not fit
    if missing := missing_media(questions, benchmark):
        print(*missing, sep="\n", flush=True)
        if args.strict_data:
            raise FileNotFoundError("media are missing (see above), and --strict-data stops at that")
    if not any(q["media"] for q in questions):
        raise FileNotFoundError(f"{args.data} holds none of the media that its questions are about (see above)")
    for condition in conditions:
        if condition.requested:
            condition.prepare(args.restart, {"commands": [report.command_line()], "version": version,
                                             "checkpoint": args.ckpt, "data": args.data})
        condition.check_media(questions)
    return questions, conditions

def answer_all(args, questions, conditions, dist):
    """Loads the model and answers this process's share of what is open -> {part: seconds}."""
    start = time.perf_counter()
    model, qformer_tok, llm_tok, autocast = load_from_args(args)
    if dtype_of(args) == "fp32" and not args.llm_int8:         # with fewer bits, rounding would lose LoRA's update
        merge_lora(model.llama_model)

    # options that change what load_eval_clip gives the model
    model.cfg = replace(model.cfg, eval_frames=args.frames or model.cfg.eval_frames,
                        eval_norm=args.norm or model.cfg.eval_norm)
    engine = Engine(model, qformer_tok, llm_tok, args.protocol)
    seconds = {"loading the model": time.perf_counter() - start}

    # the rows of a batch are on disk before the next batch is computed
    scorer = BENCHMARKS[args.benchmark].scorer
    with autocast:
        for condition, rows in evaluate(engine, questions, conditions, args.batch, args.workers, dist, scorer):
            if args.strict_data and (unread := [row["unread"] for row in rows if "unread" in row]):
                raise ValueError(f"{unread[0]} (--strict-data)")
            condition.write(rows)

    # the time that is not accounted for goes to "all else"
    seconds |= engine.seconds
    seconds["all else"] = time.perf_counter() - start - sum(seconds.values())
    if dist.size > 1:
        with engine.clock("waiting for other processes"):
            dist.barrier()                                             # only to measure how long they take
    return {**seconds, **engine.seconds, "in all": time.perf_counter() - start}

if __name__ == "__main__":
    cli.run(main, "mvbench.py", "stopped; the answers so far are saved, and the same command resumes")
