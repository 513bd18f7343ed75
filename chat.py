"""Ask about a video, once (--ask) or in a conversation. Greedy by default, so the same question gets the same answer.

Shows: the whole way from a file to a sentence in twenty lines (Chat). It is no server and keeps nothing.
Source: official conversation.py and the demo's prompt.

Run:    python chat.py --ckpt runs/toy/stage3 --video data/toy/videos/00/00000.gif --ask "What happens?"
"""
import argparse
import sys
from contextlib import nullcontext
from functools import partial

import torch

from prompt import chat_prompt, decode_answer, is_finished, pad_batch
from video import load_eval_clip
from weights.checkpoint import add_model_options, load_from_args

INSTRUCTION = "Watch the video and answer the question.\n"


class Chat:
    """A conversation about one video (or image, or folder of frames)."""

    def __init__(self, model, wordpiece, tok, media, temperature=0.0, max_new_tokens=100, autocast=None):
        self.model, self.tok, self.autocast = model, tok, autocast or nullcontext()
        self.sampling, self.max_new_tokens, self.history = {"temperature": temperature}, max_new_tokens, []
        device = model.device
        video = load_eval_clip(media, self.model.cfg)                                         # (T, 3, H, W)
        instruction_ids = torch.tensor([wordpiece.encode(INSTRUCTION, sep=True)], device=device)        # (1, S)
        with torch.no_grad(), self.autocast:
            vision = self.model.encode_video(video[None].to(device))                                 # (1, N, C)
            self.tokens = self.model.video_tokens(vision, instruction_ids, torch.ones_like(instruction_ids))          # (1, Q, D)

    @torch.no_grad()
    def ask(self, question):
        """A question -> the answer; both are remembered for the next one."""
        n_video = self.tokens.shape[1]
        prompt = chat_prompt(self.tok, self.history, question, n_video, INSTRUCTION, prompt_style=self.model.cfg.prompt_style)
        ids, _, mask = (t.to(self.model.device) for t in pad_batch([prompt], self.tok.eos_id, side="left"))
        with self.autocast:
            rows = self.model.llama_model.generate(self.model.insert_video_tokens(ids, self.tokens), mask, self.max_new_tokens,
                                                   partial(is_finished, self.tok), **self.sampling)
        answer = decode_answer(self.tok, rows[0])
        self.history.append((question, answer))
        return answer


def main(argv=None):
    p = argparse.ArgumentParser(prog="chat.py", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(p)
    p.add_argument("--video", required=True, help="a video, GIF, image, or folder of frames")
    p.add_argument("--ask", default="", help="one question; without it, questions are read until an empty line")
    p.add_argument("--temperature", type=float, default=0.0, help="0: always the most probable word (default)")
    p.add_argument("--max-new-tokens", type=int, default=100, help="longest answer (default %(default)s)")
    args = p.parse_args(argv)
    *model, autocast = load_from_args(args)
    chat = Chat(*model, args.video, args.temperature, args.max_new_tokens, autocast)
    if args.ask:
        print(chat.ask(args.ask))
        return
    print(f"{args.video}: ask, or an empty line to leave")
    while question := input("> ").strip():
        print(chat.ask(question))


if __name__ == "__main__":
    try:
        main()
    except (KeyboardInterrupt, EOFError):
        print()
    except (ValueError, OSError) as error:
        print(f"chat.py: {error}", file=sys.stderr)
        sys.exit(2)
