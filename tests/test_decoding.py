"""Encoded videos of the kinds that data sets hold: the frame that is asked for is the frame that comes, and a damaged
file never stops a worker. Run: pytest tests/test_decoding.py
"""
import gc
import json
import random
import time

import decord
import pytest
import torch
from videos import number, write_video

import video as video_file
from data import VideoTextDataset
from infra.cli import ignore_signals
from training.annotations import load_corpus
from video import MediaError, Transform, read_media

TIMES = [sum(random.Random(k).randrange(10, 120) for k in range(i)) for i in range(60)]   # milliseconds, uneven
KINDS = {
    "b_frames.mp4": dict(codec="libx264", bf=3, g=30, **{"x264-params": "b-adapt=0:bframes=3"}),
    "one_keyframe.mp4": dict(codec="libx264", g=1000, bf=2),
    "vp9.webm": dict(codec="libvpx-vp9"),
    "av1.mp4": dict(codec="libsvtav1", preset=8, crf=20),
    "plain.gif": dict(codec="gif", rate=10),
    "variable.mp4": dict(codec="libx264", times=TIMES, bf=2),
    "variable.mkv": dict(codec="libx264", times=TIMES, bf=2),
}

@pytest.fixture(scope="module", params=KINDS)
def video(request, tmp_path_factory):
    """A video of 60 frames of each kind."""
    return write_video(tmp_path_factory.mktemp("videos") / request.param, **KINDS[request.param])

def numbers(path, indices):
    frames, _ = read_media(path, lambda first, last, fps: indices)
    return [number(frame.permute(1, 2, 0).numpy()) for frame in frames]

def test_every_frame_is_the_one_that_was_asked_for(video):
    assert numbers(video, range(60)) == list(range(60))
    for seed in range(4):                                                  # any order, some of them twice
        wanted = random.Random(seed).choices(range(60), k=16)
        assert numbers(video, wanted) == wanted
    assert numbers(video, [59]) == [59] and numbers(video, [0]) == [0]

def test_the_benchmark_s_frames_are_the_rule_s(video):
    frames = video_file.read_eval_frames(video, 16)
    assert [number(frame.permute(1, 2, 0).numpy()) for frame in frames] == video_file.eval_frame_indices(16, 59, 25.0)

def test_seconds_are_where_frames_are_taken(tmp_path):
    path = write_video(tmp_path / "a.mp4", rate=25)
    frames, seconds = read_media(path, video_file.train_frame_selector(4, "middle", None, 0.4, 1.2))
    taken = [number(frame.permute(1, 2, 0).numpy()) for frame in frames]
    assert taken == [12, 17, 22, 27] and seconds == pytest.approx([i / 25 for i in taken])

def test_narrow_videos(tmp_path):
    """Rows of 48 pixels come padded from decord, which once made four channels of them."""
    path = write_video(tmp_path / "narrow.mp4", width=48, height=64, frames=8)
    frames, _ = read_media(path, lambda first, last, fps: [3, 0])
    assert frames.shape == (2, 3, 64, 48)
    red = frames[:, 0, 48].float() - frames[:, 1, 48]                      # the moving bar, 20 pixels wide from 5 i on
    assert (red[0, 17:33] > 80).all() and (red[1, 2:18] > 80).all()

# ---- damage ----------------------------------------------------------------------------------------------------------

def damaged(data, how, rng):
    data = bytearray(data)
    if how == "cut off":
        return data[:rng.randrange(len(data) // 10, len(data))]
    if how == "a hole":
        begin = rng.randrange(len(data))
        data[begin:begin + len(data) // 5] = bytes(min(len(data) // 5, len(data) - begin))
    else:
        for _ in range(rng.choice([3, 30, 300])):
            data[rng.randrange(100, len(data))] = rng.randrange(256)
    return data

@pytest.mark.parametrize("how", ["cut off", "a hole", "wrong bytes"])
def test_damaged_files_give_frames_or_an_error_and_soon(video, tmp_path, how):
    whole = video.read_bytes()
    for seed in range(4):
        path = tmp_path / f"{seed}{video.suffix}"
        path.write_bytes(damaged(whole, how, random.Random(seed)))
        begun = time.time()
        try:
            assert read_media(path, lambda first, last, fps: [first, last // 2, last])[0].shape[1] == 3
        except MediaError as error:
            assert str(error).startswith(f"{path}: ")
        assert time.time() - begun < 20

def test_a_decoder_that_hangs_is_left_behind(tmp_path, monkeypatch):
    """Its clip is replaced like every unreadable one: the worker goes on."""
    for i in range(3):
        write_video(tmp_path / f"{i}.mp4", frames=10)
    real = video_file.read_video
    monkeypatch.setattr(video_file, "read_video", lambda path, select: time.sleep(600) if path.name == "1.mp4" else
                        real(path, select))
    monkeypatch.setattr(video_file.read_media, "__defaults__", (False, 0.5, None))
    (tmp_path / "a.json").write_text(json.dumps([{"video": f"{i}.mp4", "caption": f"clip {i}"} for i in range(3)]))
    dataset = VideoTextDataset(load_corpus([[str(tmp_path / "a.json"), str(tmp_path), "video"]]), 2, Transform(32))
    loader = torch.utils.data.DataLoader(dataset, None, num_workers=1, worker_init_fn=ignore_signals)
    begun = time.time()
    samples = list(loader)
    assert time.time() - begun < 30 and [s["text"] for s in samples] == ["clip 0", "clip 2", "clip 2"]
    assert samples[1]["bad"] == [f"{tmp_path / '1.mp4'}: decoding takes more than 0.5 seconds"]

def test_a_failed_read_leaves_no_reader_to_the_garbage_collector(tmp_path):
    """Which would run in a loader process forked meanwhile, where decord's destructor aborts."""
    path = write_video(tmp_path / "a.mp4", frames=10)
    gc.collect()
    gc.disable()
    try:
        for select in (lambda first, last, fps: 1 / 0, lambda first, last, fps: [0]):
            try:
                read_media(path, select)
            except ZeroDivisionError:
                pass
            assert not any(type(thing) is decord.VideoReader for thing in gc.get_objects())
    finally:
        gc.enable()
