"""How each stage is trained: every option with its default, and what a preset or stage does otherwise.

    command line -> parse -> TrainConfig -> recipe(stage) -> TrainConfig, complete

Defaults stand in TrainConfig and, where a stage or preset differs, in RECIPES: nowhere else. The command line is made
of the fields. Not here: sizes of the model (model.PRESETS), what a stage trains (stages.py), the loop (train.py).
Source: paper section 4 and table 10; official scripts' config files.

    python train.py --help
"""
import argparse
import os
import re
from dataclasses import MISSING, asdict, dataclass, field, fields

import torch

from model import DTYPES, PRESETS, Config


def option(default, text):
    return field(default=default, metadata={"help": text})


RECOMPUTE = ("vit", "qformer", "llm")
STANDINS = ("vit", "llm")    # what stage 0 trains, one after another


@dataclass
class TrainConfig:
    """Every option of the command line. A value of None or 0 is filled in from RECIPES."""
    stage: int = option(None, "0 stand-ins, 1 align, 2 connect, 3 instruction tuning")
    preset: str = option("toy", f"sizes and recipe: {', '.join(PRESETS)}")
    data: str = option("data/toy", "folder with corpus_caption.json and corpus_instruct.json (toyworld.py)")
    out: str = option("", "folder of the run (default runs/PRESET); stage N writes OUT/stageN")
    init: str = option("", "checkpoint to start from (default: the stage before, in OUT)")
    corpus: str = option("", "the stage's corpus file (default: the one in DATA)")
    llm: str = option("", "the LLM's folder, for stages 2 and 3 (default: the one that the stage before knows of)")
    steps: int = option(0, "optimizer steps; 0: epochs x batches")
    only: str = option("", f"stage 0 alone has parts, {' and '.join(STANDINS)}: train this one (default: both)")
    epochs: int = option(1, "passes over the data, where steps is 0; in one, each source of the corpus comes as often "
                            "as its weight says (0.5: a random half of it, 2: all of it twice)")
    batch: int = option(0, "clips per step, of all processes together")
    accumulate: int = option(1, "a step's clips are computed in so many parts, one after another: less memory")
    lr: float = option(0.0, "peak learning rate")
    lr_end: float = option(0.01, "the cosine ends at lr x lr_end")
    warmup: float = option(0.02, "share of the steps in which the learning rate rises from 0")
    hold: float = option(0.0, "share of the steps, warmup included, before the cosine begins to fall")
    muon: float = option(0.0, "above 0: Muon trains the layers' matrices, at so many times lr, AdamW the rest")
    lora_lr: float = option(1.0, "LoRA's matrices are trained at so many times lr")
    weight_decay: float = option(0.02, "on matrices only: not on biases, norms, queries, temperature")
    beta2: float = option(0.999, "AdamW's second beta")
    clip: float = option(1.0, "gradient norm is cut to this")
    max_bad_steps: int = option(10, "steps whose gradient is not finite are left out; so many in a row stop the run")
    global_negatives: bool = option(False, "matching (stage 1) draws negatives from all processes' clips, not its own")
    cache_features: bool = option(False, "what the ViT sees of a clip is kept on disk; stages 2, 3 then freeze it, too")
    captions_first: float = option(0.0, "share of stage 1's steps with the captioning loss alone, before all three")
    dtype: str = option("fp32", "fp32, bf16 or fp16: what computes, and what the frozen LLM is kept in")
    llm_int8: bool = option(False, "keep the frozen LLM's matrices in 8 bits: half of bf16's memory")
    device: str = option("", "cpu or cuda (default: cuda where there is one)")
    shard: bool = option(False, "under torchrun: cut weights and optimizer up among the processes (FSDP2), not DDP")
    recompute: str = option("", "of which blocks the backward pass computes the inside again, which saves memory: "
                                "vit, qformer, llm, or several, with commas")
    compile: bool = option(False, "torch.compile for the blocks of ViT, Q-Former and LLM: slow to begin, then faster")
    workers: int = option(1, "processes that decode ahead of the model; 0: none")
    seed: int = option(0, "the same seed gives the same run")
    log_every: int = option(20, "steps between two lines of the log")
    save_every: int = option(200, "steps between two checkpoints to go on from")
    keep: int = option(2, "how many of these are kept")
    resume: bool = option(True, "go on from the last checkpoint of an interrupted run")
    restart: bool = option(False, "train again from the start although OUT has a checkpoint of this stage")
    changes: dict = field(default_factory=dict)   # of the model's Config, by MODEL_OPTIONS


MODEL_OPTIONS = {  # fields of model.Config that the command line can change; the default is the preset's
    "train_frames": "frames of a clip in stages 2 and 3 (stage 2: 4 in the paper, 8 in its code)",
    "max_text": "tokens of a prompt in stages 2 and 3 (stage 2: 32 in the paper, 512 in its code)",
    "add_timestamps": "stage 3 says at which seconds a video's frames were taken",
    "flip": "mirror half of the training clips, as the official code does: what is left is then called right",
    "train_norm": "pixels in training: imagenet (as officially) or clip (as the official evaluation)",
    "bos_ones": "stage 3 puts ones in the place of <s>, as the official training does",
    "train_separators": "stage 3 learns ###Human: and ###Assistant: too, as officially",
    "question_in_qformer": "stage 3 tells the Q-Former instruction and question (paper: better without it)",
    "caption_sep": "stage 1 ends captions in [SEP], which the official code forgets",
    "repeat_image": "stage 1 repeats an image for each temporal embedding, as officially",
}

RECIPES = {  # preset -> stage -> what differs from TrainConfig's defaults; steps that are 0 follow from epochs
    "toy": {
        "vit": dict(steps=4000, batch=8, lr=1.5e-3, beta2=0.99, muon=1.0, log_every=100, save_every=1000),
        "llm": dict(epochs=18, batch=8, lr=1e-3, muon=1.0, hold=0.7, beta2=0.99, workers=0, log_every=100,
                    save_every=1000),
        1: dict(steps=3000, batch=8, lr=3e-4, muon=3.0, hold=0.5, beta2=0.99, captions_first=0.92, cache_features=True,
                log_every=100),
        2: dict(steps=3000, batch=8, lr=3e-4, hold=0.5, beta2=0.99, cache_features=True, log_every=100),
        3: dict(steps=5400, batch=8, lr=2e-4, lora_lr=6.0, hold=0.5, beta2=0.99, cache_features=True, log_every=100),
    },
    "micro": {stage: dict(steps=4, batch=4, lr=1e-3, muon=1.0, lora_lr=2.0, log_every=1, save_every=2, workers=0,
                          cache_features=True) for stage in (*STANDINS, 1, 2, 3)},
    "paper": {
        # stage 1 warms up for 0.2 of ten epochs in the official config, for a whole one in the paper
        1: dict(epochs=10, batch=2048, lr=1e-4, warmup=0.02, dtype="bf16", workers=8),
        2: dict(epochs=1, batch=512, lr=1e-4, warmup=0.2, dtype="bf16", workers=8),
        3: dict(epochs=3, batch=128, lr=2e-5, lr_end=0.25, warmup=0.2, dtype="bf16", workers=8),
    },
}


def parse(argv=None):
    """Command line -> (TrainConfig, names of the options that were given). Derived from the dataclass."""
    p = argparse.ArgumentParser(prog="train.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(TrainConfig)[:-1]:
        text = f.metadata["help"] + ("" if f.default in ("", None, 0, False) else f" (default {f.default})")
        kind = dict(type=f.type, metavar=f.name.upper())
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        p.add_argument("--" + f.name.replace("_", "-"), default=MISSING, help=text, **kind)
    group = p.add_argument_group("of the model, and of what the official code does oddly (default: the preset's)")
    kinds = {f.name: f.type for f in fields(Config)}
    for name, text in MODEL_OPTIONS.items():
        kind = dict(type=kinds[name], metavar=name.upper())
        if kinds[name] is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        group.add_argument("--" + name.replace("_", "-"), default=MISSING, help=text, **kind)
    given = {name: value for name, value in vars(p.parse_args(argv)).items() if value is not MISSING}
    cfg = TrainConfig(**{n: v for n, v in given.items() if n not in MODEL_OPTIONS},
                      changes={n: v for n, v in given.items() if n in MODEL_OPTIONS})
    if cfg.stage not in (0, 1, 2, 3):
        p.error("--stage must be 0, 1, 2 or 3")
    if cfg.preset not in PRESETS:
        p.error(f"--preset {cfg.preset} is unknown; there are {', '.join(PRESETS)}")
    if cfg.dtype not in DTYPES:
        p.error(f"--dtype {cfg.dtype} is unknown; there are {', '.join(DTYPES)}")
    if cfg.only and (cfg.stage or cfg.only not in STANDINS):
        p.error(f"--only {cfg.only}: expected {' or '.join(STANDINS)}, with --stage 0")
    if min(cfg.accumulate, cfg.keep, cfg.save_every, cfg.log_every, cfg.max_bad_steps) < 1:
        p.error("--accumulate, --keep, --save-every, --log-every and --max-bad-steps must be 1 or more")
    if min(cfg.steps, cfg.batch, cfg.lr, cfg.lr_end, cfg.weight_decay, cfg.workers, cfg.muon) < 0 or cfg.clip <= 0:
        p.error("--clip must be above 0; --steps, --batch, rates, --weight-decay and --workers 0 or more")
    if cfg.steps == 0 and cfg.epochs < 1 or not 0 <= cfg.warmup <= 1 or not 0 <= cfg.hold <= 1:
        p.error("--epochs must be 1 or more, --warmup and --hold shares between 0 and 1")
    if not re.fullmatch(r"(cpu|cuda(:\d+)?)?", cfg.device):
        p.error(f"--device {cfg.device}: expected cpu, cuda or cuda:N")
    unknown = sorted(set(filter(None, cfg.recompute.split(","))) - set(RECOMPUTE))
    if unknown:
        p.error(f"--recompute knows no {', '.join(unknown)}; there are {', '.join(RECOMPUTE)}")
    if cfg.shard and (not cfg.stage or cfg.dtype == "fp16" or cfg.llm_int8):
        p.error("--shard is for stages 1 to 3, in fp32 or bf16, without --llm-int8")
    if cfg.shard and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        p.error("--shard needs several processes: torchrun --nproc_per_node 2 train.py ...")
    cfg.restart = cfg.restart or not cfg.resume
    cfg.out = cfg.out or f"runs/{cfg.preset}"
    cfg.device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return cfg, set(given)


def recipe(cfg, given, stage):
    """cfg with what the stage's recipe says, except where the command line said otherwise."""
    recipes = RECIPES.get(cfg.preset, RECIPES["paper"])
    if stage not in recipes:
        raise ValueError(f"preset {cfg.preset} has no stage 0: its ViT and LLM come ready-made; bring them in by "
                         f"python -m weights.convert import --preset {cfg.preset} ... (see --help)")
    return TrainConfig(**{**asdict(cfg), **{k: v for k, v in recipes[stage].items() if k not in given}})
