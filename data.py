"""From annotations to batches: draw samples, order them, tokenise, pad.

    Annotations -> entry {"video", "caption" or "QA"} -> sample (video, text) -> batch of tensors
                   drawn by Sampler                      VideoTextDataset           *Collate

It knows no model, and it forgives nothing silently: a medium that cannot be read has its whole sample replaced and is
reported, so that no video ever meets another one's text. What a sample is depends on (seed, epoch, index) alone, not
on workers or resumes. Not here: annotation files (annotations.py), how a file becomes frames (video.py), how a
conversation becomes ids (prompt.py). Source: the official pt_dataset.py and it_dataset.py.

    python data.py check corpus.json --decode
"""
import argparse
import os
import random
import signal
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from prompt import CAPTION_INSTRUCTIONS, add_packing, caption_prompt, conversation_prompt, pad_batch, pad_ids
from training.annotations import AnnotationFile, EntryError, load_annotations, load_corpus
from video import MediaError, SampleError, read_media, train_frames

# ---- samples ---------------------------------------------------------------------------------------------------------

class VideoTextDataset(torch.utils.data.Dataset):
    """Samples of load_corpus's sources, one after another: captions or instructions, as their entries are.

    A sample: video (T, 3, size, size) float or, where `features` (features.Features) are set, features (T, L, C); text
    (a caption) or qas (in random order), seconds of the frames, medium, path, idx (of the entry: the same clip has the
    same idx), draw (a random number for the collate), bad (media that could not be read and were replaced, one line
    each). More than max_bad in a row raise MediaError.
    """

    def __init__(self, sources, num_frames, transform, how="rand", seed=0, max_bad=10):
        self.num_frames, self.transform, self.how = num_frames, transform, how
        self.seed, self.epoch, self.max_bad, self.features = seed, 0, max_bad, None
        self.sources = sources
        self.entries = [load_annotations(source) for source in sources]
        self.starts = np.cumsum([0, *map(len, self.entries)]).tolist()  # source s holds starts[s] .. starts[s + 1]
        if sum(entries.header["qa"] for entries in self.entries) not in (0, len(self)):
            raise ValueError(f"{sources[0].anno} ...: captions and instructions in one corpus; train on one kind")

    def __len__(self):
        return self.starts[-1]

    def set_epoch(self, epoch):
        self.epoch = epoch

    def groups(self):
        """(medium, weight, range of indices) of each source, for the Sampler."""
        spans = zip(self.starts[:-1], self.starts[1:], strict=True)
        return [(s.media, s.weight, range(*span)) for s, span in zip(self.sources, spans, strict=True)]

    def lengths(self, indices):
        """Of these samples' texts, in characters: an array."""
        lengths = np.empty(len(indices), np.int32)
        for entries, begin, end in zip(self.entries, self.starts[:-1], self.starts[1:], strict=True):
            here = (indices >= begin) & (indices < end)
            lengths[here] = entries.chars[indices[here] - begin]
        return lengths

    def path(self, index):
        """Of the entry's medium."""
        s, entry = self.entry(index)
        return self.sources[s].path(entry)

    def entry(self, index):
        """-> (number of its source, entry)."""
        s = int(np.searchsorted(self.starts, index, side="right")) - 1
        return s, self.entries[s][index - self.starts[s]]

    def __getitem__(self, index):
        bad = []
        while True:
            try:
                return self.sample(index) | {"bad": bad}
            except MediaError as error:
                bad.append(str(error))
                if len(bad) > self.max_bad:
                    raise MediaError(f"{error}; {len(bad)} unreadable media in a row") from None
                index = self.neighbour(index)

    def neighbour(self, index):
        """The next index of the same source, and so of the same medium."""
        _, _, span = next(group for group in self.groups() if index in group[2])
        return span[(index - span.start + 1) % len(span)]

    def look(self, source, entry, rng):
        """-> video (T, 3, size, size) and the seconds of its frames."""
        choose = train_frames(self.num_frames, self.how, rng, entry.get("start"), entry.get("end"))
        frames, seconds = read_media(source.path(entry), choose, still=source.media == "image")
        return {"video": self.transform(frames, rng), "seconds": seconds}

    def sample(self, index):
        s, entry = self.entry(index)
        source = self.sources[s]
        rng = random.Random(f"{self.seed} {self.epoch} {index}")
        sample = {"idx": index, "medium": source.media, "path": "", "seconds": [], "draw": rng.random()}
        if source.media != "text":
            sample["path"] = source.path(entry)
            sample |= self.features[sample["path"]] if self.features else self.look(source, entry, rng)
        if "QA" in entry:
            sample["qas"] = rng.sample(entry["QA"], len(entry["QA"]))
        else:
            captions = entry["caption"]
            sample["text"] = (captions if isinstance(captions, str) else rng.choice(captions)).strip()
        return sample


class Sampler:
    """Batches of indices, in an order that (seed, epoch) decide. A batch holds one medium; what fills none is left out.

    A source of weight w comes w times in an epoch; of a broken weight's rest, a random part. batch_size is that of a
    step: with several processes (world) all draw the same batches, and each takes every world-th sample of them; with
    accumulate, a step's batch comes in so many parts. Going on at a step: skip_to(step).
    """

    def __init__(self, dataset, batch_size, seed=0, rank=0, world=1, accumulate=1):
        self.dataset, self.seed, self.rank, self.world, self.parts = dataset, seed, rank, world, accumulate
        self.size = batch_size
        if batch_size % (world * accumulate):
            raise ValueError(f"a batch of {batch_size} cannot be shared evenly by {world} processes in {accumulate} "
                             "parts; choose another --batch or --accumulate")
        groups = dataset.groups() if hasattr(dataset, "groups") else [("", 1.0, range(len(dataset)))]
        self.media = {}  # medium -> [(range of indices, how many of them an epoch takes)]
        for medium, weight, span in groups:
            if round(weight * len(span)):
                self.media.setdefault(medium, []).append((span, round(weight * len(span))))
        if len(self) == 0:
            raise ValueError(f"{len(dataset)} samples do not fill a batch of {self.size}")
        self.skip_to(0)

    def __len__(self):
        """Steps of one epoch."""
        return sum(sum(take for _, take in spans) // self.size for spans in self.media.values())

    def skip_to(self, step):
        """Go on as after `step` steps since the beginning."""
        epoch, position = divmod(step, len(self))
        self.set_epoch(epoch, position)

    def next_epoch(self):
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch, position=0):
        self.epoch, self.position = epoch, position
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def bucket_by_length(self, indices, window=16, step=200):
        """Within each `window` batches, texts of nearly the same length together: so all processes have as much to do,
        and less of what the Q-Former reads is padding."""
        if hasattr(self.dataset, "lengths"):
            classes = self.dataset.lengths(indices) // step
            for begin in range(0, len(indices), window * self.size):
                part = slice(begin, begin + window * self.size)
                indices[part] = indices[part][np.argsort(classes[part], kind="stable")]
        return indices

    def __iter__(self):
        """The epoch's batches from `position` on."""
        rng = np.random.default_rng((self.seed, self.epoch))
        batches = []
        for spans in self.media.values():
            drawn = [np.concatenate([rng.permutation(span) for _ in range(-(-take // len(span)))])[:take]
                     for span, take in spans if take]
            indices = rng.permutation(np.concatenate(drawn))
            full = len(indices) // self.size
            indices = self.bucket_by_length(indices[:full * self.size])
            batches += list(indices.reshape(full, self.size))
        for b in rng.permutation(len(batches))[self.position:]:
            for part in np.split(batches[b], self.parts):
                yield part[self.rank::self.world].tolist()


# ---- batches ---------------------------------------------------------------------------------------------------------

def collate_media(samples):
    """What every batch has: video (B, T, 3, H, W), or features (B, T, L, C) of it, or None for both where there is text
    alone; idx (B,), clips (how many different ones), medium, paths, bad."""
    batch = {"idx": torch.tensor([s["idx"] for s in samples]), "medium": samples[0]["medium"],
             "clips": len({s["idx"] for s in samples}),
             "paths": [s["path"] for s in samples], "bad": [line for s in samples for line in s["bad"]]}
    for key in ("video", "features"):
        batch[key] = torch.stack([s[key] for s in samples]) if key in samples[0] else None
    return batch


@dataclass
class Stage1Collate:
    """Stage 1: the caption for the Q-Former. Adds ids (B, S), mask (B, S)."""
    wordpiece: object
    max_length: int = 32
    sep: bool = False                  # QUIRK of tokenizer.WordPiece.encode: no [SEP]

    def __call__(self, samples):
        rows = [self.wordpiece.encode(s["text"], self.max_length, sep=self.sep) for s in samples]
        ids, mask = pad_ids(rows, self.wordpiece.pad_id)
        return collate_media(samples) | {"ids": ids, "mask": mask}


@dataclass
class Stage2Collate:
    """Stage 2: the caption as the LLM's answer. Adds ids, labels, mask (B, S), with n_video VIDEO ids in each row."""
    tok: object
    n_video: int
    max_text: int = 512

    def __call__(self, samples):
        prompts = []
        for s in samples:
            instructions = CAPTION_INSTRUCTIONS[s["medium"]]
            instruction = instructions[int(s["draw"] * len(instructions))]
            prompts.append(caption_prompt(self.tok, s["text"], self.n_video, instruction, s["medium"], self.max_text))
        ids, labels, mask = pad_batch(prompts, self.tok.eos_id)
        return collate_media(samples) | add_packing({"ids": ids, "labels": labels, "mask": mask})


@dataclass
class Stage3Collate:
    """Stage 3: conversations for the LLM (ids, labels, mask), the instruction for the Q-Former (instruction_ids, instruction_mask)."""
    tok: object
    wordpiece: object
    n_video: int
    max_text: int = 512
    prompt_style: str = "vicuna"
    question_in_qformer: bool = False  # QUIRK of model.Config
    add_timestamps: bool = True          # say at which seconds a video's frames were taken
    train_separators: bool = False     # QUIRK of prompt.vicuna_turns
    max_instruction: int = 512         # ids of the Q-Former's text; the end of a longer one is kept

    def __call__(self, samples):
        prompts = [self.conversation(s) for s in samples]
        ids, labels, mask = pad_batch(prompts, self.tok.eos_id)
        rows = [self.wordpiece.encode(self.instruction(s["qas"][0]), self.max_instruction, sep=True, truncate="left")
                for s in samples]
        instruction_ids, instruction_mask = pad_ids(rows, self.wordpiece.pad_id)
        texts = add_packing({"ids": ids, "labels": labels, "mask": mask})
        return collate_media(samples) | texts | {"instruction_ids": instruction_ids, "instruction_mask": instruction_mask}

    def conversation(self, s):
        """The sample as a Prompt. Raises SampleError where its instruction leaves no room for the video."""
        message = seconds_message(s["seconds"]) if self.add_timestamps and s["medium"] == "video" else ""
        try:
            return conversation_prompt(self.tok, s["qas"], self.n_video, message, s["medium"], self.prompt_style,
                                       self.max_text, self.train_separators)
        except ValueError as error:
            raise SampleError(f"{s['path']}: {error}") from None

    def instruction(self, qa):
        """The first turn's, as the LLM reads it too; the question is never there alone."""
        text = qa.get("i") or ""
        return f"{text} {qa.get('q') or ''}".strip() if text and self.question_in_qformer else text


def seconds_message(seconds):
    """What the conversation says of the frames: "The video contains 2 frames sampled at 0.3, 0.9 seconds."."""
    times = ", ".join(str(round(s, 1)) for s in seconds)
    return f"The video contains {len(seconds)} frames sampled at {times} seconds."


def make_loader(dataset, sampler, collate, workers=0):
    """Batches of one epoch from where the sampler stands; `workers` processes decode ahead."""
    # subtle: workers start anew with every epoch, and so learn of dataset.set_epoch; their seeds come from a generator
    # of their own, or going on would draw one number more from the one that dropout uses
    return torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers,
                                       pin_memory=torch.cuda.is_available(), prefetch_factor=4 if workers else None,
                                       generator=torch.Generator().manual_seed(0), worker_init_fn=ignore_signals)


def ignore_signals(worker):
    """Ctrl-C and SIGTERM reach the workers as well, but they heed the process alone that they work for, whatever they
    are handing over."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):                         # not on a Mac
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=heed_the_parent, daemon=True).start()
    sys.excepthook = lambda *error: None           # of the thread that hands tensors over; others' errors are passed on


def heed_the_parent():
    """Ends this process when a SIGTERM comes from the one that started it, as multiprocessing sends it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


# ---- python data.py check --------------------------------------------------------------------------------------------

class Media(torch.utils.data.Dataset):
    """What is wrong with the medium of each good entry: (its number in the file, Fault or None)."""

    def __init__(self, entries, decode):
        self.entries, self.decode = entries, decode

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, i):
        source = self.entries.source
        path = source.path(self.entries[i])
        if not Path(path).exists():
            return i, EntryError("missing", f"{path}: no such file")
        try:
            if self.decode:                                # first, last and some between: a torn file lacks its end
                read_media(path, lambda first, last, fps: np.linspace(first, last, 8).round().astype(int).tolist(),
                           still=source.media == "image")
        except MediaError as error:
            return i, EntryError("undecodable", str(error))
        return i, None


def media_faults(entries, decode, workers):
    """Yields (number in the file, Fault) of every medium that is missing or, with decode, cannot be read."""
    loader = torch.utils.data.DataLoader(Media(entries, decode), 64, num_workers=workers, collate_fn=list)
    with tqdm(total=len(entries), desc=Path(entries.source.anno).name, unit="file", leave=False,
              disable=not sys.stderr.isatty()) as bar:
        for batch in loader:
            yield from ((entries.entry_number(i), fault) for i, fault in batch if fault)
            bar.update(len(batch))


def check(corpus, decode=False, workers=0, show=10):
    """Print what each source holds and the first faults in it, of each kind how many; -> how many faults."""
    total = 0
    for source in load_corpus(corpus):
        entries = AnnotationFile(source)
        kinds, lines = Counter(entries.header["kinds"]), entries.header["first"][:show]
        for number, fault in media_faults(entries, decode, workers) if source.media != "text" and len(entries) else ():
            kinds[fault.kind] += 1
            lines += [f"entry {number}: {fault.text}"] * (len(lines) < show)
        faulty, n = kinds.total(), len(entries) + entries.header["faulty"]
        what = ": " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()) if faulty else ""
        print(f"{source.anno}: {n} entries of {source.media}, {faulty} faulty{what}",
              *(f"  {line}" for line in lines), *[f"  ... and {faulty - len(lines)} more"] * (faulty > len(lines)),
              sep="\n", flush=True)
        total += faulty
    return total


def main(argv=None):
    parser = argparse.ArgumentParser(prog="data.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["check"], help="count entries, list malformed ones and missing media")
    parser.add_argument("corpus", help="JSON list of [annotation file, media root, medium]")
    parser.add_argument("--decode", action="store_true", help="also open every medium and decode some of its frames")
    parser.add_argument("--workers", type=int, default=1, help="processes that look at media (default %(default)s)")
    parser.add_argument("--show", type=int, default=10, help="faults to print per source (default %(default)s)")
    args = parser.parse_args(argv)
    return 1 if check(args.corpus, args.decode, args.workers, args.show) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
