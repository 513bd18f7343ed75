"""What each stage trains: its model, its data, its loss, and how the result is written. Each is a Job for train.fit.

    stage 0   stand-ins for what the real system takes ready-made: the video ViT (UMT-L) and the LLM (Vicuna)
    stage 1   align:    the Q-Former learns to see, with the ViT frozen            contrastive + matching + captioning
    stage 2   connect:  its queries become words of the frozen LLM                 captions
    stage 3   tune:     instructions, with LoRA in the LLM                         answers

Not here: options (recipes.py), the loop (train.py), the losses themselves (qformer.py, model.py).
Source: paper section 4; official tasks/train_{qformer,pt,it}.py.

    pytest tests/test_train.py
"""
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import data
from infra.files import load_strict, read_json, read_tensors
from llama import Llama
from model import DTYPES, PRESETS, VideoChat2, next_token_loss, set_trainable
from tokenizer import SentencePiece, WordPiece
from toy.pretrain import School, Teacher, TeacherData, collate_teacher, collate_text, soft_embed, vocabulary
from training import feature_cache
from training.annotations import load_corpus
from training.recipes import MODEL_OPTIONS, RECIPES, STANDINS, recipe
from training.resume import newest
from video import Transform, train_frame_indices
from weights import checkpoint
from weights.hf_llama import llm_config, write_llm


@dataclass
class Job:
    """What fit() trains: model, where batches come from, the loss, and how the result is written."""
    name: str                       # "stage 1", for the log
    folder: Path                    # where the checkpoint goes
    model: nn.Module
    dataset: object
    collate: Callable
    loss: Callable                  # batch, share of the steps done -> {name: scalar}, whose sum is minimised
    write: Callable                 # folder, {name: tensor} of the model -> None: the checkpoint's files
    notes: list = field(default_factory=list)   # lines for the log's head
    generator: torch.Generator = None           # of the loss, where it draws (hard negatives)
    idle: bool = False                          # whether a step may leave some of what trains unused

    @property
    def unfinished(self):
        """Where resume.py keeps what an interrupted run goes on from."""
        return unfinished(self.folder)


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
            f"make the toy world by: python -m toy.world --out {cfg.data}" if cfg.preset in ("toy", "micro") else
            "it lists your annotation files (README, With the released weights): name it by --corpus, or its folder by "
            "--data"))
    return path


def clips(cfg, model_cfg, path, frames):
    """VideoTextDataset of one corpus file, with the model's frames and pixels."""
    transform = Transform(model_cfg.vit.img_size, train=True, crop=model_cfg.crop, norm=model_cfg.train_norm,
                          flip=model_cfg.flip)
    return data.VideoTextDataset(load_corpus(path), frames, transform, model_cfg.frame_sampling, seed=cfg.seed)


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


def vit_job(cfg, name, world):
    """Stage 0a: the video ViT learns what covers each patch."""
    config = model_config(cfg)
    _, vocab = toy_vocabulary(cfg)
    meta = read_json(Path(cfg.data) / "meta.json")
    targets = np.load(Path(cfg.data) / "targets.npy", mmap_mode="r")       # (clips, frames, L, 3)
    grid = (config.vit.img_size // config.vit.patch_size) ** 2
    if targets.shape[2] != grid:
        raise ValueError(f"{cfg.data}/targets.npy has {targets.shape[2]} patches a frame, preset {cfg.preset} {grid}; "
                         f"make the toy world again with --patch {48 * config.vit.patch_size // config.vit.img_size}")
    frames = train_frame_indices(config.train_frames, targets.shape[1], config.frame_sampling)
    model = Teacher(config, [len(meta[key]) for key in ("colours", "shapes", "activities")])

    def write(folder, tensors):
        checkpoint.save_checkpoint(tensors, 0, config, folder, vocab)

    videos = clips(cfg, config, corpus_file(cfg, "corpus_clips.json"), config.train_frames)
    dataset = TeacherData(videos, targets, Path(cfg.data) / "annotations.jsonl", frames, epoch_size=100 * cfg.batch)
    return Job("stage 0 vit", Path(cfg.out) / "stage0" / "vit", model, dataset, collate_teacher,
               lambda batch, _: model.losses(batch), write)


def llm_job(cfg, name, world):
    """Stage 0b: the small LLaMA learns to read, without videos."""
    config = model_config(cfg)
    tokenizer_model, _ = toy_vocabulary(cfg)
    model = Llama(config.llama)
    text, tok = Path(cfg.data) / "text.jsonl", SentencePiece(str(tokenizer_model))
    dataset = School(text, tok, config.prompt_style, config.n_query + config.n_extra, epoch_size=300 * cfg.batch)

    def loss(batch, _):
        embeds = soft_embed(model, batch["ids"], batch["soft"])                # (B, S, D)
        return {"lm": next_token_loss(model, embeds, batch["labels"], batch["lengths"], batch["targets"])}

    def write(folder, tensors):
        write_llm(model, tokenizer_model, folder, tensors)

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
            command = f"python -m weights.convert import --preset {cfg.preset} --out {folder} ... (see --help)"
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


def unfinished(folder):
    return folder.with_name(f"{folder.name}.unfinished")


def begun_with(cfg, folder):
    """The LLM of an unfinished run that goes on, or None."""
    last = None if cfg.restart else newest(unfinished(folder), say=lambda line: None, names=("config.json",))
    return last and checkpoint.read_config(last)[1]["llm"]


def stage_job(cfg, stage, world):
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
    recompute = cfg.recompute.split(",")
    config.vit.checkpoint_blocks |= "vit" in recompute
    config.qformer.checkpoint_layers |= "qformer" in recompute
    config.llama.checkpoint_layers |= "llm" in recompute
    model = VideoChat2(config, stage, defer_llm=True)
    load_strict(model, read_tensors(start / "model.safetensors"), start,
                  fresh=FRESH[stage] + (checkpoint.LLM_PREFIX,), dropped=DROPPED[stage])
    if stage > 1:
        expected, needed_by = (llm, start) if stage == 3 else (begun_with(cfg, folder), folder)
        tok, llm = checkpoint.attach_llm(model, where, expected, needed_by, dtype=DTYPES[cfg.dtype], int8=cfg.llm_int8)
    elif llm:
        llm = llm | {"path": str(where)}
    wordpiece = WordPiece.load(start / "vocab.txt")
    generator = torch.Generator().manual_seed(cfg.seed)
    frames, collate, loss = stage_parts(cfg, stage, model, wordpiece, tok, generator, world)
    dataset = clips(cfg, config, corpus, frames)
    if cfg.cache_features:
        dataset.features = feature_cache.cache_features(model.vision_encoder, dataset, Path(cfg.out) / "features", world.device,
                                         cfg.workers)
    notes = [f"  {part:20} {total:>12,} parameters {trained:>12,} trained" for part, total, trained in
             set_trainable(model, stage, vit=not cfg.cache_features)]

    def write(folder, tensors):
        checkpoint.save_checkpoint(tensors, stage, config, folder, start / "vocab.txt",
                                    checkpoint.llm_record(llm, folder))

    # captions alone need no text rows that look both ways; a text without video, or an instruction, no Q-Former's
    idle = cfg.captions_first > 0 or stage == 3
    return Job(f"stage {stage}", folder, model, dataset, collate, loss, write, notes, generator, idle)


def stage_parts(cfg, stage, model, wordpiece, tok, generator, world):
    """What the stages differ in: (frames of a clip, collate, loss)."""
    config = model.cfg
    n_video = config.n_query + config.n_extra
    if stage == 1:
        return (config.align_frames, data.Stage1Collate(wordpiece, config.align_text, config.caption_sep),
                lambda batch, done: model.stage1_losses(batch, wordpiece.dec_id, world, generator,
                                                        done < cfg.captions_first, cfg.global_negatives))
    if stage == 2:
        collate = data.Stage2Collate(tok, n_video, config.max_text)
        return config.train_frames, collate, lambda batch, _: {"lm": model.lm_loss(batch)}
    collate = data.Stage3Collate(
        tok, wordpiece, n_video, config.max_text, config.prompt_style, config.question_in_qformer, config.add_timestamps,
        config.train_separators, max_instruction=min(config.max_text, config.qformer.max_positions))
    return config.train_frames, collate, lambda batch, _: {"lm": model.lm_loss(batch)}
