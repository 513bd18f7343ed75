"""What a training run reports, and how it stops: a line every few steps, metrics.jsonl, Ctrl-C.

    stage 1 | step 200/3000 | loss 4.213 | vtc 0.871 | vtm 0.520 | vtg 2.822 | lr 3.0e-04 | grad 1.92 | 98 ms, 3% ...

Not here: the loop (train.py), what an interrupted run resumes from (training/resume.py).

    pytest tests/test_resume.py
"""
import json
import math
import signal
import sys
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from training.optim import get_lr

MAX_OVERFLOWS = 24    # in a row: GradScaler halves its scale of 2 ** 16 each time, so more than these are not its doing

class TrainLog:
    """Prints a line every log_every steps with the mean losses since the last one, and appends it to metrics.jsonl.

    subtle: a step's results are read one step later, when the GPU has the next one to compute: no log syncs the GPU."""

    def __init__(self, stage, cfg, dist, first_step):
        self.stage, self.cfg, self.dist, self.first_step = stage, cfg, dist, first_step
        self.start, self.data_seconds = time.time(), 0.0       # data_seconds: waiting for batches, since the start
        self.last_line = self.start, 0.0                       # time and data_seconds at the last printed line
        self.recent, self.pending = defaultdict(list), None    # losses since that line; the step that is not read yet
        self.bad_steps = self.overflows = 0                    # in a row
        self.no_label, self.n_no_label = [], 0                 # samples without a label since that line; all of them
        self.path = Path(cfg.out) / "metrics.jsonl"
        self.bar = tqdm(total=cfg.steps, initial=first_step, leave=False, disable=None if dist.is_main else True)
        self.print_main(f"{stage.name}: {cfg.steps} steps of {cfg.batch} from {len(stage.dataset):,} samples, "
                        f"{cfg.dtype} on {dist.device}" + f" in {dist.size} processes" * (dist.size > 1)
                        + f", resuming from step {first_step}" * (first_step > 0),
                        *getattr(stage.dataset, "notes", ()), *stage.notes)

    def print_main(self, *lines):
        if self.dist.is_main:
            self.bar.write("\n".join(lines), file=sys.stdout)              # above the bar
            sys.stdout.flush()

    def minutes(self):
        return (time.time() - self.start) / 60

    @contextmanager
    def data_wait(self):
        """Around waiting for batches: the log shows its share of the time."""
        start = time.time()
        yield
        self.data_seconds += time.time() - start

    def step(self, step, losses, grad_norm, micro_batches):
        """Takes the results of a step, {name: tensor} and a tensor, and reads those of the step before."""
        self.read_pending()
        results = {n: t.detach().to("cpu", non_blocking=True) for n, t in {**losses, "grad_norm": grad_norm}.items()}
        on_gpu = self.dist.device.startswith("cuda")           # event: after this step's work, before the next one's
        event = torch.cuda.current_stream().record_event() if on_gpu else None
        self.pending = step, results, micro_batches, (time.time(), self.data_seconds), event

    def close(self):
        self.read_pending()
        self.report_no_label()
        if self.n_no_label:
            self.print_main(f"samples without a label: {self.n_no_label}, of which the first is named above")
        self.bar.close()

    def report_no_label(self):
        """Names the run's first sample without a label, of all processes, and counts the others -> how many are new."""
        counts, first = zip(*self.dist.all_gather_object((len(self.no_label), self.no_label[:1])), strict=True)
        if sum(counts) and not self.n_no_label:
            self.print_main(f"nothing to learn in {sum(first, [])[0]}; raise --max-text or shorten the text; python -m "
                            "training.check_data lists all such entries, and the log counts them")
        self.no_label, self.n_no_label = [], self.n_no_label + sum(counts)
        return sum(counts)

    def read_pending(self):
        """Reads the last step's results and prints what is due. ValueError after max_bad_steps bad ones in a row."""
        if self.pending is None:
            return
        (step, results, micro_batches, clock, event), self.pending = self.pending, None
        if event:
            event.synchronize()                                # waits for this step, not for the one after it
        losses = {name: t.item() for name, t in results.items()}
        grad_norm = losses.pop("grad_norm")
        for line in (line for batch in micro_batches for line in batch["bad"]):    # by every process, of its own clips
            print(f"unreadable, replaced by another sample: {line}", flush=True)
        self.no_label += [line for batch in micro_batches for line in batch.get("no_label", ())]

        # a step whose gradient is not finite has changed nothing (optim.optimizer_step): the log names the first module
        # where a value was not, and the step's files; every process has other files, and perhaps another module
        if math.isfinite(grad_norm):
            self.bad_steps = self.overflows = 0
        elif not self.is_scaler_overflow(losses):
            files = sorted({path for batch in micro_batches for path in batch.get("paths", ()) if path})
            module = first_nonfinite_module(self.stage, micro_batches, step / self.cfg.steps, self.dist.device)
            values = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
            self.print_main(*self.dist.all_gather_object(
                f"step {step + 1} skipped: gradient {grad_norm}, loss {values}; first not finite: {module}; "
                f"files of the step: {', '.join(files) or 'none'}"))
            self.bad_steps, losses = self.bad_steps + 1, {}
            if self.bad_steps >= self.cfg.max_bad_steps:
                raise ValueError(f"{self.bad_steps} steps in a row without a finite gradient (--max-bad-steps); the "
                                 "last checkpoint is intact. Lower --lr, or check the files named above")

        # a line has the means of several steps; the bar, on a terminal, moves with each
        self.bar.update()
        for name, loss in losses.items():
            self.recent[name].append(loss)
        if (step + 1) % self.cfg.log_every == 0 or step + 1 == self.cfg.steps:
            self.write_line(step, grad_norm, *clock)

    def is_scaler_overflow(self, losses):
        """Whether fp16 gradients overflowed, with finite losses everywhere, because GradScaler's scale is too large."""
        if self.cfg.dtype != "fp16":
            return False
        (n_nonfinite,) = self.dist.all_reduce_sum([sum(not math.isfinite(loss) for loss in losses.values())])
        self.overflows += n_nonfinite == 0
        return n_nonfinite == 0 and self.overflows <= MAX_OVERFLOWS

    def write_line(self, step, grad_norm, now, data_seconds):
        # means over the steps since the last line (a loss may be missing in some of them) and over the processes
        sums = self.dist.all_reduce_sum([sum(column) / len(column) for column in self.recent.values()])
        means = {name: total / self.dist.size for name, total in zip(self.recent, sums, strict=True)}
        self.recent.clear()
        no_label = self.report_no_label()
        if not self.dist.is_main:
            return

        # one row of metrics.jsonl; a full disk does not end the run
        elapsed, waited = now - self.last_line[0], data_seconds - self.last_line[1]
        seconds = elapsed / min(self.cfg.log_every, step + 1 - self.first_step)                # per step
        self.last_line = now, data_seconds
        row = {"stage": self.stage.name, "step": step + 1, "loss": sum(means.values()) if means else None, **means,
               "lr": get_lr(step, self.cfg), "grad": grad_norm if math.isfinite(grad_norm) else None,
               "ms": round(1000 * seconds, 1), "clips_per_s": round(self.cfg.batch / seconds, 1),
               "waiting": round(waited / elapsed, 3)}
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as error:
            self.print_main(f"{self.path} lacks this line: {error}")

        # the same for people
        loss = f"{row['loss']:.3f}" if means else "-"
        parts = "".join(f" | {name} {mean:.3f}" for name, mean in means.items()) if len(means) > 1 else ""
        parts += f" | samples without a label {no_label}" * (no_label > 0)
        eta = (now - self.start) / (step + 1 - self.first_step) * (self.cfg.steps - step - 1)
        self.print_main(f"{self.stage.name} | step {step + 1}/{self.cfg.steps} | loss {loss}{parts} "
                        f"| lr {row['lr']:.1e} | grad {grad_norm:.2f} | {row['ms']:.0f} ms, {row['waiting']:.0%} "
                        f"waiting for data | {row['clips_per_s']} clips/s | eta {eta / 60:.1f}m")

def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}

def first_nonfinite_module(stage, micro_batches, progress, device):
    """Name of the first module whose output is not finite, found by repeating the step's forward passes.

    The state of all generators is restored. All processes must call it together, for some modules exchange rows."""
    names = []                                                 # of modules, in the order in which they compute

    def check_output(name, _module, _args, output):
        tensors = output if isinstance(output, tuple | list) else (output,)
        if not all(t.isfinite().all() for t in tensors if torch.is_tensor(t) and t.is_floating_point()):
            names.append(name)

    # the same batches again, without gradients; every module's output is checked
    generator_state = stage.generator and stage.generator.get_state()
    hooks = [m.register_forward_hook(partial(check_output, name)) for name, m in stage.model.named_modules() if name]
    with torch.random.fork_rng(), torch.no_grad():
        for batch in micro_batches:
            losses = stage.loss(to_device(batch, device), progress)
            names += [f"loss {name}" for name, loss in losses.items() if not loss.isfinite()]

    # as if nothing had happened
    for hook in hooks:
        hook.remove()
    if stage.generator:
        stage.generator.set_state(generator_state)
    return names[0] if names else "the backward pass"

class GracefulStop(ExitStack):
    """Until it exits, Ctrl-C and SIGTERM only set signal_number, so that the step is finished and saved.

    A second Ctrl-C interrupts a single process at once; torchrun passes signals on twice, so of several it does not."""

    def __init__(self, single_process=True):
        super().__init__()
        self.signal_number, self.single_process = 0, single_process
        for number in (signal.SIGINT, signal.SIGTERM):
            self.callback(signal.signal, number, signal.signal(number, self.note))      # the old handler returns

    def note(self, number, _frame):
        if self.signal_number and self.single_process:
            raise KeyboardInterrupt
        self.signal_number = number
