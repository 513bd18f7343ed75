"""Answers many questions at once, and computes nothing twice. The answers are those of mvbench.answer_one.

    clips (B, T, 3, H, W) -> encode_clips (B, N, C) -> video_tokens (B, Q, D) -> answer: "(B) It jumps."

1. Prompts begin alike: the LLM reads each node of this tree once, on top of the cached keys and values above it.

       head          "Carefully watch ... ###Human: <Video>"                                once
        '- clip      video tokens, "</Video> ###Human: Carefully watch ... Question: What"    once a clip
            |- tail  "moves? Options: (A) ... ###Assistant: Best option:("                    once a question
            '- tail  "stops? Options: (A) ... ###Assistant: Best option:("

2. The options are drafts of the answer: the first token, B, says which one will probably follow. The next step reads it
   all, and shows for each token what the LLM writes after it (speculative decoding, arXiv 2211.17192):

       reads     B    )    It   jumps  .
       writes    )    It   jumps  .    ###         all accepted: the rest of the answer in one step
       or else   )    It   spins                   two accepted; "spins" is new, and the next step starts from there

Not here: how questions are asked (protocol.py), what is a batch (batches.py), scores (scorers.py).
Source: paper section 3; mvbench.ipynb.

    pytest tests/test_engine.py
"""
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from os.path import commonprefix  # of any lists

import torch

from evaluation.protocol import NO_VIDEO, Protocol, apply_control, noise_like
from evaluation.tasks import LETTERS
from llama import KVCache
from prompt import chat_prompt, decode_answer, decode_official, is_finished, mvbench_prompt, pad_ids

ANSWER_ROOM = 32    # tokens of an answer that the cache has room for from the start

@dataclass
class Answer:
    text: str               # its first line, with the bracket that the prompt ends in
    letters: list           # probability of each option's letter as the first token; [] without an answer prompt
    likelihoods: list       # mean log-probability of each option's tokens, for decode "likelihood"
    official: str = ""      # for decode "generate": the text that the official scorer sees

def letter_ids(llm_tok):
    """The ids of the letters A to E after a bracket."""
    # subtle: SentencePiece has a piece for a letter that begins a word ("_A"), and one for a letter that continues it
    # ("A"). After "Best option:(" the LLM writes the second; so a letter is encoded with its bracket
    return [llm_tok.encode(f"({letter}")[-1] for letter in LETTERS]

class Engine:
    """A model with its tokenizers, asked by one protocol."""

    def __init__(self, model, qformer_tok, llm_tok, protocol=None):
        self.model, self.qformer_tok, self.llm_tok = model, qformer_tok, llm_tok
        self.protocol, self.seconds = protocol or Protocol(), defaultdict(float)               # seconds: by part
        self.n_video = model.cfg.n_query + model.cfg.n_extra
        self.pad_multiple = 8 if model.device.type == "cuda" else 1
        self.head_cache, self.blank_tokens = None, None        # computed when they are first needed

        # decoding is slow: only the ids that can end an answer are decoded to see whether they do
        self.letter_ids = letter_ids(llm_tok)
        self.last_ids = {i for i in range(llm_tok.vocab_size)
                         if i == llm_tok.eos_id or "#" in llm_tok.decode([i])}

    @contextmanager
    def clock(self, part):
        """Adds the seconds that a block takes to self.seconds[part]."""
        start = time.perf_counter()
        yield
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()    # or the time would count for the next part, which waits for the GPU
        self.seconds[part] += time.perf_counter() - start

    @torch.inference_mode()
    def encode_clips(self, video, control, seeds):
        """Clips (B, T, 3, H, W) under a control, with a seed for each -> what the Q-Former reads of them (B, N, C)."""
        if control in NO_VIDEO:
            cfg = self.model.cfg.vit
            zeros = torch.zeros(1, video.shape[1] * cfg.grid ** 2, cfg.width, device=self.model.device)
            return zeros.expand(len(video), -1, -1)                                            # (B, N, C)
        frames = torch.stack([apply_control(clip, control, seed) for clip, seed in zip(video, seeds, strict=True)])
        with self.clock("ViT"):
            return self.model.encode_video(frames.to(self.model.device))                       # (B, N, C)

    @torch.inference_mode()
    def video_tokens(self, vision, control, seeds, questions):
        """vision (B, N, C), with a seed and a question for each row -> what the LLM reads of it (B, Q, D)."""
        # without video and question, all rows of all batches are the same: one is computed, once
        shared = control in NO_VIDEO and not self.protocol.question_in_qformer
        tokens = self.blank_tokens if shared else None
        if tokens is None:
            n_texts = len(questions) if self.protocol.question_in_qformer else 1               # one for all rows
            texts = [self.protocol.instruction(q) for q in questions[:n_texts]]
            max_length = min(self.model.cfg.max_text, self.model.cfg.qformer.max_positions)
            rows = [self.qformer_tok.encode(text, max_length, sep=True, truncate="left") for text in texts]
            ids, mask = (t.to(vision.device) for t in pad_ids(rows, self.qformer_tok.pad_id))  # (B or 1, S)
            with self.clock("Q-Former"):
                tokens = self.model.video_tokens(vision[:1] if shared else vision, ids, mask)  # (B or 1, Q, D)
        if shared:
            self.blank_tokens = tokens
            tokens = tokens.expand(len(questions), -1, -1)                                     # (B, Q, D)
        return noise_like(tokens, seeds) if control == "noise" else tokens

    def prompt(self, q):
        """The question's prompt, up to the bracket that the letter follows."""
        return mvbench_prompt(self.llm_tok, q["question"], q["candidates"], self.n_video, self.protocol.system,
                              self.protocol.answer_prompt, self.model.cfg.prompt_style)

    @torch.inference_mode()
    def answer(self, questions, video_tokens, clips=None, prompts=None):
        """Questions -> an Answer for each. clips: the row of video_tokens (B, Q, D) of each; by default its own."""
        clips = list(range(len(questions))) if clips is None else clips
        with self.clock("LLM"):
            if self.protocol.decode == "likelihood":
                return self.answer_by_likelihood(questions, video_tokens, clips)

            # the first token, and how probable each letter is
            prompts = prompts or [self.prompt(q) for q in questions]
            hidden, cache = self.prefill(prompts, video_tokens, clips, logits_to_keep=1)       # (B, 1, D)
            logits = self.model.llama_model.lm_head(hidden[:, 0]).float()                      # (B, V)
            letters = [[] for _ in questions]
            if self.protocol.opening:
                p = logits.softmax(-1)[:, self.letter_ids].tolist()                            # (B, letters)
                letters = [row[:len(q["candidates"])] for q, row in zip(questions, p, strict=True)]

            if self.protocol.decode == "letter":
                return [Answer(f"({LETTERS[p.index(max(p))]})", p, []) for p in letters]
            answers = self.generate_with_drafts(questions, prompts, logits.argmax(-1).tolist(), cache)
            return [Answer(self.text(ids), p, [], self.official_text(ids))
                    for ids, p in zip(answers, letters, strict=True)]

    def prefill(self, prompts, video_tokens, clips, logits_to_keep=None):
        """The LLM reads the header's tree -> (hidden states (B, logits_to_keep, D) of the tails' ends, KVCache)."""
        llm, device = self.model.llama_model, self.model.device
        begin, end = prompts[0].slot, prompts[0].slot + self.n_video                           # of the video tokens

        # the head
        if self.head_cache is None:
            self.head_cache = KVCache(llm.cfg.depth)
            head = torch.tensor([prompts[0].ids[:begin]], device=device)
            llm(llm.embed(head), cache=self.head_cache, logits_to_keep=0)

        # what all prompts have in common ends before the token that predicts the answer: each tail has that one itself,
        # and is padded on the left, so that all prompts end together
        common = min(common_length(prompts), *(len(p.ids) - sum(i >= 0 for i in p.labels) - 1 for p in prompts))
        ids, mask = pad_ids([p.ids[common:] for p in prompts], self.llm_tok.eos_id, "left", self.pad_multiple)  # (B, s)

        # the clips: video tokens, and the common text after them
        unique = list(dict.fromkeys(clips))
        common_ids = torch.tensor([prompts[0].ids[end:common]], dtype=torch.long, device=device)
        words = llm.embed(common_ids).expand(len(unique), -1, -1)
        embeds = torch.cat((video_tokens[unique].to(words.dtype), words), 1)                   # (clips, Q + words, D)
        cache = self.head_cache.select_rows([0] * len(unique), embeds.shape[1] + ids.shape[1] + ANSWER_ROOM)
        llm(embeds, cache=cache, logits_to_keep=0)

        # the tails, each on a copy of its clip's keys and values
        if clips != unique:
            cache = cache.select_rows([unique.index(clip) for clip in clips], ids.shape[1] + ANSWER_ROOM)
        return llm(llm.embed(ids.to(device)), mask.to(device), cache, logits_to_keep), cache   # (B, s, D)

    def generate_with_drafts(self, questions, prompts, first_ids, cache):
        """Greedy answers (B lists of ids) that begin with first_ids; cache: of all that prefill has read."""
        llm, answers, drafts = self.model.llama_model, [[i] for i in first_ids], [self.drafts(q) for q in questions]
        limits = [min(llm.cfg.max_positions - len(p.ids) + 1, self.protocol.max_new_tokens) for p in prompts]

        # rows: the questions that the cache has a row for; complete answers leave it
        rows = list(range(len(questions)))
        while active := [i for i in rows if not self.is_complete(answers[i], limits[i])]:
            if active != rows:
                cache, rows = cache.select_rows([rows.index(i) for i in active]), active

            # a row's input is its last id, and a draft of what follows, as far as there is room
            tried = [continuation(answers[i], drafts[i])[:limits[i] - len(answers[i]) - 1] for i in rows]
            ids, mask = pad_ids([[answers[i][-1], *draft] for i, draft in zip(rows, tried, strict=True)],
                                self.llm_tok.eos_id, multiple=self.pad_multiple)                       # (rows, s)
            hidden = llm(llm.embed(ids.to(self.model.device)), mask.to(self.model.device), cache)      # (rows, s, D)
            best = llm.lm_head(hidden).argmax(-1).tolist()                                             # (rows, s)

            # accept what the draft got right, and the id after it; hide the rest of the draft from the next steps
            begin, n_new = cache.mask.shape[1] - ids.shape[1], []
            for row, i in enumerate(rows):
                new = best[row][:len(commonprefix([best[row], tried[row]])) + 1]
                ends = (n for n in range(1, len(new)) if self.is_complete(answers[i] + new[:n], limits[i]))
                n_new.append(next(ends, len(new)))
                answers[i] += new[:n_new[row]]
                cache.mask[row, begin + n_new[row]:] = 0
            cache.mask = cache.mask[:, :begin + max(n_new)]    # what no row has accepted leaves the cache
        return answers

    def drafts(self, q):
        """The answer that names each option, as ids, with the mark that ends it, as in training."""
        end = "</s>" if self.model.cfg.prompt_style == "mistral" else " ###"
        return [self.llm_tok.encode(f"({letter}) {text}{end}")
                for letter, text in zip(LETTERS, q["candidates"], strict=False)]

    def is_complete(self, ids, limit=None):
        """Whether an answer ends here: by its length, or by ### or </s>. The end of its first line, the one that
        counts, is not its end: an "Assistant:" in a later line would make that the first (prompt.decode_official)."""
        at_limit = len(ids) >= (limit or self.protocol.max_new_tokens)
        return at_limit or ids[-1] in self.last_ids and is_finished(self.llm_tok, ids)

    def text(self, ids):
        """An answer's ids -> its first line, after the bracket that the prompt ends in."""
        return self.protocol.opening + decode_answer(self.llm_tok, ids).split("\n")[0].rstrip()

    def official_text(self, ids):
        """As text, for the official scorer. The official code removes </s> from Mistral's answers."""
        if self.model.cfg.prompt_style != "vicuna":
            return self.text(ids)
        return self.protocol.opening + decode_official(self.llm_tok, ids).split("\n")[0]

    def too_long(self, q, prompt):
        """Why the LLM cannot be asked a question, or "". There must be room for the longest option as the answer."""
        limit, longest, answer = self.model.llama_model.cfg.max_positions, len(prompt.ids), self.protocol.max_new_tokens
        if longest + answer > limit:                           # rare, so the options are rarely tokenised for this
            # likelihood's prompts hold an option, and do not list them; a letter takes no room
            if self.protocol.decode == "likelihood":
                longest = max(len(p.ids) for p in self.option_prompts(q))
            answer = min(answer, max(map(len, self.drafts(q)))) if self.protocol.decode == "generate" else 0
        return "" if longest + answer <= limit else (
            f"{q['task']}, entry {q['index']}: its prompt has {longest} tokens ({self.n_video} of video) and its "
            f"longest option {answer}, but the LLM takes at most {limit}: shorten the question or its options")

    def option_prompts(self, q):
        """A prompt for each option: its text is the answer, and its ids are the labels. No prompt lists the options."""
        empty, *prompts = [
            chat_prompt(self.llm_tok, [], f"{self.protocol.system}Question: {q['question']}", self.n_video,
                        self.protocol.system, prompt_style=self.model.cfg.prompt_style, answer_prompt=answer)
            for answer in ("", *q["candidates"])]
        for p in prompts:
            begin = common_length([empty, p])
            p.labels[begin:] = p.ids[begin:]
        return prompts

    def answer_by_likelihood(self, questions, video_tokens, clips):
        """As answer, for decode "likelihood": the option whose tokens have the highest mean log-probability."""
        options = [(i, prompt) for i, q in enumerate(questions) for prompt in self.option_prompts(q)]
        hidden, _ = self.prefill([p for _, p in options], video_tokens, [clips[i] for i, _ in options])
        likelihoods = [[] for _ in questions]
        for (i, prompt), row in zip(options, hidden, strict=True):                             # row: (s, D)
            target = [label for label in prompt.labels if label >= 0]
            logits = self.model.llama_model.lm_head(row[-len(target) - 1:-1]).float()          # (n, V)
            likelihoods[i].append(logits.log_softmax(-1)[range(len(target)), target].mean().item())

        best = [p.index(max(p)) for p in likelihoods]
        texts = [f"({LETTERS[i]}) {q['candidates'][i]}" for i, q in zip(best, questions, strict=True)]
        return [Answer(text, [], p) for text, p in zip(texts, likelihoods, strict=True)]

def continuation(answer, drafts):
    """What follows, in one of the drafts, the longest piece that the answer ends with; [] if none has any of it."""
    # answer [.., 5, 6] and drafts [1, 5, 6, 7], [2, 6, 9] -> [7], for "5, 6" is longer than "6"
    best, longest = [], 0
    for draft in drafts:
        for at in range(1, len(draft)):
            n = 0
            while n < min(at, len(answer)) and draft[at - 1 - n] == answer[-1 - n]:
                n += 1
            if n > longest:
                best, longest = draft[at:], n
    return best

def common_length(prompts):
    """How many ids all prompts begin with."""
    return len(commonprefix([p.ids for p in prompts]))
