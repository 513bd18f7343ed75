"""Where does the toy stop understanding? Each part asked by itself, on the benchmark's clips.

    eye        the ViT under its teacher's heads: colour, shape and activity of covered patches, in percent
    bridge     stage 1's Q-Former says the caption in its own words: how many stand where they should
    voice      stage 2's LLM says the caption, from the queries it reads
    reader     stage 0's LLM answers the questions with the true caption in the video's place

A task that is right in one column and wrong in the next shows the part to look at. It trains and changes nothing; a
part that a run has not reached stays empty. Source: ours; the heads are standins.Teacher's.

Run:    python probe.py --run runs/toy
"""
import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch

import checkpoint
import qagen
from media import Transform, mvbench_indices, read_benchmark_clip
from prompt import CAPTION_INSTRUCTIONS, IGNORE, caption_prompt, mvbench_prompt, pad_batch
from render import ACTIVITIES, COLOURS, FPS, FRAMES, SHAPES, UNITS, token_targets
from standins import Teacher

COLUMNS = ("colour", "shape", "activity", "bridge", "voice", "reader")


def benchmark_clips(data, count):
    """{task: its first `count` annotations}."""
    clips = {task: [] for task in qagen.TASKS}
    for line in open(Path(data) / "mvbench" / "annotations.jsonl"):
        clip = json.loads(line)
        if len(clips[clip["scenario"]]) < count:
            clips[clip["scenario"]].append(clip)
    return clips


def look(cfg, data, clips):
    """Annotations -> video (B, T, 3, H, W) as the benchmark reads it."""
    transform = Transform(cfg.vit.img_size, crop=cfg.crop, norm=cfg.eval_norm)
    paths = [Path(data) / "mvbench" / "video" / clip["id"] for clip in clips]
    return torch.stack([transform(read_benchmark_clip(str(path), cfg.eval_frames)) for path in paths])


def frames_seen(task, count):
    """Frames of the simulation that the benchmark takes: a folder of JPEGs holds them at 3 per second, from 1 on."""
    if qagen.TASKS[task].folder.startswith("tvqa"):
        return [(i - 1) * FPS // 3 for i in mvbench_indices(count, FRAMES * 3 // FPS, 3, first_idx=1)]
    return mvbench_indices(count, FRAMES - 1, FPS)


def eye(folder, data, clips):
    """-> {task: (colour, shape, activity)}: share of covered patches that are right."""
    cfg, _ = checkpoint.read_config(folder)
    teacher = Teacher(cfg, [len(COLOURS), len(SHAPES), len(ACTIVITIES)]).eval()
    checkpoint.load_strictly(teacher, checkpoint.read_tensors(folder / "model.safetensors"), folder)
    patch, found = UNITS // cfg.vit.grid, {}
    for task, some in clips.items():
        frames = frames_seen(task, cfg.eval_frames)
        targets = torch.from_numpy(np.stack([token_targets(clip, patch, frames) for clip in some])).long()
        said = teacher.classify(look(cfg, data, some))                                 # 3 x (B, T, L)
        covered = targets[..., 1] > 0                                                  # (B, T, L)
        found[task] = [(said[i] == targets[..., i])[covered].float().mean().item() for i in range(3)]
    return found


def in_place(said, wanted):
    """Share of the wanted words that stand where they should."""
    said, wanted = list(said), list(wanted)
    return sum(a == b for a, b in zip(said, wanted, strict=False)) / len(wanted)


def bridge(folder, data, clips, longest=60):
    """-> {task: share of word pieces in place} of what stage 1's Q-Former says, word after most probable word."""
    model, wordpiece, _ = checkpoint.load_model(folder)
    found = {}
    for task, some in clips.items():
        vision = model.vision_encoder(look(model.cfg, data, some)) + model.vision_temp_embed   # (B, T, L, C)
        vision = model.vision_layernorm(vision.flatten(1, 2))                                  # (B, N, C)
        query = model.query_tokens.expand(len(some), -1, -1)                                   # (B, Q, E)
        _, past = model.qformer(query, vision=vision, return_past=True)
        ids = torch.full((len(some), 1), wordpiece.dec_id)                                     # (B, 1)
        for _ in range(longest):
            logits = model.qformer.caption_logits(ids, torch.ones_like(ids), past)             # (B, S, V)
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
        wanted = [wordpiece.encode(qagen.caption(clip, random.Random(0)), longest)[1:] for clip in some]
        found[task] = np.mean([in_place(*pair) for pair in zip(ids[:, 1:].tolist(), wanted, strict=True)])
    return found


def voice(folder, data, clips, longest=60):
    """-> {task: share of words in place} of the caption that the LLM reads out of stage 2's queries."""
    model, _, tok = checkpoint.load_model(folder)
    asked = caption_prompt(tok, "", model.cfg.n_query + model.cfg.n_extra, CAPTION_INSTRUCTIONS["video"][0])
    ids = [i for i, label in zip(asked.ids, asked.labels, strict=True) if label == IGNORE]
    found = {}
    for task, some in clips.items():
        tokens = model.queries(model.encode(look(model.cfg, data, some)))                      # (B, Q, D)
        batch = torch.tensor([ids] * len(some))                                                # (B, S)
        rows, _ = model.answer(model.splice(batch, tokens), torch.ones_like(batch), longest,
                               lambda row: "###" in tok.decode(row[-6:]))
        said = [tok.decode(row).split("###")[0].split() for row in rows]
        wanted = [qagen.caption(clip, random.Random(0)).split() for clip in some]
        found[task] = np.mean([in_place(*pair) for pair in zip(said, wanted, strict=True)])
    return found


def reader(folder, data, clips):
    """-> {task: share of questions} that the LLM answers right with the true caption in the video's place."""
    model, tok = checkpoint.load_llm(folder)
    letters = [tok.encode(f"({letter}")[-1] for letter in "ABCDE"]
    found = {}
    for task, some in clips.items():
        questions = json.loads((Path(data) / "mvbench" / "json" / f"{task}.json").read_text())[:len(some)]
        prompts = []
        for clip, q in zip(some, questions, strict=True):
            words = tok.encode(qagen.caption(clip, random.Random(0)))
            prompt = mvbench_prompt(tok, q["question"], q["candidates"], len(words))
            prompt.ids[prompt.slot:prompt.slot + len(words)] = words
            prompts.append(prompt)
        ids, _, mask = pad_batch(prompts, tok.eos_id, side="left")
        _, logits = model.generate(model.embed(ids), mask, 1, first_logits=True)               # (B, V)
        found[task] = np.mean([q["candidates"][row[:len(q["candidates"])].argmax()] == q["answer"]
                               for q, row in zip(questions, logits[:, letters], strict=True)])
    return found


@torch.no_grad()
def probe(run, data, count):
    """-> {column: {task: share}} of the parts that the run has."""
    clips, table = benchmark_clips(data, count), {}
    for column, part, ask in (("eye", "stage0/vit", eye), ("bridge", "stage1", bridge), ("voice", "stage2", voice),
                              ("reader", "stage0/llm", reader)):
        folder = Path(run) / part
        if (folder / "config.json").is_file():
            print(f"asking the {column} ...", file=sys.stderr)
            table[column] = ask(folder, data, clips)
    if "eye" in table:
        seen = table.pop("eye")
        table |= {name: {task: three[i] for task, three in seen.items()} for i, name in enumerate(COLUMNS[:3])}
    return table


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/toy", help="folder of the run (default runs/toy)")
    parser.add_argument("--data", default="data/toy", help="folder of the toy world (default data/toy)")
    parser.add_argument("--clips", type=int, default=20, help="clips of each task (default 20)")
    args = parser.parse_args(argv)
    table = probe(args.run, args.data, args.clips)
    print(f"{'':26}" + "".join(f"{name:>10}" for name in COLUMNS))
    means = {name: {"mean": np.nanmean(list(column.values()))} for name, column in table.items()}
    for task in (*qagen.TASKS, "mean"):
        source = means if task == "mean" else table
        cells = [f"{100 * source[name][task]:10.0f}" if name in table else f"{'':10}" for name in COLUMNS]
        print(f"{qagen.TASKS[task].name if task in qagen.TASKS else 'mean':26}" + "".join(cells))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"probe.py: {error}", file=sys.stderr)
        sys.exit(2)
