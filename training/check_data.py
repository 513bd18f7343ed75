"""Checks a corpus before a training run meets its faults: counts entries, lists malformed ones and missing media.

    videos.json: 6 entries of video, 2 faulty: 1 empty text, 1 missing
      entry 1: an empty "caption", or one that is not text
      entry 2: videos/none.gif: no such file

The exit code is 1 where there is a fault, else 0. The entries are checked by annotations.py when it makes the index;
only the media are read here. Not here: what a training run does about faults ("on_error" of a Source, data.py).

    python -m training.check_data corpus.json --decode --workers 8
"""
import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from infra.cli import run
from training.annotations import AnnotationFile, EntryError, load_corpus
from video import MediaError, read_media

class MediaCheck(torch.utils.data.Dataset):
    """What is wrong with the medium of each good entry: (i, EntryError or None)."""

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
            if self.decode:
                # the first frame, the last and six between: a truncated file lacks its end
                read_media(path, lambda first, last, fps: np.linspace(first, last, 8).round().astype(int).tolist(),
                           as_image=source.media == "image")
        except MediaError as error:
            return i, EntryError("undecodable", str(error))
        return i, None

def media_errors(entries, decode, workers):
    """Yields (number in the file, EntryError) of every medium that is missing or, with decode, cannot be read."""
    # lists of 64, because one at a time would spend more on sending than on a file that is only looked up
    loader = torch.utils.data.DataLoader(MediaCheck(entries, decode), 64, num_workers=workers, collate_fn=list)
    name = Path(entries.source.anno).name
    with tqdm(total=len(entries), desc=name, unit="file", leave=False, disable=None) as bar:
        for batch in loader:
            yield from ((entries.entry_number(i), error) for i, error in batch if error)
            bar.update(len(batch))

def check(corpus, decode=False, workers=0, show=10):
    """Prints for each source how many entries are faulty, of which kinds, and the first `show` -> how many in all."""
    total = 0                                              # of all sources
    for source in load_corpus(corpus):
        # what the index knows, then the media; texts have none
        entries = AnnotationFile(source)
        kinds, lines = Counter(entries.header["kinds"]), entries.header["first"][:show]
        has_media = source.media != "text" and len(entries)
        for number, error in media_errors(entries, decode, workers) if has_media else ():    # "missing", "undecodable"
            kinds[error.kind] += 1
            if len(lines) < show:
                lines.append(f"entry {number}: {error.text}")

        # one line for the source, one for each of the first faults
        faulty, n = kinds.total(), len(entries) + entries.header["faulty"]
        summary = ": " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()) if faulty else ""
        print(f"{source.anno}: {n} entries of {source.media}, {faulty} faulty{summary}", *(f"  {s}" for s in lines),
              *[f"  ... and {faulty - len(lines)} more"] * (faulty > len(lines)), sep="\n", flush=True)
        total += faulty
    return total

def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m training.check_data", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="JSON list of [annotation file, media root, medium]")
    parser.add_argument("--decode", action="store_true", help="also open every medium and decode some of its frames")
    parser.add_argument("--workers", type=int, default=1, help="processes that read media (default %(default)s)")
    parser.add_argument("--show", type=int, default=10, help="faults to print per source (default %(default)s)")
    args = parser.parse_args(argv)
    return 1 if check(args.corpus, args.decode, args.workers, args.show) else 0

if __name__ == "__main__":
    run(main, "check_data")
