"""What one CUDA card says in nine minutes, on one page: numbers, speed, memory, kernels.

    1 same numbers   numbers of the official code, a step of each stage, greedy answers: the card beside the CPU
    2 real size      a step of stages 1 to 3 of vicuna-7b: time, memory, operations, attention kernels, host waits
    3 beside others  the same step built from transformers and peft
    4 MVBench        400 questions at the real size, by the engine and one by one
    5 processes      nccl with one process: DDP and FSDP2; a run that is stopped and resumed
    6 toy            world, stages 1 to 3 and MVBench, as many steps as the time allows

A part is a process with a time limit, its share of what is left. If it fails or hangs, its rows so far stay, and the
others run. OUT gets partN.json after each row, log.txt, and after each part the page gpu_CARD.md, which is also written
to results/. Parts of earlier runs stay on the page until they run again. Weights are random and made on the card.
Not here: what the parts do (gpu_checks.py, gpu_speed.py); several cards, real weights, real videos.

A bare machine needs Python 3.10 and torch 2.6 or newer, and wheels of av, numpy, pillow, safetensors, sentencepiece and
tqdm; of transformers and peft for part 3; a C compiler and Python's headers for --compile.

    python -m bench.gpu --out DIR              # on a card
    python -m bench.gpu --tiny --out DIR       # a rehearsal: every part at tiny sizes, with or without a card
"""
import argparse
import contextlib
import datetime
import gc
import importlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from infra.cli import add_options, option, read_options, run
from infra.files import read_json, save_text, write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
START_UP = 5            # seconds under which no part is started

@dataclass
class Options:
    out: str = option("runs/gpu", "folder of the page, a JSON file for each part, and log.txt")
    minutes: float = option(9.0, "for all parts together")
    only: str = option("", "parts to run, separated by commas: 1,3")
    tiny: bool = option(False, "tiny sizes, on the CPU where there is no card; the page is written to OUT only")
    commit: str = option("", "the commit that the page names (default: git's)")

@dataclass
class Part:
    title: str
    function: str           # "module.function", which is called with a Report
    share: float            # of the time
    needs: tuple = ()       # modules that may be missing

PARTS = {
    1: Part("Same numbers as on the CPU", "bench.gpu_checks.same_numbers", 60),
    2: Part("A training step at the real size", "bench.gpu_speed.real_size", 180),
    3: Part("Beside transformers and peft", "bench.gpu_speed.beside_transformers", 85, ("transformers", "peft")),
    4: Part("MVBench at the real size", "bench.gpu_speed.mvbench_real_size", 75),
    5: Part("Processes, stopping and resuming", "bench.gpu_checks.processes", 60),
    6: Part("A toy run", "bench.gpu_checks.toy", 80)}

# ---------------------------------------------------------------------------------------------- in a part's own process

class Report:
    """What a part writes: rows of tables, in a file that is complete after each of them."""
    def __init__(self, path, seconds, tiny):
        self.path, self.tiny, self.deadline, self.failed = Path(path), tiny, time.monotonic() + seconds, 0
        self.record = read_json(path) | {"card": "CPU", "device": f"CPU, {torch.get_num_threads()} threads"}
        if torch.cuda.is_available():
            name, size = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1] / 2 ** 30
            self.record |= {"card": name, "device": f"{name}, {size:.1f} GiB, CUDA {torch.version.cuda}"}
        self.save("running")

    def row(self, **columns):
        """Adds a row. Rows that have the same columns are one table of the page."""
        print(columns, flush=True)
        self.record["rows"].append({name: as_text(value) for name, value in columns.items()})
        self.save("running")

    def attempt(self, what, call, *args):
        """call(self, *args), which writes rows. If it fails, a row says why, and the part continues."""
        if torch.cuda.is_available():                          # frees what the call before used, compiled code too
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()
        try:
            call(self, *args)
        except Exception as error:
            traceback.print_exc()
            self.failed += 1
            self.row(what=what, result=one_line(error))

    def save(self, status):
        write_json(self.record | {"status": status}, self.path)

def as_text(value):
    """{"a": 1} -> "a 1"; [1, 2] -> "1, 2"."""
    if isinstance(value, dict):
        value = [f"{name} {x}" for name, x in value.items()] or ["none"]
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

def one_line(error):
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"

def run_part(function, path, seconds, tiny):
    """Calls a part's function; whatever it raises becomes its status."""
    report = Report(path, float(seconds), tiny == "True")
    try:
        module, _, name = function.rpartition(".")
        getattr(importlib.import_module(module), name)(report)
        report.save(f"done, but {report.failed} of its rows failed" if report.failed else "done")
    except BaseException as error:                             # SystemExit of argparse, too
        report.save(f"failed: {one_line(error)}")
        raise

# ------------------------------------------------------------------------------------------------ in the first process

def start_part(number, options, commit, seconds, scratch):
    """Runs a part in a process group of its own, which ends after these seconds; its record is in OUT/partN.json."""
    # a record for the page until the part writes its own
    path, part = Path(options.out).resolve() / f"part{number}.json", PARTS[number]
    now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M")
    record = {"date": now, "commit": commit, "torch": torch.__version__, "tiny": options.tiny, "rows": [], "seconds": 0}
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing or seconds < START_UP:
        reason = f"needs {' and '.join(missing)}" if missing else "no time was left"
        return write_json(record | {"status": f"not run: {reason}"}, path)
    write_json(record | {"status": "running"}, path)

    # its temporary files are in scratch, and go with it also if the part is killed
    code = "import sys; from bench.gpu import run_part; run_part(*sys.argv[1:])"
    command = [sys.executable, "-c", code, part.function, str(path), f"{seconds:.0f}", str(options.tiny)]
    env, start = os.environ | {"TMPDIR": scratch, "PYTHONUNBUFFERED": "1"}, time.monotonic()
    with open(path.with_name("log.txt"), "a") as log:
        print(f"\n==== part {number}, {now}, at most {seconds:.0f} s", file=log, flush=True)
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
    status = "stopped by Ctrl-C"
    try:
        code = process.wait(seconds)
        status = f"failed: ended by signal {-code}" if code < 0 else f"failed: exit code {code}, see log.txt"
    except subprocess.TimeoutExpired:
        status = f"stopped at its limit of {seconds:.0f} s"
    finally:
        # end what is left of its group; a process that waits for a driver may not die
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        record = read_json(path)
        status = status if record["status"] == "running" else record["status"]
        write_json(record | {"status": status, "seconds": round(time.monotonic() - start)}, path)

def write_page(options, driver):
    """The page of all parts in OUT, whichever run they are of -> its path. Also to results/, unless sizes are tiny."""
    out = Path(options.out)
    records = {n: read_json(path) for n in PARTS if (path := out / f"part{n}.json").is_file()}
    records = {n: record for n, record in records.items() if record["tiny"] == options.tiny}        # no rehearsal's
    card = next((record["card"] for record in records.values() if "card" in record), "unknown")
    lines = [f"# bench.gpu on {card}", "",
             f"Driver {driver}, Python {sys.version.split()[0]}. Weights are random. Each part names its command, "
             'date, commit and card; what was not reached is "not run".',
             *["", "**Tiny sizes**: this is a rehearsal, and its times say nothing."] * options.tiny]

    # each part with its tables: rows with the same columns are one
    for number, part in PARTS.items():
        record = records.get(number, {"status": "not run", "rows": []})
        lines += ["", f"## {number}. {part.title}: {record['status']}"]
        if "date" in record:
            command = f"python -m bench.gpu{' --tiny' * record['tiny']} --only {number} --out DIR"
            lines += ["", f"`{command}`, {record['date']}, commit {record['commit']}, torch {record['torch']}, "
                      f"{record.get('device', 'no device')}, {record['seconds']} s"]
        for header in dict.fromkeys(map(tuple, record["rows"])):
            rows = [row.values() for row in record["rows"] if tuple(row) == header]
            lines += ["", *map(as_markdown, [header, ["---"] * len(header), *rows])]

    # results/ may not be writable
    text, page = "\n".join(lines) + "\n", out / f"gpu_{re.sub(r'[^a-z0-9]+', '_', card.lower())}.md"
    save_text(text, page)
    try:
        if not options.tiny:
            save_text(text, RESULTS / page.name)
    except OSError as error:
        print(f"{RESULTS / page.name} is not written ({error}); the page is {page}", flush=True)
    return page

def as_markdown(cells):
    return f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') for cell in cells)} |"

def output_of(*arguments):
    """The first word that a program prints, or "unknown"."""
    try:
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"

def main(argv=None):
    parser = argparse.ArgumentParser("python -m bench.gpu", description=__doc__.splitlines()[0])
    add_options(parser, Options)
    options, _ = read_options(parser, Options, argv)
    if not torch.cuda.is_available() and not options.tiny:
        raise ValueError("PyTorch finds no CUDA device here; --tiny runs every part at tiny sizes on the CPU")
    only = options.only.replace(" ", "").split(",") if options.only else [*map(str, PARTS)]
    if unknown := set(only) - {*map(str, PARTS)}:
        raise ValueError(f"--only knows no part {', '.join(sorted(unknown))}: expected numbers from 1 to {len(PARTS)}")

    # where and from what
    Path(options.out).mkdir(parents=True, exist_ok=True)
    commit = options.commit or output_of("git", "describe", "--always", "--dirty", "--exclude", "*")
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    deadline = time.monotonic() + 60 * options.minutes
    numbers = [n for n in PARTS if str(n) in only]

    # what a part leaves of its time goes to those after it
    with tempfile.TemporaryDirectory(prefix="bench_gpu_", ignore_cleanup_errors=True) as scratch:
        for i, number in enumerate(numbers):
            seconds = (deadline - time.monotonic()) * PARTS[number].share / sum(PARTS[n].share for n in numbers[i:])
            print(f"part {number}, {PARTS[number].title}: at most {seconds:.0f} s", flush=True)
            try:
                start_part(number, options, commit, seconds, scratch)
            finally:
                page = write_page(options, driver)
            print(f"  {read_json(Path(options.out) / f'part{number}.json')['status']}", flush=True)
    print(f"written to {page}")

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    run(main, "bench.gpu", stopped="stopped; what was measured is in OUT")
