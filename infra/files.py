"""Files written whole or not at all, and read strictly: what every checkpoint of this project stands on.

    atomic_folder     a folder that appears complete or not at all, whatever stops the program in between
    read_tensors     a safetensors file, or a foreign PyTorch file without running what may hide in its pickle
    load_strict    tensors into a module: every name and shape must fit, or an error lists what does not

It knows no model: an LLM's folder is llm_folder.py, a checkpoint of VideoChat2 checkpoint.py, the official files
weights.py.

    pytest tests/test_files.py
"""
import fcntl
import json
import os
import pickle
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


@contextmanager
def atomic_folder(folder, replace=True):
    """Gives a temporary folder to fill; it takes the place of `folder` only when the block ends without an error.

    Without `replace`, a folder that another process has finished meanwhile stays.
    subtle: every file is flushed to the disk before the rename, so that a crash leaves the old folder or the new one;
    in the moment between two renames the old one is called .NAME.PID.old.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            fsync(path)
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        if folder.exists() and replace:
            folder.rename(old)
        if not folder.exists():
            temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fsync(path):
    """Waits until a file's bytes are on the disk; a folder has none of its own."""
    if path.is_file():
        with open(path, "rb+") as f:
            os.fsync(f.fileno())


def read_json(path):
    """Raises FileNotFoundError or ValueError with the file's name in one line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def iter_tensors(path):
    """Yields (name, tensor) of a .safetensors file one by one, or of a PyTorch file (.bin, .pth, .pt), read as a whole.

    A PyTorch file is read with weights_only=True: of a pickle, tensors alone are taken. A torn or foreign file is a
    ValueError that names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    yield from each_safetensor(path) if path.suffix == ".safetensors" else read_torch_file(path).items()


def each_safetensor(path):
    try:
        with safe_open(path, "pt") as f:
            yield from ((name, f.get_tensor(name)) for name in f.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); copy or make it again") from None


def read_torch_file(path):
    """A PyTorch file of others -> {name: tensor}; one that lies under "model", "module" or "state_dict" is unpacked."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        found = read_old_format(path, error)
    for key in ("model", "module", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path} holds a {type(found).__name__}, not named tensors")
    tensors = {name: t for name, t in found.items() if torch.is_tensor(t)}
    if not tensors:
        raise ValueError(f"{path} holds {', '.join(list(found)[:4])}, but no tensors by those names")
    return tensors


def read_old_format(path, error):
    """Files of torch before 1.6 are no zip archives, and cannot be mapped into memory."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as second:
        held = re.search(r"Unsupported (?:global|class|operand).*?([\w.]*\.\w+)", f"{error} {second}")
        if held:
            raise ValueError(f"{path} holds {held[1]} besides tensors, which loading could let run anything; if you "
                             "trust the file, save its tensors alone: torch.save(torch.load(FILE, weights_only=False)"
                             '["model"], NEW)') from None
        raise ValueError(f"{path} is damaged or not a PyTorch file; copy it again") from None


def read_tensors(path):
    """A file of iter_tensors's kinds -> {name: tensor}."""
    return dict(iter_tensors(path))


def save_tensors(tensors, path):
    """{name: tensor} -> a safetensors file; tensors may be views and on any device. OSError names the file."""
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None


def check_state_dict(own, tensors, where, fresh=(), dropped=()):
    """Compares own {name: tensor} with tensors by names and shapes; ValueError lists what does not fit.

    Names that start with one of `fresh` may be missing in tensors, those with one of `dropped` may be left over.
    """
    missing = [n for n in own if n not in tensors and not n.startswith(tuple(fresh))]
    extra = [n for n in tensors if n not in own and not n.startswith(tuple(dropped))]
    shapes = [f"{n} {tuple(tensors[n].shape)} instead of {tuple(own[n].shape)}"
              for n in own if n in tensors and tensors[n].shape != own[n].shape]
    problems = [f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                for what, names in (("missing", missing), ("left over", extra), ("of another shape", shapes)) if names]
    if problems:
        raise ValueError(f"{where} does not fit this model: " + "; ".join(problems))


def load_strict(module, tensors, where, fresh=(), dropped=()):
    """Fills module from {name: tensor}. Names starting with `fresh` keep their initialisation, `dropped` are not used.

    Every other name must match on both sides with the same shape, or ValueError lists what does not.
    """
    own = module.state_dict()
    check_state_dict(own, tensors, where, fresh, dropped)
    with torch.no_grad():
        for name, t in own.items():
            if name in tensors and t.is_meta:
                set_parameter(module, name, tensors[name].to(t.dtype))
            elif name in tensors:
                t.copy_(tensors[name])


def set_parameter(module, name, tensor):
    """Makes tensor the parameter of this name: one on the meta device gets its memory only so."""
    parent, _, leaf = name.rpartition(".")
    parent = module.get_submodule(parent)
    setattr(parent, leaf, nn.Parameter(tensor.clone(), requires_grad=getattr(parent, leaf).requires_grad))


def hash_file(path, digest):
    """The digest (of hashlib), with the file's bytes added."""
    with open(path, "rb") as f:
        while block := f.read(2 ** 24):
            digest.update(block)
    return digest


@contextmanager
def lock_folder(folder):
    """Within it the folder is this process's; OSError if another process has it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        # subtle: lockf, not flock, which loader workers would hold on to when this process is killed
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OSError(f"another process is writing into {folder}: wait for it, or choose another folder") from None
        yield


@contextmanager
def atomic_file(path):
    """Gives a temporary path to write; it takes the place of `path` only when the block ends without an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_text(text, path):
    """A text file: whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_torch_file(tensors, path):
    """{name: tensor} -> a PyTorch file, for the code of others: whole or not at all, as every file here."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file(path) as temporary:
            torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)
    except RuntimeError as error:                              # PyTorch's word for a full disk
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}; is there room on the disk?") from None
