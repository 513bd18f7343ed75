"""Features of a frozen ViT on disk: it encodes every clip once, and training reads them as often as it likes.

    VideoTextDataset, ViT -> cache_features -> FOLDER/features.npy (clips, T, L, C), float16
                                               FOLDER/info.json: what they were made from, one row or error per clip
    dataset.features = Features(FOLDER): its samples then have "features" instead of "video"

Only for clips that are the same each time: no random frames, no random crops. With another ViT, other clips or other
frames the features are made again. Not here: the ViT (vit_video.py), reading (video.py), the loop (train.py).

    python train.py --stage 1 --cache-features
"""
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from infra.cli import ignore_signals
from infra.files import atomic_folder, fingerprint, read_json
from infra.media import MediaError

class Features:
    """The features in a folder, by the clip's path. Opened at each access, so loader processes share nothing."""

    def __init__(self, folder):
        self.path = Path(folder) / "features.npy"
        self.clips = read_json(Path(folder) / "info.json")["clips"]

    def __getitem__(self, path):
        """-> {"features": (T, L, C) float, "seconds": of its frames}. MediaError for a clip that could not be read."""
        clip = self.clips[path]
        if "bad" in clip:                                                      # the dataset replaces the sample
            raise MediaError(clip["bad"])
        features = np.load(self.path, mmap_mode="r")[clip["row"]].astype(np.float32)     # (T, L, C)
        return {"features": torch.from_numpy(features), "seconds": clip["seconds"]}

def read_clips(dataset, clips):
    """[(path, index of a sample with it)] -> [(path, sample or None, error)]; an unreadable clip is not replaced."""
    results = []
    for path, index in clips:
        try:
            results.append((path, dataset.sample(index), ""))
        except MediaError as error:
            results.append((path, None, str(error)))
    return results

@torch.no_grad()
def cache_features(vit, dataset, folder, device, workers=0, batch=32):
    """-> Features of all clips of a VideoTextDataset: those in `folder` if they are valid, otherwise made now."""
    # one row must serve every sample of a clip
    is_random = dataset.sampling in ("rand", "official") or dataset.transform.crop or dataset.transform.flip
    has_parts = any(entries.header["has_bounds"] for entries in dataset.entries)
    if is_random or has_parts or any(source.media != "video" for source in dataset.sources):
        raise ValueError("--cache-features needs whole videos with the same frames and crops: add --no-cache-features")

    # what features depend on: ViT, frames and pixels; and of each clip its file's size and time, None if it is missing
    key = {"vit": fingerprint(vit.state_dict()), "frames": dataset.num_frames, "sampling": dataset.sampling,
           "pixels": dataset.transform.size, "mean": dataset.transform.mean.flatten().tolist()}
    index_of = {dataset.path(index): index for index in reversed(range(len(dataset)))}   # the first sample with a path
    stats = {path: os.stat(path) if os.path.exists(path) else None for path in index_of}
    stamps = {path: stat and [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}
    info = read_json(Path(folder) / "info.json") if (Path(folder) / "info.json").is_file() else {}
    clips = info["clips"] if info.get("cache_key") == key else {}
    if all(path in clips and clips[path]["stamp"] == stamps[path] for path in stamps):
        return Features(folder)

    # encode batch by batch, straight into a file on disk; an unreadable clip gets its error instead of a row
    vit, clips = vit.to(device).eval(), {}                                               # path -> what info.json says
    print(f"the ViT encodes {len(index_of):,} clips once; their features are written to {folder}", flush=True)
    loader = DataLoader(list(index_of.items()), batch, collate_fn=partial(read_clips, dataset), num_workers=workers,
                        worker_init_fn=ignore_signals)
    with atomic_folder(folder) as temporary:
        shape = len(index_of), dataset.num_frames, vit.cfg.grid ** 2, vit.cfg.width      # (clips, T, L, C)
        features = np.lib.format.open_memmap(temporary / "features.npy", "w+", np.float16, shape)
        for samples in tqdm(loader, desc="features", unit="batch", disable=None):
            for row, (path, sample, error) in enumerate(samples, len(clips)):
                clip = {"row": row, "seconds": sample["seconds"]} if sample else {"bad": error}
                clips[path] = clip | {"stamp": stamps[path]}
            readable = [(clips[path]["row"], sample["video"]) for path, sample, _ in samples if sample]
            if readable:
                rows, videos = zip(*readable, strict=True)
                features[list(rows)] = vit(torch.stack(videos).to(device)).half().cpu().numpy()  # (len(rows), T, L, C)
        features.flush()                                                                 # before the folder is renamed
        (temporary / "info.json").write_text(json.dumps({"cache_key": key, "clips": clips}))
    return Features(folder)
