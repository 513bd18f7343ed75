"""One loop for every stage: python train.py --stage N

    stage 0   stand-ins for what the real system takes ready-made: the video ViT (UMT-L) and the LLM (Vicuna)
    stage 1   align:    the Q-Former learns to see, with the ViT frozen            contrastive + matching + captioning
    stage 2   connect:  its queries become words of the frozen LLM                 captions
    stage 3   tune:     instructions, with LoRA in the LLM                         answers

What a stage trains, on which data and with which loss is a Job; fit() is the loop and knows none of it. Defaults are
in TrainConfig and, where a stage or preset differs, in RECIPES: nowhere else. It does not evaluate (mvbench.py) and
does not make data (toyworld.py). Source: paper section 4 and table 10; official tasks/train_{qformer,pt,it}.py.

Run:    python train.py --stage 1          # the toy preset; goes on where an interrupted run stopped
"""
import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import checkpoint
import data
import features
from annotations import load_corpus
from llama import Llama
from llm_folder import DTYPES, llm_config, write_llm
from media import Transform, train_indices
from model import PRESETS, Config, VideoChat2, lm_loss, set_trainable
from optim import learning_rate, make_optimizers, optimizer_step
from standins import School, Teacher, TeacherData, collate_teacher, collate_text, soft_embed, vocabulary
from storage import load_strictly, read_json, read_tensors, save_tensors, whole_folder
from tokenizer import SentencePiece, WordPiece

# ------------------------------------------------------------------------------------------------------------- options


def option(default, text):
    return field(default=default, metadata={"help": text})


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
    epochs: int = option(1, "passes over the data, where steps is 0")
    batch: int = option(0, "clips per step")
    lr: float = option(0.0, "peak learning rate")
    lr_end: float = option(0.01, "the cosine ends at lr x lr_end")
    warmup: float = option(0.02, "share of the steps in which the learning rate rises from 0")
    hold: float = option(0.0, "share of the steps, warmup included, before the cosine begins to fall")
    muon: float = option(0.0, "above 0: Muon trains the layers' matrices, at so many times lr, AdamW the rest")
    lora_lr: float = option(1.0, "LoRA's matrices are trained at so many times lr")
    weight_decay: float = option(0.02, "on matrices only: not on biases, norms, queries, temperature")
    beta2: float = option(0.999, "AdamW's second beta")
    clip: float = option(1.0, "gradient norm is cut to this")
    cache_features: bool = option(False, "what the ViT sees of a clip is kept on disk; stages 2, 3 then freeze it, too")
    captions_first: float = option(0.0, "share of stage 1's steps with the captioning loss alone, before all three")
    dtype: str = option("fp32", "fp32, bf16 or fp16: what computes, and what the frozen LLM is kept in")
    llm_int8: bool = option(False, "keep the frozen LLM's matrices in 8 bits: half of bf16's memory")
    device: str = option("", "cpu or cuda (default: cuda where there is one)")
    workers: int = option(1, "processes that decode ahead of the model; 0: none")
    seed: int = option(0, "the same seed gives the same run")
    log_every: int = option(20, "steps between two lines of the log")
    save_every: int = option(200, "steps between two checkpoints to go on from")
    restart: bool = option(False, "train again from the start although OUT has a checkpoint of this stage")
    changes: dict = field(default_factory=dict)   # of the model's Config, by MODEL_OPTIONS


MODEL_OPTIONS = {  # fields of model.Config that the command line can change; the default is the preset's
    "train_frames": "frames of a clip in stages 2 and 3 (stage 2: 4 in the paper, 8 in its code)",
    "max_text": "tokens of a prompt in stages 2 and 3 (stage 2: 32 in the paper, 512 in its code)",
    "tell_seconds": "stage 3 says at which seconds a video's frames were taken",
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
    cfg.out = cfg.out or f"runs/{cfg.preset}"
    cfg.device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return cfg, set(given)


def recipe(cfg, given, stage):
    """cfg with what the stage's recipe says, except where the command line said otherwise."""
    recipes = RECIPES.get(cfg.preset, RECIPES["paper"])
    if stage not in recipes:
        raise ValueError(f"preset {cfg.preset} has no stage 0: its ViT and LLM come ready-made; bring them in by "
                         f"python weights.py import --preset {cfg.preset} ... (see --help)")
    return TrainConfig(**{**asdict(cfg), **{k: v for k, v in recipes[stage].items() if k not in given}})


# ---------------------------------------------------------------------------------------------------------------- jobs


@dataclass
class Job:
    """What fit() trains: model, where batches come from, the loss, and how the result is written."""
    name: str                       # "stage 1", for the log
    folder: Path                    # where the checkpoint goes
    model: nn.Module
    dataset: object
    collate: Callable
    loss: Callable                  # batch, share of the steps done -> {name: scalar}, whose sum is minimised
    write: Callable                 # folder -> None: the checkpoint's files
    notes: list = field(default_factory=list)   # lines for the log's head
    generator: torch.Generator = None           # of the loss, where it draws (hard negatives)


def jobs(cfg, given):
    """The jobs of a stage, one after another: stage 0 has two."""
    for name in (cfg.only,) if cfg.only else STANDINS if cfg.stage == 0 else (cfg.stage,):
        make = {"vit": vit_job}.get(name, stage_job if cfg.stage else llm_job)
        yield make, name, recipe(cfg, given, name)


def corpus_file(cfg, name):
    """--corpus, or the file of this name in the data folder. FileNotFoundError says what it should be."""
    path = Path(cfg.corpus or Path(cfg.data) / name)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; " + (
            f"make the toy world by: python toyworld.py --out {cfg.data}" if cfg.preset in ("toy", "micro") else
            "it lists your annotation files (README, With the released weights): name it by --corpus, or its folder by "
            "--data"))
    return path


def clips(cfg, model_cfg, path, frames):
    """VideoTextData of one corpus file, with the model's frames and pixels."""
    transform = Transform(model_cfg.vit.img_size, train=True, crop=model_cfg.crop, norm=model_cfg.train_norm,
                          flip=model_cfg.flip)
    return data.VideoTextData(load_corpus(path), frames, transform, model_cfg.train_choice, seed=cfg.seed)


def toy_vocabulary(cfg):
    return vocabulary(Path(cfg.data) / "text.jsonl", Path(cfg.out) / "stage0" / "text")


def model_config(cfg):
    """The preset's Config; where the toy's vocabularies decide a size, it is filled in."""
    config = PRESETS[cfg.preset]()
    if not config.llama.vocab_size:
        sp, wp = toy_vocabulary(cfg)
        config.llama.vocab_size = SentencePiece(str(sp)).vocab_size
        config.qformer.vocab_size = WordPiece.load(wp).vocab_size
    return config


def vit_job(cfg, name):
    """Stage 0a: the video ViT learns what covers each patch."""
    config = model_config(cfg)
    _, vocab = toy_vocabulary(cfg)
    meta = read_json(Path(cfg.data) / "meta.json")
    targets = np.load(Path(cfg.data) / "targets.npy", mmap_mode="r")       # (clips, frames, L, 3)
    grid = (config.vit.img_size // config.vit.patch_size) ** 2
    if targets.shape[2] != grid:
        raise ValueError(f"{cfg.data}/targets.npy has {targets.shape[2]} patches a frame, preset {cfg.preset} {grid}; "
                         f"make the toy world again with --patch {48 * config.vit.patch_size // config.vit.img_size}")
    frames = train_indices(config.train_frames, targets.shape[1], config.train_choice)
    model = Teacher(config, [len(meta[key]) for key in ("colours", "shapes", "activities")])

    def write(folder):
        checkpoint.write_checkpoint(model.state_dict(), 0, config, folder, vocab)

    videos = clips(cfg, config, corpus_file(cfg, "corpus_clips.json"), config.train_frames)
    dataset = TeacherData(videos, targets, Path(cfg.data) / "annotations.jsonl", frames, epoch_size=100 * cfg.batch)
    return Job("stage 0 vit", Path(cfg.out) / "stage0" / "vit", model, dataset, collate_teacher,
               lambda batch, _: model.losses(batch), write)


def llm_job(cfg, name):
    """Stage 0b: the small LLaMA learns to read, without videos."""
    config = model_config(cfg)
    tokenizer_model, _ = toy_vocabulary(cfg)
    model = Llama(config.llama)
    text, tok = Path(cfg.data) / "text.jsonl", SentencePiece(str(tokenizer_model))
    dataset = School(text, tok, config.style, config.n_query + config.n_extra, epoch_size=300 * cfg.batch)

    def loss(batch, _):
        embeds = soft_embed(model, batch["ids"], batch["soft"])                # (B, S, D)
        return {"lm": lm_loss(model, model(embeds, batch["mask"]), batch["labels"])}

    def write(folder):
        write_llm(model, tokenizer_model, folder)

    return Job(f"stage 0 {name}", Path(cfg.out) / "stage0" / name, model, dataset, collate_text, loss, write)


FRESH = {1: ("query_tokens", "qformer.", "vision_temp_embed", "aligner.", "vision_layernorm."),  # begin at random
         2: ("extra_query_tokens", "llama_proj."), 3: ()}
DROPPED = {1: ("norm.", "heads."),                                       # stage 0's teacher heads
           2: ("aligner.", "vision_temp_embed", "qformer.cls."), 3: ()}  # stage 1's heads


def previous(cfg):
    """Folder of the checkpoint that a stage starts from. FileNotFoundError names the command that makes it."""
    made_here = STANDINS[0] in RECIPES.get(cfg.preset, RECIPES["paper"])   # else ViT and LLM come ready-made
    before = {1: "stage0/vit" if made_here else "init"}.get(cfg.stage, f"stage{cfg.stage - 1}")
    folder = Path(cfg.init or Path(cfg.out) / before)
    if not (folder / "config.json").is_file() or not finished(folder):
        state = "is not finished" if folder.is_dir() else "is missing"
        command = f"python train.py --stage {cfg.stage - 1} --preset {cfg.preset} --out {cfg.out}"
        if not made_here and cfg.stage == 1:
            command = f"python weights.py import --preset {cfg.preset} --out {folder} ... (see --help)"
        raise FileNotFoundError(f"stage {cfg.stage} starts from {folder}, which {state}; run: {command}")
    return folder


def finished(folder):
    """A checkpoint that train.py still works on has trainer.json with "done" false; one without it is whole."""
    path = Path(folder) / "trainer.json"
    return not path.is_file() or read_json(path)["done"]


def the_llm(cfg, start, known):
    """Folder of the LLM: --llm, or the one that the checkpoint `start` knows of, or the one that stage 0 made.

    Stage 1 does without, and passes on what is known.
    """
    if cfg.llm or not known:
        return Path(cfg.llm or Path(cfg.out) / "stage0" / "llm")
    try:
        return checkpoint.find_llm(start, known["path"])
    except FileNotFoundError:
        if cfg.stage > 1:
            raise
        return Path(known["path"])


def begun_with(cfg, folder):
    """The LLM of an unfinished run that goes on, or None."""
    goes_on = (folder / "config.json").is_file() and not cfg.restart
    return checkpoint.read_config(folder)[1]["llm"] if goes_on else None


def stage_job(cfg, stage):
    """Stages 1 to 3: the model of the stage, filled from the stage before, on captions or instructions."""
    start, folder = previous(cfg), Path(cfg.out) / f"stage{stage}"
    corpus = corpus_file(cfg, "corpus_instruct.json" if stage == 3 else "corpus_caption.json")
    config, found = checkpoint.read_config(start)
    if config.preset != cfg.preset:
        raise ValueError(f"{start} is of preset {config.preset}, not {cfg.preset}; choose another --preset or --init")
    preset, llm, tok = PRESETS[cfg.preset](), found["llm"], None
    config = replace(config, **{name: getattr(preset, name) for name in MODEL_OPTIONS} | cfg.changes)
    where = the_llm(cfg, start, llm)
    if stage == 2:                                                         # it may choose its LLM; stage 3 may not
        config.llama = replace(llm_config(where), init_std=config.llama.init_std,
                               checkpoint_layers=config.llama.checkpoint_layers)
    model = VideoChat2(config, stage, llm_later=True)
    load_strictly(model, read_tensors(start / "model.safetensors"), start,
                  fresh=FRESH[stage] + (checkpoint.LLM_PREFIX,), dropped=DROPPED[stage])
    if stage > 1:
        expected, needed_by = (llm, start) if stage == 3 else (begun_with(cfg, folder), folder)
        tok, llm = checkpoint.attach_llm(model, where, expected, needed_by, dtype=DTYPES[cfg.dtype], int8=cfg.llm_int8)
    elif llm:
        llm = llm | {"path": str(where)}
    llm = checkpoint.llm_record(llm, folder)
    wordpiece = WordPiece.load(start / "vocab.txt")
    generator = torch.Generator().manual_seed(cfg.seed)
    frames, collate, loss = stage_parts(cfg, stage, model, wordpiece, tok, generator)
    dataset = clips(cfg, config, corpus, frames)
    if cfg.cache_features:
        dataset.features = features.keep(model.vision_encoder, dataset, Path(cfg.out) / "features", cfg.device,
                                         cfg.workers)
    notes = [f"  {part:20} {total:>12,} parameters {trained:>12,} trained" for part, total, trained in
             set_trainable(model, stage, vit=not cfg.cache_features)]

    def write(unfinished):
        checkpoint.write_checkpoint(model.state_dict(), stage, config, unfinished, start / "vocab.txt", llm)

    return Job(f"stage {stage}", folder, model, dataset, collate, loss, write, notes, generator)


def stage_parts(cfg, stage, model, wordpiece, tok, generator):
    """What the stages differ in: (frames of a clip, collate, loss)."""
    config = model.cfg
    n_video = config.n_query + config.n_extra
    if stage == 1:
        return (config.align_frames, data.AlignCollate(wordpiece, config.align_text, config.caption_sep),
                lambda batch, done: model.align(batch, wordpiece.dec_id, generator, done < cfg.captions_first))
    if stage == 2:
        collate = data.CaptionCollate(tok, n_video, config.max_text)
        return config.train_frames, collate, lambda batch, _: {"lm": model.loss(batch)}
    collate = data.InstructCollate(
        tok, wordpiece, n_video, config.max_text, config.style, config.question_in_qformer, config.tell_seconds,
        config.train_separators, max_instruction=min(config.max_text, config.qformer.max_positions))
    return config.train_frames, collate, lambda batch, _: {"lm": model.loss(batch)}


# ------------------------------------------------------------------------------------------------------------- the loop


def fit(job, cfg):
    """Trains a job to the end; an interrupted one goes on where its last checkpoint stands."""
    model, kind = job.model.to(cfg.device).train(), torch.device(cfg.device).type
    optimizers = make_optimizers(model, cfg)
    sampler = data.Sampler(job.dataset, cfg.batch, seed=cfg.seed)
    torch.manual_seed(cfg.seed)
    cfg.steps = cfg.steps or cfg.epochs * len(sampler)
    scaler = torch.amp.GradScaler(kind, enabled=cfg.dtype == "fp16")  # without fp16 it does nothing
    first = 0 if cfg.restart else load_trainer(job, optimizers, scaler)
    sampler.skip_to(first)
    batches = data.make_loader(job.dataset, sampler, job.collate, cfg.workers)
    print(f"{job.name}: {cfg.steps} steps of {cfg.batch} from {len(job.dataset):,} samples, {cfg.dtype} on {cfg.device}"
          + (f", going on from step {first}" if first else ""), *job.notes, sep="\n", flush=True)
    log = Log(job, cfg, first)
    with StopSignal() as stop:
        for step, batch in zip(range(first, cfg.steps), forever(batches, sampler), strict=False):
            batch = to_device(batch, cfg.device)
            with torch.autocast(kind, DTYPES[cfg.dtype], enabled=cfg.dtype != "fp32"):
                losses = job.loss(batch, step / cfg.steps)
            total = sum(losses.values())
            scaler.scale(total).backward()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            optimizer_step(optimizers, learning_rate(step, cfg), scaler)
            log.step(step, total, losses, norm, batch)
            for line in batch["bad"]:
                log.bar.write(f"unreadable, another sample took its place: {line}")
            if step + 1 == cfg.steps:
                break
            if stop.number or (step + 1) % cfg.save_every == 0:
                save(job, optimizers, scaler, cfg, step + 1)
            if stop.number:
                print(f"\nstopped; the same command goes on from step {step + 1}")
                sys.exit(128 + stop.number)
    save(job, optimizers, scaler, cfg, cfg.steps)
    print(f"{job.name}: done in {log.minutes():.1f} min, written to {job.folder}", flush=True)


class StopSignal:
    """Within it, Ctrl-C and SIGTERM only set `number`, so that the step is finished and saved; a second
    Ctrl-C is not held.
    """

    number = 0

    def __enter__(self):
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, _):
        if self.number:
            raise KeyboardInterrupt
        self.number = number

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


def forever(loader, sampler):
    """Batches of one epoch after another."""
    while True:
        yield from loader
        sampler.next_epoch()


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


class Log:
    """One line per log_every steps, with the mean losses since the last one; the same numbers in metrics.jsonl."""

    def __init__(self, job, cfg, first):
        self.job, self.cfg, self.first, self.begun, self.last = job, cfg, first, time.time(), time.time()
        self.window = []                                                   # losses since the last line
        self.bar = tqdm(total=cfg.steps, initial=first, disable=not sys.stderr.isatty(), leave=False)
        self.path = Path(cfg.out) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def minutes(self):
        self.bar.close()
        return (time.time() - self.begun) / 60

    def step(self, step, total, losses, norm, batch):
        self.bar.update()
        self.window.append({k: v.detach() for k, v in {"loss": total, **losses}.items()})
        if (step + 1) % self.cfg.log_every and step + 1 < self.cfg.steps:
            return
        now = time.time()
        n = min(self.cfg.log_every, step + 1 - self.first)
        seconds = (now - self.last) / n
        self.last = now
        means = {k: torch.stack([row[k] for row in self.window if k in row]).mean().item() for k in ("loss", *losses)}
        self.window = []
        row = {"stage": self.job.name, "step": step + 1, **means, "lr": learning_rate(step, self.cfg),
               "grad": norm.item(), "ms": round(1000 * seconds, 1), "clips_per_s": round(self.cfg.batch / seconds, 1)}
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")
        parts = "".join(f" | {k} {means[k]:.3f}" for k in losses) if len(losses) > 1 else ""
        eta = (now - self.begun) / (step + 1 - self.first) * (self.cfg.steps - step - 1)
        self.bar.write(f"{self.job.name} | step {step + 1}/{self.cfg.steps} | loss {row['loss']:.3f}{parts} "
                       f"| lr {row['lr']:.1e} | grad {row['grad']:.2f} | {row['ms']:.0f} ms "
                       f"| {row['clips_per_s']} clips/s | eta {eta / 60:.1f}m", file=sys.stdout)
        sys.stdout.flush()


def save(job, optimizers, scaler, cfg, step):
    """Writes the checkpoint; while the stage is not done, what going on needs lies beside it."""
    done = step >= cfg.steps
    with whole_folder(job.folder) as folder:
        job.write(folder)
        state = {"done": done, "step": step, "options": asdict(cfg), "scaler": scaler.state_dict()}
        if not done:
            tensors = {f"optimizer.{n}.{i}.{k}": v for n, optimizer in enumerate(optimizers)
                       for i, state in optimizer.state_dict()["state"].items() for k, v in state.items()}
            tensors["random"] = torch.get_rng_state()
            if job.generator:
                tensors["generator"] = job.generator.get_state()
            save_tensors(tensors | {f"model.{n}": t for n, t in job.model.state_dict().items()
                                    if not checkpoint.is_frozen_llm(n)},
                         folder / "trainer.safetensors")
        (folder / "trainer.json").write_text(json.dumps(state, indent=2))


def load_trainer(job, optimizers, scaler):
    """Fills model, optimizer and generators from an unfinished checkpoint and returns its step; 0 if there is none."""
    path = job.folder / "trainer.json"
    if not path.is_file():
        return 0
    trainer = read_json(path)
    tensors = read_tensors(job.folder / "trainer.safetensors")
    weights = {n[6:]: t for n, t in tensors.items() if n.startswith("model.")}
    load_strictly(job.model, weights, job.folder, fresh=(checkpoint.LLM_PREFIX,))
    moments = [{} for _ in optimizers]
    for name, t in tensors.items():
        if name.startswith("optimizer."):
            _, n, i, key = name.split(".")
            if int(n) >= len(optimizers):
                raise ValueError(f"{job.folder} was begun with --muon; go on with it, or begin again by --restart")
            moments[int(n)].setdefault(int(i), {})[key] = t
    for optimizer, state in zip(optimizers, moments, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random"])
    scaler.load_state_dict(trainer["scaler"])
    if job.generator:
        job.generator.set_state(tensors["generator"])
    return trainer["step"]


def main(argv=None):
    cfg, given = parse(argv)
    for make, name, settings in jobs(cfg, given):
        torch.manual_seed(cfg.seed)                                        # of the initial weights
        job = make(settings, name)
        if finished(job.folder) and job.folder.is_dir() and not cfg.restart:
            print(f"{job.name}: already trained, in {job.folder} (--restart trains it again)")
            continue
        fit(job, settings)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped at once; what the last checkpoint holds is kept")
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
