"""Clips a second of our reader (video.py) beside the official notebook's way, with and without worker processes.

The clip is 10 seconds of H.264 at 854 x 480, read to 16 frames of 224 pixels. Source: mvbench.ipynb,
MVBench_dataset.read_video. Not here: whether the frames are right (tests/test_files.py).

    python -m bench.decoding
"""
import argparse
import tempfile
import time
from functools import partial

import av
import decord
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from infra.cli import run
from model import Config
from video import Transform, eval_frame_indices, load_eval_clip

def read_as_notebook(path, cfg):
    """As load_eval_clip, but each frame is decoded by a call of its own and resized by Pillow."""
    reader, size, frames = decord.VideoReader(str(path), num_threads=1), cfg.vit.img_size, []
    for i in eval_frame_indices(cfg.eval_frames, len(reader) - 1, reader.get_avg_fps()):
        image = Image.fromarray(reader[i].asnumpy())
        image = image.resize([size * side // min(image.size) for side in image.size], Image.BICUBIC)
        frames.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))               # (3, H, W), H or W = size
    return Transform(size, norm=cfg.eval_norm)(torch.stack(frames))                     # (T, 3, size, size)

def main(argv=None):
    parser = argparse.ArgumentParser("python -m bench.decoding", description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=16, help="that each way reads (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="of the ways with workers (default %(default)s)")
    args, rng = parser.parse_args(argv), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        # a moving gradient with noise
        path, gradient = f"{folder}/clip.mp4", np.indices((480, 854, 3)).sum(0)         # (H, W, 3)
        with av.open(path, "w") as container:
            stream = container.add_stream("libx264", rate=25, width=854, height=480)
            for i in range(250):
                pixels = (gradient + 5 * i + rng.integers(0, 4, gradient.shape)).astype(np.uint8)   # modulo 256
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())

        # a DataLoader hands the path to the workers, and its collate_fn reads there
        for name, read in (("our reader", load_eval_clip), ("the notebook's way", read_as_notebook)):
            for workers in sorted({0, args.workers}):
                start, read_clip = time.perf_counter(), partial(read, cfg=Config())
                list(DataLoader([path] * args.clips, None, num_workers=workers, collate_fn=read_clip))
                rate = args.clips / (time.perf_counter() - start)
                print(f"{name:20}{workers} workers{rate:8.2f} clips/s", flush=True)

if __name__ == "__main__":
    run(main, "bench.decoding")
