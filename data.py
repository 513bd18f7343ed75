"""From annotations to batches: read an entry and its clip, order the samples, tokenise, pad.

    entry    {"video": "kite.mp4", "caption": "A red kite."}                              training/annotations.py
    sample   {"video": (T, 3, size, size), "text": "A red kite.", "medium": "video", ...}    VideoTextDataset
    indices  [7, 2, 31, 4], one medium per batch                                             Sampler
    batch    {"video": (B, T, 3, size, size), "ids": (B, S), "mask": (B, S), ...}            collate_stage1, 2, 3

A medium that cannot be read never makes a wrong pair: its whole sample is replaced and reported. What a sample is
depends on (seed, epoch, index) alone, not on workers or resumes. Shape letters: model.py; size: pixels of a side.
Not here: annotation files and their check (training/), files to frames (video.py), conversations to ids (prompt.py).

Source: the official pt_dataset.py and it_dataset.py.
Run:    python -m pytest tests/test_data.py
"""
import random
import sys

import numpy as np
import torch

from infra.cli import ignore_signals
from infra.media import MediaError, read_media
from prompt import CAPTION_INSTRUCTIONS, add_packing, caption_prompt, learnable_conversation, pad_batch, pad_ids
from training.annotations import load_annotations
from video import SAMPLING, train_frame_selector

# -------------------------------------------------------------------------------------------------------------- samples

class VideoTextDataset(torch.utils.data.Dataset):
    """Samples of a corpus (a list of annotations.Source): captions or conversations.

        dataset[7] -> {"video": (T, 3, size, size) float, "seconds": [0.3, 0.9, ..],     # when its frames are
                       "text": "A red kite."      or "qas": [{"q": "What moves?", "a": "A red kite."}, ..], shuffled
                       "medium": "video", "path": "clips/kite.mp4", "idx": 7,    # the same clip has the same idx
                       "prompt_choice": 0.42,     # a random number; collate_stage2 picks a prompt by it
                       "bad": ["clips/dog.mp4: no such file"]}                   # unreadable media that it replaces

    sampling: which frames of a clip (video.train_frame_indices). If self.features is set (feature_cache.Features),
    "features" (T, L, C) replace "video". More than max_bad unreadable media in a row raise MediaError."""
    def __init__(self, sources, num_frames, transform, sampling="rand", seed=0, max_bad=10):
        if sampling not in SAMPLING:
            raise ValueError(f"frame_sampling {sampling!r}: expected one of {', '.join(SAMPLING)}")
        self.sources, self.num_frames, self.transform, self.sampling = sources, num_frames, transform, sampling
        self.seed, self.epoch, self.max_bad, self.features = seed, 0, max_bad, None
        self.entries = [load_annotations(source) for source in sources]
        self.notes = [line for entries in self.entries for line in entries.faults()]        # the log begins with them
        ends = np.cumsum([0, *map(len, self.entries)]).tolist()         # 0, then where each source ends
        self.spans = list(map(range, ends[:-1], ends[1:]))              # the indices of each source's entries

        # a batch of captions and one of conversations have different keys, and so different losses
        if sum(entries.header["qa"] for entries in self.entries) not in (0, len(self)):
            raise ValueError(f"{sources[0].anno} ...: captions and instructions in one corpus; train on one kind")

    def __len__(self):
        return self.spans[-1].stop                                                       # of all sources together

    def set_epoch(self, epoch):
        self.epoch = epoch

    def groups(self):
        """(medium, weight, range of indices) of each source, for the Sampler."""
        return [(source.media, source.weight, span) for source, span in zip(self.sources, self.spans, strict=True)]

    def lengths(self, indices):
        """Characters of these samples' texts, (n,), for the Sampler. It reads the index, not the entries."""
        lengths = np.empty(len(indices), np.int32)                                       # (n,)
        for entries, span in zip(self.entries, self.spans, strict=True):
            inside = (indices >= span.start) & (indices < span.stop)
            lengths[inside] = entries.chars[indices[inside] - span.start]
        return lengths

    def entry(self, index):
        """-> source, entry."""
        for source, entries, span in zip(self.sources, self.entries, self.spans, strict=True):
            if span.start <= index < span.stop:
                return source, entries[index - span.start]                               # one small read of the file
        raise IndexError(f"sample {index} of {len(self)}")

    def path(self, index):
        source, entry = self.entry(index)
        return source.path(entry)

    def order_record(self):
        """What the order of the samples depends on besides seed and step: a dict of each source, for trainer.json."""
        return [{"anno": entries.source.anno, "media": entries.source.media, "weight": entries.source.weight,
                 "entries": len(entries), "sha256": entries.header["sha256"]} for entries in self.entries]

    def clip(self, index):
        """What sample `index` reads: a path, and how."""
        source, entry = self.entry(index)
        return source.path(entry), *source.read_options(entry).values()

    def __getitem__(self, index, batch=()):
        # an unreadable sample is replaced, text and all, by the next one of its source that has another clip and is not
        # in the batch: a batch keeps its size and its kind of medium, and no video meets the text of another
        bad = {}                                                                         # clip -> why it is not read
        while len(bad) <= self.max_bad:
            try:
                return self.sample(index) | {"bad": list(bad.values())}                  # shown in the log
            except MediaError as error:
                bad[self.clip(index)] = reason = str(error)
            index = self.replacement(index, bad, batch)
            if index is None:
                raise MediaError(f"{reason}; {len(bad)} unreadable media, and its source has no other")
        raise MediaError(f"{reason}; {len(bad)} unreadable media in a row")

    def replacement(self, index, bad, batch):
        """The next sample of the same source whose clip is none of `bad`, one of the batch only if there is no other;
        None if there is none at all."""
        span, of_batch = next(span for span in self.spans if index in span), None
        for i in (span[(index - span.start + k) % len(span)] for k in range(1, len(span))):
            if self.clip(i) not in bad:
                if i not in batch:
                    return i
                of_batch = i if of_batch is None else of_batch
        return of_batch

    def __getitems__(self, indices):
        """The samples of a batch, as a DataLoader asks for them; no replacement is a clip that the batch has."""
        batch, samples = set(indices), []
        for index in indices:
            samples.append(self.__getitem__(index, batch))
            batch.add(samples[-1]["idx"])
        return samples

    def sample(self, index):
        """The sample without "bad". MediaError for whatever its medium raises, SampleError if annotations changed."""
        # every random choice comes from a generator of this sample; another order of drawing is another training run
        rng = random.Random(f"{self.seed} {self.epoch} {index}")
        source, entry = self.entry(index)
        sample = {"idx": index, "medium": source.media, "path": "", "seconds": [], "prompt_choice": rng.random()}

        # frames, or what the frozen ViT has made of them
        if source.media != "text":
            sample["path"] = path = source.path(entry)
            try:
                if self.features:
                    sample |= self.features[path]
                else:
                    select = train_frame_selector(self.num_frames, self.sampling, rng)
                    frames, sample["seconds"] = read_media(path, select, **source.read_options(entry))
                    sample["video"] = self.transform(frames, rng)                        # (T, 3, size, size)
            except MediaError:
                raise
            except Exception as error:                 # of a decoder, or an error of ours: one file does not end a run
                raise MediaError(f"{path}: {error!r}") from error

        # one of several captions; the questions in another order each epoch, so that each comes first at times
        if "QA" in entry:
            sample["qas"] = rng.sample(entry["QA"], len(entry["QA"]))                    # a shuffled copy
        else:
            captions = entry["caption"]
            sample["text"] = (captions if isinstance(captions, str) else rng.choice(captions)).strip()
        return sample

# ---------------------------------------------------------------------------------------------------------------- order

class Sampler:
    """Batches of indices in an order given by (seed, epoch). A batch has one medium; a rest that fills none is dropped.

        Sampler(dataset, 4), an epoch       [7, 2, 31, 4] [12, 9, 0, 5] ..
        world_size=2, rank=1                [2, 4] [9, 5] ..           # all ranks draw the same, each takes its part
        world_size=2, rank=1, grad_accum=2  [2] [4] [9] [5] ..         # micro-batches: grad_accum of them are a step

    dataset: anything with a length; groups() and lengths() are used if it has them. A source of weight 2.5 is in an
    epoch twice, and a random half of it once more. To resume: skip_to(step)."""
    def __init__(self, dataset, batch_size, seed=0, rank=0, world_size=1, grad_accum=1):
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world_size, self.micro_batches = rank, world_size, grad_accum
        if batch_size % (world_size * grad_accum):
            raise ValueError(f"a batch of {batch_size} cannot be shared evenly by {world_size} processes in "
                             f"{grad_accum} parts; choose another --batch or --grad-accum")

        # medium -> [(range of indices, how many of them an epoch takes)]
        groups = dataset.groups() if hasattr(dataset, "groups") else [("", 1.0, range(len(dataset)))]
        self.media = {}
        for medium, weight, span in groups:
            if take := round(weight * len(span)):                                        # weight 0 leaves a source out
                self.media.setdefault(medium, []).append((span, take))
        if len(self) == 0:
            raise ValueError(f"{len(dataset)} samples do not fill a batch of {batch_size}")
        self.skip_to(0)

    def __len__(self):
        """Steps of one epoch."""
        return sum(sum(take for _, take in spans) // self.batch_size for spans in self.media.values())

    def skip_to(self, step):
        """Continues after `step` steps of training, at an epoch's beginning or within it."""
        self.epoch, self.position = divmod(step, len(self))                          # position: in steps of the epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.epoch)

    def next_epoch(self):
        self.skip_to((self.epoch + 1) * len(self))

    def __iter__(self):
        """The epoch's micro-batches of this rank, from `position` (in steps) on."""
        rng, batches = np.random.default_rng((self.seed, self.epoch)), []
        for spans in self.media.values():
            # each source as often as its weight says: whole permutations, the last one cut
            drawn = [np.concatenate([rng.permutation(span) for _ in range(-(-take // len(span)))])[:take]
                     for span, take in spans]

            # mixed with the other sources of its medium; what fills no batch is dropped
            indices = rng.permutation(np.concatenate(drawn))
            indices = indices[:len(indices) // self.batch_size * self.batch_size]        # whole batches

            # every 16 batches are sorted by text length, in classes of 200 characters: so all processes have equally
            # much to do, and less of what the Q-Former reads is padding. The sort is stable: a class stays shuffled
            if hasattr(self.dataset, "lengths"):
                windows = np.arange(len(indices)) // (16 * self.batch_size)
                indices = indices[np.lexsort((self.dataset.lengths(indices) // 200, windows))]
            batches += list(indices.reshape(-1, self.batch_size))                        # (n_batches, batch_size)

        # batches of all media and lengths in random order
        for b in rng.permutation(len(batches))[self.position:]:
            for micro_batch in np.split(batches[b], self.micro_batches):
                yield micro_batch[self.rank::self.world_size].tolist()                   # this rank's samples

def make_loader(dataset, sampler, collate, workers=0):
    """Batches of one epoch, from the sampler's position on; `workers` processes decode ahead."""
    # subtle: workers start again with every epoch, which is how they learn of dataset.set_epoch. Their seeds need a
    # generator of their own: a resumed run would otherwise draw one number more from the one that dropout uses
    return torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers,
                                       pin_memory=torch.cuda.is_available(), prefetch_factor=4 if workers else None,
                                       generator=torch.Generator().manual_seed(0), worker_init_fn=ignore_signals)

# -------------------------------------------------------------------------------------------------------------- batches

def collate_media(samples):
    """What every batch has: idx (B,), the number of different clips, medium, paths, faults, pixels or features."""
    idx = [s["idx"] for s in samples]
    batch = {"idx": torch.tensor(idx), "clips": len(set(idx)), "medium": samples[0]["medium"],
             "paths": [s["path"] for s in samples], "bad": [line for s in samples for line in s["bad"]]}
    for key in ("video", "features"):          # (B, T, 3, size, size), (B, T, L, C), None where samples have none
        batch[key] = torch.stack([s[key] for s in samples]) if key in samples[0] else None
    return batch

def collate_stage1(samples, cfg, qformer_tok, llm_tok=None):
    """Stage 1: the Q-Former reads and writes the caption. Adds ids (B, S), mask (B, S). cfg: model.Config."""
    rows = [qformer_tok.encode(s["text"], cfg.align_text, sep=cfg.caption_sep) for s in samples]
    ids, mask = pad_ids(rows, qformer_tok.pad_id)                                        # (B, S) each
    return collate_media(samples) | {"ids": ids, "mask": mask}

def collate_stage2(samples, cfg, qformer_tok, llm_tok):
    """Stage 2: the LLM answers with the caption. Adds ids, labels, mask (B, S), with a VIDEO id for each query."""
    # one of ten instructions for each caption, as the official stage 2 draws them
    prompts = []
    for s in samples:
        choices = CAPTION_INSTRUCTIONS[s["medium"]]
        instruction = choices[int(s["prompt_choice"] * len(choices))]
        prompts.append(caption_prompt(llm_tok, s["text"], cfg.n_query + cfg.n_extra, instruction, s["medium"],
                                      cfg.max_text))
    ids, labels, mask = pad_batch(prompts, llm_tok.eos_id)                               # (B, S) each
    return collate_media(samples) | add_packing({"ids": ids, "labels": labels, "mask": mask})

def collate_stage3(samples, cfg, qformer_tok, llm_tok):
    """Stage 3: conversations. Adds ids, labels, mask for the LLM, instruction_ids, _mask for the Q-Former, (B, S)."""
    # conversations for the LLM, some of which are too long for max_text to leave anything to learn
    prompts, no_label = [], []
    for s in samples:
        seconds = s["seconds"] if cfg.add_timestamps and s["medium"] == "video" else ()
        prompt, learns = learnable_conversation(llm_tok, s["qas"], cfg.n_query + cfg.n_extra, seconds, s["medium"],
                                                cfg.prompt_style, cfg.max_text, cfg.train_separators)
        prompts.append(prompt)
        if not learns:
            question = next(qa.get("q") or qa.get("i") or "" for qa in s["qas"])
            no_label.append(f"{s['path'] or s['idx']}: no answer is within the first {cfg.max_text} ids (--max-text) "
                            f"of its conversation {question[:40]!r}...")
    ids, labels, mask = pad_batch(prompts, llm_tok.eos_id)                               # (B, S) each

    # the Q-Former reads the instruction too, so that its queries look for what is asked; a long one loses its beginning
    limit = min(cfg.max_text, cfg.qformer.max_positions)
    rows = [qformer_tok.encode(qformer_text(s["qas"][0], cfg.question_in_qformer), limit, sep=True, truncate="left")
            for s in samples]
    instruction_ids, instruction_mask = pad_ids(rows, qformer_tok.pad_id)                # (B, S) each
    batch = collate_media(samples) | add_packing({"ids": ids, "labels": labels, "mask": mask})
    return batch | {"instruction_ids": instruction_ids, "instruction_mask": instruction_mask, "no_label": no_label}

def qformer_text(qa, with_question):
    """The instruction of a turn, with its question if with_question; never the question alone."""
    text = qa.get("i") or ""
    return f"{text} {qa.get('q') or ''}".strip() if text and with_question else text

if __name__ == "__main__":                                             # "check" was a command of this file
    sys.exit(f"data.py holds no command; check annotations by: python -m training.check_data {' '.join(sys.argv[2:])}")
