"""Images, animations and folders of frames as people have them: the right pixels at the right seconds, or one sentence.

Painted corners say whether a picture is upright, painted numbers which frame is shown (tests/cases/README.md).
Run: pytest tests/test_files_images.py
"""
import builtins
import random
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms
from videos import CASES, case_number

import video
from infra import media
from infra.media import MediaError, read_media
from video import Transform

COLOURS = {"R": (255, 0, 0), "G": (0, 255, 0), "B": (0, 0, 255), "W": (255, 255, 255), "K": (0, 0, 0)}

def every(first, last, fps):
    return range(first, last + 1)

def first_and_last(first, last, fps):
    return [first, last]

def corners(frame):
    """The colours of the corners of (3, H, W) by name: top left, top right, bottom left, bottom right."""
    _, h, w = frame.shape
    pixels = [frame[:, y, x].tolist() for y in (h // 8, h - 1 - h // 8) for x in (w // 8, w - 1 - w // 8)]
    return "".join(min(COLOURS, key=lambda name: sum(abs(a - b) for a, b in zip(COLOURS[name], pixel, strict=True)))
                   for pixel in pixels)

def number(frame):
    """The number painted into (3, H, W)."""
    return case_number(frame.permute(1, 2, 0).numpy())

def painted(i=0, width=160, height=96):
    """Quadrants RGBW, with the number i across the middle."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for k, name in enumerate("RGBW"):
        y, x = k // 2 * height // 2, k % 2 * width // 2
        pixels[y:y + height // 2, x:x + width // 2] = COLOURS[name]
    for b in range(10):
        bar = width // 10
        pixels[height * 3 // 8:height * 5 // 8, b * bar:(b + 1) * bar] = 255 * (i >> b & 1)
    return Image.fromarray(pixels)

def refusal(path, **options):
    """What read_media says about a file that it cannot read: one line that begins with its path."""
    with pytest.raises(MediaError) as caught:
        read_media(path, every, **options)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    return str(caught.value)

# ---- what a file is: its content -------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF"])
@pytest.mark.parametrize("name", ["a.jfif", "a.JPG_large", "a", "a.mp4", "a.gif", "a:b.jpg", "фото.PNG"])
def test_a_picture_is_one_whatever_its_name(tmp_path, kind, name):
    painted().save(tmp_path / name, kind)
    for as_image in (False, True):
        frames, seconds = read_media(tmp_path / name, every, as_image=as_image)
        assert frames.shape == (1, 3, 96, 160) and corners(frames[0]) == "RGBW" and seconds == [0.0]

def test_the_cases_images():
    for name, size, shown in (("exif6.jpg", (160, 96), "BRWG"), ("exif3.jpg", (96, 160), "WBGR"),
                              ("still.jfif", (96, 160), "RGBW")):
        frames, _ = read_media(CASES / "image" / name, every)
        assert frames.shape == (1, 3, *size) and corners(frames[0]) == shown
    grey = read_media(CASES / "image" / "gray16.png", every)[0][0, 0]
    assert 126 < grey.float().mean() < 129 and len(grey.unique()) == 256 and grey.min() == 0 and grey.max() == 255

@pytest.mark.parametrize("name", ["clip.gif", "clip.png", "clip.mp4", "clip"])
def test_an_animation_is_one_whatever_its_name(tmp_path, name):
    more = [painted(i) for i in range(1, 5)]
    painted(0).save(tmp_path / name, "GIF", save_all=True, append_images=more, duration=100)
    frames, seconds = read_media(tmp_path / name, every)
    assert [number(f) for f in frames] == [0, 1, 2, 3, 4] and seconds == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    frames, seconds = read_media(tmp_path / name, every, as_image=True)
    assert [number(f) for f in frames] == [0] and seconds == [0.0]

def test_a_video_is_one_whatever_its_name(tmp_path):
    for name in ("clip.gif", "clip.png", "clip.jpg", "clip"):
        (tmp_path / name).write_bytes((CASES / "video" / "plain_6s.mp4").read_bytes())
        frames, _ = read_media(tmp_path / name, lambda first, last, fps: [3, 17])
        assert [number(f) for f in frames] == [3, 17]
        assert "cannot be decoded as an image" in refusal(tmp_path / name, as_image=True)

def test_stills_of_several_pictures_are_stills(tmp_path):
    """Stereo photos (MPO) and pages of a TIFF are no animation."""
    painted(1).save(tmp_path / "a.mpo", save_all=True, append_images=[painted(2)])
    painted(1).save(tmp_path / "a.tif", save_all=True, append_images=[painted(2)])
    for name in ("a.mpo", "a.tif"):
        assert [number(f) for f in read_media(tmp_path / name, every)[0]] == [1]

@pytest.mark.parametrize("content", [
    b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', b"%PDF-1.7\n1 0 obj",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<!DOCTYPE html><html>Not found</html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", b"\x89HDF\r\n\x1a\n", b"GRIB   \2",
    b"\0\0\1\xb3\x0a\0\x60\x13\xff\xff\xe0\x18",                            # an MPEG-1 stream's head
    b"\0" * 99])
@pytest.mark.parametrize("name", ["a.jpg", "a.mp4"])
def test_other_files_are_refused_in_one_sentence(tmp_path, name, content, capfd):
    (tmp_path / name).write_bytes(content)
    assert media.open_image(tmp_path / name, required=False) is None
    assert "cannot be decoded as an image" in refusal(tmp_path / name, as_image=True)
    refusal(tmp_path / name)

def test_no_video_is_taken_for_a_picture():
    for path in (CASES / "video").iterdir():
        image = media.open_image(path, required=False)
        assert (image is not None) == (path.name == "animated.webp"), path

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 100

def test_a_heic_photo_names_the_package_that_it_needs(tmp_path, monkeypatch):
    (tmp_path / "photo.jpg").write_bytes(HEIC)
    real = builtins.__import__
    def without(name, *args):
        if name == "pillow_heif":
            raise ModuleNotFoundError(f"No module named '{name}'")
        return real(name, *args)
    monkeypatch.setattr(builtins, "__import__", without)
    for as_image in (False, True):
        assert "pillow-heif" in refusal(tmp_path / "photo.jpg", as_image=as_image)

def test_pictures_that_are_too_large_are_refused_and_large_ones_read_in_silence(tmp_path, capfd):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert "exceeds limit" in refusal(tmp_path / "bomb.png")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        media.open_image(tmp_path / "large.png").close()
    assert not shown and capfd.readouterr().err == ""

# ---- animations: true times, right pixels, nothing torn --------------------------------------------------------------

FORMATS = {"GIF": {}, "WEBP": {"lossless": True}, "PNG": {}, "AVIF": {"quality": 95}}

def animate(path, kind, durations, **options):
    """Frames 0, 1, ... shown for these milliseconds."""
    more = [painted(i) for i in range(1, len(durations))]
    painted(0).save(path, kind, save_all=True, append_images=more, duration=durations, **FORMATS[kind], **options)
    return path

@pytest.mark.parametrize("kind", FORMATS)
def test_the_seconds_of_an_animation_are_its_own(tmp_path, kind):
    durations = [100, 400, 50, 1000, 250]
    seen = []
    def select(first, last, fps):
        seen.append((first, last, fps))
        return [4, 1, 1, 99, -3]
    frames, seconds = read_media(animate(tmp_path / "a", kind, durations), select)
    assert [number(f) for f in frames] == [4, 1, 1, 4, 0]
    assert seconds == pytest.approx([1.55, 0.1, 0.1, 1.55, 0.0]) and seen == [(0, 4, pytest.approx(5 / 1.8))]
    assert read_media(tmp_path / "a", None) == (None, pytest.approx([0, 0.1, 0.5, 0.55, 1.55]))

def test_the_case_of_an_animated_webp():
    frames, seconds = read_media(CASES / "video" / "animated.webp", every)
    assert [number(f) for f in frames] == list(range(12)) and {corners(f) for f in frames} == {"RGBW"}
    assert seconds == pytest.approx([i / 10 for i in range(12)])

def test_delays_that_browsers_do_not_believe(tmp_path):
    """A delay of at most 10 ms is shown as 100 ms; 60 frames per second are believed."""
    for kind, delay, shown in (("GIF", 0, 0.1), ("GIF", 10, 0.1), ("GIF", 20, 0.02), ("WEBP", 16, 0.016)):
        _, seconds = read_media(animate(tmp_path / "a", kind, [delay] * 3), every)
        assert seconds == pytest.approx([0, shown, 2 * shown])

def test_a_png_for_old_readers_is_no_frame_of_the_animation(tmp_path):
    animate(tmp_path / "a.png", "PNG", [100] * 4, default_image=True)
    frames, seconds = read_media(tmp_path / "a.png", every)
    assert [number(f) for f in frames] == [1, 2, 3] and len(seconds) == 3 and seconds[0] == 0

@pytest.mark.parametrize("disposal", [0, 1, 2, 3])
def test_frames_that_build_on_each_other(tmp_path, disposal):
    """Squares that are drawn one after the other stay, vanish, or give way to what was there."""
    frames = [Image.new("P", (40, 20)) for _ in range(3)]
    for i, frame in enumerate(frames):
        frame.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
        frame.paste(i + 1, (10 * i, 0, 10 * i + 10, 20))
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100, disposal=disposal,
                   transparency=0, optimize=False)
    shown, _ = read_media(tmp_path / "a.gif", every)
    first = {0: "R", 1: "R", 2: "K", 3: "K"}[disposal]                         # where the first square was, in frame 2
    assert shown[0, :, 10, 5].tolist() == [255, 0, 0] and shown[2, :, 10, 25].tolist() == [0, 0, 255]
    assert tuple(shown[2, :, 10, 5].tolist()) == COLOURS[first]

@pytest.mark.parametrize("kind", FORMATS)
def test_torn_animations_are_faults(tmp_path, kind):
    content = animate(tmp_path / "a", kind, [100] * 6).read_bytes()
    for size in sorted(random.Random(0).sample(range(40, len(content) - 12), 40)):
        (tmp_path / "torn").write_bytes(content[:size])
        refusal(tmp_path / "torn")

@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF", "JPEG2000"])
def test_torn_pictures_are_faults(tmp_path, kind):
    Image.fromarray(noise(96, 160, 3).numpy()).save(tmp_path / "a", kind)
    content = (tmp_path / "a").read_bytes()
    for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9):
        (tmp_path / "torn.jpg").write_bytes(content[:int(len(content) * share)])
        refusal(tmp_path / "torn.jpg", as_image=True)

def test_a_gif_that_ends_between_two_frames_is_torn(tmp_path):
    content = animate(tmp_path / "a", "GIF", [100] * 6).read_bytes()
    starts = [i for i in range(len(content)) if content[i:i + 3] == b"!\xf9\x04"]     # what opens a frame
    assert len(starts) >= 6
    for start in starts[1:]:
        (tmp_path / "torn").write_bytes(content[:start])
        assert "ends too early" in refusal(tmp_path / "torn")
    (tmp_path / "more").write_bytes(content + b"appended by a server")
    assert len(read_media(tmp_path / "more", every)[0]) == 6

@pytest.mark.parametrize("kind", [*FORMATS, "JPEG", "TIFF", "BMP", "still"])
def test_damaged_files_give_a_picture_or_a_sentence(tmp_path, kind, capfd):
    if kind in FORMATS:
        content = animate(tmp_path / "a", kind, [100] * 4).read_bytes()
    else:
        painted().save(tmp_path / "a", "PNG" if kind == "still" else kind)
        content = (tmp_path / "a").read_bytes()
    rng = random.Random(kind)
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 8)):
            place = rng.randrange(min(len(damaged), rng.choice((64, 1024, len(damaged)))))
            damaged[place:place + rng.choice((0, 1, 16))] = rng.randbytes(rng.choice((0, 1, 16)))
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            frames, seconds = read_media(tmp_path / "damaged", first_and_last, limit=10)
            assert frames.dtype == torch.uint8 and frames.shape[:2] == (len(seconds), 3)
        except MediaError as error:
            assert "\n" not in str(error)

# ---- pixels: upright, eight bits, three colours ----------------------------------------------------------------------

TURNS = {1: "RGBW", 2: "GRWB", 3: "WBGR", 4: "BWRG", 5: "RBGW", 6: "BRWG", 7: "WGBR", 8: "GWRB"}

@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_pictures_are_upright(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    painted().save(tmp_path / "a", kind, exif=exif)
    frames, _ = read_media(tmp_path / "a", every)
    assert corners(frames[0]) == TURNS[orientation]
    assert frames.shape[2:] == ((96, 160) if orientation < 5 else (160, 96))

def test_pictures_in_folders_are_upright_too(tmp_path):
    for i in range(1, 4):
        (tmp_path / f"{i}.jpg").write_bytes((CASES / "image" / "exif6.jpg").read_bytes())
    assert {corners(f) for f in read_media(tmp_path, every)[0]} == {"BRWG"}

@pytest.mark.parametrize("exif", [
    b"", b"MM\0*\0\0\0\x08\0\x01\x01\x12", b"II*\0\xff\xff\xff\xff", bytes(range(200))])
def test_broken_exif_does_not_hide_the_picture(tmp_path, exif):
    for kind in ("JPEG", "PNG", "WEBP"):
        painted().save(tmp_path / "a", kind, exif=b"Exif\0\0" + exif)
        assert corners(read_media(tmp_path / "a", every)[0][0]) == "RGBW"

def test_orientation_is_read_where_other_exif_is_broken(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Software] = "someone"
    content = exif.tobytes().replace(b"someone", b"\xff\xfe\xfdeon\xff")
    painted().save(tmp_path / "a", "JPEG", exif=content)
    assert corners(read_media(tmp_path / "a", every)[0][0]) == "BRWG"

RAMP = np.arange(256, dtype=np.int64).reshape(8, 32)

def levels(path, image=None, kind=None, **options):
    """(8, 32) grey levels of an image that is written and read again."""
    if image is not None:
        image.save(path, kind, **options)
    frames, _ = read_media(path, every)
    assert (frames[0] == frames[0, :1]).all()
    return frames[0, 0].numpy()

def test_sixteen_bits_become_eight(tmp_path):
    deep = (RAMP * 257).astype(np.uint16)
    assert (levels(tmp_path / "a", Image.fromarray(deep), "PNG") == RAMP).all()
    assert (levels(tmp_path / "a", Image.fromarray(deep), "TIFF") == RAMP).all()
    big = Image.frombytes("I;16B", (32, 8), deep.astype(">u2").tobytes())
    assert (levels(tmp_path / "a", big, "TIFF") == RAMP).all()
    assert (levels(tmp_path / "a", Image.fromarray(deep.astype(np.int32)), "TIFF") == RAMP).all()      # mode I
    (tmp_path / "a.pgm").write_bytes(b"P5\n32 8\n65535\n" + deep.astype(">u2").tobytes())
    assert (levels(tmp_path / "a.pgm") == RAMP).all()
    # a dark picture stays dark
    assert levels(tmp_path / "a", Image.fromarray((deep // 256).astype(np.uint16)), "PNG").max() == 1

def png16(color_type, samples):
    """A PNG with 16 bits per sample, which Pillow cannot write: samples (H, W, C)."""
    h, w, _ = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", w, h, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")

@pytest.mark.parametrize("color_type, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_of_every_kind_of_png(tmp_path, color_type, channels):
    samples = np.repeat((RAMP * 257)[..., None], channels, axis=2)
    if channels in (2, 4):
        samples[..., -1] = 65535
    (tmp_path / "a").write_bytes(png16(color_type, samples))
    assert np.abs(levels(tmp_path / "a").astype(int) - RAMP).max() <= 1

@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
def test_float_greys(tmp_path, white):
    """White is 1, 255 or 65535; one value that overshoots does not make the others black."""
    grey = (RAMP / 255 * white).astype(np.float32)
    assert (levels(tmp_path / "a", Image.fromarray(grey), "TIFF") == RAMP).all()
    grey[0, 0], grey[-1, -1], grey[0, 1] = -0.2 * white, 1.1 * white, np.nan
    found = levels(tmp_path / "a", Image.fromarray(grey), "TIFF")
    assert (found[1:] == RAMP[1:]).all() and found[0, 0] == 0 and found[0, 1] == 0
    grey[0, 1], grey[0, 2] = np.inf, -np.inf                                   # no value, as NaN
    assert (levels(tmp_path / "a", Image.fromarray(grey), "TIFF")[1:] == RAMP[1:]).all()
    assert levels(tmp_path / "a", Image.fromarray(np.zeros((8, 32), np.float32)), "TIFF").max() == 0
    assert (levels(tmp_path / "a", Image.fromarray((RAMP * 1e6).astype(np.float32)), "TIFF") == RAMP).all()

def test_wide_integers_that_hold_eight_bits(tmp_path):
    assert (levels(tmp_path / "a", Image.fromarray(RAMP.astype(np.int32)), "TIFF") == RAMP).all()
    assert (levels(tmp_path / "a", Image.fromarray((RAMP * 2**23).astype(np.int32)), "TIFF") == RAMP).all()

@pytest.mark.parametrize("mode, kind", [("1", "PNG"), ("1", "TIFF"), ("L", "PNG"), ("P", "PNG"), ("LA", "PNG"),
    ("RGBA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF"),
    ("LAB", "TIFF"), ("P", "GIF"), ("P", "BMP"), ("LA", "TIFF"), ("P", "TIFF")])
def test_modes(tmp_path, mode, kind):
    image = painted()
    if mode == "LAB":
        lab = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"),
                                        outputMode="LAB")
        lab.save(tmp_path / "a", kind)
    else:
        image.convert(mode).save(tmp_path / "a", kind)
    frames, _ = read_media(tmp_path / "a", every, as_image=True)
    assert frames.shape == (1, 3, 96, 160) and frames.dtype == torch.uint8
    if mode in ("1", "L", "LA"):                                               # grey, with the black bars of number 0
        assert frames[0, :, -1, -1].min() == 255 and frames[0, :, 48, 80].max() == 0
    else:
        assert corners(frames[0]) == "RGBW"

def test_cmyk_of_adobe_is_stored_inverted_and_other_cmyk_is_not(tmp_path):
    """Pillow writes CMYK JPEGs as Adobe does; white paper has no ink either way."""
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()
    red = read_media(tmp_path / "a.jpg", every)[0][0, :, 8, 8].tolist()
    assert red[0] > 240 and max(red[1:]) < 15

def test_transparency_is_dropped_as_the_official_code_does(tmp_path):
    image = painted()
    image.putalpha(0)
    image.save(tmp_path / "a.png")
    palette = painted().quantize(8)
    palette.save(tmp_path / "p.png", transparency=bytes([0, 128] + [255] * 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("a.png", "p.png"):
            assert corners(read_media(tmp_path / name, every)[0][0]) == "RGBW"

# ---- strips ----------------------------------------------------------------------------------------------------------

def centre_crop(frames, size):
    """Short side to `size`, then the middle: what the benchmark does with ordinary shapes."""
    height, width = frames.shape[-2:]
    short = min(height, width)
    x = video.resize(frames, size * height // short, size * width // short)
    top, left = (round((side - size) / 2) for side in x.shape[-2:])
    return x[..., top:top + size, left:left + size]

def noise(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))

def evaluated(frames, size):
    transform = Transform(size)
    return transform(frames) * transform.std + transform.mean

@pytest.mark.parametrize("shape", [
    (96, 160), (160, 96), (37, 333), (900, 101), (64, 64), (30, 8), (20, 180), (719, 1279)])
def test_ordinary_shapes_are_cropped_as_before(shape):
    frames = noise(2, 3, *shape)
    old, transform = centre_crop(frames, 64), Transform(64)
    assert torch.equal(transform(frames), (old - transform.mean).div_(transform.std))

@pytest.mark.parametrize("shape", [
    (16, 320), (320, 16), (8, 1000), (100, 2000), (1600, 32), (7, 700), (32, 640), (5, 1999), (1, 40),
    (90, 2), (1, 41)])
def test_strips_show_what_they_showed_before(shape):
    frames = noise(1, 3, *shape)
    frames = video.resize(frames, *shape).to(torch.uint8)
    old, new = centre_crop(frames, 64), evaluated(frames, 64)
    if max(shape) * 64 % min(shape) == 0:                              # the resized side is whole, nothing is rounded
        assert (old - new).abs().max() < 0.01
    else:
        ramp = torch.arange(max(shape)).mul(200).div(max(shape), rounding_mode="floor").to(torch.uint8)
        frames = (ramp[:, None] if shape[0] > shape[1] else ramp[None]).expand(1, 3, *shape)
        assert (centre_crop(frames, 64) - evaluated(frames, 64)).abs().max() <= 2

STRIPS = """
import resource, sys, random
import torch
sys.path.insert(0, {root!r})
from video import Transform, read_media
from PIL import Image
Transform(224)(torch.zeros(1, 3, 300, 400, dtype=torch.uint8))
Transform(224, train=True)(torch.zeros(1, 3, 300, 400, dtype=torch.uint8), random.Random(0))
read_media({case!r}, lambda *a: [0])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for t, h, w in ((1, 2, 3000), (1, 1, 10_000), (1, 10_000, 1), (16, 4, 1920), (16, 1920, 4), (4, 1, 60_000)):
    frames = torch.zeros(t, 3, h, w, dtype=torch.uint8)
    for transform in (Transform(224), Transform(224, train=True), Transform(224, crop=False)):
        x = transform(frames, random.Random(0))
        assert x.shape == (t, 3, 224, 224)
Transform(224)(read_media({case!r}, lambda *a: [0])[0])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""

def test_strips_take_little_memory():
    """16 frames of 1920 x 4 took 5.8 GB, an image of 3000 x 2 took 1.3 GB. What is left: 16 x 224 x 1344 floats."""
    code = STRIPS.format(root=str(CASES.parent.parent), case=str(CASES / "image" / "strip_3000x2.png"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 160, done.stdout                               # MB

# ---- folders of frames -----------------------------------------------------------------------------------------------

def fill(folder, names, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names, start):
        kind = {"jpg": "JPEG", "jpeg": "JPEG", "jfif": "JPEG", "tif": "TIFF"}.get(name.split(".")[-1].lower())
        painted(i, 80, 48).save(folder / name, kind or name.split(".")[-1].upper())
    return folder

NAMINGS = {
    "official": [f"{i:05d}.jpg" for i in range(1, 13)],
    "from 0": [f"{i:05d}.png" for i in range(12)],
    "unpadded": [f"{i}.jpg" for i in range(1, 13)],
    "prefix": [f"frame_{i:06d}.PNG" for i in range(1, 13)],
    "hyphen": [f"img-{i:04d}.JPG" for i in range(100, 112)],
    "no separator": [f"frame{i}.jpeg" for i in range(12)],
    "other numbers": [f"show_s01e01_{i}.webp" for i in range(1, 13)],
    "steps of 10": [f"{i:05d}.bmp" for i in range(0, 120, 10)],
    "steps from 5": [f"clip {i}.tif" for i in range(5, 41, 3)],
    "suffixes": [f"{i}_hq.jpg" for i in range(1, 13)],
    "mixed kinds": [f"{i}.{kind}" for i, kind in enumerate(["jpg", "PNG", "jpeg", "webp"] * 3)],
}

@pytest.mark.parametrize("naming", NAMINGS)
def test_the_usual_names(tmp_path, naming):
    names = NAMINGS[naming]
    fill(tmp_path, random.Random(0).sample(names, 12))
    for name in names:                                                         # their order on disk is another
        (tmp_path / name).unlink()
    fill(tmp_path, names)
    for extra in ("._" + names[3], ".DS_Store", "Thumbs.db", "notes.txt", "cover.jpg", "._cover.jpg"):
        (tmp_path / extra).write_bytes(b"Mac OS X")
    first = 0 if names[0].split("_")[-1].split(".")[0].lstrip("frame").strip("0") == "" else 1
    seen = []
    def select(*args):
        seen.append(args)
        return [args[0], args[0] + 3, args[1], 99]
    frames, seconds = read_media(tmp_path, select)
    assert seen == [(first, first + 11, 3)]
    assert [number(f) for f in frames] == [0, 3, 11, 11] and seconds == pytest.approx([0, 1, 11 / 3, 11 / 3])
    assert read_media(tmp_path, every, fps=2.0)[1] == [i / 2 for i in range(12)]
    assert read_media(tmp_path, None) == (None, [i / 3 for i in range(12)])

def test_the_cases_folders():
    for case in ("frames_png", "frames_from_zero"):
        folder = next((CASES / "mvbench" / case / "video" / "tvqa" / "frames_fps3_hq").iterdir())
        first = 0 if case == "frames_from_zero" else 1
        frames, seconds = read_media(folder, every)
        assert [number(f) for f in frames] == list(range(first, first + 18)) and seconds == [i / 3 for i in range(18)]
        # the benchmark's rule, on the numbers in the names: seconds 1 to 5 are frames 3 to 15
        shown = [number(f) for f in video.read_eval_frames(folder, 4, (1.0, 5.0))]
        assert shown == video.eval_frame_indices(4, first + 17, 3, (1.0, 5.0), first)

def test_folders_that_have_no_right_order_say_so(tmp_path):
    fill(tmp_path / "gap", ["00001.jpg", "00002.jpg", "00004.jpg", "00005.jpg"])
    assert "in steps of 1, but 00002.jpg precedes 00004.jpg" in refusal(tmp_path / "gap")
    fill(tmp_path / "wide gap", ["0.jpg", "10.jpg", "30.jpg"])
    assert "in steps of 10, but 10.jpg precedes 30.jpg" in refusal(tmp_path / "wide gap")
    fill(tmp_path / "twice", ["a1.jpg", "a2.jpg", "a2.png"])
    assert "a2.jpg and a2.png have the same number" in refusal(tmp_path / "twice")
    fill(tmp_path / "padded", ["1.jpg", "01.jpg"])
    assert "01.jpg and 1.jpg have the same number" in refusal(tmp_path / "padded")
    fill(tmp_path / "sizes", ["1.jpg", "2.jpg"])
    painted(3, 100, 50).save(tmp_path / "sizes" / "3.jpg")
    assert "of different sizes, 100 x 50 and 80 x 48" in refusal(tmp_path / "sizes")
    with pytest.raises(MediaError, match="of different sizes"):
        read_media(tmp_path / "sizes", None)
    (tmp_path / "folders" / "00001.jpg").mkdir(parents=True)
    refusal(tmp_path / "folders")
    fill(tmp_path / "parent" / "child", ["1.jpg"])
    (tmp_path / "nothing").mkdir()
    fill(tmp_path / "no numbers", ["a.jpg", "b.jpg"])
    for name in ("parent", "nothing", "no numbers"):
        assert "the folder has no frames (00001.jpg ...)" in refusal(tmp_path / name)
    (fill(tmp_path / "broken", ["1.jpg", "2.jpg"]) / "2.jpg").write_bytes(b"broken")
    assert "2.jpg: cannot be decoded as an image" in refusal(tmp_path / "broken")
