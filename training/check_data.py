"""Checks a corpus before a training run meets its faults: malformed entries, unreadable media, texts that are too long.

    videos.json: 6 entries of video, 2 faulty: 1 empty text, 1 missing
      entry 1: an empty "caption"
      entry 2: videos/none.gif: no such file

The exit code is 1 where there is a fault, else 0. Not here: the check of the entries, which annotations.py makes with
the index; what a training run does about faults ("on_error" of a Source, data.py).

    python -m training.check_data corpus.json --decode --workers 8
"""
import argparse
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path

from torch.utils.data import DataLoader
from tqdm import tqdm

from infra.cli import ignore_signals, run
from infra.media import MediaError, check_path, read_media
from prompt import learnable_conversation
from tokenizer import SentencePiece
from training.annotations import AnnotationFile, load_corpus

BATCH = 64                 # entries that a process checks at a time
LIMIT = 1800               # seconds for all frames of a medium, of which training reads a few in its 60
KINDS = {"no such file": "missing", "beyond its end": "beyond the end"}    # words of a MediaError -> kind of the fault
SECONDS = {"video": [10.0] * 8, "image": (), "text": ()}                   # of the frames, as the prompt says them
CHARS_PER_ID = 4           # of English in a tokenizer of the LLaMA family
TEMPLATE_IDS = {"video": 80, "image": 20, "text": 10}    # before an answer, besides its question; a video's has seconds

def text_fault(entry, media, max_text, tok=None):
    """Why a conversation leaves nothing to learn if one of its turns comes first, as each does at times, or "".
    tok: the LLM's tokenizer; without it, the number of ids is estimated."""
    for n, turn in enumerate(entry.get("QA", ())):
        question = f"{turn.get('i') or ''} {turn.get('q') or ''}"
        if tok:
            about, n_ids = "", len(tok.encode(question))
            _, learns = learnable_conversation(tok, [turn], 1, SECONDS[media], media, max_text=max_text)
        else:
            # other scripts take more ids, nearly one for each 3 bytes
            n_ascii = sum(map(str.isascii, question))
            about, n_ids = "about ", n_ascii // CHARS_PER_ID + (len(question.encode()) - n_ascii) // 3
            learns = n_ids + TEMPLATE_IDS[media] < max_text
        if not learns:
            return f"QA {n}: a question of {about}{n_ids} ids leaves no room for its answer in {max_text} (--max-text)"
    return ""

@lru_cache(1 << 16)        # many entries may share a medium
def medium_fault(path, decode, options):
    """What is wrong with a medium -> (kind, text), or None. decode: with every frame, of read_media's options."""
    try:
        check_path(path)
        if decode:
            read_media(path, None, limit=LIMIT, **dict(options))
    except Exception as error:                                     # whatever a decoder raises is a fault of the file
        text = str(error) if isinstance(error, MediaError) else f"{path}: {error!r}"
        return next((kind for words, kind in KINDS.items() if words in text), "unreadable"), text
    return None

def entry_faults(entries, decode, max_text, tok, indices):
    """[(entry's number in the file, kind, text)] of the faults in texts and media of these good entries."""
    faults, source = [], entries.source
    for i in indices:
        entry = entries[i]
        if text := text_fault(entry, source.media, max_text, tok):
            faults.append((entries.entry_number(i), "nothing to learn", text))
        elif source.media != "text":
            fault = medium_fault(source.path(entry), decode, tuple(source.read_options(entry).items()))
            faults += [(entries.entry_number(i), *fault)] if fault else []
    return faults

def each_batch(entries, find_faults, workers):
    """find_faults of BATCH entries after another, by loader processes. A file that kills its process is a fault too."""
    load = partial(DataLoader, collate_fn=find_faults, worker_init_fn=ignore_signals)
    start = 0
    while start < len(entries):
        try:
            for faults in load(range(start, len(entries)), BATCH, num_workers=workers):
                yield faults
                start += BATCH
        except RuntimeError:
            # a process was killed by one of several batches: the entries of the first again, each in its own process
            batch = range(start, min(start + BATCH, len(entries)))
            yield sum((find_alone(entries, load([i], 1, num_workers=1), i) for i in batch), [])
            start += BATCH

def find_alone(entries, loader, i):
    """The faults of entry i, by a loader of its own, whose process it may kill."""
    try:
        return next(iter(loader))
    except RuntimeError as error:                                  # "DataLoader worker is killed by signal: ..."
        path = entries.source.path(entries[i])
        return [(entries.entry_number(i), "unreadable", f"{path}: {' '.join(str(error).split())}")]

def check_source(source, decode, workers, show, max_text, tok):
    """Prints how many entries of a source are faulty, of which kinds, and the first of them -> how many."""
    # what the index knows; a file that is no list of entries is one fault
    try:
        entries = AnnotationFile(source)
    except (ValueError, OSError) as error:
        print(error, flush=True)
        return 1
    kinds, lines = Counter(entries.header["kinds"]), entries.header["first"][:show]
    n, checked = len(entries) + entries.header["faulty"], 0

    # then texts and media; what was found is printed after Ctrl-C too
    find_faults = partial(entry_faults, entries, decode, max_text, tok)
    try:
        for faults in tqdm(each_batch(entries, find_faults, workers), Path(source.anno).name, -(-len(entries) // BATCH),
                           unit="file", unit_scale=BATCH, leave=False, disable=None):
            kinds.update(kind for _, kind, _ in faults)
            lines += [f"entry {number}: {text}" for number, _, text in faults][:show - len(lines)]
            checked += BATCH
    finally:
        # one line for the source, one for each of the first faults
        faulty = kinds.total()
        summary = ": " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()) if faulty else ""
        stopped = f", stopped after {checked}" * (checked < len(entries))
        print(f"{source.anno}: {n} entries of {source.media}{stopped}, {faulty} faulty{summary}",
              *(f"  {s}" for s in lines), *[f"  ... and {faulty - len(lines)} more"] * (faulty > len(lines)),
              sep="\n", flush=True)
    return faulty

def main(argv=None):
    parser = argparse.ArgumentParser("python -m training.check_data", description=__doc__.splitlines()[0])
    parser.add_argument("corpus", help="JSON list of [annotation file, media root, medium]")
    parser.add_argument("--decode", action="store_true", help="also decode every frame that training could meet")
    parser.add_argument("--workers", type=int, default=1, help="processes that read media (default %(default)s)")
    parser.add_argument("--show", type=int, default=10, help="faults to print for each source (default %(default)s)")
    parser.add_argument("--max-text", type=int, default=512, help="of the training run (default %(default)s)")
    parser.add_argument("--llm", help="folder with tokenizer.model: count ids exactly instead of estimating")
    args = parser.parse_args(argv)
    tok = SentencePiece(Path(args.llm) / "tokenizer.model") if args.llm else None
    faulty = [check_source(source, args.decode, args.workers, args.show, args.max_text, tok)
              for source in load_corpus(args.corpus)]
    return int(sum(faulty) > 0)                                        # 1: there are faults

if __name__ == "__main__":
    run(main, "check_data")
