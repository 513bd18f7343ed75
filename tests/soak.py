"""Trains stages 1 to 3 twice, once undisturbed and once with kill -9 at random moments, and compares every weight.

    python tests/soak.py --run runs/toy --data data/toy --steps 2500 --every 60

Both runs go side by side, with one thread each. Of the disturbed one, sometimes the whole group of processes is killed,
sometimes only the one that trains, and now and then the kill falls into the writing of a checkpoint. Not a part of
pytest: it takes as long as it trains.
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from infra import files  # noqa: E402

def command(args, out, stage):
    more = ["--init", args.run / "init"] if stage == 1 else []
    return [str(part) for part in (
        sys.executable, ROOT / "train.py", "--stage", stage, "--data", args.data, "--out", out, "--steps", args.steps,
        "--llm", args.run / "llm", "--save-every", 50, "--vtg-only", 0.5, "--log-every", 200, *more)]

def start(args, out, stage):
    return subprocess.Popen(command(args, out, stage), env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)

def undisturbed(args, out):
    for stage in (1, 2, 3):
        process = start(args, out, stage)
        said, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"the undisturbed run failed:\n{said}")

def disturbed(args, out, rng, kills):
    for stage in (1, 2, 3):
        while True:
            process, begun, patience = start(args, out, stage), time.time(), rng.uniform(0.5, 1.5) * args.every
            killer = threading.Timer(patience, kill, (process, rng.random() < 0.5))
            killer.start()
            said, _ = process.communicate()
            killer.cancel()
            went_on = [line for line in said.splitlines() if "resuming from step" in line or "damaged" in line]
            print(f"stage {stage}: {time.time() - begun:5.1f} s, code {process.returncode:3}; "
                  + ("; ".join(went_on) or "from the start"), flush=True)
            if process.returncode == 0:
                break
            if process.returncode != -signal.SIGKILL:
                raise SystemExit(f"not killed, and failed:\n{said}")
            kills.append(stage)

def kill(process, all_of_them):
    if all_of_them:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, default=Path("runs/toy"), help="a run whose pretraining is finished")
    p.add_argument("--data", type=Path, default=Path("data/toy"))
    p.add_argument("--steps", type=int, default=2500, help="of each stage")
    p.add_argument("--every", type=float, default=60, help="seconds between two kills, by half more or less")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    begun, kills = time.time(), []
    with tempfile.TemporaryDirectory() as folder:
        quiet, torn = Path(folder) / "undisturbed", Path(folder) / "disturbed"
        for out in (quiet, torn):                              # looking at all clips would take longer than a life
            out.mkdir()
            (out / "features").symlink_to((args.run / "features").resolve())
        beside = threading.Thread(target=undisturbed, args=(args, quiet))
        beside.start()
        disturbed(args, torn, random.Random(args.seed), kills)
        beside.join()
        for stage in (1, 2, 3):
            one, other = (files.read_tensors(out / f"stage{stage}/model.safetensors") for out in (quiet, torn))
            unlike = [name for name in one if not torch.equal(one[name], other[name])]
            print(f"stage {stage}: {len(one)} tensors, {len(unlike)} differ")
            if unlike or one.keys() != other.keys():
                return 1
    print(f"{len(kills)} kills in {(time.time() - begun) / 60:.1f} minutes; every weight is the same, bit for bit")
    return 0

if __name__ == "__main__":
    sys.exit(main())
