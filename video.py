"""A file on disk -> normalised frames: choose which, decode them, crop, resize, normalise.

    path -> read_media(path, choose) -> frames (T, 3, H, W) uint8 and their seconds -> Transform -> (T, 3, size, size)

Which frames: train_frame_indices for training, eval_frame_indices for the benchmark; each is the official rule, and what is odd
in it stays behind an option. A file that cannot be read is a MediaError that names it, never an empty frame.
Not here: annotations, samples and batches (data.py); what becomes of the frames (vit_video.py). It imports nothing of
ours. Source: the official dataset/video_utils.py and, for the benchmark, mvbench.ipynb.

    pytest tests/test_video.py
"""
import queue
import struct
import threading
from pathlib import Path

import decord
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence, UnidentifiedImageError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}  # .gif: see read_gif
GIF_LIMIT = 3e8  # pixels in all its frames
TIME_LIMIT = 60  # seconds that decoding may take before a file counts as damaged
FOLDER_FPS = 3  # of a folder of frames: TVQA's, the only one in MVBench
NORMS = {       # name: (mean, std) of red, green, blue in 0..1
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


# ---- which frames ----------------------------------------------------------------------------------------------------

def train_frame_indices(num_frames, n_total, how="rand", rng=None, official=False):
    """num_frames of n_total frames, one from each of equal intervals: "rand" any of it, "middle" the middle one.

    A shorter video gives all its frames and repeats the last. Source: video_utils.py, get_frame_indices.
    "mvbench" takes the frames that the benchmark will take.
    """
    if how == "mvbench":
        return eval_frame_indices(num_frames, n_total - 1, fps=1)
    edges = np.linspace(0, n_total, min(num_frames, n_total) + 1).astype(int).tolist()
    spans = [range(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    if how == "middle":
        indices = [(span.start + span.stop - 1) // 2 for span in spans]
    elif how != "rand":
        raise ValueError(f"frames are chosen by 'rand', 'middle' or 'mvbench', not by {how!r}")
    elif not official:
        indices = [rng.choice(span) for span in spans]
    # QUIRK video_utils.py:53-62: the last frame of an interval is never drawn; where one interval has a single frame,
    # all frames are drawn at random from the whole video
    elif min(len(span) for span in spans) > 1:
        indices = [rng.choice(span[:-1]) for span in spans]
    else:
        indices = sorted(rng.sample(range(n_total), len(spans)))
    return indices + [indices[-1]] * (num_frames - len(indices))


def eval_frame_indices(num_frames, max_frame, fps, bound=None, first_idx=0):
    """The benchmark's frames: the middles of equal parts of (start, end) in seconds, or of the whole video.

    May lie beyond the video, where the bound does. Source: mvbench.ipynb, MVBench_dataset.get_index.
    """
    start, end = bound or (-100_000, 100_000)
    start, end = max(first_idx, round(start * fps)), min(round(end * fps), max_frame)
    part = (end - start) / num_frames
    return [int(start + part / 2 + round(part * i)) for i in range(num_frames)]


def train_frames(num_frames, how="rand", rng=None, start=None, end=None):
    """A `choose` for read_media: train_frame_indices within start and end, in seconds."""
    def choose(first, last, fps):
        if start is None:
            return [first + i for i in train_frame_indices(num_frames, last - first + 1, how, rng)]
        n_total = max(int((end - start) * fps), 1)
        return [first + int(start * fps) + i for i in train_frame_indices(num_frames, n_total, how, rng)]
    return choose


# ---- reading ---------------------------------------------------------------------------------------------------------

class SampleError(ValueError):
    """What is wrong with one sample: "path: reason", in one line."""

    def __str__(self):
        # subtle: on its way from a worker process the message gets a traceback put before it
        last = super().__str__().strip().split("\n")[-1]
        return last.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: ")


class MediaError(SampleError):
    """A video, image or folder of frames that cannot be read."""


def read_media(path, choose, still=False, limit=TIME_LIMIT):
    """Frames (T, 3, H, W) uint8 and their times in seconds, of a video, an image (T = 1) or a folder of 00001.jpg ...

    `choose(first, last, fps)` names the frames wanted by their numbers from first to last; numbers outside become the
    nearest inside. still: an image is meant, so that a GIF is its first frame. Raises MediaError, also for a video that
    takes more than `limit` seconds to decode.
    """
    path = Path(path)
    if path.is_dir():
        return read_folder(path, choose)
    if not path.is_file():
        raise MediaError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty")
    if still or path.suffix.lower() in IMAGE_SUFFIXES:
        return read_image(path)[None], [0.0]  # (1, 3, H, W)
    if path.suffix.lower() == ".gif":
        return read_gif(path, choose)
    return within(limit, read_video, path, choose)


def within(limit, read, path, *args):
    """read(path, *args), in a thread that is left behind where it takes more than `limit` seconds.

    A decoder in C that a damaged file has sent astray cannot be interrupted, neither by an exception nor by Ctrl-C; but
    it does not hold the interpreter, so whoever waits for it can go away. The process goes on, the thread ends with it.
    """
    results = queue.SimpleQueue()

    def work():
        try:
            results.put((read(path, *args), None))
        except BaseException as error:
            results.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        found, error = results.get(timeout=limit)
    except queue.Empty:
        raise MediaError(f"{path}: decoding takes more than {limit:g} seconds") from None
    if error:
        raise error
    return found


def read_eval_frames(path, num_frames, bound=None):
    """(T, 3, H, W) uint8: the frames of a medium that MVBench's protocol takes, within bound = (start, end) seconds."""
    frames, _ = read_media(path, lambda first, last, fps: eval_frame_indices(num_frames, last, fps, bound, first))
    return frames


def read_gif(path, choose):
    """As read_video, but by Pillow, in half of decord's time; so does the official code (mvbench.ipynb, read_gif).

    Each frame builds on those before it, so all are decoded.
    """
    try:
        frames, seconds = [], 0.0
        with Image.open(path) as image:
            for i, frame in enumerate(ImageSequence.Iterator(image), 1):
                if i * frame.width * frame.height > GIF_LIMIT:
                    raise MediaError(f"{path}: more than {i - 1} frames of {frame.width} x {frame.height} are too many "
                                     "for a GIF: make a video of it")
                frames.append(frame.convert("RGB"))
                delay = image.info.get("duration", 0) / 1000
                seconds += delay if delay >= 0.02 else 0.1                               # as browsers and FFmpeg do
        fps = len(frames) / seconds if len(frames) > 1 else 1.0
        indices = np.clip(choose(0, len(frames) - 1, fps), 0, len(frames) - 1).tolist()
        chosen = torch.from_numpy(np.stack([np.asarray(frames[i]) for i in indices]))    # (T, H, W, 3)
    except MediaError:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, EOFError, SyntaxError, ValueError,
            struct.error, IndexError) as error:
        raise MediaError(f"{path}: cannot be decoded as a GIF") from error
    return chosen.permute(0, 3, 1, 2), [i / fps for i in indices]                        # (T, 3, H, W)


def read_video(path, choose):
    try:
        reader = decord.VideoReader(str(path), num_threads=1)  # more threads break on some webm files (decord #246)
        if len(reader) == 0:
            raise MediaError(f"{path}: the video has no frames")
        fps = reader.get_avg_fps()
        fps = fps if fps > 0 else 1.0
        indices = np.clip(choose(0, len(reader) - 1, fps), 0, len(reader) - 1).tolist()
        frames = all_at_once(reader, indices)                                            # (T, H, W, 3)
    except (RuntimeError, decord.DECORDError) as error:
        raise MediaError(f"{path}: cannot be decoded as a video") from error
    # subtle: channels stay last in memory, which is how they came and how resize is quickest
    return torch.from_numpy(frames).permute(0, 3, 1, 2), [i / fps for i in indices]      # (T, 3, H, W)


def all_at_once(reader, indices):
    """The frames (T, H, W, 3), in a single call, so that no part of the file is decoded twice."""
    try:
        return reader.get_batch(indices).asnumpy()
    except decord.DECORDError as error:
        if "size must exactly match" not in str(error):
            raise
        return np.stack([without_padding(reader[i].asnumpy()) for i in indices])


def without_padding(frame):
    """(H, W, c) -> (H, W, 3). Rows of narrow videos, as of 48 pixels, are padded, which decord takes for channels."""
    height, width, _ = frame.shape
    return frame.reshape(height, -1)[:, :3 * width].reshape(height, width, 3)


def read_image(path):
    """(3, H, W) uint8, whatever the file holds: grey, palette, transparency, CMYK."""
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))          # (H, W, 3)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path}: cannot be decoded as an image") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)         # (3, H, W)


def read_folder(path, choose):
    last = len(list(path.glob("*.jpg")))
    if last == 0:
        raise MediaError(f"{path}: the folder has no frames (00001.jpg ...)")
    indices = np.clip(choose(1, last, FOLDER_FPS), 1, last).tolist()
    missing = [i for i in indices if not (path / f"{i:05d}.jpg").is_file()]
    if missing:
        raise MediaError(f"{path}: the folder of {last} frames lacks {missing[0]:05d}.jpg")
    frames = [read_image(path / f"{i:05d}.jpg") for i in indices]
    return torch.stack(frames), [(i - 1) / FOLDER_FPS for i in indices]  # (T, 3, H, W)


# ---- pixels ----------------------------------------------------------------------------------------------------------

class Transform:
    """uint8 (T, 3, H, W) -> normalised float (T, 3, size, size), the same crop for all frames.

    train: a random crop of `scale` of the area, ratio 3/4 to 4/3, resized; flipped by chance if `flip` (off by default,
    since it turns left into right, but not in the text). Else short side to `size`, centre crop. crop=False: resized
    only.
    """

    def __init__(self, size, train=False, crop=True, norm="imagenet", scale=(0.5, 1.0), flip=False):
        if norm not in NORMS:
            raise ValueError(f"norm {norm!r}: expected one of {', '.join(NORMS)}")
        self.size, self.train, self.crop, self.scale, self.flip = size, train, crop, scale, flip
        self.mean, self.std = (255 * torch.tensor(values).view(3, 1, 1) for values in NORMS[norm])

    def __call__(self, frames, rng=None):
        if self.crop and self.train:
            top, left, height, width = self.random_box(*frames.shape[-2:], rng)
            frames = frames[..., top:top + height, left:left + width]
        elif self.crop:
            frames = self.centre(frames)
        x = resize(frames, self.size, self.size)          # (T, 3, size, size)
        if self.train and self.flip and rng.random() < 0.5:
            x = x.flip(-1)
        return (x - self.mean).div_(self.std)

    def centre(self, frames):
        height, width = frames.shape[-2:]
        short = min(height, width)
        x = resize(frames, self.size * height // short, self.size * width // short)
        top, left = (round((side - self.size) / 2) for side in x.shape[-2:])
        return x[..., top:top + self.size, left:left + self.size]  # (T, 3, size, size)

    def random_box(self, height, width, rng):
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            ratio = (4 / 3) ** rng.uniform(-1, 1)  # width : height, as often wide as tall
            w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                return rng.randint(0, height - h), rng.randint(0, width - w), h, w
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))  # very long or tall: the middle
        return (height - h) // 2, (width - w) // 2, h, w


def load_eval_clip(path, cfg, bound=None):
    """A medium as a model (cfg: its model.Config) sees it in MVBench and chat: (T, 3, size, size)."""
    transform = Transform(cfg.vit.img_size, crop=cfg.crop, norm=cfg.eval_norm)
    return transform(read_eval_frames(path, cfg.eval_frames, bound))


def resize(x, height, width):
    """Bicubic with antialiasing, within 2 levels of Pillow's. (T, 3, H, W) uint8 -> float.

    subtle: on bytes, PyTorch rounds between its two passes, as Pillow does; on floats it does not, differs by up to 8
    levels at sharp edges, and takes 16 times as long. Decoders can resize as well, but not alike: decord's
    result differs by up to 68 levels.
    """
    if x.shape[-2:] != (height, width):
        x = F.interpolate(x, (height, width), mode="bicubic", antialias=True)
    return x.to(torch.float32, memory_format=torch.contiguous_format)
