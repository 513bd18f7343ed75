"""How questions are asked: the paper's protocol with its ablations, and the controls, which take something away.

What a model still answers right under a control did not need what was taken away.
Not here: how answers are computed (engine.py), what the scores say (report.py). Source: paper tables 8, 9 and 11; the
likelihood of each option: SEED-Bench, arXiv 2307.16125, section 3.3.

    pytest tests/test_engine.py
"""
import zlib
from dataclasses import dataclass

import torch

from prompt import ANSWER_PROMPT, SYSTEM, mvbench_question

DECODES = {
    "generate": "greedy generation, as in the paper",
    "letter": "the most probable option letter after the answer prompt",
    "likelihood": "the option whose text is the likeliest, mean over its tokens, options not shown (SEED-Bench)",
}
CONTROLS = {
    "blank": "no video: the Q-Former reads zeros",
    "noise": "no video: the LLM reads random vectors, as large as the video tokens of a blank one",
    "single": "the middle frame alone, instead of every frame",
    "shuffle": "the frames in random order",
    "reverse": "the frames from last to first",
}
NO_VIDEO = ("blank", "noise")       # controls under which nothing of the clip reaches the model

@dataclass(frozen=True)
class Protocol:
    """The defaults are the paper's (51.1 with Vicuna-7B). Each field but the last is one of its ablations."""
    system: str = SYSTEM                # without it 49.9 (table 8)
    answer_prompt: str = ANSWER_PROMPT  # without it 50.1 (table 9)
    question_in_qformer: bool = False   # with it 50.8 (table 11)
    decode: str = "generate"            # one of DECODES
    max_new_tokens: int = 100

    @property
    def opening(self):
        """The bracket that the prompt ends in, for the answer to begin with a letter; "" without an answer prompt."""
        return "(" if self.answer_prompt.endswith("(") else ""

    def instruction(self, q):
        """What the Q-Former reads."""
        question = mvbench_question(q["question"], q["candidates"]) if self.question_in_qformer else ""
        return self.system + question

def clip_seed(media, bound):
    """A seed for a clip: the same on every machine, in every process and in every order."""
    return zlib.crc32(f"{media} {bound}".encode())

def apply_control(video, control, seed):
    """A clip (T, 3, H, W) under a control; unchanged under "" and under those that change no frames."""
    T = len(video)
    if control == "single":
        return video[T // 2].expand_as(video)
    if control == "reverse":
        return video.flip(0)
    if control == "shuffle":
        generator, order = torch.Generator().manual_seed(seed), torch.arange(T)
        while T > 1 and torch.equal(order, torch.arange(T)):   # until it is another order
            order = torch.randperm(T, generator=generator)
        return video[order]
    return video

def noise_like(tokens, seeds):
    """Random vectors (B, Q, D), a seed for each row, with the mean and the deviation that each channel has over Q."""
    noise = torch.stack([torch.randn(tokens.shape[1:], generator=torch.Generator().manual_seed(seed))
                         for seed in seeds]).to(tokens)                                        # (B, Q, D)
    return tokens.mean(1, keepdim=True) + noise * tokens.std(1, keepdim=True)
