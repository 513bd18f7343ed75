"""Talk about a video: one question (--ask), or a conversation until an empty line.

Decoding is greedy by default, so the same question gets the same answer. Not here: many videos, fast (mvbench.py).
Source: the official conversation.py and the prompt of its demo.

    python chat.py --ckpt runs/toy/stage3 --video data/toy/videos/00/00000.gif --ask "What happens?"
"""
import argparse
import math
import sys
from contextlib import nullcontext
from functools import partial

import torch

from infra import cli
from prompt import chat_prompt, check_text, decode_answer, is_finished, pad_batch
from video import load_eval_clip
from weights.checkpoint import add_model_options, load_from_args

INSTRUCTION = "Watch the video and answer the question.\n"

class Chat:
    """A conversation about a video, image or folder of frames."""
    def __init__(self, model, qformer_tok, llm_tok, media, temperature=0.0, max_new_tokens=100, autocast=None):
        self.model, self.llm_tok, self.autocast = model, llm_tok, autocast or nullcontext()
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.history, self.n_dropped = [], 0                   # turns that the LLM still reads; number of older ones
        # the video is encoded once for all questions: the Q-Former reads the instruction, not the question
        video = load_eval_clip(media, model.cfg)[None].to(model.device)                              # (1, T, 3, H, W)
        ids = torch.tensor([qformer_tok.encode(INSTRUCTION, sep=True)], device=model.device)         # (1, S)
        with torch.no_grad(), self.autocast:
            vision = model.encode_video(video)                                                       # (1, N, C)
            self.video_tokens = model.video_tokens(vision, ids, torch.ones_like(ids))                # (1, Q, D)

    @torch.no_grad()
    def ask(self, question):
        """A question -> the answer. Both become part of the prompt of the next question. ValueError if the question
        alone is too long for the LLM."""
        model, tok, n_video = self.model, self.llm_tok, self.video_tokens.shape[1]
        limit, style = model.llama_model.cfg.max_positions, model.cfg.prompt_style
        check_text(question)

        # the oldest turns make room for an answer, of a quarter of the LLM's length at most
        for first in range(len(self.history) + 1):
            prompt = chat_prompt(tok, self.history[first:], question, n_video, INSTRUCTION, prompt_style=style)
            if len(prompt.ids) + min(self.max_new_tokens, limit // 4) <= limit:
                break
        room = limit - len(prompt.ids) + 1                     # the answer's last token is not read again
        if room < 2:
            raise ValueError(f"the question makes a prompt of {len(prompt.ids)} tokens, but the LLM takes at most "
                             f"{limit} with the answer: shorten it")
        del self.history[:first]
        self.n_dropped += first

        ids, _, mask = (t.to(model.device) for t in pad_batch([prompt], tok.eos_id, side="left"))    # (1, S)
        with self.autocast:
            embeds = model.insert_video_tokens(ids, self.video_tokens)                               # (1, S, D)
            rows = model.llama_model.generate(embeds, mask, min(self.max_new_tokens, room), partial(is_finished, tok),
                                              temperature=self.temperature)
        answer = decode_answer(tok, rows[0])
        self.history.append((question, answer))
        return answer

def main(argv=None):
    p = argparse.ArgumentParser("chat.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(p)
    p.add_argument("--video", required=True, metavar="PATH", help="a video, GIF, image, or folder of frames")
    p.add_argument("--ask", default="", metavar="TEXT", help="one question; without it, asks until an empty line")
    p.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: most probable token (default)")
    p.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="longest answer (default %(default)s)")
    args = p.parse_args(argv)
    if not 0 <= args.temperature < math.inf or args.max_new_tokens < 1:
        p.error("--temperature must be 0 or more, --max-new-tokens 1 or more")
    check_text(args.ask)                                       # before the model is loaded

    *model, autocast = load_from_args(args)
    chat = Chat(*model, args.video, args.temperature, args.max_new_tokens, autocast)
    if args.ask:
        print(chat.ask(args.ask))
        return

    print(f"{args.video}: ask about it; an empty line ends the conversation")
    try:
        while question := input("> ").strip():
            n_before = chat.n_dropped
            try:
                print(chat.ask(question))
            except ValueError as error:                        # of this question; the next may be asked
                print(f"chat.py: {error}", file=sys.stderr)
            if chat.n_dropped and not n_before:
                print("(the conversation has outgrown the LLM: from here on it forgets the oldest turns)")
    except (EOFError, KeyboardInterrupt):
        print()

if __name__ == "__main__":
    cli.run(main, "chat.py")
