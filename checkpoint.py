"""A checkpoint is a folder, written whole or not at all, and read back strictly.

    runs/toy/stage3/
        config.json          Config, stage, where the LLM lies and its fingerprint
        model.safetensors    every tensor but the frozen LLM's (LoRA's are here)
        vocab.txt            WordPiece words of the Q-Former
    runs/toy/stage0/llm/     an LLM folder in Hugging Face layout: config.json, model.safetensors, tokenizer.model

The frozen LLM is not copied: a checkpoint holds its path and a fingerprint, and another LLM is refused by name.
This file does not know the official checkpoints' names (weights.py will), nor the optimizer's state (train.py).

Try:    python checkpoint.py runs/toy/stage3       # what is in it: tensors, parameters, norm, per part
"""
import hashlib
import json
import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llama import Llama, LlamaConfig
from model import Config, VideoChat2
from tokenizer import SentencePiece, WordPiece

LLM_PREFIX = "llama_model."

# ---------------------------------------------------------------------------------------------------- folders and files


@contextmanager
def whole_folder(folder, replace=True):
    """Gives a temporary folder to fill; it takes the place of `folder` only when the block ends without an error.

    Without `replace`, a folder that another process has finished meanwhile stays.
    subtle: every file is flushed to the disk before the rename; a crash leaves the old folder or the new one.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            to_disk(path)
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        if folder.exists() and replace:
            folder.rename(old)
        if not folder.exists():
            temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def to_disk(path):
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


def read_tensors(path):
    """A safetensors file -> {name: tensor}. A torn or foreign file is a ValueError that names it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); copy or train it again") from None


def save_tensors(tensors, path):
    """{name: tensor} -> a safetensors file; tensors may be views and on any device."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)


def load_strictly(module, tensors, where, fresh=(), dropped=()):
    """Fills module from {name: tensor}. Names starting with `fresh` keep their initialisation, `dropped` are not used.

    Every other name must match on both sides with the same shape, or ValueError lists what does not.
    """
    own = module.state_dict()
    missing = [n for n in own if n not in tensors and not n.startswith(tuple(fresh))]
    extra = [n for n in tensors if n not in own and not n.startswith(tuple(dropped))]
    shapes = [f"{n} {tuple(tensors[n].shape)} instead of {tuple(own[n].shape)}"
              for n in own if n in tensors and tensors[n].shape != own[n].shape]
    problems = [f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                for what, names in (("missing", missing), ("left over", extra), ("of another shape", shapes)) if names]
    if problems:
        raise ValueError(f"{where} does not fit this model: " + "; ".join(problems))
    with torch.no_grad():
        for name, t in own.items():
            if name in tensors:
                t.copy_(tensors[name])


# ------------------------------------------------------------------------------------------------------------- the LLM

HF_NAMES = {  # LlamaConfig field -> key of Hugging Face's config.json
    "vocab_size": "vocab_size", "width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "ffn": "intermediate_size", "eps": "rms_norm_eps", "rope_theta": "rope_theta",
    "max_positions": "max_position_embeddings"}


def write_llm(llama, tokenizer_model, folder):
    """The files of an LLM folder in Hugging Face layout: what stage 0 makes is what Vicuna comes as."""
    config = {hf: getattr(llama.cfg, ours) for ours, hf in HF_NAMES.items()}
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
               "tie_word_embeddings": False, "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_tensors(llama.state_dict(), folder / "model.safetensors")
    shutil.copyfile(tokenizer_model, folder / "tokenizer.model")


def llm_config(folder):
    """config.json of an LLM folder -> LlamaConfig."""
    found = read_json(Path(folder) / "config.json")
    missing = [hf for ours, hf in HF_NAMES.items() if hf not in found and ours not in ("kv_heads", "rope_theta")]
    if missing:
        raise ValueError(f"{folder}/config.json lacks {', '.join(missing)}: is this the folder of a LLaMA model?")
    found.setdefault("num_key_value_heads", found["num_attention_heads"])
    found.setdefault("rope_theta", 1e4)
    return LlamaConfig(**{ours: found[hf] for ours, hf in HF_NAMES.items()})


def fingerprint(tensors):
    """Short hash of a model's weights: their names, shapes and 16 values of each tensor."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        flat = t.reshape(-1)
        digest.update(f"{name} {tuple(t.shape)}".encode())
        digest.update(flat[:: max(1, flat.numel() // 16)][:16].float().numpy().tobytes())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------ the whole model


def write_model(model, folder, vocab, llm=None):
    """Writes a checkpoint's files into a folder that the caller makes whole (train.py adds the optimizer's).

    llm: {"path", "fingerprint"} of the frozen LLM, if the stage has one.
    """
    tensors = {n: t for n, t in model.state_dict().items() if not n.startswith(LLM_PREFIX) or "lora_" in n}
    save_tensors(tensors, folder / "model.safetensors")
    shutil.copyfile(vocab, folder / "vocab.txt")
    config = {"stage": model.stage, "config": asdict(model.cfg), "llm": llm}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def read_config(folder):
    """A checkpoint's config.json -> (Config, the whole dict). ValueError names what is wrong with it."""
    path = Path(folder) / "config.json"
    found = read_json(path)
    if not {"stage", "config", "llm"} <= set(found):
        raise ValueError(f"{path} is not a VideoChat2 checkpoint's: it lacks "
                         + ", ".join(sorted({"stage", "config", "llm"} - set(found))))
    return Config.from_dict(found["config"]), found


def load_model(folder, llm="", device="cpu", dtype=torch.float32):
    """A checkpoint folder of stage 1 to 3 -> (VideoChat2, WordPiece, SentencePiece or None), ready to run.

    llm: the LLM's folder, if it moved from where config.json says. dtype: of the frozen LLM.
    """
    folder = Path(folder)
    cfg, found = read_config(folder)
    if found["stage"] not in (1, 2, 3):
        raise ValueError(f"{folder} is of stage {found['stage']}, not a VideoChat2 model of stage 1, 2 or 3")
    model = VideoChat2(cfg, found["stage"])
    tensors = read_tensors(folder / "model.safetensors")
    tok = None
    if found["llm"]:
        where = find_llm(folder, llm or found["llm"]["path"])
        tok, _ = put_llm(model, where, dtype, expected=found["llm"]["fingerprint"], needed_by=folder)
        tensors |= {n: t for n, t in model.state_dict().items() if n.startswith(LLM_PREFIX) and "lora_" not in n}
    load_strictly(model, tensors, folder)
    return model.to(device).eval(), WordPiece.load(folder / "vocab.txt"), tok


def find_llm(folder, path):
    """The LLM's folder: as written, or relative to the checkpoint (so that runs/ can be moved as a whole)."""
    for candidate in (Path(path), Path(folder) / path):
        if (candidate / "config.json").is_file():
            return candidate
    raise FileNotFoundError(f"{folder} was trained with the LLM in {path}, which is not there; name its place by --llm")


def put_llm(model, folder, dtype=torch.float32, expected=None, needed_by=""):
    """Reads an LLM folder into model.llama_model -> (its tokenizer, its fingerprint, which must be `expected`)."""
    tensors = read_tensors(Path(folder) / "model.safetensors")
    found = fingerprint(tensors)
    if expected and found != expected:
        raise ValueError(f"{needed_by} was trained with the LLM {expected}, but {folder} holds {found}: "
                         "another LLM gives gibberish; name the right one by --llm")
    llama = model.llama_model
    lora = [n for n in llama.state_dict() if "lora_" in n]
    base = {n.replace(".base.weight", ".weight"): n for n in llama.state_dict()}
    load_strictly(llama, {base.get(n, n): t for n, t in tensors.items()}, folder, fresh=lora)
    for name, p in llama.named_parameters():
        if "lora_" not in name:
            p.data = p.data.to(dtype)
    return SentencePiece(str(Path(folder) / "tokenizer.model")), found


def load_llm(folder, dtype=torch.float32):
    """An LLM folder -> (Llama, SentencePiece)."""
    llama = Llama(llm_config(folder))
    load_strictly(llama, read_tensors(Path(folder) / "model.safetensors"), folder)
    return llama.to(dtype), SentencePiece(str(Path(folder) / "tokenizer.model"))


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python checkpoint.py FOLDER    shows what a checkpoint holds")
    _, found = read_config(sys.argv[1])
    print(f"{sys.argv[1]}: preset {found['config']['preset']}, stage {found['stage']}, LLM {found['llm']}")
    rows = {}
    for name, t in read_tensors(Path(sys.argv[1]) / "model.safetensors").items():
        part = "lora" if "lora_" in name else name.split(".")[0]
        rows.setdefault(part, []).append(t)
    for part, tensors in rows.items():
        norm = sum(t.float().square().sum() for t in tensors) ** 0.5
        n = sum(t.numel() for t in tensors)
        print(f"  {part:20} {len(tensors):4} tensors {n:>13,} parameters  {tensors[0].dtype}  norm {norm:.3f}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"checkpoint.py: {error}", file=sys.stderr)
        sys.exit(2)
