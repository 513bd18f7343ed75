"""The three training stages of VideoChat2, and the loop that trains each of them: python train.py --stage N

    stage        what trains                               data          loss                        paper's rate
    1 align      Q-Former, 32 queries, the losses' heads   captions      VTC + VTM + VTG             1e-4
    2 connect    ViT, Q-Former, 96 queries, projection     captions      next token of the caption   1e-4
    3 instruct   the same, and LoRA in the frozen LLM      instructions  next token of the answers   2e-5

Each starts from the one before: OUT/init -> OUT/stage1 -> OUT/stage2 -> OUT/stage3. OUT/init is what the paper takes
ready-made, ViT and BERT: `python -m weights.convert import` makes it of the official files, `python -m toy.pretrain`
trains the toy's. Not here: the losses (qformer.py, model.py), batches (data.py), optimizers and resuming (training/).
Source: paper section 4, table 10; official tasks/train_{qformer,pt,it}.py.

    python train.py --stage 1                              # the toy; resumes where it stopped
    torchrun --nproc_per_node 8 train.py --stage 1 --preset vicuna-7b --data ... --out ...
"""
import argparse
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch

import data
from infra.cli import add_options, option, read_options, run
from infra.distributed import blocks_of, init_distributed, set_gradient_sync, sync_unsharded_grads, wrap_model
from infra.files import load_strict, read_tensors
from model import DTYPES, PRESETS, VideoChat2, set_trainable
from qformer import VTM_TEXT_CLS
from tokenizer import WordPiece
from training import feature_cache, resume
from training.annotations import load_corpus
from training.log import GracefulStop, TrainLog, to_device
from training.optim import clip_gradients, get_lr, make_optimizers, optimizer_step
from video import Transform
from weights import checkpoint
from weights.hf_llama import llm_config

# -------------------------------------------------------------------------------------------------------------- options

RUN, DATA, OPTIM, SPEED, LOG = "run", "data", "optimization", "memory and speed", "logging and saving"   # in --help
MODEL = "the model, and quirks of the official code (default: the preset's)"

@dataclass
class TrainConfig:
    """Every option of the command line. A recipe replaces what was not typed. No default is anywhere else."""
    stage: int = option(None, "1 align, 2 connect, 3 instruct", RUN)
    preset: str = option("toy", "model sizes and recipe", RUN, choices=tuple(PRESETS))
    out: str = option("", "folder of the run (default runs/PRESET); stage N writes OUT/stageN", RUN)
    init: str = option("", "checkpoint to start from (default: the stage before, in OUT)", RUN)
    llm: str = option("", "the LLM's folder (default: the one the stage before knows, or OUT/llm)", RUN)
    resume: bool = option(True, "resume an interrupted run; --no-resume or --restart starts again", RUN)
    accept_changed_data: bool = option(False, "resume although annotation files have changed meanwhile", RUN)
    seed: int = option(0, "the same seed gives the same run", RUN)
    device: str = option("", "cpu, cuda or cuda:N (default: cuda where there is one)", RUN)

    data: str = option("data/toy", "folder with corpus_caption.json and corpus_instruct.json", DATA)
    corpus: str = option("", "the stage's corpus file (default: the one in DATA)", DATA)
    workers: int = option(1, "processes that decode ahead of the model; 0: none", DATA)
    cache_features: bool = option(False, "run the ViT once per clip, keep its features on disk, leave it frozen", DATA)

    steps: int = option(0, "optimizer steps (default: the recipe's, or as many as --epochs takes)", OPTIM)
    epochs: int = option(1, "passes over the data; a source of weight 0.5 gives half of itself", OPTIM)
    batch: int = option(0, "clips per step, of all processes together (default: the recipe's)", OPTIM)
    grad_accum: int = option(1, "micro-batches per step: less memory, same gradient", OPTIM, aliases=("--accumulate",))
    lr: float = option(0.0, "peak learning rate (default: the recipe's)", OPTIM)
    lr_end: float = option(0.01, "the cosine ends at lr * lr_end", OPTIM)
    warmup: float = option(0.02, "share of the steps in which the learning rate rises from 0", OPTIM)
    constant_until: float = option(0.0, "share of the steps before the cosine starts", OPTIM, aliases=("--hold",))
    muon_lr_scale: float = option(0.0, "above 0: Muon trains the layers, at X times lr", OPTIM, aliases=("--muon",))
    lora_lr_scale: float = option(1.0, "LoRA's learning rate as a multiple of lr", OPTIM, aliases=("--lora-lr",))
    weight_decay: float = option(0.02, "of matrices; not of biases, norms, queries, temperature", OPTIM)
    beta2: float = option(0.999, "AdamW's second beta", OPTIM)
    grad_clip: float = option(1.0, "largest norm of the gradient", OPTIM, aliases=("--clip",))
    max_bad_steps: int = option(10, "skip steps without a finite gradient; stop after this many in a row", OPTIM)
    vtg_only: float = option(0.0, "share of stage 1 with captioning alone", OPTIM, aliases=("--captions-first",))
    global_negatives: bool = option(False, "stage 1: matching draws negatives from all processes' clips", OPTIM)

    dtype: str = option("fp32", "of the computation and of the frozen LLM", SPEED, choices=tuple(DTYPES))
    llm_int8: bool = option(False, "keep the frozen LLM's matrices in 8 bits: half of bf16's memory", SPEED)
    shard: bool = option(False, "under torchrun: FSDP2 instead of DDP", SPEED)
    grad_checkpoint: str = option("", "recompute blocks backward: vit,qformer,llm", SPEED, aliases=("--recompute",))
    compile: bool = option(False, "torch.compile the blocks of ViT, Q-Former and LLM", SPEED)

    log_every: int = option(20, "steps between two lines of the log", LOG)
    save_every: int = option(200, "steps between two checkpoints", LOG)
    keep_checkpoints: int = option(2, "checkpoints to keep until the stage is finished", LOG, aliases=("--keep",))

    train_frames: int = option(None, "stages 2, 3: frames of a clip (stage 2: 4 in the paper, 8 in its code)", MODEL)
    max_text: int = option(None, "stages 2, 3: tokens of a prompt (stage 2: 32 in the paper, 512 in its code)", MODEL)
    frame_sampling: str = option(None, "frames of a clip: rand, middle, official or mvbench (video.py)", MODEL)
    add_timestamps: bool = option(None, "stage 3: say when frames were taken", MODEL, aliases=("--tell-seconds",))
    flip: bool = option(None, "mirror half of the clips, as the official code does: left is then called right", MODEL)
    train_norm: str = option(None, "pixels: imagenet (official training) or clip (official evaluation)", MODEL)
    bos_ones: bool = option(None, "stage 3: ones instead of <s>, as the official code does", MODEL)
    train_separators: bool = option(None, "stage 3: also learn ###Human:, ###Assistant:, as the official code", MODEL)
    question_in_qformer: bool = option(None, "stage 3: the Q-Former reads the question (paper: better without)", MODEL)
    caption_sep: bool = option(None, "stage 1: captions end in [SEP], which the official code forgets", MODEL)
    vtm_text_cls: str = option(None, "stage 1: how matching adds [CLS] to the queries", MODEL, choices=VTM_TEXT_CLS)
    repeat_image: bool = option(None, "stage 1: repeat an image for each temporal embedding", MODEL)

MODEL_OPTIONS = [f.name for f in fields(TrainConfig) if f.metadata["group"] == MODEL]    # fields of model.Config too
TOY_RECIPE = dict(batch=8, constant_until=0.5, beta2=0.99, muon_lr_scale=3.0, cache_features=True, log_every=100)
RECIPES = {  # preset -> stage -> what differs from TrainConfig's defaults
    "toy": {
        # 28,000, 9,600 and 22,400 clips; the first 95 % of stage 1 teach the queries to see, by captioning alone
        1: TOY_RECIPE | dict(steps=3500, lr=4e-4, vtg_only=0.95),
        2: TOY_RECIPE | dict(steps=1200, lr=4e-4),
        3: TOY_RECIPE | dict(steps=2800, lr=2e-4, lora_lr_scale=6.0),
    },
    "micro": dict.fromkeys((1, 2, 3), dict(steps=4, batch=4, lr=1e-3, muon_lr_scale=1.0, lora_lr_scale=2.0, log_every=1,
                                           save_every=2, workers=0, cache_features=True)),
    "paper": {
        # stage 1 warms up for 0.2 of ten epochs in the official config, for a whole one in the paper
        1: dict(epochs=10, batch=2048, lr=1e-4, warmup=0.02, dtype="bf16", workers=8),
        2: dict(epochs=1, batch=512, lr=1e-4, warmup=0.2, dtype="bf16", workers=8),
        3: dict(epochs=3, batch=128, lr=2e-5, lr_end=0.25, warmup=0.2, dtype="bf16", workers=8),
    },
}

AT_LEAST_1 = ("epochs", "grad_accum", "max_bad_steps", "log_every", "save_every", "keep_checkpoints")
SHARES = ("warmup", "constant_until", "vtg_only")                          # between 0 and 1

def parse(argv=None, config_class=TrainConfig, command="train.py", description=__doc__, parts=()):
    """Command line -> (config, names of the options that were typed). Wrong values exit as argparse does, code 2."""
    parser = argparse.ArgumentParser(
        prog=command, usage=f"{command} [options]", description=description,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=38, width=120))
    if parts:
        parser.add_argument("part", nargs="?", choices=parts, default=MISSING, help="train this one (default: both)")
    add_options(parser, config_class)                                      # one for each field made by option()
    parser.add_argument("--restart", dest="resume", action="store_false", default=MISSING, help="same as --no-resume")
    cfg, explicit = read_options(parser, config_class, argv)

    # what argparse does not check: numbers are 0 or more, some at least or at most 1; combinations
    for name, value in vars(cfg).items():
        low, high = int(name in AT_LEAST_1), 1 if name in SHARES else math.inf
        if type(value) in (int, float) and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} {value}: expected {low} to {high}")
    if cfg.grad_clip == 0:
        parser.error("--grad-clip 0 leaves no gradient: expected more than 0")
    if not re.fullmatch(r"(cpu|cuda(:\d+)?)?", cfg.device):
        parser.error(f"--device {cfg.device}: expected cpu, cuda or cuda:N")
    if set(cfg.grad_checkpoint.split(",")) - {"", "vit", "qformer", "llm"}:
        parser.error(f"--grad-checkpoint {cfg.grad_checkpoint}: expected vit, qformer, llm, or several with commas")
    if cfg.shard and (cfg.stage == 0 or cfg.dtype == "fp16" or cfg.llm_int8):
        parser.error("--shard is for stages 1 to 3, in fp32 or bf16, without --llm-int8")
    if cfg.shard and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        parser.error("--shard needs several processes: torchrun --nproc_per_node 2 train.py ...")

    cfg.out = cfg.out or f"runs/{cfg.preset}"
    cfg.device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return cfg, explicit

def apply_recipe(cfg, explicit, recipe):
    """The recipe's values, except for options that were typed."""
    return replace(cfg, **{name: value for name, value in recipe.items() if name not in explicit})

# ----------------------------------------------------------------------------------------------------------- the stages

@dataclass
class Stage:
    """What fit trains: a model, where its batches come from, its loss, and how the result is written."""
    name: str                       # "stage 1", in the log
    folder: Path                    # of the finished checkpoint
    model: torch.nn.Module
    dataset: object                 # of samples; data.Sampler draws their indices
    collate: Callable               # samples -> batch
    loss: Callable                  # batch, share of the steps done -> {name: scalar}; their sum is minimized
    write: Callable                 # folder, {name: tensor} of the model -> None; writes a checkpoint's files
    notes: list = field(default_factory=list)   # lines that the log begins with
    generator: torch.Generator = None           # of the loss, where it draws (hard negatives)
    find_unused: bool = False                   # whether a step may leave some of what trains unused (DDP must know)

    @property
    def unfinished(self):
        return self.folder.with_name(f"{self.folder.name}.unfinished")     # what an interrupted run resumes from

# what a stage adds, at random where its checkpoint lacks it, and drops: heads of the toy's ViT, of stage 1's losses
NEW = {1: ("query_tokens", "qformer.", "vision_temp_embed", "aligner.", "vision_layernorm."),
       2: ("extra_query_tokens", "llama_proj."), 3: ()}
DROPPED = {1: ("norm.", "heads."), 2: ("aligner.", "vision_temp_embed", "qformer.cls."), 3: ()}

def build_stage(cfg, dist):
    """Stage 1, 2 or 3: its model, filled from the stage before, its data and its loss."""
    # the checkpoint before decides the sizes; what the command line can change is typed or the preset's
    start = resume.init_checkpoint(cfg)                                    # OUT/init, OUT/stage1 or OUT/stage2
    config, saved = checkpoint.read_config(start)
    if config.preset != cfg.preset:
        raise ValueError(f"{start} is of preset {config.preset}, not {cfg.preset}; choose another --preset or --init")
    preset, typed = PRESETS[cfg.preset](), {n: getattr(cfg, n) for n in MODEL_OPTIONS if getattr(cfg, n) is not None}
    config = replace(config, **{name: getattr(preset, name) for name in MODEL_OPTIONS} | typed)

    # stages 1 and 2 learn from captions, stage 3 from instructions
    corpus = "corpus_instruct.json" if cfg.stage == 3 else "corpus_caption.json"
    dataset = load_clips(cfg, config, corpus, config.align_frames if cfg.stage == 1 else config.train_frames)

    # the text of a batch is for the Q-Former in stage 1, for the LLM in stage 2, for both in stage 3
    model, llm_tok, llm = build_model(cfg, config, start, saved["llm"])    # stage 1 has no llm_tok
    qformer_tok = WordPiece.load(start / "vocab.txt")
    collate = {1: data.collate_stage1, 2: data.collate_stage2, 3: data.collate_stage3}[cfg.stage]
    collate = partial(collate, cfg=config, qformer_tok=qformer_tok, llm_tok=llm_tok)
    generator = torch.Generator().manual_seed(cfg.seed)                    # draws the hard negatives of matching

    def loss(batch, progress):
        if cfg.stage > 1:
            return {"lm": model.lm_loss(batch)}                            # mean over the target tokens
        return model.stage1_losses(batch, qformer_tok.dec_id, dist, generator, vtg_only=progress < cfg.vtg_only,
                                   global_negatives=cfg.global_negatives)

    def write(folder, tensors):
        checkpoint.save_checkpoint(tensors, cfg.stage, config, folder, start / "vocab.txt",
                                   checkpoint.llm_record(llm, folder))

    # a ViT that stays frozen gives a clip the same features each time, so it can run once per clip, before training
    if cfg.cache_features:
        dataset.features = feature_cache.cache_features(
            model.vision_encoder, dataset, Path(cfg.out) / "features", dist.device, cfg.workers)
    notes = [f"  {part:20} {total:>12,} parameters {trained:>12,} trained"
             for part, total, trained in set_trainable(model, cfg.stage, vit=not cfg.cache_features)]

    # captioning alone uses no bidirectional text rows; a text without video uses no Q-Former
    return Stage(f"stage {cfg.stage}", Path(cfg.out) / f"stage{cfg.stage}", model, dataset, collate, loss, write, notes,
                 generator, find_unused=cfg.vtg_only > 0 or cfg.stage == 3)

def build_model(cfg, config, start, llm):
    """-> (VideoChat2 filled from the checkpoint `start`, the LLM's tokenizer, the LLM's {"path", "fingerprint"})."""
    # blocks that the backward pass recomputes: less memory, more time
    config.vit.checkpoint_blocks |= "vit" in cfg.grad_checkpoint
    config.qformer.checkpoint_layers |= "qformer" in cfg.grad_checkpoint
    config.llama.checkpoint_layers |= "llm" in cfg.grad_checkpoint

    # stage 2 may choose its LLM, whose folder then decides its sizes
    if cfg.stage > 1:
        llm_folder = cfg.llm or (checkpoint.find_llm(start, llm["path"]) if llm else Path(cfg.out) / "llm")
    if cfg.stage == 2:
        config.llama = replace(llm_config(llm_folder), init_std=config.llama.init_std,
                               checkpoint_layers=config.llama.checkpoint_layers)

    # every weight is the checkpoint's, new in this stage, or the LLM's
    model = VideoChat2(config, cfg.stage, defer_llm=True)
    load_strict(model, read_tensors(start / "model.safetensors"), start,
                fresh=NEW[cfg.stage] + (checkpoint.LLM_PREFIX,), dropped=DROPPED[cfg.stage])
    if cfg.stage == 1:                                                 # it has no LLM, but records which one to use
        return model, None, llm and llm | {"path": str(cfg.llm or start / llm["path"])}

    # stage 3 takes no other LLM than stage 2 had, and a stage 2 that resumes no other than it began with
    expected, needed_by = llm, start
    if cfg.stage == 2:
        needed_by = Path(cfg.out) / "stage2"
        last = cfg.resume and resume.latest(f"{needed_by}.unfinished", lambda line: None, ["config.json"])
        expected = checkpoint.read_config(last)[1]["llm"] if last else None
    return model, *checkpoint.attach_llm(model, Path(llm_folder), expected, needed_by, dtype=DTYPES[cfg.dtype],
                                         int8=cfg.llm_int8)

def load_clips(cfg, config, corpus, num_frames):
    """The samples of --corpus, or of the file `corpus` in the data folder, with the model's frames and pixels."""
    path = Path(cfg.corpus or Path(cfg.data) / corpus)
    if not path.is_file():
        hint = f"make the toy world: python -m toy.world --out {cfg.data}" if cfg.preset in resume.TOY_PRESETS else (
            "it lists your annotation files (docs/data.md): name it with --corpus, or its folder with --data")
        raise FileNotFoundError(f"{path} does not exist; {hint}")
    transform = Transform(config.vit.img_size, train=True, crop=config.crop, norm=config.train_norm, flip=config.flip)
    return data.VideoTextDataset(load_corpus(path), num_frames, transform, config.frame_sampling, seed=cfg.seed)

# ------------------------------------------------------------------------------------------------------------ the loop

def fit(stage, cfg, dist):
    """Trains a stage to its last step and writes stage.folder. Resumes from the last whole checkpoint, bit for bit."""
    # (seed, step) decide which samples are in a step, so a run can resume at any of them
    sampler = data.Sampler(stage.dataset, cfg.batch, cfg.seed, dist.rank, dist.size, cfg.grad_accum)
    cfg.steps = cfg.steps or cfg.epochs * len(sampler)                 # a sampler's length is one epoch
    last = dist.broadcast(resume.latest(stage.unfinished) if dist.is_main else None) if cfg.resume else None

    # weights first; then compile and distribute; then the state of optimizers and random generators; then the data
    first_step = resume.load_weights(stage, cfg, last, dist) if last else 0
    for block in blocks_of(stage.model) if cfg.compile else ():        # blocks are alike, so few of them are compiled
        block.compile()
    forward = wrap_model(stage.model.train(), stage.loss, dist, cfg.shard, stage.find_unused)
    optimizers = make_optimizers(stage.model, cfg)                     # AdamW, or AdamW and Muon
    scaler = torch.amp.GradScaler(torch.device(dist.device).type, enabled=cfg.dtype == "fp16")
    torch.manual_seed(cfg.seed + dist.rank)                            # of dropout
    if last:
        resume.load_trainer(stage, optimizers, scaler, last, dist)
    sampler.skip_to(first_step)                                        # epoch and position follow from the step
    batches = cycle(data.make_loader(stage.dataset, sampler, stage.collate, cfg.workers), sampler)
    log, saver = TrainLog(stage, cfg, dist, first_step), resume.AsyncSaver(stage, cfg, dist)
    with GracefulStop(single_process=dist.size == 1) as stop:
        for step in range(first_step, cfg.steps):
            # the batches of one step; each log line says which share of the time went into waiting for them
            with log.data_wait():
                micro_batches = [next(batches) for _ in range(cfg.grad_accum)]

            # forward and backward; all processes also learn whether one of them was asked to stop
            n_targets, stopping = dist.all_reduce_sum([sum(map(count_targets, micro_batches)), stop.signal_number > 0])
            losses = forward_backward(stage, forward, micro_batches, n_targets, step / cfg.steps, scaler, cfg, dist)

            # update, unless the gradient is not finite or there is no target; the log reads a step later: no GPU sync
            grad_norm = clip_gradients(stage.model, optimizers, scaler, cfg.grad_clip)
            optimizer_step(optimizers, get_lr(step, cfg), scaler, grad_norm, skip=not losses)
            log.step(step, losses, grad_norm, micro_batches)

            # save every few hundred steps, in a thread, and when asked to stop: Ctrl-C, SIGTERM, on any machine
            if step + 1 == cfg.steps:
                break
            if stopping or (step + 1) % cfg.save_every == 0:
                saver.save(step + 1, optimizers, scaler)
            if stopping:
                log.close()
                saver.close()                              # OSError if the checkpoint cannot be written
                command = "the same command" if cfg.resume else "the same command without --restart"
                log.print_main(f"\n{stage.name}: stopped; {command} resumes from step {step + 1}")
                sys.exit(128 + (stop.signal_number or signal.SIGTERM))
    log.close()
    saver.wait()
    resume.finish(stage, cfg, dist)
    log.print_main(f"{stage.name}: finished in {log.minutes():.1f} min, written to {stage.folder}")

def forward_backward(stage, forward, micro_batches, n_targets, progress, scaler, cfg, dist):
    """Adds up the gradients of a step -> {name: loss}, whose mean over the processes is the loss of the step; {} if it
    has no target to learn. n_targets: target tokens in the whole step, of all processes. progress: share of the steps
    done."""
    device_type, losses = torch.device(dist.device).type, {}
    for i, batch in enumerate(micro_batches):
        # processes exchange gradients once per step, after the last micro-batch
        set_gradient_sync(forward, stage.model, last=i + 1 == len(micro_batches))
        # the forward pass computes matrix products in cfg.dtype; weights and optimizer stay in fp32
        with torch.autocast(device_type, DTYPES[cfg.dtype], enabled=cfg.dtype != "fp32"):
            batch_losses = forward(to_device(batch, dist.device), progress)    # {name: scalar}

        # a mean over tokens counts by its share of the step's tokens, times the number of processes, over which
        # gradients are averaged: k micro-batches in n processes then give the gradient of the joint batch
        weights = {name: count_targets(batch) / max(1, n_targets) * dist.size if name in ("lm", "vtg") else
                   1 / cfg.grad_accum for name in batch_losses}
        weighted = {name: weights[name] * loss for name, loss in batch_losses.items()}
        scaler.scale(sum(weighted.values())).backward()                # without fp16 the scale is 1
        losses = {name: losses.get(name, 0) + loss.detach() for name, loss in weighted.items()}
    sync_unsharded_grads(stage.model, dist)                            # FSDP leaves the temperature whole
    return losses if n_targets or "lm" not in losses else {}

def count_targets(batch):
    """Number of tokens of a batch that next-token losses are means over."""
    if "targets" in batch:
        return len(batch["targets"])
    return batch["mask"][:, 1:].sum().item() if "mask" in batch else 0

def cycle(loader, sampler):
    """The batches of one epoch after another. OSError if a process that reads media is killed."""
    while True:
        try:
            yield from loader
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise OSError(f"{' '.join(str(error).split())} Memory ran out (use fewer --workers), or a file crashes its "
                          "decoder: python -m training.check_data CORPUS --decode names it") from None
        sampler.next_epoch()

# ---------------------------------------------------------------------------------------------------------- the command

def train_stage(build, cfg, dist):
    """fit(build(cfg, dist)), unless that stage is finished."""
    torch.manual_seed(cfg.seed)                            # of the new weights
    stage = dist.main_process_first(lambda: build(cfg, dist))

    # subtle: a run that was restarted and then interrupted resumes, although the old result is still there
    if cfg.resume and resume.is_finished(stage.folder) and not resume.saved_steps(stage.unfinished):
        if dist.is_main:
            print(f"{stage.name}: already trained, in {stage.folder} (--restart trains it again)")
        return
    with resume.locked(stage, cfg, dist):
        fit(stage, cfg, dist)

def main(argv=None):
    cfg, explicit = parse(argv)
    if cfg.stage not in (1, 2, 3):
        raise ValueError("--stage 0 is now a command of its own: python -m toy.pretrain" if cfg.stage == 0 else
                         "--stage must be 1, 2 or 3")
    cfg = apply_recipe(cfg, explicit, RECIPES.get(cfg.preset, RECIPES["paper"])[cfg.stage])
    dist = init_distributed(cfg.device)
    try:
        train_stage(build_stage, cfg, dist)
    except SystemExit:                     # subtle: all processes stop here; gloo's threads would abort one that exits
        dist.close()
        raise
    dist.close()

if __name__ == "__main__":
    run(main, "train.py", stopped="stopped at once; the last checkpoint is intact")
