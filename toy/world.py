"""The toy world on disk: training clips, captions, instructions, and a benchmark like MVBench.

    videos/00/00000.gif ...     clips: the 20 tasks in turn, then the playground
    annotations.jsonl           what happens in each of them
    captions.json, instructions.json, corpus_*.json     what stages 1 to 3 read, listed as data.py expects it
    mvbench/                    the benchmark in the official layout, and its clips' annotations
    with --texts, what toy.pretrain reads:
    text.jsonl                  documents for the language model
    targets.npy                 (clips, T, L, 3) uint8: the class of every patch, for the ViT

Every clip has its own random generator, so the bytes depend on the seed and not on the number of workers.
Not here: what happens in a clip (scenarios.py), its pictures (draw.py), how questions are made (qagen/generate.py).

    python -m toy.world --out data/toy --sheet sheet.png
"""
import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evaluation.tasks import TASKS
from infra.cli import add_options, option, read_options, run
from infra.files import atomic_folder, read_json, write_json
from qagen import generate
from toy import draw
from toy.scenarios import SCENARIOS
from toy.things import COLOURS, FPS, FRAMES, SHAPES, UNITS

PLAIN_BACKGROUNDS = ("light", "cream", "mist")
HELD_OUT = {("star", "red"), ("circle", "green"), ("cross", "blue"),
            ("triangle", "yellow"), ("square", "purple"), ("diamond", "orange")}  # training never shows these six

@dataclass
class WorldConfig:
    out: str = option("data/toy", "folder to write; it appears only when it is complete")
    clips: int = option(24000, "training clips: the tasks in turn, then the playground (an eighth; three with --texts)")
    questions: int = option(100, "questions for each task of the benchmark")
    texts: int = option(0, "documents without video, and the classes of all patches, for toy.pretrain; 0: neither")
    seed: int = option(0, "the same seed writes the same bytes")
    patch: int = option(12, "side of a patch that has classes; the world is 48 wide")
    workers: int = option(None, "processes; by default one for each core")
    sheet: str = option("", "also draw one question of each task into this PNG file")

to_line = json.JSONEncoder(separators=(",", ":")).encode

def cast(rng, split, n):
    """n (shape, colour) pairs, all shapes and all colours different; the first is the hero's, and the only one that may
    be held out: in half of the benchmark's clips (split "test"), never in training ("train")."""
    novel = split == "test" and rng.random() < 0.5
    while True:
        pairs = list(zip(rng.sample(SHAPES, n), rng.sample(COLOURS, n), strict=True))
        if ((pairs[0] in HELD_OUT) == novel) and not HELD_OUT.intersection(pairs[1:]):
            return pairs

def simulate(name, rng, split="train"):
    """One clip of a scenario -> its annotation, for JSON: "scenario", "duration" in seconds, "background" (a name per
    frame), "objects", "events" and more where the scenario needs it."""
    clip = SCENARIOS[name].simulate(rng, partial(cast, rng, split))
    clip = {"scenario": name, "duration": FRAMES / FPS, "background": [rng.choice(PLAIN_BACKGROUNDS)] * FRAMES} | clip
    for obj in clip["objects"]:  # a digit after the point is enough, and keeps the files small
        obj |= {track: [round(value, 1) for value in obj[track]] for track in ("x", "y", "size", "angle")}
    return clip

def clip_scenario(index, cfg):
    """Key of the scenario of training clip `index`: the tasks in turn, then the playground."""
    return TASKS[index % len(TASKS)].file if index < cfg.clips * (5 if cfg.texts else 7) / 8 else "playground"

def train_clip(index, out, cfg):
    """Write training clip `index` -> its line of annotations, caption entry, instruction entries, patch classes."""
    rng, video = random.Random(f"{cfg.seed}/train/{index}"), f"{index // 1000:02d}/{index:05d}.gif"
    name = clip_scenario(index, cfg)
    scenario, clip = SCENARIOS[name], {"id": video} | simulate(name, rng)
    draw.write_gif(draw.render(clip), out / "videos" / video)

    # stage 3 is for the tasks; it sees every second clip of the playground
    talks = []
    if name != "playground" or index % 2 == 0:
        talks = [{"video": video, "QA": turns} for turns in generate.conversations(scenario, clip, rng)]
    caption, _ = generate.caption_and_facts(scenario, clip, rng)
    targets = draw.token_targets(clip, cfg.patch) if cfg.texts else None                 # (T, L, 3)
    return to_line(clip), {"video": video, "caption": caption}, talks, targets

def text_document(index, out, cfg):
    """One line of text.jsonl: [caption, turns of a conversation, the same turns without options]."""
    rng = random.Random(f"{cfg.seed}/text/{index}")
    name = TASKS[3 * index // 4 % len(TASKS)].file if index % 4 else "playground"  # every fourth
    return json.dumps(generate.text_document(SCENARIOS[name], simulate(name, rng), rng))

def benchmark_task(task, out, cfg):
    """Write one task of the benchmark in the official layout -> the lines of its clips' annotations."""
    rng, entries, lines = random.Random(f"{cfg.seed}/test/{task.file}"), [], []
    folder, in_frames = out / "mvbench" / "video" / task.folder, task.folder.startswith("tvqa")
    folder.mkdir(parents=True, exist_ok=True)  # tasks share folders
    draw_clip = partial(simulate, task.file, rng, "test")
    for clip, choice in generate.benchmark(SCENARIOS[task.file], cfg.questions, draw_clip, rng):
        # a random name: a file's name must not give away the answer
        name = f"{rng.getrandbits(48):012x}" + ("" if in_frames else ".gif")
        write = draw.write_frames if in_frames else draw.write_gif
        write(draw.render(clip), folder / name)
        entries.append({"video": name, **choice} | ({"start": 0.0, "end": clip["duration"]} if task.bound else {}))
        lines.append(to_line({"id": f"{task.folder}/{name}", **clip}))
    write_json(entries, out / "mvbench" / "json" / f"{task.file}.json", indent=1)
    return lines

def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))

def write_world(out, cfg, pool):
    """Everything but meta.json into the folder `out`."""
    def parallel_map(function, values, title, chunk=32):
        results = pool.imap(partial(function, out=out, cfg=cfg), values, chunk)
        return tqdm(results, title, len(values), disable=None)                            # a bar on terminals only

    # training clips
    for i in range(-(-cfg.clips // 1000)):                                                # a thousand files per folder
        (out / "videos" / f"{i:02d}").mkdir(parents=True)
    results = parallel_map(train_clip, range(cfg.clips), "clips")
    lines, captions, talks, targets = zip(*results, strict=True)
    write_lines(out / "annotations.jsonl", lines)

    # what the stages read, and the corpus files that list it
    instructions = [entry for entries in talks for entry in entries]
    for corpus, name, entries in (("caption", "captions", captions), ("instruct", "instructions", instructions)):
        write_json(entries, out / f"{name}.json", indent=1)
        write_json([[f"{name}.json", "videos", "video"]], out / f"corpus_{corpus}.json", indent=1)

    # what toy.pretrain reads, and the benchmark
    if cfg.texts:
        np.save(out / "targets.npy", np.stack(targets))                                   # (clips, T, L, 3)
        write_lines(out / "text.jsonl", parallel_map(text_document, range(cfg.texts), "texts"))
    lines = sum(parallel_map(benchmark_task, TASKS, "benchmark", 1), [])
    write_lines(out / "mvbench" / "annotations.jsonl", lines)

def build(cfg):
    """Write a world into cfg.out, whole or not at all -> False if it is there; FileExistsError if something else is."""
    # impossible settings
    settings = {name: getattr(cfg, name) for name in ("clips", "questions", "texts", "seed", "patch")}
    for name, value in settings.items():
        if value < (least := int(name not in ("seed", "texts"))):
            raise ValueError(f"--{name} {value}: expected {least} or more")
    if UNITS % cfg.patch:
        raise ValueError(f"--patch {cfg.patch}: expected a divisor of {UNITS}, the width of the world")

    # a folder that is there already
    out = Path(cfg.out)
    if out.exists():
        existing = read_json(out / "meta.json")["settings"] if (out / "meta.json").is_file() else "no toy world"
        if existing == settings:
            return False
        raise FileExistsError(f"{out} exists: {existing}; expected {settings}. Choose another --out or delete it")

    # a build that was killed has left its folder
    for path in out.parent.glob(f".{out.name}.*.partial"):
        shutil.rmtree(path, ignore_errors=True)

    # workers ignore Ctrl-C: the parent catches it, ends them and deletes the unfinished folder
    ignore_ctrl_c = signal.signal, (signal.SIGINT, signal.SIG_IGN)
    with atomic_folder(out) as part, Pool(cfg.workers or os.cpu_count(), *ignore_ctrl_c) as pool:
        write_world(part, cfg, pool)
        write_json({"settings": settings, "frames": FRAMES, "fps": FPS, "units": UNITS, "pixels": draw.PIXELS,
                    "colours": draw.COLOUR_CLASSES, "shapes": draw.SHAPE_CLASSES,
                    "activities": draw.ACTIVITY_CLASSES, "held_out": sorted(HELD_OUT)}, part / "meta.json", indent=1)
    return True

def record(settings, count=500):
    """What identifies a world, for JSON: its settings, and a hash of its first documents and training clips."""
    cfg, digest = WorldConfig(**settings), hashlib.sha256()
    for index in range(count):
        name, rng = clip_scenario(index, cfg), random.Random(f"{cfg.seed}/train/{index}")
        digest.update((text_document(index, None, cfg) + to_line(simulate(name, rng))).encode())
    return {"settings": settings, "sha256": digest.hexdigest()}

def sheet_rows(seed=0):
    """A question of each task for the contact sheet: (title, annotation, question)."""
    for task in TASKS:
        rng = random.Random(f"{seed}/sheet/{task.file}")
        draw_clip = partial(simulate, task.file, rng, "test")
        ((clip, choice),) = generate.benchmark(SCENARIOS[task.file], 1, draw_clip, rng, trials=1)
        yield task.name, clip, choice

def main(argv=None):
    parser, start = argparse.ArgumentParser(description=__doc__.split("\n")[0]), time.monotonic()
    add_options(parser, WorldConfig)
    cfg, _ = read_options(parser, WorldConfig, argv)
    is_new = build(cfg)
    if cfg.sheet:
        draw.contact_sheet(list(sheet_rows(cfg.seed)), cfg.sheet)
    print(f"{cfg.out}: " + (f"written in {time.monotonic() - start:.0f} s" if is_new else "already there"))

if __name__ == "__main__":
    run(main, "toy.world", "stopped; nothing was written")
