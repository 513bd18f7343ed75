"""Trains what the real system takes ready-made, at toy size: UMT-L, BERT and Vicuna. assets/toy/ holds the result.

    vit    pretrain_vit.py: names what covers each patch of a video    -> OUT/vit
    bert   pretrain_bert.py: writes captions                           -> OUT/bert
    llm    pretrain_llm.py: reads the toy world in words               -> OUT/llm_fp32
    when all three are there, in float16:                                 OUT/init, where stage 1 starts, and OUT/llm

Options and loop are train.py's. weights.convert writes OUT/init of the official files. What was tried on the way is in
results/toy_cpu.md. Not here: the world that they learn from, which is not that of stages 1 to 3 (toy/world.py).

    python -m toy.world --out data/pretraining --clips 96000 --texts 120000 --seed 1000
    python -m toy.pretrain                                # or one part of it: python -m toy.pretrain vit
"""
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from infra.cli import option, run
from infra.distributed import init_distributed
from infra.files import atomic_folder, read_json, read_tensors, write_json
from llama import Llama
from model import PRESETS, next_token_loss
from prompt import SYSTEM
from tokenizer import SentencePiece, WordPiece, train_sentencepiece, train_wordpiece
from toy import world
from toy.pretrain_bert import CaptionAutoencoder, Captions, collate_captions, text_half
from toy.pretrain_llm import TextCurriculum, collate_prompts, noisy_embeds
from toy.pretrain_vit import PatchClassifier, PatchLabels, collate_patches
from train import DATA, MODEL_OPTIONS, Stage, TrainConfig, apply_recipe, load_clips, parse, train_stage
from training import resume
from video import train_frame_indices
from weights.checkpoint import llm_record, save_checkpoint
from weights.convert import copy_text_to_query
from weights.hf_llama import load_llm, load_llm_weights, write_llm

def train_tokenizers(text, folder, size=1000):
    """The files of both tokenizers, made from text.jsonl if they do not exist -> (tokenizer.model, vocab.txt)."""
    if not folder.is_dir():
        if not text.is_file():
            raise FileNotFoundError(f"{text} does not exist; make it: python -m toy.world --out {text.parent} "
                                    "--clips 96000 --texts 120000 --seed 1000")
        texts = [part for caption, turns, open_turns in map(json.loads, open(text))
                 for part in (caption, *(qa[key] for qa in turns + open_turns for key in "iqa"))]
        texts += 1000 * [SYSTEM]                                           # the benchmark's prompt has its own words
        with atomic_folder(folder, replace=False) as temporary:
            train_sentencepiece(texts, str(temporary / "tokenizer.model"), vocab_size=size)
            train_wordpiece(texts, str(temporary / "vocab.txt"))
    return folder / "tokenizer.model", folder / "vocab.txt"

# --------------------------------------------------------------------------------------------------------- the command

@dataclass
class PretrainConfig(TrainConfig):
    stage: int = 0
    part: str = ""
    data: str = option("data/pretraining", "folder of a toy world made with --texts", DATA)

UNUSED = {"init", "llm", "cache_features", "lora_lr_scale", "vtg_only", "global_negatives", "llm_int8", *MODEL_OPTIONS}
ALL = dict(batch=8, beta2=0.99, muon_lr_scale=1.0, log_every=100, save_every=1000)
MICRO = dict(steps=4, batch=4, lr=1e-3, muon_lr_scale=1.0, log_every=1, save_every=2, workers=0)
RECIPES = {
    "toy": {"vit": dict(ALL, steps=18000, lr=1.5e-3),
            "bert": dict(ALL, steps=4000, lr=3e-4, muon_lr_scale=3.0, constant_until=0.6, workers=0),
            "llm": dict(ALL, steps=13000, lr=1e-3, constant_until=0.7, workers=0)},
    "micro": {"vit": MICRO, "bert": MICRO, "llm": MICRO},
}

def toy_config(cfg):
    """-> (the preset's Config, with the sizes of the toy's vocabularies; the files of its tokenizers)."""
    config = PRESETS[cfg.preset]()
    sentencepiece, wordpiece = train_tokenizers(Path(cfg.data) / "text.jsonl", Path(cfg.out) / "tokenizers")
    config.llama.vocab_size = SentencePiece(str(sentencepiece)).vocab_size
    config.qformer.vocab_size = WordPiece.load(wordpiece).vocab_size
    return config, sentencepiece, wordpiece

def vit_stage(cfg, dist):
    """The ViT learns what covers each patch."""
    # the world's patches must be the preset's
    (config, _, vocab), data = toy_config(cfg), Path(cfg.data)
    targets = np.load(data / "targets.npy", mmap_mode="r")                 # (clips, frames, L, 3)
    if targets.shape[2] != config.vit.grid ** 2:
        raise ValueError(f"{data}/targets.npy has {targets.shape[2]} patches per frame, preset {cfg.preset} needs "
                         f"{config.vit.grid ** 2}; make that world again with --patch {48 // config.vit.grid}")

    # clips with the classes of the frames that are shown
    clips, meta = load_clips(cfg, config, "corpus_caption.json", config.train_frames), read_json(data / "meta.json")
    frames = train_frame_indices(config.train_frames, targets.shape[1], config.frame_sampling)
    dataset = PatchLabels(clips, targets, data / "annotations.jsonl", frames, epoch_size=100 * cfg.batch)
    model = PatchClassifier(config, [len(meta[key]) for key in ("colours", "shapes", "activities")])
    return Stage("stage 0 vit", Path(cfg.out) / "vit", model, dataset, collate_patches,
                 loss=lambda batch, _: model.losses(batch),
                 write=lambda folder, tensors: save_checkpoint(tensors, 0, config, folder, vocab))

def bert_stage(cfg, dist):
    """The Q-Former's text half learns to write captions."""
    config, _, vocab = toy_config(cfg)
    tok = WordPiece.load(vocab)
    model, dataset = CaptionAutoencoder(config, tok.mask_id), Captions(Path(cfg.data) / "text.jsonl", 300 * cfg.batch)
    return Stage("stage 0 bert", Path(cfg.out) / "bert", model, dataset,
                 collate=partial(collate_captions, tok=tok, max_text=config.align_text),
                 loss=lambda batch, _: model.losses(batch),
                 write=lambda folder, tensors: save_checkpoint(tensors, 0, config, folder, vocab))

def llm_stage(cfg, dist):
    """The small LLaMA learns to read, without videos."""
    config, tokenizer_model, _ = toy_config(cfg)
    model, tok, n_video = Llama(config.llama), SentencePiece(str(tokenizer_model)), config.n_query + config.n_extra
    dataset = TextCurriculum(Path(cfg.data) / "text.jsonl", tok, config.prompt_style, n_video, 300 * cfg.batch)

    def loss(batch, _):
        embeds = noisy_embeds(model, batch["ids"], batch["noisy"])         # (B, S, D)
        return {"lm": next_token_loss(model, embeds, batch["labels"], batch["lengths"], batch["targets"])}

    return Stage("stage 0 llm", Path(cfg.out) / "llm_fp32", model, dataset, collate_prompts, loss,
                 write=lambda folder, tensors: write_llm(model, tokenizer_model, folder, tensors))

STAGES = {"vit": vit_stage, "bert": bert_stage, "llm": llm_stage}

def write_standins(cfg):
    """OUT/vit, bert and llm_fp32 -> OUT/llm, a folder as Vicuna's, and OUT/init, as weights.convert imports UMT and
    BERT; both in float16. OUT/init/world.json says which world they know; tests compare it with today's."""
    config, tokenizer_model, vocab = toy_config(cfg)
    out, half = Path(cfg.out), lambda tensors: {name: t.detach().half() for name, t in tensors.items()}
    with atomic_folder(out / "llm") as folder:
        llama, _ = load_llm(out / "llm_fp32")
        write_llm(llama, tokenizer_model, folder, half(dict(llama.named_parameters())))
    vit, bert = (read_tensors(out / part / "model.safetensors") for part in ("vit", "bert"))   # the ViT with its heads
    with atomic_folder(out / "init") as folder:
        llm = {"path": str(out / "llm"), "fingerprint": load_llm_weights(llama, out / "llm")}
        save_checkpoint(half(vit | copy_text_to_query(text_half(bert))), 0, config, folder, vocab,
                        llm_record(llm, out / "init"))
        write_json(world.record(read_json(Path(cfg.data) / "meta.json")["settings"]), folder / "world.json")

def main(argv=None):
    cfg, explicit = parse(argv, PretrainConfig, "python -m toy.pretrain", __doc__, tuple(STAGES))
    if explicit & UNUSED:
        raise ValueError(f"--{min(explicit & UNUSED).replace('_', '-')} is for stages 1 to 3 (train.py)")
    if cfg.preset not in RECIPES:
        raise ValueError(f"preset {cfg.preset} takes its ViT and LLM ready-made: python -m weights.convert import "
                         f"--preset {cfg.preset} ... (see --help)")
    dist = init_distributed(cfg.device)
    for part in (cfg.part,) if cfg.part else STAGES:
        train_stage(STAGES[part], apply_recipe(replace(cfg, part=part), explicit, RECIPES[cfg.preset][part]), dist)
    if dist.is_main and all(resume.is_finished(Path(cfg.out) / name) for name in ("vit", "bert", "llm_fp32")):
        write_standins(cfg)
    dist.close()

if __name__ == "__main__":
    run(main, "toy.pretrain", stopped="stopped at once; the last checkpoint is intact")
