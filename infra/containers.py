"""A video file -> the frames that a player shows, upright, and their seconds; by PyAV, that is FFmpeg.

    packets    time stamps, key frames, edit lists                    which frames there are, without decoding
    frames     decoded from the last key frame before each            and checked against the packets' time stamps
    pictures   RGB, rotated as the container says

Not here: which file is a video, images, folders (media.py); which frames a model sees (video.py). docs/data.md has the
table of formats that all of this is measured on.

    pytest tests/test_files.py
"""
import statistics
import threading
from bisect import bisect_left, bisect_right
from contextlib import contextmanager
from itertools import pairwise

import av
import numpy as np
import torch
from av.video.frame import PictureType

PIXEL_LIMIT = 6e8  # in all frames that are read: 1.8 GB; 16 frames of 8K are just within it

class SampleError(ValueError):
    """What is wrong with one sample: "path: reason", in one line."""
    def __str__(self):
        # subtle: an error from a loader process arrives with its traceback in front of the message
        message = super().__str__().strip().split("\n")[-1]
        return message.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: ")

class MediaError(SampleError):
    """A video, image or folder of frames that cannot be read."""

@contextmanager
def decode_errors(path, kind, *errors):
    """These errors of a decoder become a MediaError."""
    try:
        yield
    except MediaError:
        raise
    except errors as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error) or repr(error)).split())
        raise MediaError(f"{path}: cannot be decoded as {kind}: {reason}") from error

def choose_frames(path, select, times, fps, start=None, end=None, first=0, last_seconds=0.0):
    """-> positions in `times` of the frames to read, and their seconds. MediaError for a start beyond the end.

    times: seconds at which each frame appears; first: the number of the first frame; last_seconds: how long the last
    is shown. Where frames come at an equal rate, seconds times fps give their numbers, as in the official code.
    Elsewhere their own times decide which are on screen between start and end: in a phone's video, whose rate varies,
    frame 60 may be at second 2 or 6."""
    times, regular = np.asarray(times, float), np.arange(len(times)) / fps               # (n,) each
    is_regular = (np.abs(times - regular) < 0.5 / fps).all()
    times = regular if is_regular else times

    # the frames on screen between start and end
    low, high, stop = 0, len(times) - 1, times[-1] + max(1 / fps, last_seconds)
    if start is not None:
        if start >= stop:
            raise MediaError(f"{path}: start {start:g} s is beyond its end ({stop:.1f} s)")
        low = int(start * fps) if is_regular else int(np.searchsorted(times, start, "right")) - 1
        low = min(max(low, 0), high)
    if end is not None:
        last = low + (end - (start or 0)) * fps - 1 if is_regular else np.searchsorted(times, end) - 1
        high = int(min(max(last, low), high))

    # a number outside becomes the nearest inside
    numbers = range(low + first, high + first + 1) if select is None else select(low + first, high + first, fps)
    positions = np.array([min(max(n - first, low), high) for n in numbers])
    return positions, times[positions].tolist()

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

    # a song has the picture of its cover; FFmpeg would draw the letters of a text
    with container:
        stream = container.streams.best("video")
        if container.format.name == "tty":
            raise MediaError(f"{path}: a text, not a video")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
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
    with decode_errors(path, "a video", av.FFmpegError, MemoryError):
        try:
            with open_video(path) as video:
                return take_frames(path, *video, *list_packets(path, *video), select, start, end)
        except TimeStampError:
            with open_video(path) as video:
                shown = [(frame.pts, frame.duration) for frame in decode(path, *video)]
            with open_video(path) as video:
                return take_frames(path, *video, shown, None, select, start, end)

def list_packets(path, container, stream):
    """-> (time stamp, duration) of the frames that are shown, ascending; {key frame's stamp: where to seek for it}."""
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
            shown.append((packet.pts, packet.duration))
    stamps = {stamp for stamp, _ in shown}
    if not shown or None in stamps or None in keys or len(stamps) < len(shown):
        raise TimeStampError

    # MP4 lists all packets at its beginning or end, so it shows when some are missing
    if container.format.name.startswith("mov") and len(stream.index_entries) > n:
        raise MediaError(f"{path}: torn: {n} of {len(stream.index_entries)} frames are there")
    first = min(keys)                                          # what comes before the first key frame is lost
    return sorted((stamp, duration) for stamp, duration in shown if stamp >= first), keys

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
                raise MediaError(f"{path}: damaged at {max(0.0, float(damaged * stream.time_base)):.1f} s")
            yield frame
        if getattr(threading.current_thread(), "is_abandoned", False):                   # by with_timeout
            return

def decode_needed(path, container, stream, stamps, keys, needed):
    """Yields (position, frame) for these positions in `stamps`, ascending. keys None: decodes all, from the first."""
    if keys is None:
        missing = set(needed)
        for i, frame in enumerate(decode(path, container, stream)):
            if i in missing:
                yield i, frame
                missing.remove(i)
            if not missing:
                return
        raise MediaError(f"{path}: damaged before frame {min(missing)}")

    # B-frames that serve no other are half of what there is to decode; elsewhere each frame shows that none is missing
    skips = has_time_index(container) and stream.codec.name in ("h264", "hevc")
    only, positions = {stamps[p] for p in needed} if skips else None, {stamp: i for i, stamp in enumerate(stamps)}
    frames, position, key_stamps = None, -1, sorted(keys)
    for p in needed:
        # from the last key frame before it, if that is not decoded already
        key = key_stamps[bisect_right(key_stamps, stamps[p]) - 1]
        if must_seek := frames is None or key > stamps[position + 1]:
            container.seek(keys[key], stream=stream)
            frames, position = decode(path, container, stream, only), bisect_left(stamps, key) - 1

        # subtle: frames that come after a key frame but are shown before it lack what they are made from: passed over.
        # The key frame itself must come next, and be one: in streams that refresh the picture part by part, it is not
        limit = p if skips and not (must_seek and key in positions) else position + 1
        while position < p:
            frame = next(frames, None)
            new = positions.get(frame.pts, len(stamps)) if frame else len(stamps)
            if new > limit or frame.pts == key and frame.pict_type in (PictureType.P, PictureType.B):
                raise TimeStampError
            if new > position:
                position, limit = new, p if skips else new + 1
        yield p, frame

def take_frames(path, container, stream, shown, keys, select, start, end):
    """-> frames (T, 3, H, W), their seconds. shown, keys: of list_packets; or of all decoded frames, and None."""
    if not shown:
        raise MediaError(f"{path}: the video has no frames")
    stamps, last_seconds = [stamp for stamp, _ in shown], float((shown[-1][1] or 0) * stream.time_base)
    times, fps = frame_times(container, stream, stamps)
    positions, seconds = choose_frames(path, select, times, fps, start, end, last_seconds=last_seconds)
    frames, graph, source, size = None, None, None, None
    for p, frame in decode_needed(path, container, stream, stamps, keys, np.unique(positions).tolist()):
        if frame.is_corrupt:
            raise MediaError(f"{path}: damaged at {times[p]:.1f} s")
        if select is None:
            continue

        # to RGB; where the picture changes its size, as large as the first. A palette may change, too
        if source != (source := (frame.width, frame.height, frame.format.name)) or frame.format.has_palette:
            size = size or source[:2]
            if len(positions) * size[0] * size[1] > PIXEL_LIMIT:
                raise MediaError(f"{path}: {len(positions)} frames of {size[0]} x {size[1]} take too much memory: make "
                                 "the video smaller")
            graph = rgb_graph(stream, frame, *size)
        graph.push(frame)
        picture = np.rot90(graph.pull().to_ndarray(), round(frame.rotation / 90))        # (H, W, 3), upright
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

def frame_times(container, stream, stamps):
    """-> seconds at which each frame appears, frames per second in the mean."""
    # a new piece begins where time runs back by more than a decoder's reordering, as where two recordings are joined
    n, unit, rate = len(stamps), float(stream.time_base), float(stream.average_rate or 0)
    known = sorted({stamp for stamp in stamps if stamp is not None})
    step = statistics.median(b - a for a, b in pairwise(known)) * unit if len(known) > 1 else 1 / (rate or 25)
    pieces, latest = [[]], -step
    for stamp in stamps:
        time = latest + step if stamp is None else stamp * unit
        if pieces[-1] and time < latest - 1:
            pieces.append([])
        latest = max(latest, time) if pieces[-1] else time
        pieces[-1].append(time)

    # within a piece, some codecs' stamps are in the order of decoding; pieces follow each other at the usual step
    times = sorted(pieces[0])
    for piece in map(sorted, pieces[1:]):
        times += [time - piece[0] + times[-1] + step for time in piece]

    # the container's average rate, unless it is missing or absurd
    mean_rate = (n - 1) / (times[-1] - times[0]) if times[-1] > times[0] else rate or 1.0
    fps = rate if mean_rate / 2 < rate < mean_rate * 2 else mean_rate

    # seconds count from the first frame, unless the video begins late: by more than the few frames of a decoder's delay
    begin = 0 if has_time_index(container) else (container.start_time or 0) / 1e6
    delay = times[0] - begin if known and (times[0] - begin) * fps > 4 else 0
    return [time - times[0] + delay for time in times], fps
