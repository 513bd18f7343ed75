"""train.py without dropout that is stopped, as by SIGTERM, in the step before this one: stop_at.py STEP OPTIONS

For test_distributed.py, under torchrun: every process hears the signal, and leaves with code 0.
"""
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model  # noqa: E402
import train  # noqa: E402

micro = model.PRESETS["micro"]

def without_dropout():
    """The micro preset's Config; of dropout, each process has its own."""
    config = micro()
    return replace(config, lora_dropout=0.0, qformer=replace(config.qformer, dropout=0.0, drop_path=0.0))

def main():
    real, last = train.TrainLog.step, int(sys.argv[1])

    def stopped(self, step, *rest):
        real(self, step, *rest)
        if step + 2 == last:
            os.kill(os.getpid(), signal.SIGTERM)

    model.PRESETS["micro"], train.TrainLog.step = without_dropout, stopped
    try:
        train.main(sys.argv[2:])
    except SystemExit as left:
        return int(left.code != 128 + signal.SIGTERM)
    return 1

if __name__ == "__main__":
    sys.exit(main())
