"""What a frozen ViT sees in every clip, kept on disk: it looks once, and stage 1 learns from it as often as it likes.

    VideoTextData, ViT -> keep() -> features.npy (clips, T, L, C) in half precision, and info.json: what made them
                                    VideoTextData.features = Features(folder): samples then hold "features", not "video"

Only for clips that are the same each time: neither random frames nor random crops. Features of another ViT, other clips
or other frames are made anew. Not here: the ViT (vit_video.py), reading (media.py), the loop (train.py).

Run:    python train.py --stage 1 --cache-features
"""
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from checkpoint import fingerprint, read_json, whole_folder
from media import MediaError


class Features:
    """The folder that keep() wrote, by index of the clip. Opened at each access: worker processes share nothing."""

    def __init__(self, folder):
        self.path = Path(folder) / "features.npy"
        self.bad = read_json(Path(folder) / "info.json")["bad"]            # index -> why it could not be read

    def __getitem__(self, index):
        """-> (T, L, C) float. MediaError for a clip that could not be read."""
        if str(index) in self.bad:
            raise MediaError(self.bad[str(index)])
        return torch.from_numpy(np.load(self.path, mmap_mode="r")[index].astype(np.float32))


class EachOnce(Dataset):
    """The clips of a VideoTextData in order, without any taking another's place: (index, video or None, error)."""

    def __init__(self, clips):
        self.clips = clips

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        try:
            return index, self.clips.sample(index)["video"], ""
        except MediaError as error:
            return index, None, str(error)


def origin(vit, clips):
    """What the features depend on, as JSON: the ViT's weights, the corpus, the choice of frames, the pixels."""
    size = [[Path(s.anno).stat().st_size, Path(s.anno).stat().st_mtime] for s in clips.sources]
    return {"vit": fingerprint(vit.state_dict()), "sources": [asdict(s) for s in clips.sources], "annotations": size,
            "clips": len(clips), "frames": clips.num_frames, "how": clips.how, "pixels": clips.transform.size,
            "mean": clips.transform.mean.flatten().tolist()}


@torch.no_grad()
def keep(vit, clips, folder, device, workers=0, batch=32):
    """Features of all clips (a VideoTextData) in `folder`: those that lie there if they are these, else made now."""
    made_from = origin(vit, clips)
    info = Path(folder) / "info.json"
    if info.is_file() and read_json(info)["made_from"] == made_from:
        return Features(folder)
    drawn = clips.how == "rand" or clips.transform.crop or clips.transform.flip
    if drawn or any(source.media != "video" for source in clips.sources):
        raise ValueError("--cache-features is for videos whose frames and crops are the same each time; leave it out")
    vit, bad = vit.to(device).eval(), {}
    loader = DataLoader(EachOnce(clips), batch, collate_fn=list, num_workers=workers)
    print(f"the ViT looks at {len(clips):,} clips; what it sees is kept in {folder}", flush=True)
    with whole_folder(folder) as temporary:
        shape = len(clips), clips.num_frames, vit.cfg.grid ** 2, vit.cfg.width
        features = np.lib.format.open_memmap(temporary / "features.npy", "w+", np.float16, shape)
        for rows in tqdm(loader, desc="features", unit="batch", disable=not sys.stderr.isatty()):
            bad |= {index: error for index, video, error in rows if video is None}
            seen = [(index, video) for index, video, _ in rows if video is not None]
            if seen:
                indices, videos = zip(*seen, strict=True)
                features[list(indices)] = vit(torch.stack(videos).to(device)).half().cpu().numpy()
        features.flush()
        (temporary / "info.json").write_text(json.dumps({"made_from": made_from, "bad": bad}))
    return Features(folder)
