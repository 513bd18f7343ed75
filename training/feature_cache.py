"""What a frozen ViT sees in every clip, kept on disk: it looks once, and what comes behind it learns from that as often
as it likes.

    VideoTextDataset, ViT -> keep() -> features.npy (clips, T, L, C) in half precision, and info.json: what made them
                                    VideoTextDataset.features = Features(folder): samples then hold "features", not "video"

Only for clips that are the same each time: neither random frames nor random crops. Features of another ViT, other clips
or other frames are made anew. Not here: the ViT (vit_video.py), reading (video.py), the loop (train.py).

Run:    python train.py --stage 1 --cache-features
"""
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from infra.files import atomic_folder, fingerprint, read_json
from video import MediaError


class Features:
    """The folder that keep() wrote, by path of the clip. Opened at each access: worker processes share nothing."""

    def __init__(self, folder):
        self.path = Path(folder) / "features.npy"
        self.clips = read_json(Path(folder) / "info.json")["clips"]

    def __getitem__(self, path):
        """-> features (T, L, C) float, seconds of the frames. MediaError for a clip that could not be read."""
        clip = self.clips[path]
        if "bad" in clip:
            raise MediaError(clip["bad"])
        features = np.load(self.path, mmap_mode="r")[clip["row"]].astype(np.float32)
        return {"features": torch.from_numpy(features), "seconds": clip["seconds"]}


class EachOnce(Dataset):
    """Each clip of a VideoTextDataset in order, without any taking another's place: (path, sample or None, error)."""

    def __init__(self, clips, entries):
        self.clips, self.entries = clips, list(entries.items())                    # (path, index of an entry with it)

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, number):
        path, index = self.entries[number]
        try:
            return path, self.clips.sample(index), ""
        except MediaError as error:
            return path, None, str(error)


def stamp(path):
    """Size and time of a file, or None where there is none: another file of that name is another clip."""
    return [os.stat(path).st_size, os.stat(path).st_mtime_ns] if os.path.exists(path) else None


def origin(vit, clips):
    """What the features of a clip depend on, besides its file, as JSON."""
    return {"vit": fingerprint(vit.state_dict()), "frames": clips.num_frames, "how": clips.how,
            "pixels": clips.transform.size, "mean": clips.transform.mean.flatten().tolist()}


def lies_there(folder, made_from, stamps):
    """Whether the folder holds features of all these clips (path -> stamp), made from the same."""
    info = Path(folder) / "info.json"
    found = read_json(info) if info.is_file() else {"made_from": None}
    return found["made_from"] == made_from and all(
        found["clips"].get(path, {}).get("stamp", ()) == mark for path, mark in stamps.items())


@torch.no_grad()
def cache_features(vit, clips, folder, device, workers=0, batch=32):
    """Features of all clips (a VideoTextDataset) in `folder`: those that lie there if they are these, else made now."""
    first = {clips.path(index): index for index in reversed(range(len(clips)))}    # path -> the first entry with it
    drawn = clips.how == "rand" or clips.transform.crop or clips.transform.flip
    cut = any(entries.header["cut"] for entries in clips.entries)
    if drawn or cut or any(source.media != "video" for source in clips.sources):
        raise ValueError("--cache-features is for whole videos whose frames and crops are the same each time; "
                         "leave it out")
    stamps, made_from = {path: stamp(path) for path in first}, origin(vit, clips)
    if lies_there(folder, made_from, stamps):
        return Features(folder)
    vit = vit.to(device).eval()
    loader = DataLoader(EachOnce(clips, first), batch, collate_fn=list, num_workers=workers)
    print(f"the ViT looks at {len(first):,} clips; what it sees is kept in {folder}", flush=True)
    table = {}
    with atomic_folder(folder) as temporary:
        shape = len(first), clips.num_frames, vit.cfg.grid ** 2, vit.cfg.width
        features = np.lib.format.open_memmap(temporary / "features.npy", "w+", np.float16, shape)
        for samples in tqdm(loader, desc="features", unit="batch", disable=not sys.stderr.isatty()):
            seen = []
            for path, sample, error in samples:
                row = len(table)
                table[path] = {"stamp": stamps[path], **(
                    {"row": row, "seconds": sample["seconds"]} if sample else {"bad": error})}
                seen += [(row, sample["video"])] if sample else []
            if seen:
                rows, videos = zip(*seen, strict=True)
                features[list(rows)] = vit(torch.stack(videos).to(device)).half().cpu().numpy()
        features.flush()
        (temporary / "info.json").write_text(json.dumps({"made_from": made_from, "clips": table}))
    return Features(folder)
