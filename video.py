"""A video, image or folder of frames -> normalised frames: select, decode, crop, resize, normalise.

    path -> read_media(path, select) -> frames (T, 3, H, W) uint8, seconds -> Transform -> (T, 3, size, size) float

Which frames: train_frame_indices for training, eval_frame_indices for the benchmark. A file that cannot be read raises
a MediaError that names it; it never gives an empty frame. Shape letters: model.py; size: pixels of a side.
Not here: annotations, samples and batches (data.py), what becomes of the frames (vit_video.py).

Source: the official dataset/video_utils.py and, for the benchmark, mvbench.ipynb.
Run:    python -m pytest tests/test_video.py
"""
import os
import queue
import struct
import threading
from contextlib import contextmanager
from pathlib import Path

import decord
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence, UnidentifiedImageError

SAMPLING = ("rand", "middle", "official", "mvbench")                          # see train_frame_indices
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}  # .gif: see read_gif
IMAGE_ERRORS = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError)
GIF_LIMIT = 3e8  # pixels in all frames together
TIME_LIMIT = 60  # seconds; a file that takes longer to decode counts as damaged
FOLDER_FPS = 3   # frames per second of a folder of frames: TVQA's, the only one in MVBench
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
    """A `select` for read_media: train_frame_indices of the frames from first to last."""
    def select(first, last, fps):
        return [first + i for i in train_frame_indices(num_frames, last - first + 1, sampling, rng)]
    return select

# -------------------------------------------------------------------------------------------------------------- reading

class SampleError(ValueError):
    """What is wrong with one sample: "path: reason", in one line."""
    def __str__(self):
        # subtle: an error from a loader process arrives with its traceback in front of the message
        message = super().__str__().strip().split("\n")[-1]
        return message.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: ")

class MediaError(SampleError):
    """A video, image or folder of frames that cannot be read."""

def check_path(path):
    """MediaError if a medium is missing, empty or cannot be reached."""
    try:
        path = Path(path)
        if os.stat(path).st_size == 0 and not path.is_dir():
            raise MediaError(f"{path}: the file is empty")
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file") from None
    except MediaError:
        raise
    except (OSError, ValueError) as error:
        raise MediaError(f"{path}: {getattr(error, 'strerror', None) or error}") from None

def read_media(path, select, as_image=False, limit=TIME_LIMIT, fps=None, start=None, end=None):
    """Stand-in of the reading to come: bounds and select=None, by wrapping the selector."""
    check_path(path)
    def bounded(first, last, rate):
        if start is not None:
            first = first + int(start * rate)
            if first > last:
                raise MediaError(f"{path}: start {start:g} s is beyond its end ({(last + 1) / rate:.1f} s)")
            last = min(last, first + max(int((end - start) * rate), 1) - 1)
        return list(range(first, last + 1)) if select is None else select(first, last, rate)
    frames, seconds = read_medium(path, bounded, as_image, limit)
    return (None if select is None else frames), seconds

def read_medium(path, select, as_image=False, limit=TIME_LIMIT):
    """-> frames (T, 3, H, W) uint8 and their seconds, of a video, an image (T = 1) or a folder of 00001.jpg ...

    select(first, last, fps) -> numbers of the frames to read, of those from first to last; a number outside becomes the
    nearest inside. as_image: an image is expected, so a GIF gives its first frame. Raises MediaError, also for a video
    that takes more than `limit` seconds to decode."""
    path = Path(path)
    if path.is_dir():
        return read_folder(path, select)
    if not path.is_file():
        raise MediaError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty")
    if as_image or path.suffix.lower() in IMAGE_SUFFIXES:
        return read_image(path)[None], [0.0]                                              # (1, 3, H, W)
    if path.suffix.lower() == ".gif":
        return read_gif(path, select)
    return with_timeout(limit, read_video, path, select)

def with_timeout(limit, read, path, *args):
    """read(path, *args) in a thread, which is abandoned (MediaError) if it takes more than `limit` seconds. Neither an
    exception nor Ctrl-C interrupts a decoder in C that hangs on a damaged file. But it does not hold the interpreter
    lock, so the process can continue without it; the thread ends with the process."""
    results = queue.SimpleQueue()
    def work():
        try:
            results.put(read(path, *args))
        except BaseException as error:
            results.put(error)

    # a daemon, unlike the threads of an executor: Python does not wait for it at the end
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        result = results.get(timeout=limit)
    except queue.Empty:
        raise MediaError(f"{path}: decoding takes more than {limit:g} seconds") from None
    except KeyboardInterrupt:
        thread.join(timeout=2)  # a process that ends in the middle of decoding may abort instead of exiting with 130
        raise
    try:
        if isinstance(result, BaseException):
            raise result
        return result
    finally:
        # subtle: an error's traceback holds this frame, and the frame would hold the error. In such a circle decord's
        # reader outlives the call, and a loader process forked meanwhile aborts when it collects the reader
        del result

@contextmanager
def decode_errors(path, kind, *errors):
    """These errors of a decoder become a MediaError."""
    try:
        yield
    except MediaError:
        raise
    except errors as error:
        raise MediaError(f"{path}: cannot be decoded as {kind}") from error

def read_video(path, select):
    with decode_errors(path, "a video", RuntimeError, decord.DECORDError):
        reader = decord.VideoReader(str(path), num_threads=1)  # more threads break on some webm files (decord #246)
        if len(reader) == 0:
            raise MediaError(f"{path}: the video has no frames")
        fps = reader.get_avg_fps() if reader.get_avg_fps() > 0 else 1.0
        indices = np.clip(select(0, len(reader) - 1, fps), 0, len(reader) - 1).tolist()

        # all frames in one call, so that no part of the file is decoded twice
        try:
            frames = reader.get_batch(indices).asnumpy()                                 # (T, H, W, 3)
        except decord.DECORDError as error:
            if "size must exactly match" not in str(error):
                raise
            # narrow videos (48 pixels) have padded rows; read one by one, decord takes the padding for more channels
            frames = np.stack([reader[i].asnumpy() for i in indices])                    # (T, H, W, c)
            t, height, width, _ = frames.shape
            frames = frames.reshape(t, height, -1)[:, :, :3 * width].reshape(t, height, width, 3)
    # subtle: channels stay last in memory, as they came; resize is fastest on them
    return torch.from_numpy(frames).permute(0, 3, 1, 2), [i / fps for i in indices]      # (T, 3, H, W)

def read_gif(path, select):
    """By Pillow, in half of decord's time; so does the official code (mvbench.ipynb, read_gif)."""
    with decode_errors(path, "a GIF", *IMAGE_ERRORS, EOFError, struct.error, IndexError), Image.open(path) as image:
        # each frame builds on those before it, so all are decoded
        frames, seconds = [], 0.0
        for i, frame in enumerate(ImageSequence.Iterator(image), 1):
            if i * frame.width * frame.height > GIF_LIMIT:
                raise MediaError(f"{path}: {i} frames of {frame.width} x {frame.height} are too many: make it a video")
            frames.append(frame.convert("RGB"))
            delay = image.info.get("duration", 0) / 1000
            seconds += delay if delay >= 0.02 else 0.1                                   # as browsers and FFmpeg do

        fps = len(frames) / seconds if len(frames) > 1 else 1.0
        indices = np.clip(select(0, len(frames) - 1, fps), 0, len(frames) - 1).tolist()
        selected = torch.from_numpy(np.stack([np.asarray(frames[i]) for i in indices]))  # (T, H, W, 3)
    return selected.permute(0, 3, 1, 2), [i / fps for i in indices]                      # (T, 3, H, W)

def read_image(path):
    """(3, H, W) uint8 of any kind of image: grey, palette, transparency, CMYK."""
    with decode_errors(path, "an image", *IMAGE_ERRORS), Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))                                          # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)                                     # (3, H, W)

def read_folder(path, select):
    last = len(list(path.glob("*.jpg")))
    if last == 0:
        raise MediaError(f"{path}: the folder has no frames (00001.jpg ...)")
    indices = np.clip(select(1, last, FOLDER_FPS), 1, last).tolist()
    missing = [i for i in indices if not (path / f"{i:05d}.jpg").is_file()]
    if missing:
        raise MediaError(f"{path}: the folder of {last} frames lacks {missing[0]:05d}.jpg")
    frames = [read_image(path / f"{i:05d}.jpg") for i in indices]
    return torch.stack(frames), [(i - 1) / FOLDER_FPS for i in indices]                  # (T, 3, H, W)

def read_eval_frames(path, num_frames, bound=None):
    """(T, 3, H, W) uint8: the frames of a medium that the benchmark takes, within bound = (start, end) in seconds."""
    frames, _ = read_media(path, lambda first, last, fps: eval_frame_indices(num_frames, last, fps, bound, first))
    return frames

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
            short = min(height, width)
            x = resize(frames, size * height // short, size * width // short)
            top, left = (round((side - size) / 2) for side in x.shape[-2:])
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

def load_eval_clip(path, cfg, bound=None):
    """A medium as MVBench and chat show it to a model (cfg: its model.Config): (T, 3, size, size)."""
    transform = Transform(cfg.vit.img_size, crop=cfg.crop, norm=cfg.eval_norm)
    return transform(read_eval_frames(path, cfg.eval_frames, bound))
