"""Questions about videos -> answers, many at a time, and nothing computed twice.

    frames -> look -> (B, N, C) -> read -> (B, Q, D) -> answer -> "(B) It jumps."      letters 0.03 0.91 0.06

What makes it quick changes no answer:
  - The Q-Former reads the instruction, not the question, so a clip's tokens serve all of its questions.
  - A prompt is head, video, what all questions begin with, and the rest. The LLM reads the head once, the next two once
    a clip, the rest for each question, each part on top of the keys and values of the parts before.
  - The first step of an answer gives the letter, and the letter tells what the model will very probably say: "B) It
    jumps. ###". A second step reads all this at once, and says at each word whether it would have come next. Where
    another would have come, it is said instead, and the next step goes on from there: every answer is what greedy
    generation gives word by word. (The idea: arXiv 2211.17192, with the options in the place of a draft model.)

Also here: the controls, which take from a clip what it should not be answerable without. Not here: which questions
(tasks.py), files and processes (mvbench.py), scores (scorers.py). Source: paper section 3 and tables 8, 9, 11;
mvbench.ipynb; the likelihood of each option: SEED-Bench, arXiv 2307.16125, section 3.3.

    pytest tests/test_engine.py
"""
import time
import zlib
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from data import pad_ids
from evaluation.tasks import LETTERS
from llama import KVCache
from prompt import (
    ANSWER_PROMPT,
    SYSTEM,
    Prompt,
    chat_prompt,
    decode_answer,
    is_finished,
    mvbench_prompt,
    mvbench_question,
    pad_batch,
)

CONTROLS = {
    "blank": "no video: what the Q-Former sees is zeros",
    "noise": "no video: what the LLM reads are random vectors, as large as those of a blank one",
    "single": "the middle frame alone, in the place of every frame",
    "shuffle": "the frames in random order",
    "reverse": "the frames from last to first",
}
ANSWER_ROOM = 32    # tokens that an answer takes in the cache, as a rule
DECODES = {
    "generate": "greedy, as the paper",
    "letter": "the most probable option letter behind the answer prompt",
    "likelihood": "of each option's text, the options not being shown; the mean over its tokens, as SEED-Bench",
}


@dataclass(frozen=True)
class Protocol:
    """How the questions are asked. The defaults are the paper's; what else it has tried is a field away."""
    system: str = SYSTEM                # table 8: without it 49.9
    answer_prompt: str = ANSWER_PROMPT  # table 9: without it 50.1
    question_in_qformer: bool = False   # table 11: with it 50.8
    decode: str = "generate"
    max_new_tokens: int = 100


@dataclass
class Answer:
    said: str               # first line, behind the bracket that the prompt has opened
    letters: list           # probability of each option's letter as the first word, [] without the answer prompt
    likelihoods: list       # mean log-probability of each option's tokens, with decode "likelihood"


class Clock:
    """Where the time goes: seconds by part."""

    def __init__(self, device="cpu"):
        self.seconds, self.on_gpu = defaultdict(float), torch.device(device).type == "cuda"

    @contextmanager
    def __call__(self, part):
        begun = time.perf_counter()
        yield
        if self.on_gpu:
            torch.cuda.synchronize()                           # or the time would be counted where it is waited for
        self.seconds[part] += time.perf_counter() - begun


# ------------------------------------------------------------------------------------------------------- the controls


def clip_seed(media, bound):
    """The same for a clip on every machine, in every order and process."""
    return zlib.crc32(f"{media} {bound}".encode())


def altered(video, control, seed):
    """One clip's frames (T, 3, H, W) under a control that changes frames; as they are under any other."""
    T = len(video)
    if control == "single":
        return video[T // 2].expand_as(video)
    if control == "reverse":
        return video.flip(0)
    if control == "shuffle":
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(T, generator=generator)
        while T > 1 and torch.equal(order, torch.arange(T)):
            order = torch.randperm(T, generator=generator)
        return video[order]
    return video


# ------------------------------------------------------------------------------------------------------- the questions


def letter_ids(tok):
    """The ids that name the options, behind a bracket."""
    return [tok.encode(f"({letter}")[-1] for letter in LETTERS]


class Engine:
    """A model with its tokenizers, asked under one protocol."""

    def __init__(self, model, wordpiece, tok, protocol=None):
        self.model, self.wordpiece, self.tok, self.protocol = model, wordpiece, tok, protocol or Protocol()
        self.n_video = model.cfg.n_query + model.cfg.n_extra
        self.letter_ids = letter_ids(tok)
        # the ids that can be an answer's last: all others need not be looked at, which takes longer than one thinks
        self.last_ids = {i for i in range(tok.vocab_size) if i == tok.eos_id or set("#\n") & set(tok.decode([i]))}
        self.clock = Clock(model.device)
        self.multiple = 8 if self.clock.on_gpu else 1          # of padded lengths
        self.head, self.blank = None, None                     # KVCache of the prompts' head; tokens of a blank video

    # ---- what the LLM reads of the clips

    def watch(self, video, control, seeds):
        """Clips (B, T, 3, H, W), a seed for each -> what the Q-Former sees of them (B, N, C); zeros without video."""
        if control in ("blank", "noise"):
            cfg = self.model.cfg.vit
            zeros = torch.zeros(1, video.shape[1] * cfg.grid ** 2, cfg.width, device=self.model.device)
            return zeros.expand(len(video), -1, -1)
        return self.look(torch.stack([altered(clip, control, seed) for clip, seed in zip(video, seeds, strict=True)]))

    def tokens(self, vision, control, seeds, questions):
        """What the Q-Former sees (B, N, C), with a seed and a question for each -> what the LLM reads (B, Q, D)."""
        if control not in ("blank", "noise"):
            return self.read(vision, questions)
        if self.protocol.question_in_qformer:
            tokens = self.read(vision, questions)
        else:
            if self.blank is None:                             # the same for all clips
                self.blank = self.read(vision[:1], questions[:1])
            tokens = self.blank.expand(len(questions), -1, -1)
        return tokens if control == "blank" else noise_like(tokens, seeds)

    @torch.inference_mode()
    def look(self, video):
        """video (B, T, 3, H, W) -> what the Q-Former sees of it (B, N, C)."""
        with self.clock("ViT"):
            return self.model.encode_video(video.to(self.model.device))

    @torch.inference_mode()
    def read(self, vision, questions):
        """vision (B, N, C) with a question for each -> what the LLM reads (B, Q, D).

        The Q-Former reads the system prompt along, and the question only where the protocol says so.
        """
        with self.clock("Q-Former"):
            texts = [self.protocol.system]                                 # one for all
            if self.protocol.question_in_qformer:
                texts = [self.protocol.system + mvbench_question(q["question"], q["candidates"]) for q in questions]
            length = min(self.model.cfg.max_text, self.model.cfg.qformer.max_positions)
            rows = [self.wordpiece.encode(text, length, sep=True, truncate="left") for text in texts]
            instruction_ids, instruction_mask = (t.to(vision.device) for t in pad_ids(rows, self.wordpiece))   # (B, S)
            return self.model.video_tokens(vision, instruction_ids, instruction_mask)

    # ---- prompts

    def prompt(self, q):
        return mvbench_prompt(self.tok, q["question"], q["candidates"], self.n_video, self.protocol.system,
                              self.protocol.answer_prompt, self.model.cfg.prompt_style)

    def option_prompts(self, q):
        """A prompt for each option, its text being the answer and its ids the labels; no prompt shows the options."""
        def told(text):
            return chat_prompt(self.tok, [], f"{self.protocol.system}Question: {q['question']}", self.n_video,
                               self.protocol.system, prompt_style=self.model.cfg.prompt_style, answer_prompt=text)
        asked, prompts = told(""), [told(text) for text in q["candidates"]]
        for prompt in prompts:
            begin = common_length([asked, prompt])
            prompt.labels[begin:] = prompt.ids[begin:]
        return prompts

    # ---- answers

    @torch.inference_mode()
    def answer(self, questions, tokens, clips=None, prompts=None):
        """Questions about clips, by their place in tokens (B, Q, D) (default: one each) -> an Answer for each.

        prompts: of the questions, where they are known.
        """
        clips = list(range(len(questions))) if clips is None else clips
        with self.clock("LLM"):
            if self.protocol.decode == "likelihood":
                return self.by_likelihood(questions, tokens, clips)
            prompts = prompts or [self.prompt(q) for q in questions]
            hidden, cache = self.prefill(prompts, tokens, clips, last=1)                       # (B, 1, D)
            logits = self.model.llama_model.lm_head(hidden[:, 0]).float()                      # (B, V)
            letters = logits.softmax(-1)[:, self.letter_ids].tolist() if self.opened else [[]] * len(questions)
            letters = [p[:len(q["candidates"])] for q, p in zip(questions, letters, strict=True)]
            if self.protocol.decode == "letter":
                said = [f"({LETTERS[best_of(p)]})" for p in letters]
            else:
                room = [self.model.cfg.llama.max_positions - len(p.ids) for p in prompts]
                said = map(self.first_line, self.speak(questions, logits.argmax(-1).tolist(), cache, room))
            return [Answer(text, p, []) for text, p in zip(said, letters, strict=True)]

    @property
    def opened(self):
        """Whether the prompt ends in the bracket that a letter follows."""
        return self.protocol.answer_prompt.endswith("(")

    def prefill(self, prompts, tokens, clips, last=None):
        """-> (hidden states (B, last, D) of the prompts' last ids, which end together; a KVCache of all that was read).
        """
        llm = self.model.llama_model
        begin, after = prompts[0].slot, prompts[0].slot + self.n_video
        # what foretells the answer is left to be read by each: the last id, or the one before the labels
        common = min(common_length(prompts), *(len(p.ids) - sum(i >= 0 for i in p.labels) - 1 for p in prompts))
        if self.head is None:
            self.head = KVCache(llm.cfg.depth)
            llm(llm.embed(self.ids([prompts[0].ids[:begin]])), cache=self.head, logits_to_keep=0)
        ids, _, mask = pad_batch([Prompt(p.ids[common:], p.labels[common:]) for p in prompts], self.tok.eos_id, "left",
                                 self.multiple)
        shown = list(dict.fromkeys(clips))
        words = llm.embed(self.ids([prompts[0].ids[after:common]])).expand(len(shown), -1, -1)
        room = self.n_video + words.shape[1] + ids.shape[1] + ANSWER_ROOM
        cache = self.head.select_rows([0] * len(shown), room)
        llm(torch.cat((tokens[shown].to(words.dtype), words), 1), cache=cache, logits_to_keep=0)
        if clips != shown:
            cache = cache.select_rows([shown.index(clip) for clip in clips], ids.shape[1] + ANSWER_ROOM)
        return llm(llm.embed(ids.to(self.model.device)), mask.to(self.model.device), cache, last), cache

    def ids(self, rows):
        return torch.tensor(rows, dtype=torch.long, device=self.model.device)

    def speak(self, questions, first, cache, room):
        """Greedy answers (lists of new ids), their first ids being known; cache: of the prompts, room: ids that the LLM
        can take behind each.

        Each step reads what was said last and, on trial, what the options let expect; as far as the model would have
        said just this, it has been said.
        """
        llm, said, options = self.model.llama_model, [[i] for i in first], [self.option_ids(q) for q in questions]
        rows = list(range(len(questions)))                                 # of the cache
        while left := [i for i in rows if not self.ended(said[i])]:
            if left != rows:
                cache, rows = cache.select_rows([rows.index(i) for i in left]), left
            most = [min(room[i], self.protocol.max_new_tokens) - len(said[i]) for i in rows]
            fed = [[said[i][-1], *continuation(said[i], options[i])[:max(0, n)]]
                   for i, n in zip(rows, most, strict=True)]
            prompts = [Prompt(row, row) for row in fed]
            ids, _, mask = pad_batch(prompts, self.tok.eos_id, multiple=self.multiple)
            hidden = llm(llm.embed(ids.to(self.model.device)), mask.to(self.model.device), cache)  # (b, s, D)
            best = llm.lm_head(hidden).argmax(-1).tolist()                                         # (b, s)
            new = [self.accepted(said[i], fed[row][1:], best[row]) for row, i in enumerate(rows)]
            begin = cache.mask.shape[1] - ids.shape[1]
            for row, i in enumerate(rows):
                said[i] += new[row]
                cache.mask[row, begin + len(new[row]):] = 0                # what was tried and not said
            cache.mask = cache.mask[:, :begin + max(map(len, new))]        # what nobody said leaves the cache
        return said

    def accepted(self, said, tried, best):
        """What is said next: the best ids, up to the first that is not the one which was tried."""
        new = []
        for word, wanted in zip(best, [*tried, None], strict=False):
            new.append(word)
            if word != wanted or self.ended(said + new):
                break
        return new

    def ended(self, ids):
        return len(ids) >= self.protocol.max_new_tokens or ids[-1] in self.last_ids and self.complete(ids)

    def option_ids(self, q):
        """Of each option, the ids of the answer that names it, up to its end, as in training."""
        end = "</s>" if self.model.cfg.prompt_style == "mistral" else " ###"
        return [self.tok.encode(f"({letter}) {text}{end}")
                for letter, text in zip(LETTERS, q["candidates"], strict=False)]

    def by_likelihood(self, questions, tokens, clips):
        options = [(i, prompt) for i, q in enumerate(questions) for prompt in self.option_prompts(q)]
        prompts = [prompt for _, prompt in options]
        hidden, _ = self.prefill(prompts, tokens, [clips[i] for i, _ in options])              # (B * options, s, D)
        found = defaultdict(list)
        for (i, prompt), row in zip(options, hidden, strict=True):
            target = [label for label in prompt.labels if label >= 0]
            logits = self.model.llama_model.lm_head(row[-len(target) - 1:-1]).float()          # (length, V)
            chosen = logits.log_softmax(-1)[range(len(target)), target]
            found[i].append(chosen.mean().item())
        best = {i: best_of(p) for i, p in found.items()}
        return [Answer(f"({LETTERS[best[i]]}) {q['candidates'][best[i]]}", [], found[i])
                for i, q in enumerate(questions)]

    def complete(self, ids):
        """An answer ends at ### or </s>, and only its first line counts."""
        return is_finished(self.tok, ids) or "\n" in self.tok.decode(ids[-4:]).lstrip()

    def first_line(self, ids):
        """New ids -> the prediction: the answer's first line, behind the bracket that the prompt has opened."""
        return ("(" if self.opened else "") + decode_answer(self.tok, ids).split("\n")[0].rstrip()


def noise_like(tokens, seeds):
    """Random vectors (B, Q, D), a seed for each row, with the mean and spread that each channel has over tokens."""
    noise = torch.stack([torch.randn(tokens.shape[1:], generator=torch.Generator().manual_seed(seed))
                         for seed in seeds]).to(tokens)
    return tokens.mean(1, keepdim=True) + noise * tokens.std(1, keepdim=True)


def best_of(values):
    """The place of the largest."""
    return max(range(len(values)), key=values.__getitem__)


def continuation(said, texts):
    """What follows, in one of the texts (lists of ids), on the longest piece that `said` ends with; [] if none does."""
    best, length = [], 0
    for text in texts:
        for at in range(1, len(text)):
            same = 0
            while same < min(at, len(said)) and text[at - 1 - same] == said[-1 - same]:
                same += 1
            if same > length:
                best, length = text[at:], same
    return best


def common_length(prompts):
    """How many ids all prompts begin with."""
    first, last = min(p.ids for p in prompts), max(p.ids for p in prompts)     # the two that differ soonest
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
