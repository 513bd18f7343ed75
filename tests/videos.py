"""Real encoded videos for the tests: every frame has its number painted into it.

    write_video(path, "libx264", 60, bf=2)      number(frame) -> 17

The number stands in ten bars, black for 0 and white for 1, which survive compression.
"""
from fractions import Fraction

import av
import numpy as np

BITS = 10

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

def write_video(path, codec="libx264", frames=60, width=320, height=240, rate=25, times=None, **options):
    """Encodes frames 0, 1, ...; times: of each, in milliseconds, for a variable frame rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={name: str(value) for name, value in options.items()})
        stream.width, stream.height = width, height
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if times:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(painted(i, width, height), format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt)
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
