"""What an interrupted run goes on from: the state of everything that moves, every few hundred steps, bit for bit.

    runs/toy/stage1.unfinished/000400/      after 400 steps; the last --keep of them lie here until the stage is done
        config.json, model.safetensors ...  the checkpoint as of then, which mvbench.py and chat.py take
        trainer.safetensors                 the optimizers' moments, the generators' states of each process
        trainer.json                        step, options, and size and hash of every file here

A folder appears whole or not at all (files.atomic_folder); what is torn all the same, or altered, its hashes tell, and
the one before it is taken. Tensors are copied at once and written by a thread, while training goes on. Where data and
learning rate stand, the step says. Not here: what the files of a checkpoint are (checkpoint.py).

    pytest tests/test_resume.py
"""
import hashlib
import json
import shutil
import threading
from dataclasses import asdict
from pathlib import Path

import torch

from infra.distributed import full_tensor, shard_like
from infra.files import atomic_folder, hash_file, load_strict, read_json, read_tensors, save_tensors
from weights import checkpoint

FIXED = ("stage", "preset", "batch", "accumulate", "steps", "seed", "corpus", "data", "muon", "cache_features", "dtype")
TRAINER = "trainer.json"


def steps_of(folder):
    """{step: folder} of what lies there to go on from."""
    return {int(path.name): path for path in sorted(Path(folder).glob("[0-9]*")) if path.name.isdigit()}


def digest(path):
    """[size, sha256] of a file."""
    return [path.stat().st_size, hash_file(path, hashlib.sha256()).hexdigest()]


def check(folder, names=None):
    """What is wrong with a step's folder, or with these of its files, in one line; "" if nothing is."""
    try:
        files = read_json(folder / TRAINER)["files"]
        for name, mark in files.items():
            path = folder / name
            if names and name not in names:
                continue
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != mark[0]:
                return f"{path} has {path.stat().st_size:,} bytes instead of {mark[0]:,}"
            if digest(path) != mark:
                return f"{path} is not what was written: its hash differs"
    except (ValueError, OSError, KeyError, TypeError) as error:
        return f"{folder / TRAINER} cannot be read ({error})"
    return ""


def newest(folder, say=print, names=None):
    """The last step's folder that is whole, or of which these files are, or None; each one that is not is named."""
    for _, path in sorted(steps_of(folder).items(), reverse=True):
        problem = check(path, names)
        if not problem:
            return path
        say(f"damaged: {problem}; the checkpoint before it is taken, if there is one")
    return None


def clean(job, cfg):
    """Removes what a killed process has left half-written and, where the run begins again, all."""
    for path in job.unfinished.iterdir():
        if path.is_dir() and (cfg.restart or path.name.startswith(".")):
            shutil.rmtree(path)

# ----------------------------------------------------------------------------------------------------------------------
# what a state is

def optimizer_state(optimizers, model):
    """{"optimizer.<parameter>.<key>": tensor}, whole, on the CPU. By names: places depend on what else trains."""
    names = {p: name for name, p in model.named_parameters()}
    return {f"optimizer.{names[p]}.{key}": full_tensor(t).cpu().clone() for optimizer in optimizers
            for p, state in optimizer.state.items() for key, t in state.items()}


def put_optimizer_state(optimizers, model, tensors, where):
    """The inverse. ValueError for a parameter that does not train here."""
    parameters = dict(model.named_parameters())
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for name, t in tensors.items():
        name, _, key = name.removeprefix("optimizer.").rpartition(".")
        p = parameters.get(name)
        if p not in owner:
            raise ValueError(f"{where} was begun with other options: {name} does not train now; go on with those, or "
                             "begin again by --restart")
        # subtle: fused AdamW counts its steps on the device
        owner[p].state[p][key] = t.to(p.device) if key == "step" else shard_like(t.to(p.device, p.dtype), p)


def random_state(job):
    """The states of this process's generators."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()             # of the current device, which parallel.join has set
    if job.generator:
        state["loss"] = job.generator.get_state()
    return state


def put_random_state(job, tensors, rank):
    """The inverse, where this process has one: of more processes than before, the new ones keep their own."""
    own = {name.rpartition(".")[2]: t for name, t in tensors.items() if name.startswith(f"random.{rank}.")}
    if "torch" in own:
        torch.set_rng_state(own["torch"])
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])
    if "loss" in own and job.generator:
        job.generator.set_state(own["loss"])


def model_state(model):
    """Every tensor but the frozen LLM's, whole, a copy on the CPU."""
    return {n: full_tensor(t).detach().to("cpu", copy=True) for n, t in model.state_dict().items()
            if not checkpoint.is_frozen_llm(n)}

# ----------------------------------------------------------------------------------------------------------------------
# reading

def load_model(job, cfg, folder):
    """Fills the model, before it is spread over devices, from a step's folder -> the step. ValueError if another run
    lies there."""
    options, now = read_json(folder / TRAINER)["options"], asdict(cfg)
    other = [f"{name} {options[name]} instead of {now[name]}" for name in FIXED
             if name in options and options[name] != now[name]]
    if other:
        raise ValueError(f"{folder} is of a run with " + ", ".join(other) + "; go on with its options, or begin again "
                         "by --restart")
    load_strict(job.model, read_tensors(folder / "model.safetensors"), folder, fresh=(checkpoint.LLM_PREFIX,))
    return read_json(folder / TRAINER)["step"]


def load_trainer(job, optimizers, scaler, folder, world):
    """Fills optimizers and generators."""
    tensors = read_tensors(folder / "trainer.safetensors")
    moments = {n: t for n, t in tensors.items() if n.startswith("optimizer.")}
    put_optimizer_state(optimizers, job.model, moments, folder)
    put_random_state(job, tensors, world.rank)
    scaler.load_state_dict(read_json(folder / TRAINER)["scaler"])

# ----------------------------------------------------------------------------------------------------------------------
# writing

class Saver:
    """Writes steps' folders in a thread, one at a time, and forgets all but the last `keep`."""

    def __init__(self, job, cfg, world):
        self.job, self.cfg, self.world, self.thread, self.problem = job, cfg, world, None, ""
        self.folder = job.unfinished

    def save(self, step, optimizers, scaler):
        """By all processes: what is cut up is put together; the first one writes."""
        self.wait()
        weights, tensors = model_state(self.job.model), optimizer_state(optimizers, self.job.model)
        for rank, state in enumerate(self.world.all_gather_object(random_state(self.job))):
            tensors |= {f"random.{rank}.{name}": t for name, t in state.items()}
        if self.world.is_main:
            state = {"step": step, "done": False, "options": asdict(self.cfg), "scaler": scaler.state_dict()}
            self.thread = threading.Thread(target=self.write, args=(step, weights, tensors, state))
            self.thread.start()

    def write(self, step, weights, tensors, state):
        try:
            with atomic_folder(self.folder / f"{step:06d}") as folder:
                self.job.write(folder, weights)
                save_tensors(tensors, folder / "trainer.safetensors")
                files = {path.name: digest(path) for path in sorted(folder.iterdir())}
                (folder / TRAINER).write_text(json.dumps(state | {"files": files}, indent=2))
            for _, old in sorted(steps_of(self.folder).items())[:-self.cfg.keep]:
                shutil.rmtree(old, ignore_errors=True)
        except Exception as error:                             # a full disk, above all; training need not end for it
            self.problem = (f"{self.folder / f'{step:06d}'} cannot be written ({error}): "
                            f"{room(self.folder, tensors | weights)}; the checkpoints before it are kept, and training "
                            "goes on")

    def wait(self):
        """Until the last folder is written."""
        if self.thread:
            self.thread.join()
            self.thread = None

    def close(self):
        """wait, and OSError if the last one could not be written."""
        self.wait()
        if self.problem:
            raise OSError(self.told())

    def told(self):
        """What went wrong since the last time, or ""."""
        problem, self.problem = self.problem, ""
        return problem


def room(folder, tensors):
    """What these tensors need on the disk, and what is free there."""
    need, free = sum(t.nbytes for t in tensors.values()), shutil.disk_usage(folder.parent).free
    return f"it needs {need / 2 ** 20:,.1f} MiB, {free / 2 ** 20:,.1f} MiB are free"


def finish(job, cfg, world):
    """Writes the finished checkpoint; what an unfinished run would need is forgotten. OSError on a full disk."""
    weights = model_state(job.model)
    if world.is_main:
        for _, old in sorted(steps_of(job.unfinished).items())[:-1]:
            shutil.rmtree(old)                                 # makes room
        try:
            with atomic_folder(job.folder) as folder:
                job.write(folder, weights)
                (folder / TRAINER).write_text(json.dumps({"done": True, "options": asdict(cfg)}, indent=2))
        except OSError as error:
            raise OSError(f"{job.folder} cannot be written ({error}): {room(job.folder, weights)}; make room, and the "
                          "same command goes on from the last checkpoint") from None
        shutil.rmtree(job.unfinished, ignore_errors=True)
    world.barrier()
