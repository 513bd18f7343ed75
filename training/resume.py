"""What a run starts from: the stage before it or, after an interruption, its own last state, bit for bit.

    runs/toy/stage1.unfinished/000400/      after 400 steps; the last few stay until the stage is finished
        config.json, model.safetensors ...  the checkpoint at that step, which mvbench.py and chat.py can read
        trainer.safetensors                 the optimizers' moments, the states of each process's random generators
        trainer.json                        step, options, hashes of the annotations and of every file in the folder

If a folder is damaged, its hashes show it, and the one before it is used. The position in the data and the learning
rate follow from the step. Not here: what the files of a checkpoint are (weights/checkpoint.py).

    pytest tests/test_resume.py
"""
import hashlib
import json
import shutil
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from infra.distributed import Distributed, full_tensor, raise_together, shard_like
from infra.files import atomic_folder, hash_file, load_strict, lock_folder, read_json, read_tensors, save_tensors
from weights import checkpoint

TRAINER = "trainer.json"
TOY_PRESETS = ("toy", "micro")                                 # toy.pretrain trains what they start from
TOY_INIT = Path(__file__).resolve().parent.parent / "assets/toy/init"      # ... and has done so for preset toy
MUST_MATCH = ("stage", "preset", "batch", "grad_accum", "steps", "seed", "corpus", "data", "muon_lr_scale",
              "cache_features", "dtype")                       # options that a run cannot change when it resumes
OLD_OPTIONS = {"accumulate": "grad_accum", "muon": "muon_lr_scale"}   # as older versions called them in trainer.json

def saved_steps(folder):
    """{step: folder} of the checkpoints of an unfinished run, in their order."""
    return dict(sorted((int(path.name), path) for path in Path(folder).glob("[0-9]*") if path.name.isdigit()))

def is_finished(folder):
    """Whether there is a checkpoint, and not one of an unfinished run. Without trainer.json, it was imported."""
    trainer = Path(folder) / TRAINER
    return (Path(folder) / "config.json").is_file() and (not trainer.is_file() or read_json(trainer)["done"])

def size_and_hash(path):
    return [path.stat().st_size, hash_file(path, hashlib.sha256()).hexdigest()]

def verify(folder, names=None):
    """What is wrong with a checkpoint's files, or with those in `names`, in one line; "" if nothing is."""
    try:
        expected = read_json(folder / TRAINER)["files"]
        for path in (folder / name for name in expected if name in (names or expected)):
            if not path.is_file():
                return f"{path} is missing"
            if size_and_hash(path) != expected[path.name]:
                return f"{path} has changed since it was written: its size or hash differs"
    except (ValueError, OSError, KeyError, TypeError) as error:
        return f"{folder / TRAINER} cannot be read ({error})"
    return ""

def latest(folder, report=print, names=None):
    """The last checkpoint that verify accepts, or None; reports each damaged one. names: of the files that matter."""
    for path in reversed(saved_steps(folder).values()):
        if not (problem := verify(path, names)):
            return path
        report(f"damaged: {problem}; using the checkpoint before it, if there is one")
    return None

@contextmanager
def locked(stage, cfg, dist):
    """Within it, no other run writes into the folder of the unfinished run. OSError, in every process, if one does."""
    with ExitStack() as stack:
        with raise_together(dist):
            if dist.is_main:
                stack.enter_context(lock_folder(stage.unfinished))
                remove_leftovers(stage.unfinished, cfg.resume)
        yield

def remove_leftovers(folder, resume):
    """Deletes what a killed process has left half-written and, without resume, the checkpoints too."""
    for path in list(folder.iterdir()):
        if path.is_dir() and (not resume or path.name.startswith(".")):
            shutil.rmtree(path)

def init_checkpoint(cfg):
    """Folder of the checkpoint that a stage starts from. FileNotFoundError names the command that makes it."""
    folder = Path(cfg.init or Path(cfg.out) / ("init" if cfg.stage == 1 else f"stage{cfg.stage - 1}"))
    if is_finished(folder):
        return folder

    # the toy has its own UMT and BERT, unless OUT/init says otherwise
    if cfg.stage == 1 and cfg.preset == "toy" and not cfg.init and not folder.exists():
        return TOY_INIT
    command = f"python -m weights.convert import --preset {cfg.preset} --out {folder} ... (see --help)"
    if cfg.stage > 1:
        command = f"python train.py --stage {cfg.stage - 1} --preset {cfg.preset} --out {cfg.out}"
    elif cfg.preset in TOY_PRESETS:
        command = f"python -m toy.pretrain --preset {cfg.preset} --out {cfg.out}"
    state = "is not finished" if folder.is_dir() else "is missing"
    raise FileNotFoundError(f"stage {cfg.stage} starts from {folder}, which {state}; run: {command}")

# ------------------------------------------------------------------------------------------------------------- reading

def load_weights(stage, cfg, folder, dist=None):
    """Fills the model from a checkpoint, before it is distributed -> the step. ValueError if it is another run's."""
    record, current = read_json(folder / TRAINER), asdict(cfg)
    with raise_together(dist or Distributed()):
        # other data means another order of the samples, and perhaps another number of steps
        changes = data_changes(record.get("data"), data_record(stage))
        if changes and not cfg.accept_changed_data:
            raise ValueError(f"{changes[0]}: the samples would come in another order. Bring the old data back, or add "
                             "--accept-changed-data to resume all the same, or --restart")

        # an option that a checkpoint of an older version does not have is not compared
        saved = {OLD_OPTIONS.get(name, name): value for name, value in record["options"].items()}
        differing = [f"{name} {saved[name]} instead of {current[name]}" for name in MUST_MATCH if name in saved
                     and saved[name] != current[name] and not (name == "steps" and changes)]
        if differing:
            raise ValueError(f"{folder} belongs to a run with {', '.join(differing)}; resume with these, or use "
                             "--restart")
    stage.notes += [f"resuming with changed data: {line}" for line in changes]
    load_strict(stage.model, read_tensors(folder / "model.safetensors"), folder, fresh=(checkpoint.LLM_PREFIX,))
    return record["step"]

def data_record(stage):
    """What the order of a stage's samples depends on, as trainer.json has it, or None for a dataset without files."""
    return stage.dataset.order_record() if hasattr(stage.dataset, "order_record") else None

def data_changes(saved, current):
    """What has changed between two of these records, a line each. Older versions have none."""
    if not saved or not current:
        return []
    if len(saved) != len(current):
        return [f"the corpus had {len(saved)} annotation files when the run was interrupted and has {len(current)} now"]
    changes = []
    for old, new in zip(saved, current, strict=True):
        # the name may change, as when a folder is moved
        words = [f"{old[key]} {key} then, {new[key]} now" for key in ("entries", "media", "weight")
                 if old[key] != new[key]]
        if words or old["sha256"] != new["sha256"]:
            changes.append(f"{new['anno']} has changed since the run was interrupted ("
                           + (", ".join(words) or f"{new['entries']} entries as before, but not the same") + ")")
    return changes

def load_trainer(stage, optimizers, scaler, folder, dist):
    """Fills optimizers, generators and gradient scaler from a checkpoint. ValueError if other parameters train now."""
    tensors, parameters = read_tensors(folder / "trainer.safetensors"), dict(stage.model.named_parameters())
    optimizer_of = {p: opt for opt in optimizers for group in opt.param_groups for p in group["params"]}
    for entry in [entry for entry in tensors if entry.startswith("optimizer.")]:
        name, _, key = entry.removeprefix("optimizer.").rpartition(".")
        p, t = parameters.get(name), tensors[entry]            # p: None if the model has no such parameter
        if p not in optimizer_of:
            raise ValueError(f"{folder}: {name} does not train now; resume with that run's options, or use --restart")
        # subtle: fused AdamW counts its steps on the device
        optimizer_of[p].state[p][key] = t.to(p.device) if key == "step" else shard_like(t.to(p.device, p.dtype), p)
    load_rng_state(stage, tensors, dist.rank)
    scaler.load_state_dict(read_json(folder / TRAINER)["scaler"])

def generators(stage):
    """{name: (get, set)} of the states of this process's random generators."""
    cuda = {"cuda": (torch.cuda.get_rng_state, torch.cuda.set_rng_state)} if torch.cuda.is_available() else {}
    loss = {"loss": (stage.generator.get_state, stage.generator.set_state)} if stage.generator else {}
    return {"torch": (torch.get_rng_state, torch.set_rng_state), **cuda, **loss}

def rng_state(stage):
    return {name: get_state() for name, (get_state, _) in generators(stage).items()}

def load_rng_state(stage, tensors, rank):
    """The inverse, if the checkpoint has a state for this process: additional processes keep their new generators."""
    for name, (_, set_state) in generators(stage).items():
        if f"random.{rank}.{name}" in tensors:
            set_state(tensors[f"random.{rank}.{name}"])

# ------------------------------------------------------------------------------------------------------------- writing

def model_state(model):
    """{name: tensor}, not sharded, copied to the CPU; without the frozen LLM."""
    return {n: full_tensor(t).detach().to("cpu", copy=True) for n, t in model.state_dict().items()
            if not checkpoint.is_frozen_llm(n)}

def write_checkpoint(stage, folder, weights, record, tensors=None, hint=""):
    """Writes a folder, whole or not at all. tensors: what only a run that resumes needs. OSError on a full disk."""
    try:
        with atomic_folder(folder) as temporary:
            stage.write(temporary, weights)
            if tensors is not None:
                # trainer.json comes last, for it has the hashes of all other files
                save_tensors(tensors, temporary / "trainer.safetensors")
                record["files"] = {path.name: size_and_hash(path) for path in sorted(temporary.iterdir())}
            (temporary / TRAINER).write_text(json.dumps(record, indent=2))
    except OSError as error:
        size, free = sum(t.nbytes for t in (weights | (tensors or {})).values()), shutil.disk_usage(folder.parent).free
        raise OSError(f"{folder} cannot be written ({error}): it needs {size / 2 ** 20:,.1f} MiB, "
                      f"{free / 2 ** 20:,.1f} MiB are free{hint}") from None

class AsyncSaver:
    """Writes checkpoints in a thread, one at a time, and deletes all but the last keep_checkpoints."""

    def __init__(self, stage, cfg, dist):
        self.stage, self.cfg, self.dist, self.thread, self.error = stage, cfg, dist, None, None

    def save(self, step, optimizers, scaler):
        """All processes call it, to put together what is sharded; the main one writes."""
        # copies, which the thread writes while training continues; moments by name: indices depend on what else trains
        self.wait()
        names = {p: name for name, p in self.stage.model.named_parameters()}
        weights = model_state(self.stage.model)
        tensors = {f"optimizer.{names[p]}.{key}": full_tensor(t).cpu().clone() for optimizer in optimizers
                   for p, state in optimizer.state.items() for key, t in state.items()}
        for rank, state in enumerate(self.dist.all_gather_object(rng_state(self.stage))):
            # every process draws its own dropout
            tensors |= {f"random.{rank}.{name}": t for name, t in state.items()}
        if self.dist.is_main:
            record = {"step": step, "done": False, "options": asdict(self.cfg), "scaler": scaler.state_dict(),
                      "data": data_record(self.stage)}
            self.thread = threading.Thread(target=self.write, args=(step, weights, record, tensors))
            self.thread.start()

    def write(self, step, weights, record, tensors):
        self.error = None
        try:
            write_checkpoint(self.stage, self.stage.unfinished / f"{step:06d}", weights, record, tensors)
            for old in list(saved_steps(self.stage.unfinished).values())[:-self.cfg.keep_checkpoints]:
                shutil.rmtree(old, ignore_errors=True)
        except Exception as error:                             # most likely a full disk: no reason to stop training
            self.error = str(error)                            # close raises it
            print(f"{error}; the checkpoints before it are intact, and training continues", flush=True)

    def wait(self):
        """Until the last checkpoint is written."""
        if self.thread:
            self.thread.join()

    def close(self):
        """wait, and OSError if the last checkpoint could not be written."""
        self.wait()
        if self.error:
            raise OSError(self.error)

def finish(stage, cfg, dist):
    """Writes the finished checkpoint and removes the unfinished run. OSError on a full disk."""
    weights = model_state(stage.model)                         # all processes: it puts together what is sharded
    if dist.is_main:
        # first makes room; if there still is too little, the run can resume from the last one
        for old in list(saved_steps(stage.unfinished).values())[:-1]:
            shutil.rmtree(old)
        write_checkpoint(stage, stage.folder, weights, {"done": True, "options": asdict(cfg)},
                         hint="; make room, and the same command resumes from the last checkpoint")
        shutil.rmtree(stage.unfinished, ignore_errors=True)
    dist.barrier()                                             # nobody starts the next stage before it is written
