"""Stage 0: stand-ins for what the real system takes ready-made, a ViT that sees (UMT-L), an LLM that speaks (Vicuna).

    Teacher       ViT + heads, trained towards the toy world's ground truth, patch by patch
    TextData      the toy world in words, for the small LLaMA: conversations whose video is its caption
    Drills        short exercises before that, so that it learns what an option's letter is
    vocabulary    the tokenizers' files

With real checkpoints nothing here is needed. The loop is train.py's; source of the idea: UMT (arXiv 2303.16058).

Run:    python train.py --stage 0
"""
import json
import random
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
from prompt import CAPTION_INSTRUCTIONS, IGNORE, Prompt, caption_prompt, conversation_prompt, join, pad_batch
from qagen import MARKS
from tokenizer import train_sentencepiece, train_wordpiece
from vit_video import VisionTransformer


class Teacher(nn.Module):
    """The video ViT with linear heads on every patch token: colour, shape and activity of what covers the patch.

    UMT aligns each token of its ViT with a teacher's feature of the same patch; here the teacher is the toy world's
    ground truth itself. The heads are thrown away afterwards.
    """

    def __init__(self, cfg, classes):
        super().__init__()
        self.vision_encoder = VisionTransformer(cfg.vit)
        self.norm = nn.LayerNorm(cfg.vit.width)
        self.heads = nn.ModuleList([nn.Linear(cfg.vit.width, n) for n in classes])

    def losses(self, batch):
        """video (B, T, 3, H, W), targets (B, T, L, 3) -> {"colour", "shape", "activity"}: mean cross-entropies."""
        x = self.norm(self.vision_encoder(batch["video"]))                 # (B, T, L, C)
        targets = batch["targets"].unbind(-1)                              # 3 x (B, T, L)
        return {name: F.cross_entropy(head(x).flatten(0, 2), target.flatten())
                for name, head, target in zip(("colour", "shape", "activity"), self.heads, targets, strict=True)}


class TeacherData(torch.utils.data.Dataset):
    """Clips with the teacher's classes: targets.npy (clips, frames, patches, 3) beside the captions."""

    def __init__(self, clips, targets, frames):
        self.clips, self.targets, self.frames = clips, targets, frames
        self.groups, self.set_epoch = clips.groups, clips.set_epoch

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        sample = self.clips[index]
        targets = self.targets[sample["idx"]][self.frames]                     # (T, L, 3)
        sample["targets"] = torch.from_numpy(targets.astype(np.int64))
        return sample


class TextData(torch.utils.data.Dataset):
    """Conversations without a video: where the video's tokens will stand, the caption's words do.

    So the LLM learns the language, and to find an option's letter by what it reads in that place, and it cannot learn
    any answer by heart. Each item is a Prompt; its labels are the answers, and the marks of worked
    examples (qagen.text_documents). One item in four is the request of stage 2, to say the caption again.
    """

    def __init__(self, path, tok, style):
        self.documents = [json.loads(line) for line in open(path)]
        self.tok, self.style = tok, style
        self.marks = {tok.encode(f"It grows. {mark}")[-1] for mark in MARKS}

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        caption, qas = self.documents[index]
        words = self.tok.encode(caption)
        if index % 4 == 0:
            requests = CAPTION_INSTRUCTIONS["video"]
            prompt = caption_prompt(self.tok, caption, len(words), requests[index // 4 % len(requests)])
        else:
            prompt = conversation_prompt(self.tok, qas, len(words), style=self.style)
        slot = slice(prompt.slot, prompt.slot + len(words))
        prompt.ids[slot] = words
        prompt.labels = [i if i in self.marks else label for i, label in zip(prompt.ids, prompt.labels, strict=True)]
        return prompt


class Drills(torch.utils.data.Dataset):
    """Short exercises ahead of TextData: which option stands in the text before? Letters and marks are the labels.

        spins grows lamp                          lesson 1: the text is one word, and that is the right option
        (A) cup no                                lesson 2: the text is several words, a caption or an answer,
        (B) grows yes                                       and the right option is somewhere in it
        Best option:(B

    Without them a small LLaMA does not learn in any time that a demo has that a letter stands for the option behind it:
    it must bind letter to option, match option to text and join the two before any of the three pays. On whole
    documents it stayed at chance for 700 steps; one word each, with marks, taught it in 300 steps of a tenth the size.
    """

    def __init__(self, path, tok, lesson, size=64_000):
        self.tok, self.lesson, self.size = tok, lesson, size
        documents = [json.loads(line) for line in open(path)][:5000]
        self.captions = [caption for caption, _ in documents]
        found = sorted({word for caption in self.captions for word in re.findall("[a-z]+", caption)})
        self.words = [word for word in found if len(tok.encode(word)) == 1]
        self.answers = sorted({qa["a"].partition(") ")[2] for _, qas in documents for qa in qas})

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        rng = random.Random(f"{self.lesson} {index}")
        text, right, wrong = self.exercise(rng)
        options = rng.sample([right, *wrong], len(wrong) + 1)
        worked, parts = rng.random() < 0.7, [(text, False)]
        for letter, option in zip("ABCDE", options, strict=False):
            parts += [(f"\n({letter}) {option}", False)] + worked * [(f" {MARKS[option == right]}", True)]
        parts += [("\nBest option:(", False), ("ABCDE"[options.index(right)], True)]
        prompt = join(self.tok, parts)
        return Prompt([self.tok.bos_id, *prompt.ids], [IGNORE, *prompt.labels])

    def exercise(self, rng):
        """-> (text, right option, two to four wrong ones)."""
        if self.lesson == 1:
            right, *wrong = rng.sample(self.words, 4)
            return right, right, wrong
        n_wrong = rng.randint(2, 4)
        if rng.random() < 0.25:
            right, *wrong = rng.sample(self.answers, n_wrong + 1)
            return f"{rng.choice(self.words)} {right} {rng.choice(self.words)}", right, wrong
        text = " ".join(rng.sample(self.words, rng.randint(2, 12)))
        if rng.random() < 1 / 3:
            text = rng.choice(self.captions)
        told = set(re.findall("[a-z]+", text))
        wrong = rng.sample(sorted(set(self.words) - told), n_wrong)
        return text, rng.choice(sorted(told.intersection(self.words))), wrong


def collate_text(prompts):
    ids, labels, mask = pad_batch(prompts, pad_id=0)
    return {"ids": ids, "labels": labels, "mask": mask, "bad": []}


def collate_teacher(samples):
    return {"video": torch.stack([s["video"] for s in samples]),
            "targets": torch.stack([s["targets"] for s in samples]),
            "bad": [path for s in samples for path in s["bad"]]}


def vocabulary(text, folder, size=1000):
    """The files of both tokenizers, made from text.jsonl if they are not there: -> (tokenizer.model, vocab.txt)."""
    text, folder = Path(text), Path(folder)
    if not folder.is_dir():
        if not text.is_file():
            raise FileNotFoundError(f"{text} does not exist; make it by: python toyworld.py --out {text.parent}")
        documents = [json.loads(line) for line in open(text)]
        texts = [text for caption, qas in documents for text in (caption, *(qa[k] for qa in qas for k in "iqa"))]
        with checkpoint.whole_folder(folder) as temporary:
            train_sentencepiece(texts, str(temporary / "tokenizer.model"), vocab_size=size)
            train_wordpiece(texts, str(temporary / "vocab.txt"))
    return folder / "tokenizer.model", folder / "vocab.txt"
