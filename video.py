"""A video, image or folder of frames -> normalised frames: which ones, crop, resize, normalise.

    path -> read_media(path, select) -> frames (T, 3, H, W) uint8, seconds -> Transform -> (T, 3, size, size) float

Which frames: train_frame_indices for training, eval_frame_indices for the benchmark. Shape letters: model.py; size:
pixels of a side. Not here: decoding (infra/media.py), which never gives an empty frame and names what it cannot read;
annotations, samples and batches (data.py); what becomes of the frames (vit_video.py).

Source: the official dataset/video_utils.py and, for the benchmark, mvbench.ipynb.
Run:    python -m pytest tests/test_video.py
"""
import numpy as np
import torch
import torch.nn.functional as F

from infra.media import read_media

SAMPLING = ("rand", "middle", "official", "mvbench")                          # see train_frame_indices
NORMS = {        # name: (mean, std) of red, green, blue in 0..1
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}

# --------------------------------------------------------------------------------------------------------- which frames

def train_frame_indices(num_frames, n_total, sampling="rand", rng=None):
    """num_frames of n_total frames, in order, one from each of num_frames equal intervals. A shorter video gives all
    its frames and repeats the last. Source: video_utils.py, get_frame_indices.
    sampling   rand      any frame of the interval, drawn by rng (random.Random)
               middle    the middle frame
               official  drawn as the official code does
               mvbench   the frames that the benchmark takes"""
    if sampling == "mvbench":
        return eval_frame_indices(num_frames, n_total - 1, fps=1)

    # equal intervals, in whole frames; no more of them than there are frames
    edges = np.linspace(0, n_total, min(num_frames, n_total) + 1).astype(int).tolist()
    intervals = [range(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]

    # one frame of each, and the last again until there are num_frames
    if sampling == "middle":
        indices = [(interval.start + interval.stop - 1) // 2 for interval in intervals]
    elif sampling == "rand":
        indices = [rng.choice(interval) for interval in intervals]
    elif sampling != "official":
        raise ValueError(f"sampling {sampling!r}: expected one of {', '.join(SAMPLING)}")
    # QUIRK video_utils.py:53-62: the last frame of an interval is never drawn; where one interval has a single frame,
    # all frames are drawn at random from the whole video
    elif min(map(len, intervals)) > 1:
        indices = [rng.choice(interval[:-1]) for interval in intervals]
    else:
        indices = sorted(rng.sample(range(n_total), len(intervals)))
    return indices + [indices[-1]] * (num_frames - len(indices))

def eval_frame_indices(num_frames, max_frame, fps, bound=None, first_idx=0):
    """The benchmark's frames: the middles of equal parts of bound = (start, end) in seconds, or of the whole video.
    A bound beyond the video gives indices beyond it. Source: mvbench.ipynb, MVBench_dataset.get_index."""
    start, end = bound or (-100_000, 100_000)
    start, end = max(first_idx, round(start * fps)), min(round(end * fps), max_frame)
    part = (end - start) / num_frames
    return [int(start + part / 2 + round(part * i)) for i in range(num_frames)]

def train_frame_selector(num_frames, sampling="rand", rng=None):
    """A `select` for read_media: train_frame_indices of the frames that it offers."""
    def select(first, last, fps):
        return [first + i for i in train_frame_indices(num_frames, last - first + 1, sampling, rng)]
    return select

def read_eval_frames(path, num_frames, bound=None, fps=None, warnings=None):
    """(T, 3, H, W) uint8: the frames of a medium that the benchmark takes, within bound = (start, end) in seconds.

    The benchmark counts frames at the average rate, also where the rate varies. fps: of a folder. warnings: a list that
    gets a line if the bound begins after the medium ends; its last frame is taken then."""
    def select(first, last, fps):
        if bound and warnings is not None and round(bound[0] * fps) > last:
            warnings.append(f"{path}: start {bound[0]:g} s is beyond its end ({(last - first + 1) / fps:.1f} s)")
        return eval_frame_indices(num_frames, last, fps, bound, first)
    return read_media(path, select, fps=fps)[0]

# --------------------------------------------------------------------------------------------------------------- pixels

class Transform:
    """uint8 (T, 3, H, W) -> normalised float (T, 3, size, size), with the same crop for all frames.
    train: a random crop of `scale` of the area, ratio 3/4 to 4/3, resized; with `flip`, mirrored half of the time (off
    by default: it swaps left and right in the video but not in the text). Otherwise: short side to `size`, centre crop.
    crop=False: only resized."""
    def __init__(self, size, train=False, crop=True, norm="imagenet", scale=(0.5, 1.0), flip=False):
        if norm not in NORMS:
            raise ValueError(f"norm {norm!r}: expected one of {', '.join(NORMS)}")
        self.size, self.train, self.crop, self.scale, self.flip = size, train, crop, scale, flip
        self.mean, self.std = (255 * torch.tensor(values).view(3, 1, 1) for values in NORMS[norm])

    def __call__(self, frames, rng=None):
        # a random crop, resized; the centre of the resized frames; or all of them
        (height, width), size = frames.shape[-2:], self.size
        if self.crop and self.train:
            top, left, height, width = self.random_resized_crop(height, width, rng)
            x = resize(frames[..., top:top + height, left:left + width], size, size)     # (T, 3, size, size)
        elif self.crop:
            short, corner = min(height, width), []
            for dim, side in ((-2, height), (-1, width)):
                corner.append(round((size * side // short - size) / 2))
                # subtle: of a strip, six squares about the crop are resized: all of 1920 x 4 would be 480 of them. With
                # whole squares, and two of margin, the crop's pixels stay the same
                if corner[-1] > 4 * size:
                    first = corner[-1] // size - 2
                    corner[-1] -= first * size
                    frames = frames.narrow(dim, first * short, 6 * short)
            (top, left), (height, width) = corner, frames.shape[-2:]
            x = resize(frames, size * height // short, size * width // short)
            x = x[..., top:top + size, left:left + size]                                 # (T, 3, size, size)
        else:
            x = resize(frames, size, size)                                               # (T, 3, size, size)

        if self.train and self.flip and rng.random() < 0.5:
            x = x.flip(-1)
        return (x - self.mean).div_(self.std)

    def random_resized_crop(self, height, width, rng):
        """A random box: top, left, height, width. Source: torchvision, RandomResizedCrop."""
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            ratio = (4 / 3) ** rng.uniform(-1, 1)  # width : height, as often wide as tall
            w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                return rng.randint(0, height - h), rng.randint(0, width - w), h, w

        # a very long or tall picture: its middle
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        return (height - h) // 2, (width - w) // 2, h, w

def resize(x, height, width):
    """Bicubic with antialiasing, within 2 levels of Pillow's. (T, 3, H, W) uint8 -> float (T, 3, height, width).

    subtle: on bytes, PyTorch rounds between its two passes, as Pillow does; on floats it does not, differs by up to 8
    levels at sharp edges, and takes 16 times as long. decord's own resizing differs by up to 68 levels."""
    if x.shape[-2:] != (height, width):
        x = F.interpolate(x, (height, width), mode="bicubic", antialias=True)
    return x.to(torch.float32, memory_format=torch.contiguous_format)

def load_eval_clip(path, cfg, bound=None, fps=None, warnings=None):
    """A medium as MVBench and chat show it to a model (cfg: its model.Config): (T, 3, size, size)."""
    transform = Transform(cfg.vit.img_size, crop=cfg.crop, norm=cfg.eval_norm)
    return transform(read_eval_frames(path, cfg.eval_frames, bound, fps, warnings))
