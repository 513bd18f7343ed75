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
from bisect import bisect_left, bisect_right
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}  # .gif: see read_gif
IMAGE_ERRORS = (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError)
GIF_LIMIT = 3e8  # pixels in all frames together
TIME_LIMIT = 60  # seconds; a file that takes longer to decode counts as damaged
FOLDER_FPS = 3   # frames per second of a folder of frames: TVQA's, the only one in MVBench

class SampleError(ValueError):
    """What is wrong with one sample: "path: reason", in one line."""
    def __str__(self):
        # subtle: an error from a loader process arrives with its traceback in front of the message
        message = super().__str__().strip().split("\n")[-1]
        return message.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: ")

class MediaError(SampleError):
    """A video, image or folder of frames that cannot be read."""

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
        if not os.path.isdir(path) and os.stat(path).st_size == 0:
            raise MediaError(f"{path}: the file is empty")
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:                     # ValueError: a null byte, or half a character
        raise MediaError(f"{str(path)!a:.200}: {getattr(error, 'strerror', None) or error}") from None

def choose_frames(path, select, times, fps, start=None, end=None, first=0):
    """-> positions in `times` of the frames to read, and their seconds. MediaError for a start beyond the end.

    times: seconds at which each frame appears; first: the number of the first frame. Where frames come at an equal
    rate, seconds times fps give their numbers, as in the official code. Elsewhere their own times decide which are on
    screen between start and end: in a phone's video, whose rate varies, frame 60 may be at second 2 or 6."""
    times, regular = np.asarray(times, float), np.arange(len(times)) / fps               # (n,) each
    is_regular = (np.abs(times - regular) < 0.5 / fps).all()
    times = regular if is_regular else times

    # the frames on screen between start and end
    low, high, stop = 0, len(times) - 1, times[-1] + 1 / fps
    if start is not None:
        if start >= stop:
            raise MediaError(f"{path}: start {start:g} s is beyond its end ({stop:.1f} s)")
        low = int(start * fps) if is_regular else int(np.searchsorted(times, start, "right")) - 1
        low = min(max(low, 0), high)
    if end is not None:
        last = low + (end - (start or 0)) * fps - 1 if is_regular else np.searchsorted(times, end) - 1
        high = int(min(max(last, low), high))

    # a number outside becomes the nearest inside
    numbers = range(low, high + 1) if select is None else np.array(select(low + first, high + first, fps)) - first
    positions = np.clip(numbers, low, high)
    return positions, times[positions].tolist()

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

@contextmanager
def decode_errors(path, kind, *errors):
    """These errors of a decoder become a MediaError."""
    try:
        yield
    except MediaError:
        raise
    except errors as error:
        raise MediaError(f"{path}: cannot be decoded as {kind}") from error

# --------------------------------------------------------------------------------------------------------------- videos

@contextmanager
def open_video(path):
    """-> container and video stream of a file. MediaError says why there is none."""
    try:
        container = av.open(f"file:{path}")                    # without "file:", a name with a colon is an address
    except (av.FFmpegError, ValueError) as error:
        with open(path, "rb") as f:
            is_mp4 = f.read(8)[4:] == b"ftyp"
        reason = "torn: its index (moov) is missing or damaged" if is_mp4 else "cannot be decoded as a video"
        raise MediaError(f"{path}: {reason}") from error
    with container:
        stream = container.streams.best("video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:    # a song and its cover
            raise MediaError(f"{path}: no video stream" + ", audio only" * bool(container.streams.audio))
        if stream.codec_context is None:
            raise MediaError(f"{path}: FFmpeg has no decoder for its video")
        stream.codec_context.thread_count = 1                  # the loader has a process for each core
        yield container, stream

def demux(container, stream):
    """The packets of a stream, in the file's order, and at the end an empty one."""
    try:
        yield from container.demux(stream)
    except IndexError:                                         # PyAV: another stream began in the middle of the file
        return

def has_time_index(container):
    """Whether it is MP4 or Matroska, whose time stamps are those of a player, from 0 on, and which seek by them."""
    return container.format.name.startswith(("mov", "matroska"))

class TimeStampError(Exception):
    """The decoder's frames are not those that the container announces."""

def read_video(path, select, start=None, end=None):
    """The frames that a player shows, upright, numbered in the order in which it shows them.

    The packets' time stamps say which frames there are, and only what is needed is decoded. Where the decoder gives
    other frames (AVI with packed B-frames, pieces of a broadcast), all is decoded: once to count, once to read."""
    with decode_errors(path, "a video", av.FFmpegError):
        try:
            with open_video(path) as video:
                return take_frames(path, *video, *list_packets(path, *video), select, start, end)
        except TimeStampError:
            with open_video(path) as video:
                stamps = [frame.pts for frame in decode(path, *video)]
            with open_video(path) as video:
                return take_frames(path, *video, stamps, None, select, start, end)

def list_packets(path, container, stream):
    """-> time stamps of the frames that are shown, ascending; {time stamp of a key frame: where to seek for it}."""
    # a palette may have changed in what a seek passes over
    if stream.format and stream.format.has_palette:
        raise TimeStampError

    # an edit list hides frames at both ends, which others may be decoded from; VP8 hides frames that only serve others
    is_vp8, has_index, shown, keys, n = stream.codec.name == "vp8", has_time_index(container), [], {}, 0
    for packet in demux(container, stream):
        n += packet.size > 0
        if packet.is_keyframe:
            keys[packet.pts] = packet.pts if has_index or packet.dts is None else packet.dts
        if packet.size and keys and not packet.is_discard and not (is_vp8 and not memoryview(packet)[0] & 16):
            shown.append(packet.pts)
    if not shown or None in shown or None in keys or len(set(shown)) < len(shown):
        raise TimeStampError

    # MP4 lists all packets at its beginning or end, so it shows when some are missing
    if container.format.name.startswith("mov") and len(stream.index_entries) > n:
        raise MediaError(f"{path}: torn: {n} of {len(stream.index_entries)} frames are there")
    first = min(keys)                                          # what comes before the first key frame is lost
    return sorted(stamp for stamp in shown if stamp >= first), keys

def decode(path, container, stream, needed=None):
    """Yields the decoder's frames. needed: time stamps; frames that are not among them and serve no other are left out.
    """
    has_key, damaged = False, None                             # damaged: time stamp of the first bad packet
    for packet in demux(container, stream):
        has_key |= packet.is_keyframe
        if needed is not None:
            is_needed = packet.pts is None or packet.pts in needed
            stream.codec_context.skip_frame = "DEFAULT" if is_needed else "NONREF"
        try:
            frames = packet.decode()
        except av.FFmpegError:
            # a piece of a broadcast begins before a key frame, and cannot be decoded there; a torn file ends badly
            damaged, frames = packet.pts or 0 if has_key and damaged is None else damaged, []
        for frame in frames:
            if damaged is not None and (frame.pts is None or frame.pts > damaged):
                raise MediaError(f"{path}: damaged at {float(damaged * stream.time_base):.1f} s")
            yield frame
        if getattr(threading.current_thread(), "is_abandoned", False):                   # by with_timeout
            return

def decode_needed(path, container, stream, stamps, keys, needed):
    """Yields (position, frame) for these positions in `stamps`, ascending. keys None: decodes all, from the first."""
    if keys is None:
        frames, needed = enumerate(decode(path, container, stream)), set(needed)
        yield from islice(((i, frame) for i, frame in frames if i in needed), len(needed))
        return

    # B-frames that serve no other are half of what there is to decode; elsewhere each frame shows that none is missing
    skips = has_time_index(container) and stream.codec.name in ("h264", "hevc")
    only, positions = {stamps[p] for p in needed} if skips else None, {stamp: i for i, stamp in enumerate(stamps)}
    frames, position, key_stamps = None, -1, sorted(keys)
    for p in needed:
        # from the last key frame before it, if that is not decoded already
        key = key_stamps[bisect_right(key_stamps, stamps[p]) - 1]
        if frames is None or key > stamps[position + 1]:
            container.seek(keys[key], stream=stream)
            frames, position = decode(path, container, stream, only), bisect_left(stamps, key) - 1

        # subtle: frames that come after a key frame but are shown before it lack what they are made from: passed over
        while position < p:
            frame = next(frames, None)
            new = positions.get(frame.pts, len(stamps)) if frame else len(stamps)
            if new > (p if skips else position + 1):
                raise TimeStampError
            position = max(position, new)
        yield p, frame

def take_frames(path, container, stream, stamps, keys, select, start, end):
    """-> frames (T, 3, H, W), their seconds. stamps, keys: of list_packets; or of all decoded frames, and None."""
    times, fps = frame_times(path, container, stream, stamps)
    positions, seconds = choose_frames(path, select, times, fps, start, end)
    frames, graph, source, size = None, None, None, None
    for p, frame in decode_needed(path, container, stream, stamps, keys, np.unique(positions).tolist()):
        if frame.is_corrupt:
            raise MediaError(f"{path}: damaged at {times[p]:.1f} s")
        if select is None:
            continue

        # to RGB; where the picture changes its size, as large as the first. A palette may change, too
        if source != (source := (frame.width, frame.height, frame.format.name)) or frame.format.has_palette:
            size = size or source[:2]
            graph = rgb_graph(stream, frame, *size)
        graph.push(frame)
        picture = np.rot90(graph.pull().to_ndarray(), frame.rotation // 90)              # (H, W, 3), upright
        if frames is None:
            frames = np.empty((len(positions), *picture.shape), np.uint8)                # (T, H, W, 3)
        frames[positions == p] = picture

    # subtle: channels stay last in memory, as they came; resize is fastest on them
    return None if select is None else torch.from_numpy(frames).permute(0, 3, 1, 2), seconds  # (T, 3, H, W)

def rgb_graph(stream, frame, width, height):
    """A filter that makes frames like this one RGB pictures of width x height, as FFmpeg itself does."""
    graph = av.filter.Graph()
    graph.threads = 1
    source = graph.add_buffer(stream, frame.width, frame.height, frame.format)
    graph.link_nodes(source, graph.add("scale", f"{width}:{height}"), graph.add("format", "rgb24"),
                     graph.add("buffersink")).configure()
    return graph

def frame_times(path, container, stream, stamps):
    """-> seconds at which each frame appears, frames per second in the mean."""
    n, unit, rate = len(stamps), float(stream.time_base), float(stream.average_rate or 0)
    if n == 0:
        raise MediaError(f"{path}: the video has no frames")
    if None in stamps or any(a >= b for a, b in pairwise(stamps)):                       # a raw stream has no times
        stamps, unit = range(n), 1 / (rate or 25)

    # seconds count from the first frame, unless the video begins late, after a pause that an edit list makes
    begin = 0 if has_time_index(container) else (container.start_time or 0) / 1e6
    delay = stamps[0] * unit - begin
    times = [(stamp - stamps[0]) * unit + (delay if delay > 0.5 else 0) for stamp in stamps]

    # the container's average rate, unless it is missing or absurd
    mean_rate = (n - 1) / (times[-1] - times[0]) if n > 1 else rate or 1.0
    return times, rate if mean_rate / 2 < rate < mean_rate * 2 else mean_rate

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
