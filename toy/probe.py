"""Where does the toy stop understanding? Each part asked by itself, on the benchmark's clips.

    eye        the ViT under its teacher's heads: colour, shape and activity of covered patches, in percent
    bridge     stage 1's Q-Former says the caption: how many are right to the last word
    alike 1    cosine of its queries with one another: at 100 they have become one and the same
    voice      stage 2's LLM says the caption, from the queries it reads
    alike 2    cosine of what it reads
    reader     stage 0's LLM answers the questions with the true caption in the video's place

Whole captions are counted, not words: what a question asks for is a word or two of the caption, and nearly all of the
others are the same in every clip of the task. A task that is right in one column and wrong in the next shows the part
to look at. It trains and changes nothing; a part that a run has not reached stays empty. Source: ours; the heads are
standins.Teacher's.

Run:    python -m toy.probe --run runs/toy
"""
import argparse
import json
import random
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

from evaluation.engine import letter_ids
from evaluation.tasks import TASKS
from infra.files import load_strict, read_tensors
from prompt import (
    CAPTION_INSTRUCTIONS,
    IGNORE,
    caption_prompt,
    decode_answer,
    is_finished,
    mvbench_prompt,
    pad_batch,
)
from qagen import generate
from toy.draw import ACTIVITY_CLASSES, COLOUR_CLASSES, SHAPE_CLASSES, token_targets
from toy.pretrain import Teacher
from toy.scenarios import SCENARIOS
from toy.things import FPS, FRAMES, UNITS
from video import eval_frame_indices, load_eval_clip
from weights import checkpoint
from weights.hf_llama import load_llm

COLUMNS = ("colour", "shape", "activity", "bridge", "alike 1", "voice", "alike 2", "reader")


def benchmark_clips(data, count):
    """{task: its first `count` annotations}."""
    clips = {task.file: [] for task in TASKS}
    for line in open(Path(data) / "mvbench" / "annotations.jsonl"):
        clip = json.loads(line)
        if len(clips[clip["scenario"]]) < count:
            clips[clip["scenario"]].append(clip)
    return clips


def look(cfg, data, clips):
    """Annotations -> video (B, T, 3, H, W) as the benchmark reads it."""
    folder = Path(data) / "mvbench" / "video"
    return torch.stack([load_eval_clip(str(folder / clip["id"]), cfg) for clip in clips])


def frames_seen(task, count):
    """Frames of the simulation that the benchmark takes: a folder of JPEGs holds them at 3 per second, from 1 on."""
    if task == "episodic_reasoning":
        return [(i - 1) * FPS // 3 for i in eval_frame_indices(count, FRAMES * 3 // FPS, 3, first_idx=1)]
    return eval_frame_indices(count, FRAMES - 1, FPS)


def told(clip):
    return generate.caption_and_facts(SCENARIOS[clip["scenario"]], clip, random.Random(0))[0]


def alike(queries):
    """queries (B, Q, D) -> mean cosine of two queries of the same clip."""
    unit = torch.nn.functional.normalize(queries, dim=-1)                                      # (B, Q, D)
    n = queries.shape[1]
    return ((unit.sum(1).square().sum(-1) - n) / (n * n - n)).mean().item()


# Each part asked about one task: what its loader returned, the world's folder, the task, some clips -> its shares.


def load_teacher(folder):
    cfg, _ = checkpoint.read_config(folder)
    teacher = Teacher(cfg, [len(COLOUR_CLASSES), len(SHAPE_CLASSES), len(ACTIVITY_CLASSES)]).eval()
    load_strict(teacher, read_tensors(folder / "model.safetensors"), folder)
    return teacher, cfg


def eye(loaded, data, task, clips):
    """-> (colour, shape, activity): share of covered patches that are right."""
    teacher, cfg = loaded
    frames = frames_seen(task, cfg.eval_frames)
    targets = np.stack([token_targets(clip, UNITS // cfg.vit.grid, frames) for clip in clips])
    targets = torch.from_numpy(targets).long()                                                 # (B, T, L, 3)
    said = teacher.classify(look(cfg, data, clips))                                            # (B, T, L) each
    covered = targets[..., 1] > 0                                                              # (B, T, L)
    return [(said[i] == targets[..., i])[covered].float().mean().item() for i in range(3)]


def bridge(loaded, data, task, clips, longest=60):
    """-> share of captions that stage 1's Q-Former says right, word after most probable word; cosine of its queries."""
    model, wordpiece, _ = loaded
    vision = model.encode_video_stage1(look(model.cfg, data, clips))                                  # (B, N, C)
    query = model.query_tokens.expand(len(clips), -1, -1)                                      # (B, Q, E)
    hidden, past, _ = model.qformer(query, vision=vision, return_kv=True)                       # (B, Q, E)
    ids = torch.full((len(clips), 1), wordpiece.dec_id)                                        # (B, 1)
    for _ in range(longest):
        logits = model.qformer.caption_logits(ids, torch.ones_like(ids), past)                 # (B, S, V)
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    wanted = [wordpiece.encode(told(clip), longest)[1:] for clip in clips]
    said = [row[1:len(words) + 1] for row, words in zip(ids.tolist(), wanted, strict=True)]
    return np.mean([a == b for a, b in zip(said, wanted, strict=True)]), alike(hidden)


def voice(loaded, data, task, clips, longest=60):
    """-> share of captions that the LLM reads right out of stage 2's queries; cosine of these."""
    model, _, tok = loaded
    asked = caption_prompt(tok, "", model.cfg.n_query + model.cfg.n_extra, CAPTION_INSTRUCTIONS["video"][0])
    ids = [i for i, label in zip(asked.ids, asked.labels, strict=True) if label == IGNORE]
    ids = torch.tensor([ids] * len(clips))                                                     # (B, S)
    tokens = model.video_tokens(model.encode_video(look(model.cfg, data, clips)))                         # (B, Q, D)
    rows = model.llama_model.generate(model.insert_video_tokens(ids, tokens), None, longest, partial(is_finished, tok))
    return np.mean([decode_answer(tok, row) == told(clip) for row, clip in zip(rows, clips, strict=True)]), alike(tokens)


def reader(loaded, data, task, clips):
    """-> share of questions that the LLM answers right with the true caption in the video's place."""
    model, tok = loaded
    questions = json.loads((Path(data) / "mvbench" / "json" / f"{task}.json").read_text())[:len(clips)]
    prompts = []
    for clip, q in zip(clips, questions, strict=True):
        words = tok.encode(told(clip))
        prompts.append(mvbench_prompt(tok, q["question"], q["candidates"], len(words)))
        prompts[-1].fill(words)
    ids, _, mask = pad_batch(prompts, tok.eos_id, side="left")
    logits = model.lm_head(model(model.embed(ids), mask)[:, -1])                               # (B, V)
    return np.mean([q["candidates"][row[:len(q["candidates"])].argmax()] == q["answer"]
                    for q, row in zip(questions, logits[:, letter_ids(tok)], strict=True)]),


PARTS = {  # how a part is asked -> its folder in a run, how it is loaded, the columns that it fills
    eye: ("stage0/vit", load_teacher, COLUMNS[:3]),
    bridge: ("stage1", checkpoint.load_checkpoint, COLUMNS[3:5]),
    voice: ("stage2", checkpoint.load_checkpoint, COLUMNS[5:7]),
    reader: ("stage0/llm", load_llm, COLUMNS[7:]),
}


@torch.no_grad()
def probe(run, data, count):
    """-> {column: {task: share}} of the parts that the run has."""
    clips, table = benchmark_clips(data, count), {}
    for ask, (part, load, columns) in PARTS.items():
        folder = Path(run) / part
        if (folder / "config.json").is_file():
            print(f"asking the {ask.__name__} ...", file=sys.stderr)
            loaded = load(folder)
            shares = {task: ask(loaded, data, task, some) for task, some in clips.items()}
            table |= {name: {task: row[i] for task, row in shares.items()} for i, name in enumerate(columns)}
    return table


def print_row(title, shares):
    """shares: {column: share}; a column that is missing stays empty."""
    print(f"{title:26}" + "".join(f"{100 * shares[name]:10.0f}" if name in shares else f"{'':10}" for name in COLUMNS))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/toy", help="folder of the run (default runs/toy)")
    parser.add_argument("--data", default="data/toy", help="folder of the toy world (default data/toy)")
    parser.add_argument("--clips", type=int, default=20, help="clips of each task (default 20)")
    args = parser.parse_args(argv)
    table = probe(args.run, args.data, args.clips)
    print(f"{'':26}" + "".join(f"{name:>10}" for name in COLUMNS))
    for task in TASKS:
        print_row(task.name, {name: column[task.file] for name, column in table.items()})
    print_row("mean", {name: np.nanmean(list(column.values())) for name, column in table.items()})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"probe.py: {error}", file=sys.stderr)
        sys.exit(2)
