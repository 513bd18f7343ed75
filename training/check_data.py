"""Checks a corpus before a training run meets its faults: counts entries, lists malformed ones and missing media.

    videos.json: 6 entries of video, 2 faulty: 1 empty text, 1 missing
      entry 1: an empty "caption", or one that is not text
      entry 2: videos/none.gif: no such file

The exit code is 1 where there is a fault, else 0. Not here: the check of the entries, which annotations.py makes with
the index; what a training run does about faults ("on_error" of a Source, data.py).

    python -m training.check_data corpus.json --decode --workers 8
"""
import argparse
from collections import Counter
from functools import partial
from pathlib import Path

from torch.utils.data import DataLoader
from tqdm import tqdm

from infra.cli import ignore_signals, run
from infra.media import MediaError, read_media
from training.annotations import AnnotationFile, load_corpus

def media_errors(entries, decode, indices):
    """[(entry's number in the file, kind, text)] of the media that are missing or, with decode, cannot be read."""
    errors, source = [], entries.source
    for i in indices:
        path = source.path(entries[i])
        try:
            if not Path(path).exists():
                errors.append((entries.entry_number(i), "missing", f"{path}: no such file"))
            elif decode:
                # the first frame, the last and six between: a truncated file lacks its end
                read_media(path, lambda first, last, fps: [first + (last - first) * k // 7 for k in range(8)],
                           as_image=source.media == "image")
        except MediaError as error:
            errors.append((entries.entry_number(i), "undecodable", str(error)))
    return errors

def check(corpus, decode=False, workers=0, show=10):
    """Prints for each source how many entries are faulty, of which kinds, and the first of them -> how many in all."""
    total = 0                                                                  # of all sources
    for source in load_corpus(corpus):
        # what the index knows; then the media, 64 at a time, in the loader's processes; texts have none
        entries = AnnotationFile(source)
        kinds, lines = Counter(entries.header["kinds"]), entries.header["first"][:show]
        loader = DataLoader(range(len(entries) if source.media != "text" else 0), 64, num_workers=workers,
                            collate_fn=partial(media_errors, entries, decode), worker_init_fn=ignore_signals)
        for errors in tqdm(loader, Path(source.anno).name, unit="file", unit_scale=64, leave=False, disable=None):
            kinds.update(kind for _, kind, _ in errors)
            lines += [f"entry {number}: {text}" for number, _, text in errors][:show - len(lines)]

        # one line for the source, one for each of the first faults
        faulty, n = kinds.total(), len(entries) + entries.header["faulty"]
        summary = ": " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()) if faulty else ""
        print(f"{source.anno}: {n} entries of {source.media}, {faulty} faulty{summary}", *(f"  {s}" for s in lines),
              *[f"  ... and {faulty - len(lines)} more"] * (faulty > len(lines)), sep="\n", flush=True)
        total += faulty
    return total

def main(argv=None):
    parser = argparse.ArgumentParser("python -m training.check_data", description=__doc__.splitlines()[0])
    parser.add_argument("corpus", help="JSON list of [annotation file, media root, medium]")
    parser.add_argument("--decode", action="store_true", help="also open every medium and decode some of its frames")
    parser.add_argument("--workers", type=int, default=1, help="processes that read media (default %(default)s)")
    parser.add_argument("--show", type=int, default=10, help="faults to print for each source (default %(default)s)")
    args = parser.parse_args(argv)
    return int(check(args.corpus, args.decode, args.workers, args.show) > 0)              # 1: there are faults

if __name__ == "__main__":
    run(main, "check_data")
