"""Clips a second of our reader (video.py) beside the official notebook's way, with and without worker processes.

The clip is 10 seconds of H.264 at 854 x 480, read to 16 frames of 224 pixels. The notebook decodes and resizes one
frame after the other, with Pillow, and uses no workers. Source: mvbench.ipynb, MVBench_dataset.read_video. Not here:
whether the frames are right (tests/test_decoding.py).

    python -m bench.decoding
"""
import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import decord
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from bench.reference import import_dev
from infra.cli import run
from model import Config
from video import NORMS, eval_frame_indices, load_eval_clip

def write_clip(path):
    """A moving gradient with noise, 25 frames a second."""
    av, rng = import_dev("av"), np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height = 854, 480
        for i in range(250):
            gradient = (np.add.outer(np.arange(480), np.arange(854)) + 5 * i) % 256                     # (H, W)
            frame = (gradient[..., None] + rng.integers(0, 4, (480, 854, 3))).astype(np.uint8)          # (H, W, 3)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())

def read_as_notebook(path, cfg):
    """A video, frame by frame: decoded, short side resized, centre cropped, normalised -> (T, 3, size, size)."""
    reader, size = decord.VideoReader(str(path), num_threads=1), cfg.vit.img_size
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMS[cfg.eval_norm])

    # as many calls as frames, and no frame is decoded ahead of its turn
    frames = []
    for i in eval_frame_indices(cfg.eval_frames, len(reader) - 1, reader.get_avg_fps()):
        image = Image.fromarray(reader[i].asnumpy())
        short = min(image.size)
        image = image.resize((size * image.width // short, size * image.height // short), Image.BICUBIC)
        left, top = (round((side - size) / 2) for side in image.size)
        pixels = torch.from_numpy(np.array(image.crop((left, top, left + size, top + size))))           # (H, W, 3)
        frames.append((pixels.permute(2, 0, 1).float() / 255 - mean) / std)
    return torch.stack(frames)

def main(argv=None):
    parser = argparse.ArgumentParser("python -m bench.decoding", description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=16, help="that each way reads (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="of the ways with workers (default %(default)s)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_clip(path)

        # a DataLoader hands the path to the workers, and its collate_fn reads there
        for name, read in (("our reader", load_eval_clip), ("the notebook's way", read_as_notebook)):
            for workers in sorted({0, args.workers}):
                loader = DataLoader([path] * args.clips, None, num_workers=workers,
                                    collate_fn=partial(read, cfg=Config()))
                start = time.perf_counter()
                list(loader)
                rate = args.clips / (time.perf_counter() - start)
                print(f"{name:20}{workers} workers{rate:8.2f} clips/s", flush=True)

if __name__ == "__main__":
    run(main, "bench.decoding")
