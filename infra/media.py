"""A path -> frames and their seconds, as a player shows them: videos, images, moving images, folders of frames.

    read_media("kite.mp4", lambda first, last, fps: [first, last]) -> (2, 3, H, W) uint8, [0.0, 9.97]

The content of a file says what it is, not its name. A video is read by PyAV, that is FFmpeg, an image by Pillow. What
cannot be read raises a MediaError: "PATH: reason", in one line; there is never an empty frame, nor one of another time.
Not here: which frames a model sees, and its pixels (video.py). docs/data.md lists what is read, and how exactly.

    pytest tests/test_files.py tests/test_files_images.py
"""
import os
import queue
import re
import threading
import warnings
from contextlib import contextmanager, suppress
from itertools import pairwise

import numpy as np
import torch
from PIL import ExifTags, Image, ImageSequence, UnidentifiedImageError

from infra.containers import MediaError, choose_frames, decode_errors, read_video

# what Pillow identifies as pictures, without its stubs of videos and documents (MPEG, EPS, WMF, HDF5 ...)
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "ICO", "QOI", "PSD")
FRAME_NAME = re.compile(r"(?!\.).*?([0-9]+)[^0-9]*\.(jpe?g|jfif|png|bmp|webp|tiff?|avif|heic)", re.IGNORECASE)
UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation: Pillow's Transpose that turns it upright
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
    image = None if as_image else open_image(path, required=False)
    if image and (image.format == "GIF" or image.format in ("PNG", "WEBP", "AVIF") and image.is_animated):
        return read_animation(path, image, select, start, end)
    if image or as_image:
        return read_image(path, image)[None], [0.0]                                      # (1, 3, H, W)
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
        frames = reader.get_batch(positions.tolist()).asnumpy()                          # (T, H, W, 3)
    return torch.from_numpy(frames).permute(0, 3, 1, 2), seconds                         # (T, 3, H, W)

# --------------------------------------------------------------------------------------------------- images and folders

@contextmanager
def image_errors(path):
    """Whatever Pillow raises becomes a MediaError; its warnings are not shown."""
    with decode_errors(path, "an image", Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

def open_image(path, required=True):
    """A Pillow image, not decoded yet, whatever the file's name; for other content MediaError, or None."""
    Image.init()
    with image_errors(path):
        try:
            image = Image.open(path, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN])
        except UnidentifiedImageError:
            # subtle: FFmpeg would read the tiles of a HEIC photo as frames, and pieces of a torn AVIF
            with open(path, "rb") as file:
                brand = re.match(b"....ftyp(hei[cxms]|hev[cx]|mif1|msf1|avi[fs])", file.read(12), re.DOTALL)
            if brand and brand[1][:3] != b"avi" and "HEIF" not in Image.OPEN:
                register_heif(path)
                return open_image(path, required)
            if required or brand:
                raise
            return None
        if required or image.format != "JPEG" or not is_motion_jpeg(path):
            return image
        image.close()

def register_heif(path):
    """Lets Pillow read HEIC photos; MediaError if the package that does is missing."""
    try:
        import pillow_heif
    except ImportError:
        raise MediaError(f"{path}: a HEIC photo, which needs: pip install pillow-heif") from None
    pillow_heif.register_heif_opener()

def is_motion_jpeg(path):
    """Whether another picture follows the first at once, as in a camera's stream. A thumbnail is inside of it."""
    with open(path, "rb") as file:
        return b"\xff\xd9\xff\xd8" in file.read()

def to_rgb(image):
    """A Pillow image of any mode -> RGB, its transparency dropped, as the official code does. Files do not say what is
    white among 32-bit greys: it is the least usual value that they do not exceed by far (floats overshoot)."""
    if image.mode[0] in "IF":
        grey = np.nan_to_num(np.asarray(image), posinf=0, neginf=0)                      # (H, W)
        usual = {"u": (65535,), "i": (255, 65535), "f": (1, 255, 65535)[:2 + (grey.max() > 30_000)]}[grey.dtype.kind]
        white = next((white for white in usual if grey.max() <= 2 * white), grey.max())
        image = Image.fromarray((grey * np.float32(255 / white)).round().clip(0, 255).astype(np.uint8))
    return image.convert("RGB")

def read_image(path, image=None):
    """(3, H, W) uint8 of any kind of image, upright: of the first, if the file holds several."""
    with image_errors(path), image or open_image(path) as image:
        rgb, orientation = to_rgb(image), None
        with suppress(Exception):                # of damaged EXIF; subtle: a PNG may have it after the pixels
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        pixels = np.array(rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb)    # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)                                     # (3, H, W)

def read_animation(path, image, select, start=None, end=None):
    """By Pillow, GIFs in half of decord's time; so does the official code (mvbench.ipynb, read_gif)."""
    frames, times = [], [0.0]                    # of each frame in seconds, and of the end
    with image_errors(path), image:
        # each frame builds on those before it, so all are decoded; a PNG's first may be for other readers only
        iterator = ImageSequence.Iterator(image)
        iterator.position += getattr(image, "default_image", False)
        for frame in iterator:
            frames.append(to_rgb(frame))
            if len(frames) * frame.width * frame.height > GIF_LIMIT:
                raise MediaError(f"{path}: more than {GIF_LIMIT:,.0f} pixels in all frames: make it a video")
            delay = image.info.get("duration", 0) / 1000
            times.append(times[-1] + (delay if delay > 0.01 else 0.1))                   # as browsers and FFmpeg do

        # a torn file is a fault, and Pillow says so, unless a GIF ends between two frames: then it lacks its ";"
        if image.format == "GIF":
            image.fp.seek(-1, 1)
            if image.fp.read(1) != b";":
                raise MediaError(f"{path}: the file ends too early, after {len(frames)} frames")

    fps = len(frames) / times[-1] if len(frames) > 1 else 1.0
    last_seconds = times[-1] - times[-2]
    positions, seconds = choose_frames(path, select, times[:-1], fps, start, end, last_seconds=last_seconds)
    if select is None:
        return None, seconds
    selected = torch.from_numpy(np.stack([np.asarray(frames[p]) for p in positions]))    # (T, H, W, 3)
    return selected.permute(0, 3, 1, 2), seconds                                         # (T, 3, H, W)

def read_folder(path, select, fps, start=None, end=None):
    """Pictures that are numbered in equal steps. `select` counts them from 0 if they start at 0, else from 1."""
    with decode_errors(path, "a folder of frames", OSError):
        matches = (FRAME_NAME.fullmatch(name) for name in os.listdir(path))
    files = sorted((int(match[1]), match[0]) for match in matches if match)
    if not files:
        raise MediaError(f"{path}: the folder has no frames (00001.jpg ...)")
    step = min((b - a for (a, _), (b, _) in pairwise(files) if a < b), default=1)
    for (a, name), (b, next_name) in pairwise(files):
        if a == b:
            raise MediaError(f"{path}: {name} and {next_name} have the same number: keep one of them")
        if b - a != step:
            raise MediaError(f"{path}: the frames are numbered in steps of {step}, but {name} precedes {next_name}")

    # each file once, even if it is selected twice
    times, first = [i / fps for i in range(len(files))], min(files[0][0] // step, 1)
    positions, seconds = choose_frames(path, select, times, fps, start, end, first)
    frames, sizes = {}, set()
    for p in np.unique(positions).tolist():
        frame = read_image(os.path.join(path, files[p][1]))                              # (3, H, W)
        sizes.add(" x ".join(map(str, frame.shape[:0:-1])))
        frames[p] = frame if select else None
    if len(sizes) > 1:
        raise MediaError(f"{path}: the frames are of different sizes, {' and '.join(sorted(sizes)[:2])}")
    return torch.stack([frames[p] for p in positions.tolist()]) if select else None, seconds     # (T, 3, H, W)
