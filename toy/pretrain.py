"""Stage 0: stand-ins for what the real system takes ready-made, a ViT that sees (UMT-L), an LLM that speaks (Vicuna).

    Teacher       ViT + heads, trained towards the toy world's ground truth, patch by patch
    School        the toy world in words, for the small LLaMA: drills, then conversations whose video is its caption
    vocabulary    the tokenizers' files

With real checkpoints nothing here is needed. The loop is train.py's; source of the idea: UMT (arXiv 2303.16058).

Run:    python train.py --stage 0
"""
import json
import random
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from infra.files import atomic_folder
from prompt import CAPTION_INSTRUCTIONS, SYSTEM, VIDEO, add_packing, caption_prompt, conversation_prompt, pad_batch
from qagen.generate import OPTION_HINTS, as_turn
from tokenizer import train_sentencepiece, train_wordpiece
from toy.things import STRAIGHT
from vit_video import VisionTransformer


class Teacher(nn.Module):
    """The video ViT with linear heads on every patch token: what covers the patch, and which patch and frame it is.

    UMT aligns each token of its ViT with a teacher's feature of the same patch; here the teacher is the toy world's
    ground truth itself: colour, shape and activity of what covers the patch. Place and time are asked for as well, or
    the ViT soon forgets them: without, they made 3.3 % and 0.7 % of the features' variance, and the Q-Former could name
    both scenes of a clip but not their order. The heads are thrown away afterwards.
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

        Nine patches in ten are background, which is class 0 of each head and soon learned; at equal weight they drown
        the rest (single heroes' shapes were then right on 25 to 36 % after 25,000 clips), so a background patch weighs
        a fiftieth of a covered one. Activity is the slowest to come and weighs double.
        """
        x = self.norm(self.vision_encoder(batch["video"]))                 # (B, T, L, C)
        B, T, L, _ = x.shape
        colour, shape, activity = batch["targets"].unbind(-1)              # each (B, T, L)
        place = torch.arange(L, device=x.device).expand(B, T, L)
        time = torch.arange(T, device=x.device)[:, None].expand(B, T, L)
        weight = 0.02 + 0.98 * (shape > 0)                                 # (B, T, L)
        weight = (weight / weight.sum((1, 2), keepdim=True) / B).flatten()  # (B*N,): every clip weighs the same
        losses = {}
        for head, (name, target, share) in zip(self.heads, (
                ("colour", colour, 1), ("shape", shape, 1), ("activity", activity, 2),
                ("place", place, 1), ("time", time, 1)), strict=True):
            loss = F.cross_entropy(head(x).flatten(0, 2), target.flatten(), reduction="none")  # (B*N,)
            losses[name] = share * (loss * weight).sum()
        return losses


class TeacherData(torch.utils.data.Dataset):
    """Clips with the teacher's classes: targets.npy (clips, frames, patches, 3) beside the captions.

        epochs 0-6   the playground's clips in which things go straight ahead or rest
        then         clips of the playground, and as many of the tasks

    Lessons are needed: what moves must be found in another frame before its movement can be told, and nothing pays
    until both are there. On all movements at once activity was right on 18 % of a playground's patches after 1,500
    steps of 8; after 700 steps of straight lines and 800 of all, on 32 % (weighed four and three times).
    """

    def __init__(self, clips, targets, annotations, frames, epoch_size):
        self.clips, self.targets, self.frames, self.epoch_size, self.epoch = clips, targets, frames, epoch_size, 0
        self.lessons = [], [], []                           # indices of clips: straight ahead, playground, tasks
        for index, line in enumerate(open(annotations)):
            clip = json.loads(line)
            if clip["scenario"] != "playground":
                self.lessons[2].append(index)
            else:
                self.lessons[1].append(index)
                if all(e["action"] in STRAIGHT for e in clip["events"]):
                    self.lessons[0].append(index)

    def __len__(self):
        return self.epoch_size

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.clips.set_epoch(epoch)

    def __getitem__(self, index):
        rng = random.Random(f"{self.epoch} {index}")
        lesson = 0 if self.epoch < 7 else 1 + index % 2
        sample = self.clips[rng.choice(self.lessons[lesson])]
        targets = self.targets[sample["idx"]][self.frames]                     # (T, L, 3)
        sample["targets"] = torch.from_numpy(targets.astype(np.int64))
        return sample


DRILL = ("Which of these is there?", "What is told of?", "Which one is it?")


class School(torch.utils.data.Dataset):
    """Texts from which the small LLaMA learns to read; an epoch is a lesson, and each item is a Prompt.

        lessons 0-2    grows                        a word in the video's place, of which one option speaks
                       Question: Which one is it?
                       Options:
                       (A) cup no
                       (B) grows yes
                       Best option:(B) grows
        lessons 3-7    the right option stands somewhere in 2, 4, .. words, in an answer or a caption
        from then on   of ten batches two of such drills, two of open questions about a caption (What does the red
                       star do after it jumps? After that it grows.), six of questions with options about a caption

    All of it is written as the benchmark is, with the caption where the video's tokens will stand, so that the LLM
    learns the language and to find an option's letter by what it reads in that place, but no answer by heart. One
    batch in five has the benchmark's long system prompt from lesson 15 on. Labels: answers, and the marks "no" and
    "yes" of worked examples. One conversation in ten is stage 2's request, to say the caption again. From lesson 14
    on, half of the captions lie spread over the video's places and blurred (soft_embed).

    Lessons and marks are needed: to find the letter, the model must bind letter to option, match option to text, and
    join the two before any of the three pays. On conversations it was still at chance when stopped, after 300 steps
    of 32 without marks and 400 with them; single words with marks bring all three within the first lessons. These must
    not be cut short: with 200 steps of 8 each instead of 300, 1,200 steps of conversations left it at chance.
    """

    def __init__(self, path, tok, prompt_style, n_video, epoch_size):
        self.documents = [json.loads(line) for line in open(path)]
        self.tok, self.prompt_style, self.n_video, self.epoch_size, self.epoch = tok, prompt_style, n_video, epoch_size, 0
        self.marks = {tok.encode(f"It grows. {mark}")[-1] for mark in OPTION_HINTS}
        found = {word for caption, *_ in self.documents[:5000] for word in re.findall(r"\b[a-z]+\b", caption)}
        self.words = [word for word in sorted(found) if len(tok.encode(word)) == 1]
        self.answers = sorted({qa["a"] for _, _, plain in self.documents[:5000] for qa in plain})

    def __len__(self):
        return self.epoch_size

    def set_epoch(self, epoch):
        self.epoch = epoch

    def groups(self):
        """For the Sampler: kinds of unlike length share no batch."""
        ends = [self.epoch_size * fifth // 5 for fifth in (0, 1, 2, 4, 5)]
        kinds = ("open", "drill", "options", "system")
        return [(kind, 1.0, range(*span)) for kind, span in zip(kinds, pairwise(ends), strict=True)]

    def __getitem__(self, index):
        rng = random.Random(f"{self.epoch} {index}")
        fifth = 5 * index // self.epoch_size                               # which of the groups
        caption, qas = self.drill(rng) if self.epoch < 8 or fifth == 1 else self.document(rng, plain=fifth == 0)
        words, soft = self.tok.encode(caption), self.epoch > 13 and fifth != 1 and rng.random() < 0.5
        length = max(len(words), self.n_video) if soft else len(words)
        if self.epoch > 7 and fifth > 1 and rng.random() < 0.1:
            prompt = caption_prompt(self.tok, caption, length, rng.choice(CAPTION_INSTRUCTIONS["video"]))
        else:
            if self.epoch > 14 and fifth == 4:                             # twice, as the benchmark says it
                qas = [qas[0] | {"i": SYSTEM, "q": SYSTEM + qas[0]["q"]}, *qas[1:]]
            prompt = conversation_prompt(self.tok, qas, length, prompt_style=self.prompt_style)
        prompt.soft = range(prompt.slot, prompt.slot + length * soft)
        prompt.fill(words, sorted(rng.sample(range(length), len(words))))
        prompt.labels = [i if i in self.marks else label for i, label in zip(prompt.ids, prompt.labels, strict=True)]
        return prompt

    def document(self, rng, plain):
        """-> (caption, turns): without options (plain), or with them; their marks are rare from lesson 13 on."""
        caption, many, open_turns = rng.choice(self.documents)
        if self.epoch > 12 and rng.random() < 0.8:
            many = [qa | {"q": re.sub(f" ({'|'.join(OPTION_HINTS)})\n", "\n", qa["q"])} for qa in many]
        return caption, open_turns if plain else many

    def drill(self, rng):
        """-> (words, [turn]), as document."""
        text, right, wrong = self.one_word(rng) if self.epoch < 3 else self.many_words(rng)
        choice = {"question": rng.choice(DRILL), "candidates": rng.sample([right, *wrong], len(wrong) + 1),
                  "answer": right}
        return text, [as_turn(choice, worked=rng.random() < 0.7)]

    def one_word(self, rng):
        """-> (text, right option, wrong ones), as many_words."""
        right, *wrong = rng.sample(self.words, 4)
        return right, right, wrong

    def many_words(self, rng):
        n_wrong, kind = rng.randint(2, 4), rng.random()
        if kind < 0.25 and self.epoch > 4:
            right, *wrong = rng.sample(self.answers, n_wrong + 1)
            return f"{rng.choice(self.words)} {right} {rng.choice(self.words)}", right, wrong
        text = " ".join(rng.sample(self.words, rng.randint(1, min(12, 2 ** (self.epoch - 2)))))
        if kind > 0.75 and self.epoch > 5:
            text = rng.choice(self.documents)[0]
        told = set(re.findall(r"\b[a-z]+\b", text))
        right = [word for word in self.words if word in told]
        wrong = [word for word in self.words if word not in told]
        return (text, rng.choice(right), rng.sample(wrong, n_wrong)) if right else self.one_word(rng)


def collate_text(prompts):
    """-> ids (B, S) with VIDEO where nothing is said, labels, mask, soft (B, S): 1 where a word stands for a video."""
    ids, labels, mask = pad_batch(prompts, pad_id=0)
    soft = torch.zeros_like(mask)
    for row, prompt in zip(soft, prompts, strict=True):
        row[prompt.soft.start:prompt.soft.stop] = 1
    return add_packing({"ids": ids, "labels": labels, "mask": mask}) | {"soft": soft, "bad": []}


def soft_embed(llama, ids, soft):
    """Embeds ids (B, S) -> (B, S, D), blurred where soft (B, S) is 1; VIDEO becomes noise alone.

    A large LLM understands vectors that lie near a word's (soft prompts); a small one must be taught to.
    """
    embeds = llama.embed(ids.clamp(min=0)) * (ids != VIDEO).unsqueeze(-1)             # (B, S, D)
    strength = soft * 0.7 * torch.rand(len(ids), 1, device=ids.device)                # (B, S), words have about 1
    return embeds + strength.unsqueeze(-1) * torch.randn_like(embeds)


def collate_teacher(samples):
    return {"video": torch.stack([s["video"] for s in samples]),
            "targets": torch.stack([s["targets"] for s in samples]),
            "bad": [path for s in samples for path in s["bad"]]}


def vocabulary(text, folder, size=1000):
    """The files of both tokenizers, made from text.jsonl if they are not there: -> (tokenizer.model, vocab.txt)."""
    text, folder = Path(text), Path(folder)
    if not folder.is_dir():
        if not text.is_file():
            raise FileNotFoundError(f"{text} does not exist; make it by: python -m toy.world --out {text.parent}")
        documents = [json.loads(line) for line in open(text)]
        texts = [text for caption, many, plain in documents
                 for text in (caption, *(qa[key] for qa in many + plain for key in "iqa"))]
        texts += 1000 * [SYSTEM]                                           # the benchmark's prompt has words of its own
        with atomic_folder(folder, replace=False) as temporary:
            train_sentencepiece(texts, str(temporary / "tokenizer.model"), vocab_size=size)
            train_wordpiece(texts, str(temporary / "vocab.txt"))
    return folder / "tokenizer.model", folder / "vocab.txt"
