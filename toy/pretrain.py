"""Trains what the real system takes ready-made, at toy size: a video ViT (UMT-L) and an LLM (Vicuna).

    PatchClassifier   the ViT with linear heads that say what covers each patch      -> OUT/init, where stage 1 starts
    TextCurriculum    the toy world in words, from which the small LLaMA learns      -> OUT/llm
    train_tokenizers  SentencePiece for the LLM, WordPiece for the Q-Former          -> OUT/tokenizers

With real checkpoints nothing here is needed: weights/convert.py writes OUT/init. Options and loop are train.py's; what
only stages 1 to 3 use is refused. Not here: the world (toy/world.py). Source of the idea: UMT (arXiv 2303.16058).

    python -m toy.pretrain vit        # or llm; both, one after the other, if none is named
"""
import json
import random
import re
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from infra.cli import run
from infra.distributed import init_distributed
from infra.files import atomic_folder, read_json
from llama import Llama
from model import PRESETS, next_token_loss
from prompt import CAPTION_INSTRUCTIONS, SYSTEM, VIDEO, add_packing, caption_prompt, conversation_prompt, pad_batch
from qagen.generate import OPTION_HINTS, as_turn
from tokenizer import SentencePiece, WordPiece, train_sentencepiece, train_wordpiece
from toy.things import STRAIGHT
from train import MODEL_OPTIONS, Stage, TrainConfig, apply_recipe, load_clips, parse, train_stage
from video import train_frame_indices
from vit_video import VisionTransformer
from weights.checkpoint import save_checkpoint
from weights.hf_llama import write_llm

# ------------------------------------------------------------------------------------------------------------- the ViT

class PatchClassifier(nn.Module):
    """The video ViT with linear heads on every patch token: what covers the patch, and which patch and frame it is.

    UMT aligns each token of its ViT with a teacher's feature of the same patch; here the teacher is the toy world's
    ground truth: colour, shape and activity of what covers the patch. The heads also ask for place and time, which the
    ViT would soon forget: without them they made up 3.3 % and 0.7 % of the features' variance, and the Q-Former could
    name both scenes of a clip but not their order. Stage 1 drops the heads.
    """

    def __init__(self, cfg, classes):
        super().__init__()
        self.vision_encoder = VisionTransformer(cfg.vit)
        self.norm = nn.LayerNorm(cfg.vit.width)
        sizes = [*classes, cfg.vit.grid ** 2, cfg.train_frames]
        self.heads = nn.ModuleList([nn.Linear(cfg.vit.width, n) for n in sizes])

    def classify(self, video):
        """video (B, T, 3, H, W) -> the most probable class of each head, (B, T, L) each."""
        x = self.norm(self.vision_encoder(video))                          # (B, T, L, C)
        return [head(x).argmax(-1) for head in self.heads]

    def losses(self, batch):
        """video (B, T, 3, H, W), targets (B, T, L, 3) -> weighted cross-entropies of each head, by name.

        Nine patches in ten are background, which is class 0 of each head and soon learned. At equal weight they drown
        the rest (the shapes of single objects were then right on 25 to 36 % after 25,000 clips), so a background patch
        weighs a fiftieth of a covered one. Activity is the slowest to learn and weighs double.
        """
        x = self.norm(self.vision_encoder(batch["video"]))                 # (B, T, L, C)
        B, T, L, _ = x.shape
        colour, shape, activity = batch["targets"].unbind(-1)              # each (B, T, L)
        place = torch.arange(L, device=x.device).expand(B, T, L)
        time = torch.arange(T, device=x.device)[:, None].expand(B, T, L)

        # every clip weighs the same
        weight = 0.02 + 0.98 * (shape > 0)                                 # (B, T, L)
        weight = (weight / weight.sum((1, 2), keepdim=True) / B).flatten()  # (B*N,)

        losses = {}
        for head, (name, target, scale) in zip(self.heads, (
                ("colour", colour, 1), ("shape", shape, 1), ("activity", activity, 2),
                ("place", place, 1), ("time", time, 1)), strict=True):
            loss = F.cross_entropy(head(x).flatten(0, 2), target.flatten(), reduction="none")  # (B*N,)
            losses[name] = scale * (loss * weight).sum()
        return losses

class PatchLabels(torch.utils.data.Dataset):
    """Clips with the class of every patch: targets.npy (clips, frames, patches, 3), in the order of the annotations.

        epochs 0-6   clips of the playground in which everything moves straight ahead or rests
        then         clips of the playground, and as many of the tasks

    The two phases are needed: a movement can be named only once the object is found in another frame, and neither pays
    before both are there. On all movements at once, activity was right on 18 % of a playground's patches after 1,500
    steps of 8; after 700 steps of straight lines and 800 of everything, on 32 %.
    """

    def __init__(self, clips, targets, annotations, frames, epoch_size):
        self.clips, self.targets, self.frames, self.epoch_size, self.epoch = clips, targets, frames, epoch_size, 0
        self.straight, self.playground, self.tasks = [], [], []            # indices of clips
        for index, line in enumerate(open(annotations)):
            clip = json.loads(line)
            if clip["scenario"] != "playground":
                self.tasks.append(index)
            else:
                self.playground.append(index)
                if all(e["action"] in STRAIGHT for e in clip["events"]):
                    self.straight.append(index)

    def __len__(self):
        return self.epoch_size

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.clips.set_epoch(epoch)

    def __getitem__(self, index):
        rng = random.Random(f"{self.epoch} {index}")
        pool = self.straight if self.epoch < 7 else (self.playground, self.tasks)[index % 2]
        sample = self.clips[rng.choice(pool)]
        targets = self.targets[sample["idx"]][self.frames]                     # (T, L, 3)
        return sample | {"targets": torch.from_numpy(targets.astype(np.int64))}

def collate_patches(samples):
    return {"video": torch.stack([s["video"] for s in samples]),
            "targets": torch.stack([s["targets"] for s in samples]),
            "bad": [path for s in samples for path in s["bad"]]}

# ------------------------------------------------------------------------------------------------------------- the LLM

@dataclass
class CaptionedPrompt:
    """As prompt.Prompt, with a caption in the slot of the video."""
    ids: list
    labels: list
    noisy: range        # positions that noisy_embeds blurs

def fill_slot(prompt, ids, places=None):
    """Puts the ids of a text in the slot of the video: at these of its places, or one after another from its first."""
    first = prompt.slot
    for place, i in zip(places or range(len(ids)), ids, strict=True):
        prompt.ids[first + place] = i

class TextCurriculum(torch.utils.data.Dataset):
    """Texts from which the small LLaMA learns to read; an epoch is a phase, and each item is a CaptionedPrompt.

        phases 0-2   grows                          a word in the place of the video; one option repeats it
                     Question: Which one is it?
                     Options:
                     (A) cup no
                     (B) grows yes
                     Best option:(B) grows
        phases 3-7   the right option is somewhere in 2, 4, .. words, in an answer or in a caption
        after that   of ten batches two of such drills, two of open questions about a caption (What does the red star
                     do after it jumps? After that it grows.), six of questions with options about a caption

    All of it is written as the benchmark is, with the caption in the slot of the video, so that the LLM learns the
    language and to find an option's letter by what the slot says, but no answer by heart. One batch in five has the
    benchmark's long system prompt from phase 15 on. Labels: answers, and the hints "no" and "yes" of worked examples.
    One conversation in ten is stage 2's request to repeat the caption. From phase 14 on, half of the captions are
    spread over the places of the slot and blurred (noisy_embeds).

    Phases and hints are needed: to find the letter, the model must bind letter to option, match option to text, and
    join the two before any of the three pays. On conversations alone it was at chance after 300 steps of 32 without
    hints, and after 400 with them; single words with hints bring all three within the first phases. These must not be
    cut short: with 200 steps of 8 each instead of 300, 1,200 steps of conversations left it at chance.
    """
    DRILL_QUESTIONS = ("Which of these is there?", "What is told of?", "Which one is it?")

    def __init__(self, path, tok, prompt_style, n_video, epoch_size):
        self.documents = [json.loads(line) for line in open(path)]         # (caption, with options, open questions)
        self.tok, self.prompt_style, self.n_video = tok, prompt_style, n_video
        self.epoch_size, self.epoch = epoch_size, 0
        self.hint_ids = {tok.encode(f"It grows. {hint}")[-1] for hint in OPTION_HINTS}
        words = {word for caption, *_ in self.documents[:5000] for word in re.findall(r"\b[a-z]+\b", caption)}
        self.words = [word for word in sorted(words) if len(tok.encode(word)) == 1]
        self.answers = sorted({qa["a"] for *_, open_turns in self.documents[:5000] for qa in open_turns})

    def __len__(self):
        return self.epoch_size

    def set_epoch(self, epoch):
        self.epoch = epoch

    def groups(self):
        """For the Sampler: kinds of different lengths share no batch."""
        ends = [self.epoch_size * fifth // 5 for fifth in (0, 1, 2, 4, 5)]
        kinds = ("open", "drill", "options", "system")
        return [(kind, 1.0, range(*span)) for kind, span in zip(kinds, pairwise(ends), strict=True)]

    def __getitem__(self, index):
        # a caption and turns about it; which fifth of the epoch the index is in decides the kind
        rng, fifth = random.Random(f"{self.epoch} {index}"), 5 * index // self.epoch_size
        caption, turns = self.drill(rng) if self.epoch < 8 or fifth == 1 else self.document(rng, fifth == 0)

        # written as stage 2 asks for a caption, or as stage 3 and the benchmark ask questions
        words, noisy = self.tok.encode(caption), self.epoch > 13 and fifth != 1 and rng.random() < 0.5
        length = max(len(words), self.n_video) if noisy else len(words)
        if self.epoch > 7 and fifth > 1 and rng.random() < 0.1:
            prompt = caption_prompt(self.tok, caption, length, rng.choice(CAPTION_INSTRUCTIONS["video"]))
        else:
            if self.epoch > 14 and fifth == 4:                             # twice, as in the benchmark
                turns = [turns[0] | {"i": SYSTEM, "q": SYSTEM + turns[0]["q"]}, *turns[1:]]
            prompt = conversation_prompt(self.tok, turns, length, prompt_style=self.prompt_style)

        # the caption takes the place of the video, and hints are learnt too
        noisy_ids = range(prompt.slot, prompt.slot + length * noisy)
        fill_slot(prompt, words, sorted(rng.sample(range(length), len(words))))
        labels = [i if i in self.hint_ids else label for i, label in zip(prompt.ids, prompt.labels, strict=True)]
        return CaptionedPrompt(prompt.ids, labels, noisy_ids)

    def document(self, rng, is_open):
        """-> (caption, turns): without options, or with them; their hints are rare from phase 13 on."""
        caption, turns, open_turns = rng.choice(self.documents)
        if self.epoch > 12 and rng.random() < 0.8:
            turns = [qa | {"q": re.sub(f" ({'|'.join(OPTION_HINTS)})\n", "\n", qa["q"])} for qa in turns]
        return caption, open_turns if is_open else turns

    def drill(self, rng):
        """-> (words, [turn]), as document."""
        text, right, wrong = self.one_word(rng) if self.epoch < 3 else self.several_words(rng)
        question, options = rng.choice(self.DRILL_QUESTIONS), rng.sample([right, *wrong], len(wrong) + 1)
        choice = {"question": question, "candidates": options, "answer": right}
        return text, [as_turn(choice, worked=rng.random() < 0.7)]

    def one_word(self, rng):
        """-> (text, right option, wrong ones)."""
        right, *wrong = rng.sample(self.words, 4)
        return right, right, wrong

    def several_words(self, rng):
        """-> as one_word: an answer between two words; or words of a list, or of a caption."""
        n_wrong, kind = rng.randint(2, 4), rng.random()
        if kind < 0.25 and self.epoch > 4:
            right, *wrong = rng.sample(self.answers, n_wrong + 1)
            return f"{rng.choice(self.words)} {right} {rng.choice(self.words)}", right, wrong

        text = " ".join(rng.sample(self.words, rng.randint(1, min(12, 2 ** (self.epoch - 2)))))
        if kind > 0.75 and self.epoch > 5:
            text = rng.choice(self.documents)[0]
        present = set(re.findall(r"\b[a-z]+\b", text))
        right = [word for word in self.words if word in present]
        wrong = [word for word in self.words if word not in present]
        return (text, rng.choice(right), rng.sample(wrong, n_wrong)) if right else self.one_word(rng)

def collate_prompts(prompts):
    """-> ids (B, S) with VIDEO where the slot is empty, labels, mask, noisy (B, S): 1 where noisy_embeds blurs."""
    ids, labels, mask = pad_batch(prompts, pad_id=0)
    noisy = torch.zeros_like(mask)
    for row, prompt in zip(noisy, prompts, strict=True):
        row[prompt.noisy.start:prompt.noisy.stop] = 1
    return add_packing({"ids": ids, "labels": labels, "mask": mask}) | {"noisy": noisy, "bad": []}

def noisy_embeds(llama, ids, noisy):
    """Embeds ids (B, S) -> (B, S, D), with noise added where noisy (B, S) is 1; VIDEO becomes noise alone.

    A large LLM understands vectors that are close to a word's (soft prompts); a small one must be taught to.
    """
    embeds = llama.embed(ids.clamp(min=0)) * (ids != VIDEO).unsqueeze(-1)             # (B, S, D)
    strength = noisy * 0.7 * torch.rand(len(ids), 1, device=ids.device)               # (B, S), words have about 1
    return embeds + strength.unsqueeze(-1) * torch.randn_like(embeds)

def train_tokenizers(text, folder, size=1000):
    """The files of both tokenizers, made from text.jsonl if they do not exist -> (tokenizer.model, vocab.txt)."""
    text, folder = Path(text), Path(folder)
    if not folder.is_dir():
        if not text.is_file():
            raise FileNotFoundError(f"{text} does not exist; make it: python -m toy.world --out {text.parent}")
        documents = [json.loads(line) for line in open(text)]
        texts = [text for caption, turns, open_turns in documents
                 for text in (caption, *(qa[key] for qa in turns + open_turns for key in "iqa"))]
        texts += 1000 * [SYSTEM]                                           # the benchmark's prompt has words of its own
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
RECIPES = {
    "toy": {"vit": dict(steps=4000, batch=8, lr=1.5e-3, beta2=0.99, muon_lr_scale=1.0, log_every=100, save_every=1000),
            "llm": dict(epochs=18, batch=8, lr=1e-3, muon_lr_scale=1.0, constant_until=0.7, beta2=0.99, workers=0,
                        log_every=100, save_every=1000)},
    "micro": dict.fromkeys(("vit", "llm"), dict(steps=4, batch=4, lr=1e-3, muon_lr_scale=1.0, log_every=1, save_every=2,
                                                workers=0)),
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
    config, _, vocab = toy_config(cfg)
    meta = read_json(Path(cfg.data) / "meta.json")
    targets = np.load(Path(cfg.data) / "targets.npy", mmap_mode="r")       # (clips, frames, L, 3)
    if targets.shape[2] != config.vit.grid ** 2:
        raise ValueError(f"{cfg.data}/targets.npy has {targets.shape[2]} patches per frame, preset {cfg.preset} needs "
                         f"{config.vit.grid ** 2}; make the toy world again with --patch {48 // config.vit.grid}")

    clips = load_clips(cfg, config, "corpus_clips.json", config.train_frames)
    frames = train_frame_indices(config.train_frames, targets.shape[1], config.frame_sampling)
    dataset = PatchLabels(clips, targets, Path(cfg.data) / "annotations.jsonl", frames, epoch_size=100 * cfg.batch)
    model = PatchClassifier(config, [len(meta[key]) for key in ("colours", "shapes", "activities")])
    return Stage("stage 0 vit", Path(cfg.out) / "init", model, dataset, collate_patches,
                 lambda batch, _: model.losses(batch),
                 lambda folder, tensors: save_checkpoint(tensors, 0, config, folder, vocab))

def llm_stage(cfg, dist):
    """The small LLaMA learns to read, without videos. OUT/llm is a folder as Vicuna's."""
    config, tokenizer_model, _ = toy_config(cfg)
    model, tok = Llama(config.llama), SentencePiece(str(tokenizer_model))
    dataset = TextCurriculum(Path(cfg.data) / "text.jsonl", tok, config.prompt_style, config.n_query + config.n_extra,
                             epoch_size=300 * cfg.batch)

    def loss(batch, _):
        embeds = noisy_embeds(model, batch["ids"], batch["noisy"])             # (B, S, D)
        return {"lm": next_token_loss(model, embeds, batch["labels"], batch["lengths"], batch["targets"])}

    return Stage("stage 0 llm", Path(cfg.out) / "llm", model, dataset, collate_prompts, loss,
                 lambda folder, tensors: write_llm(model, tokenizer_model, folder, tensors))

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
        part_cfg = apply_recipe(replace(cfg, part=part), explicit, RECIPES[cfg.preset][part])
        train_stage(STAGES[part], part_cfg, dist)
    dist.close()

if __name__ == "__main__":
    run(main, "toy.pretrain", stopped="stopped at once; the last checkpoint is intact")
