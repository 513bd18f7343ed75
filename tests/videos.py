"""Real encoded videos for the tests: every frame has its number painted into it.

    write_video(path, "libx264", 60, bf=2)      number(frame) -> 17

The number is in ten bars, black for 0 and white for 1, which survive compression. FORMATS is the table of docs/data.md:

    python tests/videos.py                      # reads each of them by PyAV and by decord: how exactly, how fast
"""
import statistics
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 10
CASES = Path(__file__).parent / "cases"         # README.md there says what is right for each
X265 = "log-level=none:keyint=30:bframes=2:open-gop="
UNEVEN = [sum(40 + 60 * (k % 5 == 0) + 7 * (k % 3) for k in range(i)) for i in range(90)]  # milliseconds of 90 frames

# container and codec as people have them -> how write_video makes one
FORMATS = {
    "MP4 H.264, B-frames": ("a.mp4", dict(codec="libx264", g=30, bf=2)),
    "MP4 H.264, one key frame": ("a.mp4", dict(codec="libx264", g=1000, bf=2)),
    "MP4 H.264, open GOP": ("a.mp4", {"codec": "libx264", "g": 30, "bf": 3, "x264-params": "open-gop=1"}),
    "MP4 H.264, B-pyramid": ("a.mp4", {"codec": "libx264", "x264-params": "bframes=8:b-adapt=2:b-pyramid=normal"}),
    "MP4 H.264, interlaced": ("a.mp4", {"codec": "libx264", "g": 30, "x264-params": "interlaced=1"}),
    "MP4 H.264, intra refresh": ("a.mp4", {"codec": "libx264", "g": 30, "x264-params": "intra-refresh=1"}),
    "MP4 H.264, 10 bits": ("a.mp4", dict(codec="libx264", pix_fmt="yuv420p10le", g=30)),
    "MP4 H.264, beginning cut off by an edit list": ("a.mp4", dict(codec="libx264", g=30, bf=2, trim=17)),
    "MP4 H.264, fragments": ("a.mp4", dict(codec="libx264", g=30, movflags="frag_keyframe+empty_moov")),
    "MP4 H.264, variable rate": ("a.mp4", dict(codec="libx264", g=30, bf=2, times=UNEVEN)),
    "MP4 H.264, 29.97 per second": ("a.mp4", dict(codec="libx264", g=30, bf=2, rate=Fraction(30000, 1001))),
    "MOV H.264, B-frames": ("a.mov", dict(codec="libx264", g=30, bf=2)),
    "MKV H.264, B-frames": ("a.mkv", dict(codec="libx264", g=30, bf=2)),
    "MKV H.264, variable rate": ("a.mkv", dict(codec="libx264", g=30, bf=2, times=UNEVEN)),
    "TS H.264, B-frames": ("a.ts", dict(codec="libx264", g=30, bf=2)),
    "FLV H.264, B-frames": ("a.flv", dict(codec="libx264", g=30, bf=2)),
    "AVI H.264, B-frames": ("a.avi", dict(codec="libx264", g=30, bf=2)),
    "raw H.264": ("a.h264", dict(codec="libx264", g=30, bf=2)),
    "MP4 H.265, closed GOP": ("a.mp4", {"codec": "libx265", "x265-params": X265 + "0"}),
    "MP4 H.265, open GOP": ("a.mp4", {"codec": "libx265", "x265-params": X265 + "1"}),
    "MKV H.265, open GOP": ("a.mkv", {"codec": "libx265", "x265-params": X265 + "1"}),
    "TS H.265, open GOP": ("a.ts", {"codec": "libx265", "x265-params": X265 + "1"}),
    "MP4 AV1": ("a.mp4", dict(codec="libsvtav1", preset=8, crf=20, g=30)),
    "WebM VP8": ("a.webm", dict(codec="libvpx", g=30, deadline="realtime")),
    "WebM VP8, hidden frames": ("a.webm", {"codec": "libvpx", "auto-alt-ref": 1, "lag-in-frames": 16, "b": "200k"}),
    "WebM VP9": ("a.webm", dict(codec="libvpx-vp9", g=30, deadline="realtime")),
    "WebM VP9, variable rate": ("a.webm", dict(codec="libvpx-vp9", g=30, deadline="realtime", times=UNEVEN)),
    "AVI MPEG-4 (Xvid, DivX), B-frames": ("a.avi", dict(codec="mpeg4", g=25, bf=2)),
    "MP4 MPEG-4, B-frames": ("a.mp4", dict(codec="mpeg4", g=25, bf=2)),
    "MKV MPEG-4": ("a.mkv", dict(codec="mpeg4", g=25)),
    "AVI MS MPEG-4": ("a.avi", dict(codec="msmpeg4")),
    "MPG MPEG-1, B-frames": ("a.mpg", dict(codec="mpeg1video", g=15, bf=2)),
    "VOB MPEG-2, B-frames": ("a.vob", dict(codec="mpeg2video", g=15, bf=2)),
    "TS MPEG-2, B-frames": ("a.ts", dict(codec="mpeg2video", g=15, bf=2)),
    "WMV WMV2": ("a.wmv", dict(codec="wmv2", g=12)),
    "FLV Sorenson": ("a.flv", dict(codec="flv1", g=12)),
    "AVI Motion JPEG": ("a.avi", dict(codec="mjpeg", pix_fmt="yuvj420p")),
    "AVI HuffYUV": ("a.avi", dict(codec="huffyuv", pix_fmt="yuv422p")),
    "MKV FFV1": ("a.mkv", dict(codec="ffv1")),
    "MOV ProRes": ("a.mov", dict(codec="prores_ks", pix_fmt="yuv422p10le")),
    "MOV QuickTime Animation": ("a.mov", dict(codec="qtrle", pix_fmt="rgb24")),
}

def painted(i, width=320, height=240):
    """Frame i: (height, width, 3) uint8."""
    image = np.full((height, width, 3), 128, np.uint8)
    bar = width // BITS
    for bit in range(BITS):
        image[:height // 2, bit * bar:(bit + 1) * bar] = 255 * (i >> bit & 1)
    x = 5 * i % (width - 20)
    image[height // 2:, x:x + 20] = 255, 30, 30                            # something that moves, for the encoder to do
    return image

def number(frame):
    """The number painted into a frame (height, width, 3)."""
    height, width, _ = frame.shape
    bar = width // BITS
    rows, middle = slice(height // 8, height * 3 // 8), (bar // 4, bar * 3 // 4)
    return sum(int(frame[rows, bit * bar + middle[0]:bit * bar + middle[1]].mean() > 128) << bit for bit in range(BITS))

def case_number(frame):
    """The number in a frame (height, width, 3) of tests/cases, whose bars are in the middle."""
    height, width, _ = frame.shape
    bar, rows = width // BITS, slice(height * 7 // 16, height * 9 // 16)
    return sum(int(frame[rows, b * bar + bar // 4:b * bar + bar // 2 + 1].mean() > 128) << b for b in range(BITS))

def write_video(path, codec="libx264", frames=60, width=320, height=240, rate=25, times=None, pix_fmt="yuv420p", trim=0,
                movflags="", **options):
    """Encodes frames 0, 1, ...; times: of each, in milliseconds, for a variable frame rate. trim: the frames at the
    beginning that an edit list hides."""
    path.parent.mkdir(parents=True, exist_ok=True)
    container_options = {"movflags": movflags} if movflags else {}
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=rate, options={name: str(value) for name, value in options.items()})
        stream.width, stream.height = width, height
        stream.pix_fmt = "rgb8" if codec == "gif" else pix_fmt
        if times:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(painted(i, width, height), format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt)
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            elif trim:
                frame.pts, frame.time_base = i - trim, 1 / Fraction(rate)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path

def compare_readers(folder, frames=240, width=320, height=240):
    """Prints a row for each of FORMATS: what each reader makes of it. Sparse: 16 frames of all; dense: 64 in a row."""
    from infra.media import MediaError, read_decord, read_video
    print("| format | PyAV | decord | sparse, ms | dense, ms |\n|---|---|---|---|---|")
    for name, (file, options) in FORMATS.items():
        path = folder / file
        times = options.get("times") and [1000 * i // 25 + 15 * (i % 3) for i in range(frames)]
        write_video(path, **{**options, "frames": frames, "width": width, "height": height, "times": times})
        first = options.get("trim", 0)
        selections = ([int((i + 0.5) * (frames - first) / 16) for i in range(16)],
                      list(range((frames - first) // 2, (frames - first) // 2 + 64)))
        words, seconds = {}, {}
        for reader in (read_video, read_decord):
            wrong, problem = 0, ""
            for indices in (*selections, list(range(frames - first))):
                try:
                    clip, _ = reader(path, lambda first, last, fps, indices=indices: indices)
                    numbers = [number(frame.permute(1, 2, 0).numpy()) for frame in clip]
                    wrong += sum(n != first + i for n, i in zip(numbers, indices, strict=True))
                except MediaError:
                    problem = "refused"
            words[reader] = problem or (f"{wrong} of {80 + frames - first} wrong" if wrong else "exact")
        for selection in selections:                                       # paired: one after the other, five times
            for reader in (*[read_video, read_decord] * 5,):
                start = time.perf_counter()
                try:
                    reader(path, lambda first, last, fps, selection=selection: selection)
                except MediaError:
                    continue
                seconds.setdefault((reader, len(selection)), []).append(time.perf_counter() - start)
        cells = [" / ".join(f"{1000 * statistics.median(seconds[reader, n]):.1f}" if (reader, n) in seconds else "-"
                            for reader in (read_video, read_decord)) for n in (16, 64)]
        print(f"| {name} | {words[read_video]} | {words[read_decord]} | {cells[0]} | {cells[1]} |", flush=True)

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    with tempfile.TemporaryDirectory() as scratch:
        compare_readers(Path(scratch))
