"""One loop for every stage: python train.py --stage N

    stage 0   stand-ins for what the real system takes ready-made: the video ViT (UMT-L) and the LLM (Vicuna)
    stage 1   align:    the Q-Former learns to see, with the ViT frozen            contrastive + matching + captioning
    stage 2   connect:  its queries become words of the frozen LLM                 captions
    stage 3   tune:     instructions, with LoRA in the LLM                         answers

This file is the loop and knows none of the stages: what one trains, on which data and with which loss is a Job of
stages.py. Options: recipes.py. Going on after an interruption: resume.py. Several processes: parallel.py. How weights
move: optim.py. Source: paper section 4 and table 10; official tasks/train_{qformer,pt,it}.py.

Run:    python train.py --stage 1          # the toy preset; goes on where an interrupted run stopped
        torchrun --nproc_per_node 8 train.py --stage 1 --preset vicuna-7b ...
"""
import json
import math
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

import data
from infra.distributed import (
    blocks_of,
    init_distributed,
    raise_together,
    set_gradient_sync,
    sync_unsharded_grads,
    wrap_model,
)
from infra.files import lock_folder
from model import DTYPES
from training import resume
from training.optim import grad_norm, learning_rate, make_optimizers, optimizer_step
from training.recipes import parse
from training.stages import finished, jobs

# ------------------------------------------------------------------------------------------------------------- the loop


def fit(job, cfg, world):
    """Trains a job to the end; an interrupted one goes on where its last whole checkpoint stands."""
    sampler = data.Sampler(job.dataset, cfg.batch, cfg.seed, world.rank, world.size, cfg.accumulate)
    cfg.steps = cfg.steps or cfg.epochs * len(sampler)
    last = None if cfg.restart else world.broadcast(resume.newest(job.unfinished) if world.is_main else None)
    first = resume.load_model(job, cfg, last) if last else 0
    if cfg.compile:
        compile_blocks(job.model)
    forward = wrap_model(job.model.train(), job.loss, world, cfg.shard, job.idle)
    optimizers = make_optimizers(job.model, cfg)
    torch.manual_seed(cfg.seed + world.rank)
    # without fp16 it does nothing
    scaler = torch.amp.GradScaler(torch.device(world.device).type, enabled=cfg.dtype == "fp16")
    if last:
        resume.load_trainer(job, optimizers, scaler, last, world)
    sampler.skip_to(first)
    batches = forever(data.make_loader(job.dataset, sampler, job.collate, cfg.workers), sampler)
    log, saver = Log(job, cfg, world, first), resume.Saver(job, cfg, world)
    log.head(first)
    with StopSignal(alone=world.size == 1) as stop:
        for step in range(first, cfg.steps):
            with log.waiting():
                parts = [next(batches) for _ in range(cfg.accumulate)]
            words, stopped = world.all_reduce_sum([sum(map(words_in, parts)), float(stop.number > 0)])
            losses = backward(job, forward, parts, words, step / cfg.steps, scaler, cfg, world)
            norm = grad_norm(job.model, optimizers, scaler, cfg.clip)
            optimizer_step(optimizers, learning_rate(step, cfg), scaler, norm)
            log.step(step, losses, norm, parts)
            if step + 1 == cfg.steps:
                break
            if stopped or (step + 1) % cfg.save_every == 0:
                saver.save(step + 1, optimizers, scaler)
            if stopped:
                log.close()
                saver.close()
                again = "the same command without --restart" if cfg.restart else "the same command"
                log.say(f"\nstopped; {again} goes on from step {step + 1}")
                sys.exit(128 + (stop.number or signal.SIGTERM))
            if saver.problem:
                log.say(saver.told())
    log.close()
    saver.wait()
    resume.finish(job, cfg, world)
    log.say(f"{job.name}: done in {log.minutes():.1f} min, written to {job.folder}")


def backward(job, forward, parts, words, done, scaler, cfg, world):
    """Gradients of one step, part by part -> {name: loss}, whose mean over the processes is the step's.

    words: learnt in the whole step; done: share of the steps.
    """
    kind, losses = torch.device(world.device).type, {}
    for i, batch in enumerate(parts):
        set_gradient_sync(forward, job.model, last=i + 1 == len(parts))
        with torch.autocast(kind, DTYPES[cfg.dtype], enabled=cfg.dtype != "fp32"):
            found = forward(to_device(batch, world.device), done)
        shares = {name: share(name, batch, words, cfg, world) * loss for name, loss in found.items()}
        scaler.scale(sum(shares.values())).backward()
        losses = {name: losses.get(name, 0) + loss.detach() for name, loss in shares.items()}
    sync_unsharded_grads(job.model, world)
    return losses


def words_in(batch):
    """How many words of a batch are learnt: next-word losses are means over them."""
    if "targets" in batch:
        return len(batch["targets"])
    return batch["mask"][:, 1:].sum().item() if "mask" in batch else 0


def share(name, batch, words, cfg, world):
    """What a part's loss, a mean over its own words or clips, counts for in the step's loss, the mean over all of them;
    times the number of processes, over which gradients are averaged."""
    if name in ("lm", "vtg"):
        return words_in(batch) / max(1, words) * world.size
    return 1 / cfg.accumulate


def compile_blocks(model):
    """torch.compile for each block: they are alike, so it compiles few, and an uncompiled loop runs them."""
    for block in blocks_of(model):
        block.compile()


class StopSignal:
    """Within it, Ctrl-C and SIGTERM only set `number`, so that the step is finished and saved; a second Ctrl-C is not
    held. torchrun hands signals on to processes that have them already, so among several no second one counts.
    """

    number = 0

    def __init__(self, alone=True):
        self.alone = alone

    def __enter__(self):
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, _):
        if self.number and self.alone:
            raise KeyboardInterrupt
        self.number = number

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


def forever(loader, sampler):
    """Batches of one epoch after another."""
    while True:
        yield from loader
        sampler.next_epoch()


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}

# ------------------------------------------------------------------------------------------------------ what is told


class Log:
    """One line per log_every steps, with the mean losses since the last one; the same numbers in metrics.jsonl.

    subtle: what a step has computed is read one step later, so that a GPU is never waited for: it has the next step by
    then. A step whose gradient is not finite has changed nothing (optim.optimizer_step) and is told of.
    """

    def __init__(self, job, cfg, world, first):
        self.job, self.cfg, self.world, self.first = job, cfg, world, first
        self.begun = time.time()
        self.waited, self.last = 0.0, (self.begun, 0.0)                    # seconds spent on data; at the last line
        self.window, self.before, self.bad, self.overflows = [], None, 0, 0
        self.bar = tqdm(total=cfg.steps, initial=first, leave=False,
                        disable=not (world.is_main and sys.stderr.isatty()))
        self.path = Path(cfg.out) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def say(self, line):
        if self.world.is_main:
            self.bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def head(self, first):
        processes = f" in {self.world.size} processes" if self.world.size > 1 else ""
        self.say("\n".join([
            f"{self.job.name}: {self.cfg.steps} steps of {self.cfg.batch} from {len(self.job.dataset):,} samples, "
            f"{self.cfg.dtype} on {self.world.device}{processes}" + (f", going on from step {first}" if first else ""),
            *self.job.notes]))

    def minutes(self):
        return (time.time() - self.begun) / 60

    @contextmanager
    def waiting(self):
        """For data: the time in it is told as a share of all."""
        begun = time.time()
        yield
        self.waited += time.time() - begun

    def step(self, step, losses, norm, parts):
        """losses {name: tensor}, norm a tensor: as yet unread. parts: the step's batches."""
        self.read()
        losses, norm = {name: later(t) for name, t in losses.items()}, later(norm)
        self.before = step, losses, norm, parts, (time.time(), self.waited), computed(self.world.device)

    def close(self):
        self.read()
        self.before = None
        self.bar.close()

    def read(self):
        """What the step before has computed."""
        if self.before is None:
            return
        step, losses, norm, parts, times, ready = self.before
        ready()
        for line in (line for batch in parts for line in batch["bad"]):
            self.bar.write(f"unreadable, another sample took its place: {line}")
        if math.isfinite(norm.item()):
            self.bad = self.overflows = 0
            self.window.append(losses)
        elif self.looks_for_a_scale(losses):
            self.window.append(losses)
        else:
            self.left_out(step, losses, norm, parts)
        self.bar.update()
        if (step + 1) % self.cfg.log_every == 0 or step + 1 == self.cfg.steps:
            self.line(step, norm, times)

    def looks_for_a_scale(self, losses):
        """Whether a gradient overflowed, with fp16, only because GradScaler's scale was too large. It halves it each
        time, from 2 ** 16, so more than a few in a row are not of its making. All processes find the same."""
        if self.cfg.dtype != "fp16":
            return False
        (strange,) = self.world.all_reduce_sum([sum(not math.isfinite(loss.item()) for loss in losses.values())])
        self.overflows += strange == 0
        return strange == 0 and self.overflows <= 24

    def left_out(self, step, losses, norm, parts):
        """ValueError, in all processes, when it is one too many in a row."""
        self.bad += 1
        files = sorted({path for batch in parts for path in batch.get("paths", ()) if path})
        where = first_not_finite(self.job, parts, step / self.cfg.steps, self.world)
        told = (f"step {step + 1} left out: gradient {norm.item()}, loss "
                + ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
                + f"; the first that is not finite: {where}; its files: {', '.join(files) or 'none'}")
        for line in self.world.all_gather_object(told):
            self.say(line)
        if self.bad >= self.cfg.max_bad_steps:
            raise ValueError(f"{self.bad} steps in a row without a finite gradient (--max-bad-steps); the last "
                             f"checkpoint is kept. Lower --lr, or look at the files named above")

    def line(self, step, norm, times):
        n, (now, waited), (then, waited_then) = min(self.cfg.log_every, step + 1 - self.first), times, self.last
        seconds, waited = (now - then) / n, (waited - waited_then) / (now - then)
        self.last = times
        names = list(dict.fromkeys(name for losses in self.window for name in losses))
        means = [sum(losses.get(name, torch.zeros(())).item() for losses in self.window)
                 / max(1, sum(name in losses for losses in self.window)) for name in names]
        means = dict(zip(names, (total / self.world.size for total in self.world.all_reduce_sum(means)), strict=True))
        self.window = []
        row = {"stage": self.job.name, "step": step + 1, "loss": sum(means.values()) if means else None, **means,
               "lr": learning_rate(step, self.cfg), "grad": norm.item() if norm.isfinite() else None,
               "ms": round(1000 * seconds, 1),
               "clips_per_s": round(self.cfg.batch / seconds, 1), "waiting": round(waited, 3)}
        if not self.world.is_main:
            return
        try:
            with open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")
        except OSError as error:                                           # a full disk need not end the run
            self.say(f"{self.path} lacks this line: {error}")
        parts = "".join(f" | {name} {mean:.3f}" for name, mean in means.items()) if len(means) > 1 else ""
        loss = f"{row['loss']:.3f}" if means else "-"
        eta = (now - self.begun) / (step + 1 - self.first) * (self.cfg.steps - step - 1)
        self.say(f"{self.job.name} | step {step + 1}/{self.cfg.steps} | loss {loss}{parts} "
                 f"| lr {row['lr']:.1e} | grad {norm.item():.2f} | {row['ms']:.0f} ms, {waited:.0%} waiting for data "
                 f"| {row['clips_per_s']} clips/s | eta {eta / 60:.1f}m")


def later(t):
    """A tensor on its way to the CPU, without waiting for it."""
    return t.detach().to("cpu", non_blocking=True)


def computed(device):
    """-> a function that waits until all is done that a GPU was told up to now, but for nothing that comes after."""
    if not device.startswith("cuda"):
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


def first_not_finite(job, parts, done, world):
    """Which module first gives numbers that are not finite, from a step's batches; the state of all generators is left
    as it was. All processes must ask, for some modules exchange rows."""
    found, before = [], job.generator.get_state() if job.generator else None

    def look(name, _, __, given):
        tensors = given if isinstance(given, tuple | list) else (given,)
        if not all(t.isfinite().all() for t in tensors if torch.is_tensor(t) and t.is_floating_point()):
            found.append(name)

    hooks = [module.register_forward_hook(lambda *args, name=name: look(name, *args))
             for name, module in job.model.named_modules() if name]
    with torch.random.fork_rng(), torch.no_grad():
        for batch in parts:
            losses = job.loss(to_device(batch, world.device), done)
            found += [f"loss {name}" for name, loss in losses.items() if not loss.isfinite()]
    for hook in hooks:
        hook.remove()
    if job.generator:
        job.generator.set_state(before)
    return found[0] if found else "the backward pass alone"

# -------------------------------------------------------------------------------------------------------- command line


def main(argv=None):
    cfg, given = parse(argv)
    world = init_distributed(cfg.device)
    for make, name, settings in jobs(cfg, given):
        torch.manual_seed(cfg.seed)                                        # of the initial weights
        job = world.main_process_first(lambda make=make, name=name, settings=settings: make(settings, name, world))
        # subtle: one that was begun again, and stopped, goes on although the old one lies there
        if finished(job.folder) and job.folder.is_dir() and not (cfg.restart or resume.steps_of(job.unfinished)):
            if world.is_main:
                print(f"{job.name}: already trained, in {job.folder} (--restart trains it again)")
            continue
        train(job, settings, world)
    world.close()


def train(job, cfg, world):
    """fit, with the run's folder held against other runs."""
    problem = None
    with ExitStack() as held:
        if world.is_main:
            try:
                held.enter_context(lock_folder(job.unfinished))
                resume.clean(job, cfg)
            except OSError as error:
                problem = error
        raise_together(problem, world)
        fit(job, cfg, world)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped at once; what the last checkpoint holds is kept")
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
