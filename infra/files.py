"""Files that are complete or absent, and strict loading: what every checkpoint of this project rests on.

    atomic_folder   a folder that appears complete or not at all, whatever stops the program in between
    read_tensors    a .safetensors file, or a PyTorch file of somebody else without running code from its pickle
    load_strict     tensors into a module: names and shapes must match, or the error lists what does not

Not here: checkpoints (weights/checkpoint.py), LLM folders (weights/hf_llama.py), official files (weights/convert.py).

    pytest tests/test_infra_files.py
"""
import fcntl
import hashlib
import json
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

def flush_to_disk(path):
    """Waits until the bytes of a file are on the disk."""
    with open(path, "rb+") as f:
        os.fsync(f.fileno())

@contextmanager
def atomic_folder(folder, replace=True):
    """Yields a temporary folder to fill, which becomes `folder` if the block ends without an error.
    replace=False: a `folder` that another process has finished meanwhile stays."""
    folder = Path(folder)
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("partial", "old"))
    shutil.rmtree(temporary, ignore_errors=True)               # of a killed process that had the same id
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in filter(Path.is_file, temporary.rglob("*")):
            flush_to_disk(path)

        # a folder cannot be renamed onto one that has files, so the old one is moved aside
        # subtle: the files are on disk by now, so a crash leaves the old folder (maybe as .NAME.PID.old) or the new one
        if folder.exists() and replace:
            folder.rename(old)
        if not folder.exists():
            temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

@contextmanager
def atomic_file(path):
    """Yields a temporary path to write, whose file becomes `path` if the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name                   # save_tensors reads the suffix
        yield temporary
        flush_to_disk(temporary)
        temporary.replace(path)

@contextmanager
def lock_folder(folder):
    """Creates the folder and locks it for this process inside the block. OSError if another process has the lock."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".lock", "w") as lock:
        try:                                # subtle: loader workers would inherit a flock and outlive this process
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OSError(f"another process is writing into {folder}: wait for it, or choose another folder") from None
        yield

def save_text(text, path):
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")          # a lone surrogate: \ud800

def write_json(value, path, indent=2):
    save_text(json.dumps(value, indent=indent) + "\n", path)

def read_json(path, lines=False):
    """FileNotFoundError or ValueError name the file, in one line. lines: JSON Lines give a list."""
    try:
        data = Path(path).read_bytes()
        text = data.decode(json.detect_encoding(data)).removeprefix("\ufeff").strip()   # or, from Windows, UTF-16
        if not lines:
            return json.loads(text)

        # one value after another, so that an error names the line in the file
        values, end = [], 0
        while not values or end < len(text):
            value, end = json.JSONDecoder().raw_decode(text, end)
            values.append(value)
            end = re.compile(r"\s*").match(text, end).end()
        return values[0] if len(values) == 1 else values
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None

# ------------------------------------------------------------------------------------------------------- named tensors

def read_torch_file(path):
    """A PyTorch file of somebody else -> {name: tensor}; a dict under "model", "module" or "state_dict" is unpacked."""
    # a pickle may run any code, so only tensors and plain values are accepted; only zip archives can be memory-mapped
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        foreign = re.search(r"Unsupported (?:global|class|operand).*?([\w.]*\.\w+)", str(error))
        raise ValueError(f"{path} holds {foreign[1]} besides tensors, which may run any code; if you trust it: "
                         'torch.save(torch.load(FILE, weights_only=False)["model"], NEW)' if foreign else
                         f"{path} is damaged or not a PyTorch file; copy it again") from None

    # official files nest their tensors in one or two dicts, beside other things
    for key in ("model", "module", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    named = content if isinstance(content, dict) else {}
    tensors = {name: t for name, t in named.items() if isinstance(name, str) and torch.is_tensor(t)}
    if not tensors:
        raise ValueError(f"{path} holds {list(named)[:4] or type(content).__name__}, but no tensors by name")
    return tensors

def iter_tensors(path):
    """Yields (name, tensor) one by one from .safetensors, or from a PyTorch file. ValueError for a damaged file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if Path(path).suffix != ".safetensors":
        yield from read_torch_file(path).items()               # mapped into memory if the format allows it
        return
    try:
        with safe_open(path, "pt") as f:
            for name in f.keys():
                yield name, f.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); copy or make it again") from None

def read_tensors(path):
    return dict(iter_tensors(path))

def save_tensors(tensors, path):
    """Writes {name: tensor}, views too and from any device, as .safetensors or, by the suffix, as a PyTorch file."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save = save_file if Path(path).suffix == ".safetensors" else torch.save
    try:
        save(tensors, path)
    except (SafetensorError, RuntimeError) as error:           # RuntimeError: what torch.save raises on a full disk
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}; is there room on the disk?") from None

def hash_file(path, digest):
    """Adds the bytes of a file to a hashlib digest -> the digest."""
    with open(path, "rb") as f:
        while block := f.read(2 ** 24):                        # 16 MiB at a time
            digest.update(block)
    return digest

def fingerprint(tensors):
    """16 hexadecimal digits of {name: tensor} or an iterable of its items: names, shapes, 16 values of each tensor."""
    parts = {}
    for name, t in tensors.items() if isinstance(tensors, dict) else tensors:
        flat = t.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // 16)][:16].float().cpu().numpy()      # from all over the tensor
        parts[name] = f"{name} {tuple(t.shape)}".encode() + values.tobytes()
    return hashlib.sha256(b"".join(parts[name] for name in sorted(parts))).hexdigest()[:16]

def check_state_dict(expected, tensors, where, fresh=(), dropped=()):
    """Compares two {name: tensor}; ValueError names `where` and lists the names and shapes that do not match.
    Names that start with one of `fresh` may be missing, those with one of `dropped` may be left over."""
    problems = {
        "missing": [n for n in expected if n not in tensors and not n.startswith(tuple(fresh))],
        "left over": [n for n in tensors if n not in expected and not n.startswith(tuple(dropped))],
        "of another shape": [f"{n} {tuple(tensors[n].shape)} instead of {tuple(t.shape)}"
                             for n, t in expected.items() if n in tensors and tensors[n].shape != t.shape]}
    # of each kind the number and the first three names, at once: each attempt to load 14 GB takes minutes
    if report := [f"{len(names)} {kind} ({', '.join(names[:3])})" for kind, names in problems.items() if names]:
        raise ValueError(f"{where} does not fit this model: {'; '.join(report)}")

def load_strict(module, tensors, where, fresh=(), dropped=()):
    """Fills module from {name: tensor} after check_state_dict; `fresh` names keep their initialisation."""
    state = module.state_dict()
    check_state_dict(state, tensors, where, fresh, dropped)
    with torch.no_grad():
        for name, t in state.items():
            if name in tensors and t.is_meta:                  # has no memory to copy into
                set_parameter(module, name, tensors[name].to(t.dtype))
            elif name in tensors:                              # optimizers may already refer to it
                t.copy_(tensors[name])

def set_parameter(module, name, tensor):
    """Replaces the parameter of this dotted name; one on the meta device gets its memory this way."""
    parent, _, leaf = name.rpartition(".")
    parent = module.get_submodule(parent)
    # subtle: a copy, because the tensor may be a view of a mapped file
    setattr(parent, leaf, torch.nn.Parameter(tensor.clone(), requires_grad=getattr(parent, leaf).requires_grad))
