"""Questions -> batches of clips, decoded ahead by other processes -> answers under each condition -> rows.

Not here: files and processes (mvbench.py), how a batch is answered (engine.py).

    pytest tests/test_mvbench.py
"""
from collections import defaultdict
from functools import partial

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from evaluation.predictions import key_of, make_row
from evaluation.protocol import clip_seed
from infra.cli import ignore_signals
from infra.distributed import Distributed
from infra.media import MediaError
from video import load_eval_clip

GROUP = 8       # clips that a loader process hands over at a time

def load_clips(group, cfg):
    """Clips, each a (medium, bound, fps) -> the readable ones (B, T, 3, H, W) or None; and for each clip a note for the
    rows of its questions: {}, {"warning": text} or {"unread": why}."""
    clips, notes = [], []
    for media, bound, fps in group:
        warnings = []
        try:
            clip = load_eval_clip(media, cfg, bound, fps, warnings)
            clips.append(clip.expand(cfg.eval_frames, -1, -1, -1))                         # a picture is a still video
            notes.append({"warning": "; ".join(warnings)} if warnings else {})
        except Exception as error:                             # whatever a decoder dies of, the others are asked
            why = str(error) if isinstance(error, MediaError) else f"{media}: {type(error).__name__}: {error}"
            notes.append({"unread": why})
    return torch.stack(clips) if clips else None, notes

def evaluate(engine, questions, conditions, batch=32, workers=1, dist=None, scorer="official"):
    """Asks what has no answer yet, under all conditions; yields (condition, its new rows), batch by batch."""
    # clips, each a list of its questions; those with long prompts come first, so that a batch's prompts are of similar
    # length, and a batch that does not fit into memory fails at once
    dist, by_clip = dist or Distributed(), defaultdict(list)
    prompts = {key_of(q): engine.prompt(q) for q in questions}
    for q in questions:
        by_clip[q["media"], q["bound"], q.get("fps")].append(q)
    clips = sorted(by_clip.values(), key=lambda qs: -max(len(prompts[key_of(q)].ids) for q in qs))

    # this process's batches: every n-th one, of those that still have something to ask
    # subtle: batches depend neither on what is answered already nor on the number of processes, so a question is always
    # computed together with the same others, and its numbers are the same to the last bit
    batches = [clips[i:i + batch] for i in range(0, len(clips), batch)][dist.rank::dist.size]
    batches = [clips for clips in batches if any(c.todo(qs) for c in conditions for qs in clips)]

    # loader processes decode ahead, in groups: several of them can then work on a batch
    groups = [[(qs[0]["media"], qs[0]["bound"], qs[0].get("fps")) for qs in clips[i:i + GROUP]]
              for clips in batches for i in range(0, len(clips), GROUP)]
    loader = iter(DataLoader(groups, batch_size=None, collate_fn=partial(load_clips, cfg=engine.model.cfg),
                             num_workers=workers, worker_init_fn=ignore_signals))

    total = sum(len(condition.todo(qs)) for condition in conditions for clips in batches for qs in clips)
    with tqdm(total=total, unit="answer", leave=False, disable=None if dist.is_main else True) as bar:
        for clips in batches:
            with engine.clock("waiting for data"):
                videos, notes = zip(*[next(loader) for _ in range(0, len(clips), GROUP)], strict=True)
            videos = [v for v in videos if v is not None]
            clips = [[q | note for q in qs] for qs, note in zip(clips, sum(notes, []), strict=True)]
            readable = [qs for qs in clips if "unread" not in qs[0]]

            # new rows under each condition; a question about a clip that cannot be read has a row, too
            answers = answer_batch(engine, torch.cat(videos), readable, prompts, conditions, batch) if videos else {}
            for condition in conditions:
                answered = answers.get(condition.name, [])
                answered += [(v, None) for qs in clips if "unread" in qs[0] for q in qs for v in condition.variants(q)]
                rows = [make_row(v, answer, scorer) for v, answer in answered if condition.needs_answer(v)]
                yield condition, rows
                bar.update(len(rows))

def answer_batch(engine, video, questions, prompts, conditions, batch):
    """Clips (B, T, 3, H, W), a list of questions for each -> {condition: [(question, Answer), ...]}; without an
    Answer, the question says why: "unread"."""
    seeds = [clip_seed(qs[0]["video"], qs[0]["bound"]) for qs in questions]
    shared, encoded, answers = not engine.protocol.question_in_qformer, {}, {}
    for condition in conditions:
        if not any(condition.todo(qs) for qs in questions):
            continue

        # what is computed of the clips serves all orders of the options; so do the video tokens, if they are shared
        # by a clip's questions, because the Q-Former does not read these
        control = condition.control
        if control not in encoded:
            encoded[control] = engine.encode_clips(video, control, seeds)                      # (B, N, C)
            if shared:
                firsts = [qs[0] for qs in questions]
                encoded[control] = engine.video_tokens(encoded[control], control, seeds, firsts)       # (B, Q, D)

        # the questions that fit into the LLM, those with long prompts first, `batch` at a time
        variants = [(v, clip, prompts.get(key_of(v)) or engine.prompt(v))
                    for clip, qs in enumerate(questions) for q in qs for v in condition.variants(q)]
        variants.sort(key=lambda item: -len(item[2].ids))
        too_long = [engine.too_long(v, prompt) for v, _, prompt in variants]
        answers[condition.name] = [(item[0] | {"unread": why}, None)
                                   for item, why in zip(variants, too_long, strict=True) if why]
        variants = [item for item, why in zip(variants, too_long, strict=True) if not why]
        for i in range(0, len(variants), batch):
            qs, clips, qs_prompts = map(list, zip(*variants[i:i + batch], strict=True))
            tokens = encoded[control]
            if not shared:                                     # then each question has video tokens of its own
                tokens = engine.video_tokens(tokens[clips], control, [seeds[clip] for clip in clips], qs)
                clips = None
            answers[condition.name] += zip(qs, engine.answer(qs, tokens, clips, qs_prompts), strict=True)
    return answers
