"""From nothing to a model that watches videos, in one go: the toy world, stages 0 to 3, and its MVBench.

Runs the same commands that one would type (STEPS), each in a process of its own, and adds nothing to them. What does
not need each other runs side by side, on half of the cores each. A command that is done is not done again: stop with
Ctrl-C and start again at will.

Run:    make demo          # or, in a set-up environment: python demo.py
"""
import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

RUN = Path("runs/toy")
STEPS = [  # what it is, its lanes of commands (side by side, each one command after another), minutes on 2 CPU cores
    ("make the toy world: 32,000 clips and a benchmark", [["-m toy.world --out data/toy"]], 1),
    ("stage 0: a LLaMA that reads | stage 0: a ViT that sees, stage 1: align", [
        ["train.py --stage 0 --only llm"],
        ["train.py --stage 0 --only vit", "train.py --stage 1"]], 13),
    ("stage 2: connect, captions through the frozen LLaMA", [["train.py --stage 2"]], 3),
    ("stage 3: tune on instructions, with LoRA", [["train.py --stage 3"]], 11),
    ("MVBench: 20 tasks, and the same with less to go by", [["mvbench.py --ckpt runs/toy/stage3 --controls all"]], 1),
]


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if shutil.disk_usage(".").free < 2e9:
        sys.exit("demo.py: less than 2 GB of disk is free here; the toy world, the ViT's features and the checkpoints "
                 "need them")
    total = sum(minutes for *_, minutes in STEPS)
    print(f"VideoChat2 on the toy world: {len(STEPS)} steps, about {total} minutes on 2 CPU cores.\n"
          "Stop with Ctrl-C at any time: make demo goes on where it stopped.\n")
    for number, (what, _, minutes) in enumerate(STEPS, 1):
        print(f"  {number}. {what:71} about {minutes} min")
    times = {}
    for number, (what, lanes, _) in enumerate(STEPS, 1):
        print(f"\n=== {number}/{len(STEPS)} {what}", flush=True)
        begun = time.time()
        code = run(lanes)
        times[what] = time.time() - begun
        if code:
            print(f"\ndemo: stopped in step {number}; run it again to go on", file=sys.stderr)
            return code
    (RUN / "report.md").write_text(report(times))
    print("\nMinutes per step: " + ", ".join(f"{seconds / 60:.1f}" for seconds in times.values())
          + f"; {sum(times.values()) / 60:.1f} in all")
    clip = sorted(Path("data/toy/videos").rglob("*.gif"))[0]
    print(f"""
Where things lie
  data/toy                           the world: videos, captions, instructions, benchmark
  runs/toy/stage3                    the model
  runs/toy/stage3/mvbench            every question with its answer (predictions.jsonl), and what to make of it:
                                     report.html, to be opened in a browser
  runs/toy/metrics.jsonl             losses of every stage
  runs/toy/report.md                 the table, the losses and the times of this run

What to try next
  .venv/bin/python chat.py --ckpt runs/toy/stage3 --video {clip} --ask "What happens in the video?"
  .venv/bin/python mvbench.py --ckpt runs/toy/stage2
  .venv/bin/python train.py --help""")
    return 0


def report(times):
    """The run in markdown: where and when, the table with its control, minutes per step, losses per stage."""
    found = json.loads((RUN / "stage3" / "mvbench" / "summary.json").read_text())
    lines = [f"Command `make demo`, commit {told('git', 'rev-parse', '--short', 'HEAD')}, {processor()}, "
             f"{time.strftime('%Y-%m-%d')}.", "",
             f"| task | right | 95 % | chance | {' | '.join(found['controls'])} | needs time |",
             "|" + (5 + len(found["controls"])) * "---|"]
    for line in (*found["tasks"], found["average"]):
        controls = " | ".join(f"{share:.1f}" for share in line["controls"].values())
        lines.append(f"| {line['task']} | {line['accuracy']:.1f} | {line['low']:.1f} to {line['high']:.1f} | "
                     f"{line['chance']:.1f} | {controls} | {line['needs time']:+.1f} |")
    lines += ["", "| step | minutes |", "|---|---|"]
    lines += [f"| {what.replace('|', 'and')} | {seconds / 60:.1f} |" for what, seconds in times.items()]
    lines += [f"| all | {sum(times.values()) / 60:.1f} |", "", "Loss at ten points of each stage:", ""]
    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        curve = {row["step"]: row["loss"] for row in rows if row["stage"] == stage}
        shown = sorted(curve)[::max(1, len(curve) // 10)]
        lines += [f"- {stage}: " + ", ".join(f"{curve[step]:.3f} ({step})" for step in shown)]
    return "\n".join(lines) + "\n"


def told(*command):
    """What a command prints, or "unknown" where there is none."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor():
    names = re.findall(r"model name\s*: (.*)", told("cat", "/proc/cpuinfo")) or [platform.processor() or "unknown"]
    return f"{os.cpu_count()} cores of {names[0]}"


def run(lanes):
    """Runs the lanes of one step -> the first exit status that is not 0. Ctrl-C reaches the commands too (they are in
    the same process group), and they are given the time to save."""
    codes = []
    threads = [threading.Thread(target=run_lane, args=(lane, len(lanes), codes)) for lane in lanes]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            continue
    return next((code for code in codes if code), 0)


def run_lane(lane, lanes, codes):
    """Commands one after another, as long as each succeeds. Of several lanes, each gets its share of the cores, and
    hands its lines on whole; a progress bar has the screen for itself only where there is one lane."""
    env = os.environ | ({"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // lanes))} if lanes > 1 else {})
    for command in lane:
        print(f"$ python {command}", flush=True)
        process = subprocess.Popen([sys.executable, *command.split()], env=env, text=True,
                                   **(dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT) if lanes > 1 else {}))
        for line in process.stdout or ():
            print(line, end="", flush=True)
        codes.append(process.wait())
        if codes[-1]:
            return


if __name__ == "__main__":
    sys.exit(main())
