"""pytest tests/test_video.py"""
import json
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import video
from infra.containers import SampleError
from infra.media import MediaError, read_media
from video import Transform

def paint(folder, name, value=0, frames=16, size=48):
    """A GIF whose frame i shows a bar at column 2 i, on a background of the grey level `value`."""
    images = []
    for i in range(frames):
        pixels = np.full((size, size, 3), value, np.uint8)
        pixels[10:20, 2 * i:2 * i + 10] = (255, 0, 0)
        images.append(Image.fromarray(pixels))
    folder.mkdir(parents=True, exist_ok=True)
    images[0].save(folder / name, save_all=True, append_images=images[1:], duration=500, loop=0)
    return folder / name

def bars(frames):
    """Which frame each of (T, 3, H, W) is: half the first column where red lies on row 15."""
    return [int((frame[0, 15] - frame[1, 15].float() > 100).nonzero()[0]) // 2 for frame in frames.float()]

def every(first, last, fps):
    return range(first, last + 1)

# ---- which frames: parity --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "sampling.json").read_text())

def test_middle_frames(recorded):
    for case in recorded["get_frame_indices_middle"]:
        assert video.train_frame_indices(case["num_frames"], case["vlen"], "middle") == case["out"], case

def test_benchmark_frames(recorded):
    for case in recorded["mvbench_get_index"]:
        limits = (case["max_frame"], case["fps"], case["bound"], case["first_idx"])
        found = video.eval_frame_indices(case["num_segments"], *limits)
        assert found == case["out"], case
    for case in recorded["notebook_get_index"]:  # the demo's rule is the benchmark's without bounds
        assert video.eval_frame_indices(case["num_segments"], case["num_frames"] - 1, 1.0) == case["out"], case

def test_official_random_frames(recorded):
    for case in recorded["get_frame_indices_rand_seed42"]:
        n, total = case["num_frames"], case["vlen"]
        found = video.train_frame_indices(n, total, "official", random.Random(42))
        if total >= 2 * n:
            assert found == case["out"], case
        assert sorted(found) == found and len(found) == n and found[-1] < total

def test_our_random_frames_reach_every_frame():
    rng = random.Random(0)
    drawn = [video.train_frame_indices(4, 10, "rand", rng) for _ in range(500)]
    assert {i for indices in drawn for i in indices} == set(range(10))
    assert all(a < b for indices in drawn for a, b in pairwise(indices))
    assert video.train_frame_indices(4, 2, "rand", rng) == [0, 1, 1, 1]

# ---- reading ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [48, 64, 100])
def test_gif_frames_are_exact(tmp_path, size):
    path = paint(tmp_path, "a.gif", 40, size=size)
    frames, seconds = read_media(path, every)
    assert frames.shape == (16, 3, size, size) and frames.dtype == torch.uint8
    assert bars(frames) == list(range(16)) and seconds == [i / 2 for i in range(16)]
    assert frames[0, :, -1, -1].tolist() == [40, 40, 40] and frames[0, :, 15, 5].tolist() == [255, 0, 0]
    frames, _ = read_media(path, lambda first, last, fps: [15, 3, 3, 8, 99])  # any order; beyond the end: the last
    assert bars(frames) == [15, 3, 3, 8, 15]

def test_start_and_end_in_seconds(tmp_path):
    path = paint(tmp_path, "a.gif")
    select = video.train_frame_selector(4, "middle")
    frames, _ = read_media(path, select, start=2.0, end=4.0)               # frames 4 to 7 at 2 per second
    assert bars(frames) == [4, 5, 6, 7]
    assert bars(video.read_eval_frames(path, 2, (2.0, 4.0))) == [5, 7]
    assert bars(video.read_eval_frames(path, 16)) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 13, 14]

def test_a_video_of_one_frame(tmp_path):
    path = paint(tmp_path, "a.gif", frames=1)
    assert bars(video.read_eval_frames(path, 4, (0.0, 2.0))) == [0, 0, 0, 0]
    frames, seconds = read_media(path, video.train_frame_selector(2, "rand", random.Random(0)))
    assert bars(frames) == [0, 0] and seconds == [0.0, 0.0]

@pytest.mark.parametrize("mode, name", [("L", "a.png"), ("P", "a.png"), ("RGBA", "a.png"), ("CMYK", "a.jpg"),
                                        ("1", "a.png"), ("RGBA", "a.webp"), ("L", "a.jpg"), ("P", "a.gif")])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, name):
    Image.new("RGB", (20, 10), (255, 255, 255)).convert(mode).save(tmp_path / name)
    frames, seconds = read_media(tmp_path / name, every, as_image=True)
    assert frames.shape == (1, 3, 10, 20) and frames.min() > 250 and seconds == [0.0]

def test_where_an_image_is_meant_a_gif_is_its_first_frame(tmp_path):
    frames, seconds = read_media(paint(tmp_path, "a.gif", 40), every, as_image=True)
    assert bars(frames) == [0] and seconds == [0.0] and frames.shape == (1, 3, 48, 48)

def test_a_folder_of_frames(tmp_path):
    for i in range(1, 8):
        Image.new("RGB", (20, 10), (i * 30,) * 3).save(tmp_path / f"{i:05d}.jpg")
    frames, seconds = read_media(tmp_path, lambda first, last, fps: [first, last, last + 5])
    assert [round(level / 30) for level in frames[:, 0, 0, 0].tolist()] == [1, 7, 7] and seconds == [0.0, 2.0, 2.0]
    assert video.read_eval_frames(tmp_path, 2).shape == (2, 3, 10, 20)
    (tmp_path / "00003.jpg").unlink()
    with pytest.raises(MediaError, match="00002.jpg precedes 00004.jpg"):
        read_media(tmp_path, every)

def test_unreadable_media_say_why(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "no_video.mp4").write_bytes(b"this is no video" * 50)
    (tmp_path / "no_image.png").write_bytes(b"this is no image" * 50)
    (tmp_path / "folder").mkdir()
    reasons = {"absent.mp4": "no such file", "empty.mp4": "the file is empty", "folder": "the folder has no frames",
               "no_video.mp4": "cannot be decoded as a video", "no_image.png": "cannot be decoded as an image"}
    for name, reason in reasons.items():
        with pytest.raises(MediaError) as caught:
            read_media(tmp_path / name, every, as_image=name.endswith(".png"))
        assert str(caught.value).startswith(f"{tmp_path / name}: {reason}") and "\n" not in str(caught.value)

def test_a_png_with_too_much_text_in_it(tmp_path):
    info = PngInfo()
    info.add_text("comment", "x" * 2_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(MediaError, match="a.png: cannot be decoded as an image"):
        read_media(tmp_path / "a.png", every)

def test_an_error_in_a_worker_stays_one_line():
    """DataLoader raises the error anew, with the worker's traceback before its words."""
    wrapped = MediaError("Caught MediaError in DataLoader worker process 0.\nOriginal Traceback (most recent call):\n"
                         '  File "video.py", line 1, in sample\ninfra.containers.MediaError: a.gif: no such file\n')
    assert str(wrapped) == "a.gif: no such file"
    assert str(SampleError("infra.containers.SampleError: a.gif: no room")) == "a.gif: no room"
    assert str(MediaError("a.gif: no such file")) == "a.gif: no such file"

# ---- pixels ----------------------------------------------------------------------------------------------------------

def test_evaluation_pixels_are_pillows():
    # smooth, since Pillow rounds between its two passes, which shows where the values jump
    y, x = np.mgrid[0:50, 0:90]
    pixels = np.stack([2 * x + y, 200 - x - y, 128 + 100 * np.sin(x / 9 + y / 7)], axis=2).astype(np.uint8)
    found = Transform(32, norm="clip")(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]  # (3, 32, 32)
    small = Image.fromarray(pixels).resize((57, 32), Image.Resampling.BICUBIC).crop((12, 0, 44, 32))
    mean, std = video.NORMS["clip"]
    expected = (np.asarray(small) / 255 - mean) / std
    assert np.abs(found.permute(1, 2, 0).numpy() - expected).max() < 1.1 / 255 / min(std)  # one level, from rounding

def test_training_crops_are_the_same_in_all_frames():
    frames = torch.randint(0, 256, (1, 3, 40, 60), dtype=torch.uint8).expand(4, -1, -1, -1)
    transform = Transform(32, train=True)
    one, two = (transform(frames, random.Random(seed)) for seed in (1, 2))
    assert one.shape == (4, 3, 32, 32) and (one == one[:1]).all() and not torch.equal(one, two)
    for shape in ((40, 60), (8, 200), (200, 8)):
        for seed in range(50):
            top, left, h, w = transform.random_resized_crop(*shape, random.Random(seed))
            assert 0 <= top <= shape[0] - h and 0 <= left <= shape[1] - w and h > 0 and w > 0
            assert shape != (40, 60) or 0.45 < h * w / 2400 < 1.05

def test_without_crop_nothing_is_lost():
    frames = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    found = Transform(32, train=True, crop=False)(frames, random.Random(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in video.NORMS["imagenet"])
    torch.testing.assert_close(found * std + mean, frames / 255)
    assert Transform(32, crop=False)(frames[..., :20]).shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="norm 'vit': expected one of imagenet, clip"):
        Transform(32, norm="vit")

@pytest.mark.parametrize("size", [(40, 60), (300, 500)])                   # larger and smaller than the result
def test_bicubic_is_pillows_on_noise_too(size):
    frames = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for layout in (torch.contiguous_format, torch.channels_last):
        found = video.resize(frames.contiguous(memory_format=layout), 112, 96)         # (2, 3, 112, 96)
        for one, frame in zip(found, frames, strict=True):
            image = Image.fromarray(frame.permute(1, 2, 0).numpy()).resize((96, 112), Image.Resampling.BICUBIC)
            assert np.abs(one.permute(1, 2, 0).numpy() - np.asarray(image).astype(float)).max() <= 2

def test_random_resized_crops_are_pillows():
    frames = torch.randint(0, 256, (1, 3, 90, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = Transform(48, train=True, norm="clip")
    for seed in range(5):
        top, left, height, width = transform.random_resized_crop(90, 120, random.Random(seed))
        image = Image.fromarray(frames[0].permute(1, 2, 0).numpy())
        image = image.crop((left, top, left + width, top + height)).resize((48, 48), Image.Resampling.BICUBIC)
        found = transform(frames, random.Random(seed))[0] * transform.std + transform.mean         # (3, 48, 48)
        assert np.abs(found.permute(1, 2, 0).numpy() - np.asarray(image)).max() <= 2.01

def test_flip_mirrors_half_of_the_clips_and_is_off_by_default():
    frames = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    plain = Transform(32, train=True, crop=False)(frames, random.Random(0))
    mirror = Transform(32, train=True, crop=False, flip=True)
    flipped = [torch.equal(mirror(frames, random.Random(seed)), plain.flip(-1)) for seed in range(100)]
    assert 35 < sum(flipped) < 65
    assert all(torch.equal(Transform(32, train=True, crop=False)(frames, random.Random(s)), plain) for s in range(20))

@pytest.mark.parametrize("offset, data", [(6, b"\xff\xff\xff\x7f"), (0, b"GIF87b"), (10, b"\0")])
def test_damaged_headers_of_gifs_are_named(tmp_path, offset, data):
    path = paint(tmp_path, "a.gif", 40)
    found = bytearray(path.read_bytes())
    found[offset:offset + len(data)] = data
    path.write_bytes(found)
    try:
        read_media(path, every)
    except MediaError as error:
        assert str(error).startswith(f"{path}: ")
