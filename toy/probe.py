"""Where does the toy stop understanding? Each part of a run is tested alone, on the benchmark's clips.

    vit              the ViT under its pretraining heads: colour, shape, activity of covered patches that are right
    qformer          stage 1's Q-Former writes the caption, the most probable word each time: right to the last word
    alike 1          cosine similarity of its queries with one another: at 100 they are all the same
    llm_from_video   stage 2's LLM writes the caption from the video tokens; alike 2: cosine similarity of these
    llm_from_text    the pretrained LLM answers the questions, with the true caption in the place of the video

All in percent. Captions count whole: nearly all words are the same in every clip of a task. A task that is right in one
column and wrong in the next shows which part to look at. A part that a run does not have stays empty.

    python -m toy.probe --run runs/toy
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
from infra.cli import run
from infra.files import load_strict, read_json, read_tensors
from prompt import CAPTION_INSTRUCTIONS, IGNORE, caption_prompt, decode_answer, is_finished, mvbench_prompt, pad_ids
from qagen.generate import caption_and_facts
from toy.draw import ACTIVITY_CLASSES, COLOUR_CLASSES, SHAPE_CLASSES, token_targets
from toy.pretrain_vit import PatchClassifier
from toy.scenarios import SCENARIOS
from toy.things import FPS, FRAMES, UNITS
from training.resume import TOY_INIT
from video import eval_frame_indices, load_eval_clip
from weights import checkpoint
from weights.hf_llama import load_llm

MAX_WORDS = 60    # of a caption

def read_benchmark(data, count):
    """-> {task: annotations of its first `count` clips}, each also with "path", "caption" and the question's fields."""
    folder, clips_of = Path(data) / "mvbench", {task.file: [] for task in TASKS}
    for clip in map(json.loads, open(folder / "annotations.jsonl")):
        clips_of[clip["scenario"]].append(clip)
    for task, clips in clips_of.items():
        del clips[count:]
        for clip, question in zip(clips, read_json(folder / "json" / f"{task}.json"), strict=False):
            caption, _ = caption_and_facts(SCENARIOS[task], clip, random.Random(0))
            clip |= question | {"path": str(folder / "video" / clip["id"]), "caption": caption}
    return clips_of

def load_videos(cfg, clips):
    return torch.stack([load_eval_clip(clip["path"], cfg) for clip in clips])                  # (B, T, 3, H, W)

def sampled_frames(task, count):
    """Frames of the simulation that the benchmark samples; a folder of JPEGs has them at 3 per second, from 1 on."""
    if task == "episodic_reasoning":
        return [(i - 1) * FPS // 3 for i in eval_frame_indices(count, FRAMES * 3 // FPS, 3, first_idx=1)]
    return eval_frame_indices(count, FRAMES - 1, FPS)

def alike(queries):
    """queries (B, Q, D) -> mean cosine similarity of two queries of the same clip."""
    unit, n = torch.nn.functional.normalize(queries, dim=-1), queries.shape[1]                 # (B, Q, D)
    return ((unit.sum(1).square().sum(-1) - n) / (n * n - n)).mean().item()

def probe_vit(folder, clips_of):
    cfg, _ = checkpoint.read_config(folder)
    vit = PatchClassifier(cfg, [len(COLOUR_CLASSES), len(SHAPE_CLASSES), len(ACTIVITY_CLASSES)]).eval()
    load_strict(vit, read_tensors(folder / "model.safetensors"), folder, dropped=("qformer.",))
    for task, clips in clips_of.items():
        patch, frames = UNITS // cfg.vit.grid, sampled_frames(task, cfg.eval_frames)
        targets = torch.tensor(np.stack([token_targets(clip, patch, frames) for clip in clips]))  # (B, T, L, 3)
        classes = [logits.argmax(-1) for logits in vit(load_videos(cfg, clips))[:3]]           # (B, T, L) each
        covered = targets[..., 1] > 0                                                          # (B, T, L)
        yield task, (torch.stack(classes, -1) == targets)[covered].float().mean(0).tolist()

def probe_qformer(folder, clips_of):
    model, qformer_tok, _ = checkpoint.load_checkpoint(folder)
    for task, clips in clips_of.items():
        vision = model.encode_video_stage1(load_videos(model.cfg, clips))                      # (B, N, C)
        query = model.query_tokens.expand(len(clips), -1, -1)                                  # (B, Q, E)
        hidden, kv, _ = model.qformer(query, vision=vision, return_kv=True)                    # (B, Q, E)
        ids = torch.full((len(clips), 1), qformer_tok.dec_id)                                  # (B, 1)
        for _ in range(MAX_WORDS):
            logits = model.qformer.caption_logits(ids, torch.ones_like(ids), kv)               # (B, S, V)
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
        captions = [qformer_tok.encode(clip["caption"], MAX_WORDS)[1:] for clip in clips]
        right = [row[1:len(words) + 1] == words for row, words in zip(ids.tolist(), captions, strict=True)]
        yield task, (np.mean(right), alike(hidden))

def probe_llm_from_video(folder, clips_of):
    model, _, tok = checkpoint.load_checkpoint(folder)
    prompt = caption_prompt(tok, "", model.cfg.n_query + model.cfg.n_extra, CAPTION_INSTRUCTIONS["video"][0])
    request = [i for i, label in zip(prompt.ids, prompt.labels, strict=True) if label == IGNORE]
    for task, clips in clips_of.items():
        tokens = model.video_tokens(model.encode_video(load_videos(model.cfg, clips)))         # (B, Q, D)
        embeds = model.insert_video_tokens(torch.tensor([request] * len(clips)), tokens)       # (B, S, D)
        rows = model.llama_model.generate(embeds, None, MAX_WORDS, partial(is_finished, tok))
        right = [decode_answer(tok, row) == clip["caption"] for row, clip in zip(rows, clips, strict=True)]
        yield task, (np.mean(right), alike(tokens))

def probe_llm_from_text(folder, clips_of):
    model, tok = load_llm(folder)
    for task, clips in clips_of.items():
        rows = []
        for clip in clips:
            prompt = mvbench_prompt(tok, clip["question"], clip["candidates"], n_video=1)
            rows.append(prompt.ids[:prompt.slot] + tok.encode(clip["caption"]) + prompt.ids[prompt.slot + 1:])
        ids, mask = pad_ids(rows, tok.eos_id, side="left")                                     # (B, S)
        logits = model.lm_head(model(model.embed(ids), mask)[:, -1])[:, letter_ids(tok)]       # (B, 5)
        right = [clip["answer"] == clip["candidates"][row[:len(clip["candidates"])].argmax()]
                 for clip, row in zip(clips, logits, strict=True)]
        yield task, (np.mean(right),)

PROBES = {  # a run's folder -> what yields (task, one share per column) from the part in it, the columns
    "init": (probe_vit, ("colour", "shape", "activity")),
    "stage1": (probe_qformer, ("qformer", "alike 1")),
    "stage2": (probe_llm_from_video, ("llm_from_video", "alike 2")),
    "llm": (probe_llm_from_text, ("llm_from_text",)),
}
COLUMNS = [column for _, columns in PROBES.values() for column in columns]

@torch.no_grad()
def probe(run_folder, data, count):
    """-> {column: {task: share}} of the parts that the run has."""
    clips_of, table = read_benchmark(data, count), {}
    for name, (probe_part, columns) in PROBES.items():
        folder = Path(run_folder) / name
        if name in ("init", "llm") and not folder.exists():                                    # it started from these
            folder = TOY_INIT.parent / name
        if (folder / "config.json").is_file():
            print(f"testing {folder} ...", file=sys.stderr)
            rows = dict(probe_part(folder, clips_of))
            table |= {column: {task: row[i] for task, row in rows.items()} for i, column in enumerate(columns)}
    return table

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/toy", help="folder of the run (default %(default)s)")
    parser.add_argument("--data", default="data/toy", help="folder of the toy world (default %(default)s)")
    parser.add_argument("--clips", type=int, default=20, help="clips of each task (default %(default)s)")
    args = parser.parse_args(argv)
    table = probe(args.run, args.data, args.clips)

    print(f"{'':26}" + "".join(f"{name:>16}" for name in COLUMNS))
    rows = {task.name: {name: shares[task.file] for name, shares in table.items()} for task in TASKS}
    rows["mean"] = {name: np.nanmean(list(shares.values())) for name, shares in table.items()}
    for title, shares in rows.items():
        print(f"{title:26}" + "".join(f"{100 * shares[c]:16.0f}" if c in shares else f"{'':16}" for c in COLUMNS))

if __name__ == "__main__":
    run(main, "toy.probe")
