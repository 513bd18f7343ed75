"""bench.gpu, as far as a CPU can tell: every part at tiny sizes; parts that fail, crash and hang beside one that works.

Run: pytest tests/test_bench_gpu.py
"""
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from bench import gpu, gpu_speed, memory

def record_of(out, number):
    return json.loads((out / f"part{number}.json").read_text())

@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Of the parts' processes: a CPU with one thread, and this file, in which the functions below are."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

# ---- all of it

def test_every_part_runs_at_tiny_sizes(tmp_path, capsys):
    before = sorted(gpu.RESULTS.iterdir())
    gpu.main(["--tiny", "--out", str(tmp_path), "--commit", "abc1234", "--minutes", "60"])
    page, records = (tmp_path / "gpu_cpu.md").read_text(), [record_of(tmp_path, n) for n in gpu.PARTS]
    assert [record["status"] for record in records] == ["done"] * 6, (tmp_path / "log.txt").read_text()[-3000:]
    assert len(list(tmp_path.iterdir())) <= 8 and sorted(gpu.RESULTS.iterdir()) == before
    for number, part in gpu.PARTS.items():
        assert f"## {number}. {part.title}: done" in page and f"--tiny --only {number} --out DIR`, 20" in page
    assert page.count("commit abc1234") == 6 and page.count("not run: no CUDA device") > 3 and "Error" not in page

    # what a card must show, and the CPU does
    assert page.count("within") > 30 and "ABOVE" not in page and "nan" not in page
    (answers,) = (row for row in records[0]["rows"] if "answers" in row)
    assert answers["answers"] == "16" and answers["differ"] == "0"
    assert records[4]["rows"][-1] | {"what": ""} == {"what": "", "stopped and resumed": "0.0e+00",
                                                     "only repeated": "0.0e+00"}
    variants = [(row["stage"], row["variant"]) for row in records[1]["rows"] if "variant" in row]
    assert variants == [*((n, "plain") for n in "321"), *(("3", name) for name in (
        gpu_speed.INT8, gpu_speed.RECOMPUTE, gpu_speed.COMPILE))]
    assert [row["stage"] for row in records[5]["rows"]] == [
        "stage 0 vit", "stage 0 bert", "stage 0 llm", "stage 1", "stage 2", "stage 3", "MVBench"]

# ---- parts that do not end well

def works(report):
    report.row(what="a figure", result=[1, 2])

def raises(report):
    works(report)
    raise RuntimeError("CUDA error: out of | order\nmore lines")

def attempts(report):
    report.attempt("the first", raises)
    report.attempt("the second", works)

def crashes(report):
    works(report)
    os.abort()

def hangs(report):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report.row(what="a process of the part", result=sleeper.pid)
    time.sleep(600)

def part(function, share, *needs):
    return gpu.Part(function.__name__, f"test_bench_gpu.{function.__name__}", share, needs)

def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

def test_the_others_survive_a_part_that_raises_crashes_or_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {1: part(raises, 20), 2: part(crashes, 20), 3: part(hangs, 4), 4: part(
        works, 20, "torch", "transformerz", "pefd"), 5: part(works, 20)})
    start = time.monotonic()
    gpu.main(["--tiny", "--out", str(tmp_path), "--minutes", "3"])
    assert time.monotonic() - start < 180
    statuses = [record_of(tmp_path, n)["status"] for n in range(1, 6)]
    assert statuses[0] == "failed: RuntimeError: CUDA error: out of | order"
    assert statuses[1] == "failed: ended by signal 6" and statuses[2].startswith("stopped at its limit of")
    assert statuses[3:] == ["not run: needs transformerz and pefd", "done"]

    # every row is on the page, and nothing of the part that hung goes on
    page = (tmp_path / "gpu_cpu.md").read_text()
    assert page.count("| a figure | 1, 2 |") == 3 and all(status in page for status in statuses)
    assert not is_alive(record_of(tmp_path, 3)["rows"][0]["result"])
    assert "Traceback" in (tmp_path / "log.txt").read_text()

def test_a_measurement_that_fails_is_a_row_and_the_next_one_runs(tmp_path):
    (tmp_path / "part1.json").write_text('{"rows": []}')
    gpu.run_part("test_bench_gpu.attempts", tmp_path / "part1.json", 60, "True")
    record, figure = record_of(tmp_path, 1), {"what": "a figure", "result": "1, 2"}
    error = {"what": "the first", "result": "RuntimeError: CUDA error: out of | order"}
    assert record["status"] == "done, but 1 of its rows failed" and record["rows"] == [figure, error, figure]

def test_ctrl_c_keeps_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {1: part(works, 1), 2: part(hangs, 9), 3: part(works, 1)})

    def press_ctrl_c():
        while not (tmp_path / "part2.json").is_file() or not record_of(tmp_path, 2)["rows"]:
            time.sleep(0.1)
        os.kill(os.getpid(), 2)

    threading.Thread(target=press_ctrl_c, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--tiny", "--out", str(tmp_path), "--minutes", "5"])
    page = (tmp_path / "gpu_cpu.md").read_text()
    assert "## 1. works: done" in page and "## 2. hangs: stopped by Ctrl-C" in page and "## 3. works: not run\n" in page
    assert "| a process of the part |" in page and not is_alive(record_of(tmp_path, 2)["rows"][0]["result"])

def test_without_time_a_part_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {1: part(works, 1)})
    gpu.main(["--tiny", "--out", str(tmp_path), "--minutes", "0.05"])
    assert "## 1. works: not run: no time was left" in (tmp_path / "gpu_unknown.md").read_text()

def test_parts_can_be_chosen_and_a_page_keeps_those_of_earlier_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {1: part(works, 1), 2: part(works, 1), 3: part(works, 1)})
    for only, commit in (("1,3", "aaa"), ("3", "bbb")):
        gpu.main(["--tiny", "--out", str(tmp_path), "--only", only, "--commit", commit])
    page = (tmp_path / "gpu_cpu.md").read_text()
    assert page.count("commit aaa") == page.count("commit bbb") == 1 and "## 2. works: not run\n" in page
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    assert "aaa" not in gpu.write_page(gpu.Options(str(tmp_path)), "-").read_text()            # a rehearsal's rows
    with pytest.raises(ValueError, match="--only knows no part 7"):
        gpu.main(["--tiny", "--out", str(tmp_path), "--only", "1,7"])

@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_only_the_tiny_sizes_run(tmp_path):
    with pytest.raises(ValueError, match="no CUDA device here; --tiny"):
        gpu.main(["--out", str(tmp_path)])

def test_the_page_is_also_in_results_if_it_can_be(tmp_path, monkeypatch, capsys):
    card = "NVIDIA H100 80GB HBM3"
    record = {"status": "done", "card": card, "device": f"{card}, 79.1 GiB", "rows": [], "date": "2026-11-28 15:00",
              "commit": "abc", "torch": "2.11.0", "seconds": 3, "tiny": False}
    (tmp_path / "part1.json").write_text(json.dumps(record))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    page = gpu.write_page(gpu.Options(str(tmp_path)), "580.1")
    text = (tmp_path / "results" / "gpu_nvidia_h100_80gb_hbm3.md").read_text()
    assert page.read_text() == text and "Driver 580.1" in text and "79.1 GiB" in text

    (tmp_path / "a_file").write_text("")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "a_file" / "results")
    gpu.write_page(gpu.Options(str(tmp_path)), "580.1")
    assert "is not written" in capsys.readouterr().out

# ---- what only a card would show

def test_a_profile_tells_kernels_and_what_made_the_host_wait():
    """Names as CUDA 12 and 13 have them. What is outside of the step is the profiler's own."""
    def event(name, start, device=DeviceType.CPU):
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=start + 1))

    step = event("training step", 10)
    step.time_range.end = 100
    attention, kernels, waits = gpu_speed.read_profile([
        step, event("training step", 11, DeviceType.CUDA), event("cudaDeviceSynchronize", 5),
        event("aten::_scaled_dot_product_flash_attention", 20), event("cudaLaunchKernel", 21),
        event("void pytorch_flash::flash_fwd_kernel<...>", 120, DeviceType.CUDA),
        event("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(...)", 121, DeviceType.CUDA),
        event("ampere_bf16_s16816gemm", 122, DeviceType.CUDA), event("cudaMemcpyAsync", 30),
        event("Memcpy HtoD (Pinned -> Device)", 12, DeviceType.CUDA), event("cudaStreamSynchronize", 31),
        event("cudaMalloc", 32), event("Memcpy DtoH (Device -> Pinned)", 131, DeviceType.CUDA),
        event("Memcpy DtoH (Device -> Pageable)", 130, DeviceType.CUDA), event("cudaDeviceSynchronize_v2", 101)])
    assert attention == {"aten::_scaled_dot_product_flash_attention": 1} and len(kernels) == 2
    assert waits == {"cudaStreamSynchronize": 1, "cudaMalloc": 1, "Memcpy DtoH (Device -> Pageable)": 1}
    names = [*kernels, "cudnn_generated_fort_native_sdpa_sm90_knob_3_64x64x64_4x1x1_kernel0_0"]
    assert [bool(gpu_speed.FLASH.search(name)) for name in names] == [True, False, True]       # cuDNN's is one, too

@pytest.mark.parametrize("gib, plain, int8, recompute", [(23.2, 0, 1, 1), (39.1, 3, 3, 3), (79.2, 8, 8, 8)])
def test_the_batch_is_what_a_card_has_room_for(monkeypatch, gib, plain, int8, recompute):
    """Stage 3 on cards of 24, 40 and 80 GB. Variants have the plain step's batch, if that fits."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(gib * 2**30), 0))
    for variant, clips in (("", plain), (gpu_speed.INT8, int8), (gpu_speed.RECOMPUTE, recompute)):
        if clips:
            assert gpu_speed.real_step(3, variant).batch == clips
        else:
            with pytest.raises(MemoryError, match="vicuna-7b does not fit: 23.2 GiB are free"):
                gpu_speed.real_step(3, variant)

def test_the_counts_on_the_page_are_bench_memory_s():
    step = memory.Options(3, "vicuna-7b", batch=4, dtype="bf16")
    first, each = gpu_speed.COUNTED[3][""]
    counted = memory.counted_step(memory.step_config(step), step)["peak"] / 2**30
    assert counted == pytest.approx(first + 3 * each, rel=5e-3)
