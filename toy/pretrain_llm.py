"""What the toy's LLM is pretrained on: the toy world in words, with a text where the video will be.

    TextCurriculum -> ids (B, S), VIDEO where a place is empty, noisy (B, S) -> noisy_embeds (B, S, D) -> Llama -> loss

A large LLM understands vectors that are close to words (soft prompts) and finds the letter of the option that it means;
a small one must be taught both. Not here: the command, its options and files (toy/pretrain.py).
What was tried on the way: results/toy_cpu.md.

    python -m toy.pretrain llm
"""
import json
import random
import re
from dataclasses import dataclass

import torch

from prompt import CAPTION_INSTRUCTIONS, SYSTEM, Prompt, add_packing, caption_prompt, conversation_prompt, pad_batch
from qagen.generate import OPTION_HINTS, as_turn

WORD, OPTION = re.compile(r"\b[a-z]+\b"), re.compile(r"^\([A-E]\) (.*)", re.M)

@dataclass
class CaptionedPrompt(Prompt):
    """A Prompt with a caption in the slot of the video."""
    noisy: range        # positions that noisy_embeds blurs

def needs_order(caption, turns):
    """Whether words alone do not tell a wrong option from the right one, for the caption holds those of both:
    "After that it grows." or "After that it spins." in "It jumps. Before that it grows. After that it spins."."""
    for qa in turns:
        present, right, *options = (set(re.findall(r"\w+", text.lower())) - set(OPTION_HINTS)
                                 for text in (caption, qa["a"].partition(") ")[2], *OPTION.findall(qa["q"])))
        if any(words != right and words - right <= present for words in options) or options.count(right) > 1:
            return True
    return False

class TextCurriculum(torch.utils.data.Dataset):
    """Texts from which the small LLaMA learns to read, with the text in the slot of the video; an epoch is a phase.

        phases 0-2   the text is a word, one of the options: grows | Which one is it? (A) cup no (B) grows yes
        phases 3-7   the right option is somewhere in 2, 4, .. words, in an answer or in a caption
        after that   of ten batches two of such drills, two of open questions about a caption (What does the red star
                     do after it jumps? After that it grows.), six of questions with options about a caption; half of
                     the captions are such that the order of their words decides (needs_order)
        from 14 on   three captions in four fill the places of a video, one word each, under noise: as the Q-Former's
                     queries will, which write all words at once and none exactly

    It learns answers, and the hints "no" and "yes" of worked examples. Phases and hints are needed: the model must bind
    letter to option, match option to text, and join the two before any of the three pays. On conversations alone it was
    at chance after 300 steps of 32 without hints, and after 400 with them."""
    DRILL_QUESTIONS = ("Which of these is there?", "What is told of?", "Which one is it?")

    def __init__(self, path, tok, prompt_style, n_video, epoch_size):
        self.tok, self.prompt_style, self.n_video = tok, prompt_style, n_video
        self.epoch_size, self.epoch = epoch_size, 0
        self.documents = [json.loads(line) for line in open(path)]         # (caption, with options, open questions)
        self.ordered = [doc for doc in self.documents if needs_order(*doc[:2])] or self.documents
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
            caption, turns, open_turns = rng.choice(self.ordered if rng.random() < 0.5 else self.documents)
            if rng.random() < (0, 0.8, 1)[(self.epoch > 12) + (self.epoch > 20)]:          # hints become rare, then go
                turns = [qa | {"q": re.sub(f" ({'|'.join(OPTION_HINTS)})\n", "\n", qa["q"])} for qa in turns]
            turns = turns if fifth else open_turns

        # words fill the places of a video, with noise around them; a few are lost, so that each is read at its place,
        # and not found by the word before it
        words, places = self.tok.encode(caption), self.n_video
        is_noisy = self.epoch > 13 and not is_drill and len(words) <= places and rng.random() < 0.75
        length, lost = (places, 0.3 * rng.random()) if is_noisy else (len(words), 0)

        # one in five is stage 2's request for the caption; from phase 15 on a fifth has the benchmark's system prompt
        if not is_drill and fifth > 1 and rng.random() < 0.2:
            prompt = caption_prompt(self.tok, caption, length, rng.choice(CAPTION_INSTRUCTIONS["video"]))
        else:
            if self.epoch > 14 and fifth == 4:
                turns = [turns[0] | {"i": SYSTEM, "q": SYSTEM + turns[0]["q"]}, *turns[1:]]    # twice, as there
            prompt = conversation_prompt(self.tok, turns, length, prompt_style=self.prompt_style)

        # the caption takes the place of the video, and hints are learnt too
        first = prompt.slot
        for place, i in enumerate(words, first):
            if rng.random() >= lost:
                prompt.ids[place] = i
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

        # seven drills in ten are worked examples, with hints; from phase 20 on one in seven
        question, options = rng.choice(self.DRILL_QUESTIONS), rng.sample([right, *wrong], len(wrong) + 1)
        choice = {"question": question, "candidates": options, "answer": right}
        return text, [as_turn(choice, worked=rng.random() < (0.7 if self.epoch < 20 else 0.15))]

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
