"""How make demo runs its steps, with a stand-in for python that only notes what it is asked to do.

Run: pytest tests/test_demo.py
"""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REPORT = "runs/toy/stage3/mvbench/report.html"
DEMO = {  # command -> the file that tells make that it is done
    "-m toy.world --out data/toy": "data/toy/meta.json",
    "train.py --stage 1": "runs/toy/stage1/config.json", "train.py --stage 2": "runs/toy/stage2/config.json",
    "train.py --stage 3": "runs/toy/stage3/config.json", "mvbench.py --ckpt runs/toy/stage3 --controls all": REPORT}
PRETRAIN = "-m toy.pretrain --data data/pretraining"
STANDINS = {
    "-m toy.world --out data/pretraining --clips 96000 --texts 120000 --seed 1000": "data/pretraining/meta.json",
    f"{PRETRAIN} llm": "runs/toy/llm_fp32/config.json", f"{PRETRAIN} vit": "runs/toy/vit/config.json",
    f"{PRETRAIN} bert": "runs/toy/bert/config.json", PRETRAIN: "runs/toy/init/config.json"}
PYTHON = f"""#!{sys.executable}
import os, pathlib, signal, sys, time
command = " ".join(sys.argv[1:])
if command.startswith("-c "):
    sys.exit(0)
def note(line):
    with open("log", "a") as f:
        f.write(line + "\\n")
def save(*_):
    note(f"saved {{command}}")
    sys.exit(130)
signal.signal(signal.SIGINT, save)
note(f"start {{command}} | {{os.environ.get('OMP_NUM_THREADS', 'all')}} | {{sys.stderr.isatty()}}")
end = time.time() + 30
other = {{"{PRETRAIN} vit": "llm", "{PRETRAIN} llm": "vit"}}.get(command, "")
while other and f"start {PRETRAIN} {{other}}" not in open("log").read() and time.time() < end:
    time.sleep(0.02)
while os.path.exists("slow") and time.time() < end:
    time.sleep(0.02)
if os.path.exists("broken") and open("broken").read() == command:
    sys.exit(3)
target = pathlib.Path({DEMO | STANDINS!r}[command])
target.parent.mkdir(parents=True, exist_ok=True)
target.touch()
note(f"end {{command}}")
"""

@pytest.fixture
def folder(tmp_path):
    """A checkout whose .venv is set up."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.txt", ".venv/python", ".venv/runtime", "log"):    # in the order that make expects
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path

def start(folder, goal="demo"):
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS" and "MAKE" not in name}
    return subprocess.Popen(["make", goal], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True, env=env)

def log_of(folder, kind="start"):
    lines = (folder / "log").read_text().splitlines()
    return [line.removeprefix(f"{kind} ") for line in lines if line.startswith(kind)]

def test_the_demo_runs_its_steps_in_turn_and_none_again(folder):
    process = start(folder)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Where things are" in printed and "What to try next" in printed, printed
    assert [line.split(" | ")[:2] for line in log_of(folder)] == [[command, "all"] for command in DEMO]

    # all is done: nothing runs again; what is missing runs, and nothing that came after it
    (folder / "log").write_text("")
    assert start(folder).wait(60) == 0 and log_of(folder) == []
    (folder / REPORT).unlink()
    assert start(folder).wait(60) == 0 and log_of(folder, "end") == [list(DEMO)[-1]]

def test_the_demo_stops_at_the_first_failure_and_resumes_there(folder):
    (folder / "broken").write_text("train.py --stage 1")
    process = start(folder)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "Where things are" not in printed
    assert log_of(folder, "end") == list(DEMO)[:1]
    (folder / "broken").unlink()
    assert start(folder).wait(60) == 0 and log_of(folder, "end") == list(DEMO)

def test_from_nothing_two_lanes_with_one_thread_each_come_first(folder):
    """Each pretraining waits for the other to start, so that neither ends unless both run."""
    process = start(folder, "demo-from-nothing")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    starts = [line.split(" | ")[0] for line in log_of(folder)]
    assert sorted(starts[:5]) == sorted(STANDINS) and starts[0] == list(STANDINS)[0] and starts[5:] == list(DEMO)
    assert starts.index(f"{PRETRAIN} vit") < starts.index(f"{PRETRAIN} bert") < starts.index(PRETRAIN) == 4
    threads = {command: n for command, n, _ in (line.split(" | ") for line in log_of(folder))}
    assert {command for command, n in threads.items() if n == "1"} == set(list(STANDINS)[1:4])

def test_ctrl_c_lets_both_lanes_save(folder):
    (folder / "slow").touch()
    (folder / "data/pretraining").mkdir(parents=True)
    (folder / "data/pretraining/meta.json").touch()
    process, end = start(folder, "demo-from-nothing"), time.time() + 30
    while len(log_of(folder)) < 2 and time.time() < end:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)                                        # as a terminal does
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert sorted(log_of(folder, "saved")) == [f"{PRETRAIN} llm", f"{PRETRAIN} vit"]
