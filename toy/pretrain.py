"""Trains what the real system takes ready-made, at toy size: a video ViT (UMT-L) and an LLM (Vicuna).

    vit   PatchClassifier: linear heads on the ViT name what covers each patch    -> OUT/init, where stage 1 starts
    llm   TextCurriculum: the toy world in words, for a small LLaMA               -> OUT/llm; both: OUT/tokenizers

weights.convert writes OUT/init of real checkpoints. Options and loop are train.py's; what was tried on the way is in
results/toy_cpu.md. Not here: the world (toy/world.py). Source of the idea: UMT (arXiv 2303.16058).

    python -m toy.pretrain vit        # or llm; both, one after the other, if none is named
"""
import json
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import collate_media
from infra.cli import run
from infra.distributed import init_distributed
from infra.files import atomic_folder, read_json
from llama import Llama
from model import PRESETS, next_token_loss
from prompt import CAPTION_INSTRUCTIONS, SYSTEM, Prompt, add_packing, caption_prompt, conversation_prompt, pad_batch
from qagen.generate import OPTION_HINTS, as_turn
from tokenizer import SentencePiece, WordPiece, train_sentencepiece, train_wordpiece
from toy.things import STRAIGHT
from train import MODEL_OPTIONS, Stage, TrainConfig, apply_recipe, load_clips, parse, train_stage
from video import train_frame_indices
from vit_video import VisionTransformer
from weights.checkpoint import save_checkpoint
from weights.hf_llama import write_llm

WORD = re.compile(r"\b[a-z]+\b")

# ------------------------------------------------------------------------------------------------------------- the ViT

class PatchClassifier(nn.Module):
    """The video ViT with linear heads on every patch token, which stage 1 drops.

    UMT aligns each token with a teacher's feature of the same patch. Here the teacher is the toy world's ground truth:
    colour, shape and activity of what covers the patch. Place and time are asked for because the ViT would soon forget
    them, and the Q-Former could then name both scenes of a clip but not their order."""

    def __init__(self, cfg, classes):
        super().__init__()
        self.vision_encoder, self.norm = VisionTransformer(cfg.vit), nn.LayerNorm(cfg.vit.width)
        sizes = [*classes, cfg.vit.grid ** 2, cfg.train_frames]
        self.heads = nn.ModuleList([nn.Linear(cfg.vit.width, n) for n in sizes])

    def forward(self, video):
        """video (B, T, 3, H, W) -> logits (B, T, L, classes) of each head: colour, shape, activity, place, time."""
        x = self.norm(self.vision_encoder(video))                          # (B, T, L, C)
        return [head(x) for head in self.heads]

    def losses(self, batch):
        """video (B, T, 3, H, W), targets (B, T, L, 3) -> weighted cross-entropies of each head, by name."""
        targets = batch["targets"]
        B, T, L, _ = targets.shape
        place, time = torch.arange(L, device=targets.device), torch.arange(T, device=targets.device)[:, None]
        targets = (*targets.unbind(-1), place.expand(B, T, L), time.expand(B, T, L))

        # nine patches in ten are background, class 0, and would drown the rest: the shapes of single objects were right
        # on 25 to 36 % after 25,000 clips. One weighs a fiftieth of a covered one, and every clip weighs the same
        weight = 0.02 + 0.98 * (targets[1] > 0)                            # (B, T, L)
        weight = (weight / weight.sum((1, 2), keepdim=True) / B).flatten()  # (B*N,)

        # activity is the slowest to learn and weighs double
        losses, names = {}, ("colour", "shape", "activity", "place", "time")
        for name, logits, target in zip(names, self(batch["video"]), targets, strict=True):
            loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none")  # (B*N,)
            losses[name] = (2 if name == "activity" else 1) * (loss * weight).sum()
        return losses

class PatchLabels(torch.utils.data.Dataset):
    """Clips with the class of every patch: targets.npy (clips, frames, patches, 3), in the order of the annotations.

    Epochs 0 to 6 have the playground's clips in which everything moves straight ahead or rests; the others all of the
    playground, and as many of the tasks. Both are needed: on all movements at once, activity was right on 18 % of the
    playground's patches after 1,500 steps of 8; after 700 steps of straight lines and 800 of everything, on 32 %."""

    def __init__(self, clips, targets, annotations, frames, epoch_size):
        self.clips, self.targets, self.frames, self.epoch_size, self.epoch = clips, targets, frames, epoch_size, 0
        rows = [(c["scenario"], {e["action"] for e in c["events"]}) for c in map(json.loads, open(annotations))]
        self.tasks = [i for i, (scenario, _) in enumerate(rows) if scenario != "playground"]
        self.playground = [i for i, (scenario, _) in enumerate(rows) if scenario == "playground"]
        self.straight = [i for i in self.playground if rows[i][1].issubset(STRAIGHT)]

    def __len__(self):
        return self.epoch_size

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.clips.set_epoch(epoch)

    def __getitem__(self, index):
        pool = self.straight if self.epoch < 7 else (self.playground, self.tasks)[index % 2]
        sample = self.clips[random.Random(f"{self.epoch} {index}").choice(pool)]
        targets = self.targets[sample["idx"]][self.frames]                 # (T, L, 3)
        return sample | {"targets": torch.from_numpy(targets.astype(np.int64))}

def collate_patches(samples):
    return collate_media(samples) | {"targets": torch.stack([s["targets"] for s in samples])}   # (B, T, L, 3)

# ------------------------------------------------------------------------------------------------------------- the LLM

@dataclass
class CaptionedPrompt(Prompt):
    """A Prompt with a caption in the slot of the video."""
    noisy: range        # positions that noisy_embeds blurs

class TextCurriculum(torch.utils.data.Dataset):
    """Texts from which the small LLaMA learns to read, with the text in the slot of the video; an epoch is a phase.

        phases 0-2   the text is a word, one of the options: grows | Which one is it? (A) cup no (B) grows yes
        phases 3-7   the right option is somewhere in 2, 4, .. words, in an answer or in a caption
        after that   of ten batches two of such drills, two of open questions about a caption (What does the red star
                     do after it jumps? After that it grows.), six of questions with options about a caption

    It learns answers, and the hints "no" and "yes" of worked examples. Phases and hints are needed: the model must bind
    letter to option, match option to text, and join the two before any of the three pays. On conversations alone it was
    at chance after 300 steps of 32 without hints, and after 400 with them."""
    DRILL_QUESTIONS = ("Which of these is there?", "What is told of?", "Which one is it?")

    def __init__(self, path, tok, prompt_style, n_video, epoch_size):
        self.tok, self.prompt_style, self.n_video = tok, prompt_style, n_video
        self.epoch_size, self.epoch = epoch_size, 0
        self.documents = [json.loads(line) for line in open(path)]         # (caption, with options, open questions)
        words = {word for caption, *_ in self.documents[:5000] for word in WORD.findall(caption)}
        self.words = [word for word in sorted(words) if len(tok.encode(word)) == 1]
        self.answers = sorted({qa["a"] for *_, open_turns in self.documents[:5000] for qa in open_turns})
        self.hint_ids = {tok.encode(f"It grows. {hint}")[-1] for hint in OPTION_HINTS}

    def __len__(self):
        return self.epoch_size

    def set_epoch(self, epoch):
        self.epoch = epoch

    def groups(self):
        """For the Sampler: kinds of different lengths share no batch."""
        n = self.epoch_size // 5
        ends = (("open", 0, n), ("drill", n, 2 * n), ("options", 2 * n, 4 * n), ("system", 4 * n, 5 * n))
        return [(kind, 1.0, range(start, end)) for kind, start, end in ends]

    def __getitem__(self, index):
        # a text and turns about it; the fifth of the epoch that has the index decides the kind
        rng, fifth = random.Random(f"{self.epoch} {index}"), 5 * index // self.epoch_size
        if is_drill := self.epoch < 8 or fifth == 1:
            caption, turns = self.drill(rng)
        else:
            caption, turns, open_turns = rng.choice(self.documents)
            if self.epoch > 12 and rng.random() < 0.8:                     # hints become rare
                turns = [qa | {"q": re.sub(f" ({'|'.join(OPTION_HINTS)})\n", "\n", qa["q"])} for qa in turns]
            turns = turns if fifth else open_turns

        # from phase 14 on half of the captions are blurred, and spread over as many places as a video has
        words, is_noisy = self.tok.encode(caption), self.epoch > 13 and fifth != 1 and rng.random() < 0.5
        length = max(len(words), self.n_video) if is_noisy else len(words)

        # one in ten is stage 2's request for the caption; from phase 15 on a fifth has the benchmark's system prompt
        if not is_drill and fifth > 1 and rng.random() < 0.1:
            prompt = caption_prompt(self.tok, caption, length, rng.choice(CAPTION_INSTRUCTIONS["video"]))
        else:
            if self.epoch > 14 and fifth == 4:
                turns = [turns[0] | {"i": SYSTEM, "q": SYSTEM + turns[0]["q"]}, *turns[1:]]    # twice, as there
            prompt = conversation_prompt(self.tok, turns, length, prompt_style=self.prompt_style)

        # the caption takes the place of the video, and hints are learnt too
        first = prompt.slot
        for place, i in zip(sorted(rng.sample(range(length), len(words))), words, strict=True):
            prompt.ids[first + place] = i
        labels = [i if i in self.hint_ids else label for i, label in zip(prompt.ids, prompt.labels, strict=True)]
        return CaptionedPrompt(prompt.ids, labels, range(first, first + length * is_noisy))

    def drill(self, rng):
        """-> (text, [turn]): the right option is an answer between two words, or a word of a list or of a caption."""
        # words of a list from phase 3 on, answers from 5, captions from 6
        right = ""
        if self.epoch > 2:
            n_wrong, kind = rng.randint(2, 4), rng.random()
            if kind < 0.25 and self.epoch > 4:
                right, *wrong = rng.sample(self.answers, n_wrong + 1)
                text = f"{rng.choice(self.words)} {right} {rng.choice(self.words)}"
            else:
                text = " ".join(rng.sample(self.words, rng.randint(1, min(12, 2 ** (self.epoch - 2)))))
                if kind > 0.75 and self.epoch > 5:
                    text = rng.choice(self.documents)[0]
                present = set(WORD.findall(text))
                if options := [word for word in self.words if word in present]:
                    right = rng.choice(options)
                    wrong = rng.sample([word for word in self.words if word not in present], n_wrong)
        if not right:                                                      # the text is one word, the right option
            text, *wrong = rng.sample(self.words, 4)
            right = text

        # seven drills in ten are worked examples, with hints
        question, options = rng.choice(self.DRILL_QUESTIONS), rng.sample([right, *wrong], len(wrong) + 1)
        choice = {"question": question, "candidates": options, "answer": right}
        return text, [as_turn(choice, worked=rng.random() < 0.7)]

def collate_prompts(prompts):
    """-> ids (B, S) with VIDEO where the slot is empty, labels, mask, noisy (B, S): 1 where noisy_embeds blurs."""
    ids, labels, mask = pad_batch(prompts, pad_id=0)
    noisy = torch.zeros_like(mask)                                         # (B, S)
    for row, prompt in zip(noisy, prompts, strict=True):
        row[prompt.noisy.start:prompt.noisy.stop] = 1
    return add_packing({"ids": ids, "labels": labels, "mask": mask}) | {"noisy": noisy, "bad": []}

def noisy_embeds(llama, ids, noisy):
    """Embeds ids (B, S) -> (B, S, D), with noise added where noisy (B, S) is 1; VIDEO becomes noise alone."""
    # a large LLM understands vectors that are close to a word's (soft prompts); a small one must be taught to
    embeds = llama.embed(ids.clamp(min=0)) * (ids >= 0).unsqueeze(-1)      # (B, S, D), VIDEO is -1
    strength = noisy * 0.7 * torch.rand(len(ids), 1, device=ids.device)    # (B, S), words have about 1
    return embeds + strength.unsqueeze(-1) * torch.randn_like(embeds)

def train_tokenizers(text, folder, size=1000):
    """The files of both tokenizers, made from text.jsonl if they do not exist -> (tokenizer.model, vocab.txt)."""
    if not folder.is_dir():
        if not text.is_file():
            raise FileNotFoundError(f"{text} does not exist; make it: python -m toy.world --out {text.parent}")
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

UNUSED = {"init", "llm", "cache_features", "lora_lr_scale", "vtg_only", "global_negatives", "llm_int8", *MODEL_OPTIONS}
BOTH = dict(batch=8, beta2=0.99, muon_lr_scale=1.0, log_every=100, save_every=1000)
MICRO = dict(steps=4, batch=4, lr=1e-3, muon_lr_scale=1.0, log_every=1, save_every=2, workers=0)
RECIPES = {
    "toy": {"vit": dict(BOTH, steps=4000, lr=1.5e-3),
            "llm": dict(BOTH, epochs=18, lr=1e-3, constant_until=0.7, workers=0)},
    "micro": {"vit": MICRO, "llm": MICRO},
}

def toy_config(cfg):
    """-> (the preset's Config, with the sizes of the toy's vocabularies; the files of its tokenizers)."""
    config = PRESETS[cfg.preset]()
    sentencepiece, wordpiece = train_tokenizers(Path(cfg.data) / "text.jsonl", Path(cfg.out) / "tokenizers")
    config.llama.vocab_size = SentencePiece(str(sentencepiece)).vocab_size
    config.qformer.vocab_size = WordPiece.load(wordpiece).vocab_size
    return config, sentencepiece, wordpiece

def vit_stage(cfg, dist):
    """The ViT learns what covers each patch. OUT/init is what weights.convert writes of the official files."""
    # the world's patches must be the preset's
    (config, _, vocab), data = toy_config(cfg), Path(cfg.data)
    targets = np.load(data / "targets.npy", mmap_mode="r")                 # (clips, frames, L, 3)
    if targets.shape[2] != config.vit.grid ** 2:
        raise ValueError(f"{data}/targets.npy has {targets.shape[2]} patches per frame, preset {cfg.preset} needs "
                         f"{config.vit.grid ** 2}; make the toy world again with --patch {48 // config.vit.grid}")

    # clips with the classes of the frames that are shown
    clips, meta = load_clips(cfg, config, "corpus_clips.json", config.train_frames), read_json(data / "meta.json")
    frames = train_frame_indices(config.train_frames, targets.shape[1], config.frame_sampling)
    dataset = PatchLabels(clips, targets, data / "annotations.jsonl", frames, epoch_size=100 * cfg.batch)
    model = PatchClassifier(config, [len(meta[key]) for key in ("colours", "shapes", "activities")])
    return Stage("stage 0 vit", Path(cfg.out) / "init", model, dataset, collate_patches,
                 loss=lambda batch, _: model.losses(batch),
                 write=lambda folder, tensors: save_checkpoint(tensors, 0, config, folder, vocab))

def llm_stage(cfg, dist):
    """The small LLaMA learns to read, without videos. OUT/llm is a folder as Vicuna's."""
    config, tokenizer_model, _ = toy_config(cfg)
    model, tok, n_video = Llama(config.llama), SentencePiece(str(tokenizer_model)), config.n_query + config.n_extra
    dataset = TextCurriculum(Path(cfg.data) / "text.jsonl", tok, config.prompt_style, n_video, 300 * cfg.batch)

    def loss(batch, _):
        embeds = noisy_embeds(model, batch["ids"], batch["noisy"])         # (B, S, D)
        return {"lm": next_token_loss(model, embeds, batch["labels"], batch["lengths"], batch["targets"])}

    return Stage("stage 0 llm", Path(cfg.out) / "llm", model, dataset, collate_prompts, loss,
                 write=lambda folder, tensors: write_llm(model, tokenizer_model, folder, tensors))

STAGES = {"vit": vit_stage, "llm": llm_stage}

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
    dist.close()

if __name__ == "__main__":
    run(main, "toy.pretrain", stopped="stopped at once; the last checkpoint is intact")
