"""A path -> frames and their seconds, as a player shows them: videos, images, moving images, folders of frames.

    read_media("kite.mp4", lambda first, last, fps: [first, last]) -> (2, 3, H, W) uint8, [0.0, 9.97]

The content of a file says what it is, not its name. A video is read by PyAV, that is FFmpeg, an image by Pillow. What
cannot be read raises a MediaError: "PATH: reason", in one line; there is never an empty frame, nor one of another time.
Not here: which frames a model sees, and its pixels (video.py). docs/data.md lists what is read, and how exactly.

    pytest tests/test_files.py tests/test_files_images.py
"""
import os
import queue
import struct
import threading
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError

from infra.containers import MediaError, choose_frames, decode_errors, read_video

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}  # .gif: see read_gif
IMAGE_ERRORS = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError)
GIF_LIMIT = 3e8  # pixels in all frames together
TIME_LIMIT = 60  # seconds; a file that takes longer to decode counts as damaged
FOLDER_FPS = 3   # frames per second of a folder of frames: TVQA's, the only one in MVBench

# ------------------------------------------------------------------------------------------------------------- any kind

def read_media(path, select, as_image=False, limit=TIME_LIMIT, fps=None, start=None, end=None):
    """-> frames (T, 3, H, W) uint8 and their seconds, of a video, an image (T = 1) or a folder of frames.

    select(first, last, fps) -> numbers of the frames to read, of those from first to last, which are on screen between
    `start` and `end` (seconds); a number outside becomes the nearest inside. None: decodes all of them, returns none.
    as_image: an image is expected, so a GIF gives its first frame. fps: of a folder. Raises MediaError, also for a
    start beyond the end, and for a video that takes more than `limit` seconds to decode."""
    check_path(path)
    if os.path.isdir(path):
        return read_folder(path, select, fps or FOLDER_FPS, start, end)
    kind = {".gif": "moving"}.get(Path(path).suffix.lower(),
                                  "still" if Path(path).suffix.lower() in IMAGE_SUFFIXES else "")
    if kind == "still" or kind and as_image:
        return read_image(path)[None], [0.0]                                             # (1, 3, H, W)
    if kind:
        return read_gif(path, select, start, end)
    reader = read_decord if os.environ.get("VIDEO_READER") == "decord" else read_video
    return with_timeout(limit, reader, path, select, start, end)

def check_path(path):
    """MediaError if there is nothing to read: no such file, an empty one, no permission, an impossible name."""
    try:
        is_empty = not os.path.isdir(path) and os.stat(path).st_size == 0
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:                     # ValueError: a null byte, or half a character
        raise MediaError(f"{str(path)!a:.200}: {getattr(error, 'strerror', None) or error}") from None
    if is_empty:
        raise MediaError(f"{path}: the file is empty")

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
        thread.is_abandoned = True                             # decode() sees it and stops, unless it hangs
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

def read_decord(path, select, start=None, end=None):
    """By decord, as older versions did: exact for H.264, VP9 and AV1 in MP4 and WebM, without an edit list."""
    import decord
    decord.logging.set_level(decord.logging.QUIET)
    with decode_errors(path, "a video", RuntimeError, decord.DECORDError):
        reader = decord.VideoReader(str(path), num_threads=1)  # more threads break on some webm files (decord #246)
        if len(reader) == 0:
            raise MediaError(f"{path}: the video has no frames")
        fps = reader.get_avg_fps() if reader.get_avg_fps() > 0 else 1.0
        times = [i / fps for i in range(len(reader))]
        positions, seconds = choose_frames(path, select, times, fps, start, end)
        frames = reader.get_batch(positions.tolist()).asnumpy()                                   # (T, H, W, 3)
    return torch.from_numpy(frames).permute(0, 3, 1, 2), seconds                         # (T, 3, H, W)

# --------------------------------------------------------------------------------------------------- images and folders

def read_gif(path, select, start=None, end=None):
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

def read_folder(path, select, fps=3, start=None, end=None):
    path=Path(path)
    last = len(list(path.glob("*.jpg")))
    if last == 0:
        raise MediaError(f"{path}: the folder has no frames (00001.jpg ...)")
    indices = np.clip(select(1, last, FOLDER_FPS), 1, last).tolist()
    missing = [i for i in indices if not (path / f"{i:05d}.jpg").is_file()]
    if missing:
        raise MediaError(f"{path}: the folder of {last} frames lacks {missing[0]:05d}.jpg")
    frames = [read_image(path / f"{i:05d}.jpg") for i in indices]
    return torch.stack(frames), [(i - 1) / FOLDER_FPS for i in indices]                  # (T, 3, H, W)
