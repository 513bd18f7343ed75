"""Videos as people have them: the frames and seconds that a player shows, or one sentence.

Run: pytest tests/test_files.py
Images and folders: test_files_images.py; annotations: test_files_annotations.py; benchmarks: test_files_mvbench.py.
tests/cases/README.md says what is right for the files there; videos.FORMATS is the table of docs/data.md.
"""
import gc
import json
import os
import random
import re
import resource
import shutil
import time
import wave
from pathlib import Path

import av
import decord
import pytest
import torch
from PIL import Image
from videos import CASES, FORMATS, UNEVEN, case_number, number, painted, write_video

from data import VideoTextDataset
from infra import media
from infra.cli import ignore_signals
from infra.media import MediaError, read_media
from training.annotations import load_corpus
from video import Transform, eval_frame_indices, read_eval_frames, train_frame_selector

def every(first, last, fps):
    return range(first, last + 1)

def numbers(path, select, of=number, **options):
    """The painted numbers of the frames that read_media gives, and their seconds."""
    frames, seconds = read_media(path, select, **options)
    return [of(frame.permute(1, 2, 0).numpy()) for frame in frames], seconds

# ---- every format, by PyAV -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=FORMATS)
def format_of(request, tmp_path_factory):
    """A video of 90 frames in each of FORMATS -> (path, the numbers that it shows, their seconds)."""
    file, options = FORMATS[request.param]
    folder = tmp_path_factory.mktemp("formats")
    path = write_video(folder / file, **{"width": 160, "height": 96, "frames": 90, **options})
    first, rate = options.get("trim", 0), options.get("rate", 25)
    seconds = [t / 1000 for t in UNEVEN] if "times" in options else [float(i / rate) for i in range(90 - first)]
    return path, list(range(first, 90)), seconds

def test_every_frame_of_every_format(format_of):
    path, shown, seconds = format_of
    taken, at = numbers(path, every)
    assert taken == shown and at == pytest.approx(seconds, abs=0.002)
    for seed in range(3):                                                  # any order, some of them twice
        positions = random.Random(seed).choices(range(len(shown)), k=16)
        assert numbers(path, lambda first, last, fps, p=positions: p)[0] == [shown[p] for p in positions]
    assert numbers(path, lambda first, last, fps: [last])[0] == shown[-1:]
    assert numbers(path, lambda first, last, fps: [first])[0] == shown[:1]

def test_start_and_end_in_every_format(format_of):
    path, shown, seconds = format_of
    if seconds == [t / 1000 for t in UNEVEN]:
        expected = [n for n, t, next_t in zip(shown, seconds, [*seconds[1:], 99], strict=True)
                    if next_t > 1.01 and t < 1.99]
    else:                                                                  # the official arithmetic
        rate = 1 / seconds[1]
        expected = shown[int(1.01 * rate):][:int((1.99 - 1.01) * rate)]
    assert numbers(path, every, start=1.01, end=1.99)[0] == expected
    assert numbers(path, every, start=seconds[-1], end=1e9)[0] == shown[-1:]
    with pytest.raises(MediaError, match=r"a\.\w+: start 1000 s is beyond its end \(\d+\.\d s\)$"):
        read_media(path, every, start=1000.0, end=1001.0)

def test_the_table_in_the_documentation_is_of_these_formats():
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    assert [row for row in re.findall(r"^\| ([^|]+?) \|", page, re.M) if row in FORMATS] == list(FORMATS)

# ---- the cases -------------------------------------------------------------------------------------------------------

CASES_SHOWN = {  # file -> numbers, frames per second
    "plain_6s.mp4": (range(60), 10), "mp4_named.gif": (range(60), 10), "trim_start_editlist.mp4": (range(15, 60), 10),
    "trim_end_editlist.mp4": (range(20), 10), "hevc_closed_gop_b2_120f.mp4": (range(120), 30),
    "camcorder_h264.mts": (range(120), 25), "ts_named.mp4": (range(120), 25), "mpeg1.mpg": (range(60), 25),
    "xvid_bframes.avi": (range(120), 25), "wmv2.wmv": (range(120), 25), "hevc_open_gop.mp4": (range(120), 25),
    "browser_recorder.webm": (range(120), 25), "animated.webp": (range(12), 10), "pal8.avi": (range(10), 10),
    "more/two_edits.mp4": ([*range(50, 75), *range(10, 35)], 25), "more/repeat.mp4": ([*range(25, 50)] * 3, 25),
    "more/cut_start.ts": (range(30, 120), 25), "more/cat_twice.ts": ([*range(120)] * 2, 25),
    "more/size_change.webm": ([*range(50)] * 2, 25), "more/theora.ogv": (range(120), 25),
    "more/xvid.avi": ([*range(117), 119], 25)}

def case(name):
    return CASES / name if name.startswith("more/") else CASES / "video" / name

@pytest.mark.parametrize("name", CASES_SHOWN)
def test_cases(name):
    shown, fps = CASES_SHOWN[name]
    taken, seconds = numbers(case(name), every, case_number)
    exact = 1e-6 if name != "more/xvid.avi" else 0.041                     # its encoder has dropped frames
    assert taken == list(shown) and seconds == pytest.approx([i / fps for i in range(len(shown))], abs=exact)
    for _ in range(20):                                                    # decord refused some of them at random
        positions = sorted(random.choices(range(len(shown)), k=4))
        taken, _ = numbers(case(name), lambda first, last, fps, p=positions: p, case_number)
        assert taken == [shown[p] for p in positions]

def test_variable_rates():
    phone, screen = case("vfr_phone.mp4"), case("vfr_screen.mp4")
    taken, seconds = numbers(phone, every, case_number)
    assert taken == list(range(100))
    assert seconds == pytest.approx([i / 30 if i < 60 else 2 + 0.2 * (i - 60) for i in range(100)], abs=0.001)
    taken, seconds = numbers(phone, every, case_number, start=4.0, end=6.0)
    assert taken == list(range(70, 80)) and seconds[0] == pytest.approx(4.0)
    assert numbers(screen, every, case_number)[1] == pytest.approx([0, 0.1, 0.2, 8, 8.1, 9.9, 10], abs=0.001)
    assert numbers(screen, every, case_number, start=4.0, end=6.0) == ([2], [pytest.approx(0.2)])
    assert numbers(screen, every, case_number, start=7.0, end=9.0)[0] == [2, 3, 4]
    taken, _ = numbers(phone, train_frame_selector(8, "rand", random.Random(0)), case_number, start=4.0, end=6.0)
    assert all(70 <= n < 80 for n in taken) and len(taken) == 8

def test_a_video_that_begins_late():
    taken, seconds = numbers(case("more/late.mp4"), every, case_number)
    assert taken == list(range(120)) and seconds[0] == pytest.approx(2.0) and seconds[-1] == pytest.approx(6.76)
    assert numbers(case("more/late.mp4"), every, case_number, start=3.0, end=3.2)[0] == [25, 26, 27, 28, 29]

def test_joined_recordings_and_missing_stamps_keep_the_known_times(tmp_path):
    """H.264 in AVI: the last frames have no time stamp; in a joined TS, time begins again."""
    times = [i * 40 + 800 * (i >= 30) for i in range(60)]                  # a pause after frame 29
    write_video(tmp_path / "a.mkv", times=times, width=160, height=96, bf=0)
    with av.open(str(tmp_path / "a.mkv")) as source, av.open(str(tmp_path / "a.ts"), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    (tmp_path / "twice.ts").write_bytes((tmp_path / "a.ts").read_bytes() * 2)
    taken, seconds = numbers(tmp_path / "twice.ts", every)
    once = [t / 1000 for t in times]
    assert taken == [*range(60)] * 2
    assert seconds == pytest.approx([*once, *(once[-1] + 0.04 + t for t in once)], abs=0.01)
    assert numbers(tmp_path / "twice.ts", every, start=4.5, end=4.7)[0] == [29]
    assert numbers(tmp_path / "twice.ts", every, start=5.45, end=5.6)[0] == [36, 37, 38, 39]

def test_a_last_frame_that_stands_long(tmp_path):
    path = write_video(tmp_path / "a.mkv", frames=11, times=[100 * i for i in range(10)] + [9000], width=160, height=96)
    assert numbers(path, every, start=4.0, end=6.0)[0] == [9]
    images = [Image.fromarray(painted(i, 160, 96)) for i in range(4)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=[100, 100, 100, 5000])
    assert numbers(tmp_path / "a.gif", every, start=2.0, end=4.0)[0] == [3]
    with pytest.raises(MediaError, match=r"start 6 s is beyond its end \(5.3 s\)"):
        read_media(tmp_path / "a.gif", every, start=6.0, end=7.0)

def test_too_many_pixels_are_refused(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", frames=10)
    monkeypatch.setattr("infra.containers.PIXEL_LIMIT", 8 * 320 * 240)
    assert len(numbers(path, lambda first, last, fps: range(8))[0]) == 8
    assert reason(path) == "10 frames of 320 x 240 take too much memory: make the video smaller"

def test_a_camera_s_stream_of_jpegs_is_a_video(tmp_path):
    path = write_video(tmp_path / "a.mjpeg", codec="mjpeg", pix_fmt="yuvj420p", frames=20)
    assert numbers(path, every)[0] == list(range(20))

def test_a_start_beyond_all_numbers():
    lines = []
    assert len(read_eval_frames(case("plain_6s.mp4"), 4, (1e300, 2e300), warnings=lines)) == 4 and len(lines) == 1

def test_pictures_are_upright():
    """As FFmpeg shows them: the corners of a player's picture, from left to right and from top to bottom."""
    corners = {"rot90": "GWRB", "rot180": "WBGR", "rot270": "BRWG"}
    for name, expected in corners.items():
        (frame,), _ = read_media(case(f"more/{name}.mp4"), lambda first, last, fps: [3])
        assert frame.shape == (3, 96, 160) if name == "rot180" else (3, 160, 96)
        pixels = [frame[:, y, x].tolist() for y in (3, -4) for x in (3, -4)]
        names = {(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (1, 1, 1): "W"}
        assert "".join(names[tuple(int(c > 128) for c in pixel)] for pixel in pixels) == expected

def test_every_pixel_is_decord_s(tmp_path):
    """Answers and weights of earlier versions stay, where decord was right: also for 10 bits and odd sizes."""
    for i, options in enumerate((dict(), dict(pix_fmt="yuv420p10le"), dict(pix_fmt="yuv444p", width=161, height=97),
                                 dict(pix_fmt="yuvj420p"), dict(codec="libvpx-vp9"), dict(codec="libsvtav1"))):
        path = write_video(tmp_path / f"{i}.mp4", **{"frames": 30, "width": 160, "height": 96, **options})
        def select(first, last, fps):
            return [0, 7, 8, 20, 29]
        ours, theirs = media.read_video(path, select), [media.read_decord(path, select) for _ in range(3)]
        assert any(torch.equal(ours[0], frames) for frames, _ in theirs)   # under load, decord gives others at times
        assert ours[1] == pytest.approx(theirs[0][1])

def test_decord_can_be_chosen(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", frames=10)
    monkeypatch.setenv("VIDEO_READER", "decord")
    monkeypatch.setattr(media, "read_video", None)
    assert numbers(path, every)[0] == list(range(10))

# ---- times -----------------------------------------------------------------------------------------------------------

def test_the_benchmark_s_frames_are_the_rule_s(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    taken = [number(frame.permute(1, 2, 0).numpy()) for frame in read_eval_frames(path, 16)]
    assert taken == eval_frame_indices(16, 59, 25.0)

def test_the_benchmark_counts_at_the_average_rate():
    """mvbench.ipynb multiplies seconds by the average rate, also where the rate varies."""
    rate = float(av.open(str(case("vfr_phone.mp4"))).streams.video[0].average_rate)
    frames, lines = read_eval_frames(case("vfr_phone.mp4"), 4, (4.0, 6.0)), []
    assert [case_number(f.permute(1, 2, 0).numpy()) for f in frames] == eval_frame_indices(4, 99, rate, (4.0, 6.0))
    read_eval_frames(case("plain_6s.mp4"), 4, (4.0, 60.0), warnings=lines)
    assert lines == []                                                     # an end beyond the video: as the rule says
    frames = read_eval_frames(case("plain_6s.mp4"), 4, (30.0, 60.0), warnings=lines)
    assert lines == [f"{case('plain_6s.mp4')}: start 30 s is beyond its end (6.0 s)"] and len(frames) == 4

def test_the_official_arithmetic_of_clips(tmp_path):
    """At an equal rate: int(start * fps) is the first frame, and int((end - start) * fps) frames follow."""
    path = write_video(tmp_path / "a.mp4", rate=25)
    for start, end in ((0.4, 1.2), (0.41, 1.21), (0.0, 0.03), (0.5, 0.51), (2.39, 99.0)):
        first, n = int(start * 25), max(int((end - start) * 25), 1)
        assert numbers(path, every, start=start, end=end)[0] == list(range(first, min(first + n, 60)))
    taken, seconds = numbers(path, train_frame_selector(4, "middle"), start=0.4, end=1.2)
    assert taken == [12, 17, 22, 27] and seconds == pytest.approx([i / 25 for i in taken])

# ---- one sentence ----------------------------------------------------------------------------------------------------

def reason(path, **options):
    with pytest.raises(MediaError) as caught:
        read_media(path, every, **options)
    assert "\n" not in str(caught.value) and "av_" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ").removeprefix(f"'{path}': ")

def test_what_cannot_be_read_says_why(tmp_path, capfd):
    plain = case("plain_6s.mp4").read_bytes()
    fast = write_video(tmp_path / "fast.mp4", frames=60, movflags="faststart").read_bytes()
    files = {"index.mp4": plain[:3000], "tail.mp4": fast[:len(fast) * 2 // 3], "empty.mp4": b"",
             "words.mp4": b"this is no video" * 100, "zeros.avi": bytes(5000), "start.mkv": b"\x1aE\xdf\xa3"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert reason(tmp_path / "index.mp4") == "torn: its index (moov) is missing or damaged"
    assert re.fullmatch(r"torn: \d\d of 60 frames are there", reason(tmp_path / "tail.mp4"))
    assert reason(tmp_path / "empty.mp4") == "the file is empty"
    assert reason(tmp_path / "absent.mp4") == "no such file"
    assert reason(case("more/song.mp3")) == "no video stream, audio only"
    for name in ("words.mp4", "zeros.avi", "start.mkv"):
        assert reason(tmp_path / name).startswith("cannot be decoded as a video")
    with wave.open(str(tmp_path / "a.mp4"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    assert reason(tmp_path / "a.mp4") == "no video stream, audio only"
    assert capfd.readouterr().err == ""                                    # nothing of FFmpeg's own lines

def test_names_and_folders_that_no_file_can_have(tmp_path):
    for name in ("x" * 300 + ".mp4", "a\0b.mp4", "half \ud83d a character.mp4"):
        with pytest.raises(MediaError) as caught:
            read_media(tmp_path / name, every)
        str(caught.value).encode()                                         # it can be printed
    for name in ("with a colon: a.mp4", "http:b.mp4", "a%03d.mp4", "a?b#c.mp4", "é 日本.mp4", "-i.mp4"):
        shutil.copy(case("plain_6s.mp4"), tmp_path / name)
        assert numbers(tmp_path / name, lambda first, last, fps: [7, last], case_number)[0] == [7, 59]

@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(116, "Stale file handle"),
                                   OSError(5, "Input/output error")])
def test_a_disk_that_fails(tmp_path, monkeypatch, error):
    path = write_video(tmp_path / "a.mp4", frames=5)
    def fail(*args, **options):
        raise error
    monkeypatch.setattr(os, "stat", fail)
    assert error.strerror in reason(path)

# ---- damage ----------------------------------------------------------------------------------------------------------

def damaged(data, how, rng):
    data = bytearray(data)
    if how == "cut":
        return data[:rng.randrange(1, len(data))]
    if how == "hole":
        begin, length = rng.randrange(len(data)), rng.randrange(1, len(data) // 4)
        data[begin:begin + length] = bytes(min(length, len(data) - begin))
    elif how == "dropped":
        begin = rng.randrange(len(data))
        del data[begin:begin + rng.randrange(1, len(data) // 8)]
    else:
        for _ in range(rng.choice([1, 5, 50])):
            data[rng.randrange(len(data))] = rng.randrange(256)
    return data

CONTAINERS = {name.split(".")[-1]: name for name in CASES_SHOWN if name not in ("mp4_named.gif", "ts_named.mp4")}

@pytest.mark.parametrize("name", [*CONTAINERS.values(), "mkv", "flv"])
def test_200_damaged_files_of_each_container(name, tmp_path):
    """Frames or one sentence, soon, and with as much memory for the last as for the first."""
    path = case(name) if "." in name else write_video(tmp_path / f"a.{name}", width=160, height=96)
    data, memory = path.read_bytes(), []
    for seed in range(200):
        rng, torn = random.Random(seed), tmp_path / f"torn{path.suffix}"
        torn.write_bytes(damaged(data, rng.choice(["cut", "hole", "wrong bytes", "dropped"]), rng))
        start = time.time()
        try:
            frames, seconds = read_media(torn, lambda first, last, fps: [first, (first + last) // 2, last])
            assert frames.shape[:2] == (3, 3) and seconds == sorted(seconds)
        except MediaError as error:
            assert str(error).startswith(f"{torn}: ") and "\n" not in str(error)
        assert time.time() - start < 20
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert memory[-1] - memory[20] < 60_000                                # KB

def test_a_damaged_piece_is_told_from_its_neighbours(tmp_path):
    """A hole in the second half of a video: the frames before it are read, those in it are refused."""
    path = write_video(tmp_path / "a.mp4", frames=60, g=10, bf=0)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data[packets[30][0] + 4:packets[30][0] + packets[30][1]] = bytes(packets[30][1] - 4)
    path.write_bytes(data)
    assert numbers(path, lambda first, last, fps: [3, 12, 29])[0] == [3, 12, 29]
    assert numbers(path, lambda first, last, fps: [3, 42])[0] == [3, 42]
    assert re.match(r"damaged at 1\.\d s", reason(path))

def test_what_check_decodes_is_what_training_meets(tmp_path):
    """select=None decodes everything between start and end, and keeps nothing."""
    frames, seconds = read_media(case("plain_6s.mp4"), None, start=1.0, end=3.0)
    assert frames is None and seconds == pytest.approx([1 + i / 10 for i in range(20)])
    with pytest.raises(MediaError, match="torn"):
        torn = tmp_path / "torn.mp4"
        torn.write_bytes(case("plain_6s.mp4").read_bytes()[:3000])
        read_media(torn, None)

# ---- decoders that hang ----------------------------------------------------------------------------------------------

def test_a_decoder_that_hangs_is_left_behind(tmp_path, monkeypatch):
    """Its clip is replaced like every unreadable one, and the worker continues."""
    for i in range(3):
        write_video(tmp_path / f"{i}.mp4", frames=10)
    real = media.read_video
    monkeypatch.setattr(media, "read_video", lambda path, *args: time.sleep(600) if "1.mp4" in str(path) else
                        real(path, *args))
    monkeypatch.setattr(read_media, "__defaults__", (False, 0.5, None, None, None))
    (tmp_path / "a.json").write_text(json.dumps([{"video": f"{i}.mp4", "caption": f"clip {i}"} for i in range(3)]))
    dataset = VideoTextDataset(load_corpus([[str(tmp_path / "a.json"), str(tmp_path), "video"]]), 2, Transform(32))
    loader = torch.utils.data.DataLoader(dataset, None, num_workers=1, worker_init_fn=ignore_signals)
    start = time.time()
    samples = list(loader)
    assert time.time() - start < 30 and [s["text"] for s in samples] == ["clip 0", "clip 2", "clip 2"]
    assert samples[1]["bad"] == [f"{tmp_path / '1.mp4'}: decoding takes more than 0.5 seconds"]

def test_an_abandoned_read_ends(tmp_path):
    """A long video that exceeds its time limit does not occupy a core until its end."""
    path = write_video(tmp_path / "a.mp4", frames=250, width=640, height=480, g=250)
    import threading
    with pytest.raises(MediaError, match="takes more than 0.001 seconds"):
        read_media(path, every, limit=0.001)
    deadline = time.time() + 5
    while any(getattr(thread, "is_abandoned", False) for thread in threading.enumerate()) and time.time() < deadline:
        time.sleep(0.01)
    assert not any(getattr(thread, "is_abandoned", False) for thread in threading.enumerate())

def test_a_failed_read_leaves_no_reader_to_the_garbage_collector(tmp_path, monkeypatch):
    """Which would run in a loader process forked meanwhile, where decord's destructor aborts."""
    path = write_video(tmp_path / "a.mp4", frames=10)
    monkeypatch.setenv("VIDEO_READER", "decord")
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
