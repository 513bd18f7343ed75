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

import checkpoint
from prompt import CAPTION_INSTRUCTIONS, IGNORE, SYSTEM, Prompt, caption_prompt, conversation_prompt, join, pad_batch
from qagen import MARKS, STRAIGHT
from tokenizer import train_sentencepiece, train_wordpiece
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
        weight = (0.02 + 0.98 * (shape > 0)).flatten()                     # (B*N,)
        losses = {}
        for head, (name, target, share) in zip(self.heads, (
                ("colour", colour, 1), ("shape", shape, 1), ("activity", activity, 2),
                ("place", place, 1), ("time", time, 1)), strict=True):
            loss = F.cross_entropy(head(x).flatten(0, 2), target.flatten(), reduction="none")  # (B*N,)
            losses[name] = share * (loss * weight).sum() / weight.sum()
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


class School(torch.utils.data.Dataset):
    """Texts from which the small LLaMA learns to read; an epoch is a lesson, and each item is a Prompt.

        epochs 0-2   grows                   a word and four options, of which it is one
                     (A) cup no
                     (B) grows yes
                     Best option:(B
        epochs 3-7   the same, and the right option stands somewhere in 2, 4, .. words, in an answer or a caption
        from then on conversations about a caption, and one batch in four of the former kind

    In the conversations the caption stands where the video's tokens will, so that the LLM learns the language and to
    find an option's letter by what it reads in that place, but no answer by heart. Labels: answers, and the marks "no"
    and "yes" of worked examples. One conversation in five is stage 2's request, to say the caption again.

    Lessons and marks are needed: to find the letter, the model must bind letter to option, match option to text, and
    join the two before any of the three pays. On conversations it was still at chance when stopped, after 300 steps
    without marks and 400 with them; on single words with marks all three took 300 steps of a fifth the tokens. Lessons
    3 to 7 must not be cut short: with two of them, drills were still at a loss of 0.27 when conversations began (with
    five: 0.03), and after 1,170 steps of conversations questions were still at chance.
    """

    def __init__(self, path, tok, style, epoch_size):
        self.documents = [json.loads(line) for line in open(path)]
        self.tok, self.style, self.epoch_size, self.epoch = tok, style, epoch_size, 0
        self.marks = {tok.encode(f"It grows. {mark}")[-1] for mark in MARKS}
        found = {word for caption, _ in self.documents[:5000] for word in re.findall(r"\b[a-z]+\b", caption)}
        self.words = [word for word in sorted(found) if len(tok.encode(word)) == 1]
        self.answers = sorted({qa["a"].partition(") ")[2] for _, qas in self.documents[:5000] for qa in qas})

    def __len__(self):
        return self.epoch_size

    def set_epoch(self, epoch):
        self.epoch = epoch

    def groups(self):
        """For the Sampler: drills, conversations, and those with the benchmark's long system prompt share no batch."""
        ends = (0, self.epoch_size // 4, self.epoch_size * 7 // 8, self.epoch_size)
        kinds = ("drill", "talk", "system")
        return [(kind, 1.0, range(*span)) for kind, span in zip(kinds, pairwise(ends), strict=True)]

    def __getitem__(self, index):
        rng = random.Random(f"{self.epoch} {index}")
        if self.epoch > 7 and index >= self.epoch_size // 4:
            system = self.epoch > 10 and index >= self.epoch_size * 7 // 8
            return self.conversation(*rng.choice(self.documents), rng, system)
        return self.drill(*(self.one_word(rng) if self.epoch < 3 else self.many_words(rng)), rng)

    def conversation(self, caption, qas, rng, system):
        words = self.tok.encode(caption)
        if rng.random() < 0.2:
            prompt = caption_prompt(self.tok, caption, len(words), rng.choice(CAPTION_INSTRUCTIONS["video"]))
        else:
            if rng.random() < min(0.8, 0.4 * (self.epoch - 8)):            # fewer and fewer marks
                qas = [qa | {"q": re.sub(f" ({'|'.join(MARKS)})\n", "\n", qa["q"])} for qa in qas]
            if system:                                                     # twice, as the benchmark says it
                qas = [qas[0] | {"i": SYSTEM, "q": SYSTEM + qas[0]["q"]}, *qas[1:]]
            prompt = conversation_prompt(self.tok, qas, len(words), style=self.style)
        prompt.fill(words)
        prompt.labels = [i if i in self.marks else label for i, label in zip(prompt.ids, prompt.labels, strict=True)]
        return prompt

    def drill(self, text, right, wrong, rng):
        options = rng.sample([right, *wrong], len(wrong) + 1)
        worked, parts = rng.random() < 0.7, [(text, False)]
        for letter, option in zip("ABCDE", options, strict=False):
            parts += [(f"\n({letter}) {option}", False)] + worked * [(f" {MARKS[option == right]}", True)]
        parts += [("\nBest option:(", False), ("ABCDE"[options.index(right)], True)]
        prompt = join(self.tok, parts)
        return Prompt([self.tok.bos_id, *prompt.ids], [IGNORE, *prompt.labels])

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
        texts += 1000 * [SYSTEM]                                           # the benchmark's prompt has words of its own
        with checkpoint.whole_folder(folder) as temporary:
            train_sentencepiece(texts, str(temporary / "tokenizer.model"), vocab_size=size)
            train_wordpiece(texts, str(temporary / "vocab.txt"))
    return folder / "tokenizer.model", folder / "vocab.txt"
