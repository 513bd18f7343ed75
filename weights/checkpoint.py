"""A checkpoint of VideoChat2 is a folder; the frozen LLM is not copied into it.

    runs/toy/stage3/
        config.json          Config, stage, where the LLM lies and its fingerprint
        model.safetensors    every tensor but the frozen LLM's (LoRA's are here)
        vocab.txt            WordPiece words of the Q-Former

Another LLM than the one that a checkpoint was made with gives gibberish, not an error; so its fingerprint is compared,
and another is refused with both named. Not here: the files themselves (infra/files.py), the LLM's folder (weights/hf_llama.py),
the official checkpoints (weights.py), the optimizer's state (train.py).

Try:    python -m weights.convert check --ckpt runs/toy/stage3   # tensors, parameters, dtype and norm of each part
"""
import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from infra.files import hash_file, load_strict, read_json, read_tensors, save_tensors
from model import DTYPES, Config, VideoChat2
from tokenizer import WordPiece
from weights.hf_llama import config_diff, llm_config, llm_tokenizer, load_llm_weights

LLM_PREFIX = "llama_model."


def is_frozen_llm(name):
    """Whether a tensor of the model belongs to the LLM's folder."""
    return name.startswith(LLM_PREFIX) and "lora_" not in name


def save_checkpoint(tensors, stage, cfg, folder, vocab, llm=None):
    """Writes a checkpoint's files into a folder that the caller makes whole (train.py adds the optimizer's).

    llm: {"path", "fingerprint"} of the frozen LLM, where one is known.
    """
    save_tensors({n: t for n, t in tensors.items() if not is_frozen_llm(n)}, folder / "model.safetensors")
    shutil.copyfile(vocab, folder / "vocab.txt")
    (folder / "config.json").write_text(json.dumps({"stage": stage, "config": asdict(cfg), "llm": llm}, indent=2))


def read_config(folder):
    """A checkpoint's config.json -> (Config, the whole dict). ValueError names what is wrong with it."""
    path = Path(folder) / "config.json"
    found = read_json(path)
    if not {"stage", "config", "llm"} <= set(found):
        raise ValueError(f"{path} is not a VideoChat2 checkpoint's: it lacks "
                         + ", ".join(sorted({"stage", "config", "llm"} - set(found))))
    return Config.from_dict(found["config"]), found


def load_checkpoint(folder, llm="", device="cpu", dtype=torch.float32, int8=False):
    """A checkpoint folder of stage 1 to 3 -> (VideoChat2, WordPiece, SentencePiece or None), ready to run.

    llm: the LLM's folder, if it moved from where config.json says. dtype and int8: of the frozen LLM's weights.
    """
    folder = Path(folder)
    cfg, found = read_config(folder)
    if found["stage"] not in (1, 2, 3):
        raise ValueError(f"{folder} is of stage {found['stage']}, not a VideoChat2 model of stage 1, 2 or 3")
    with torch.device("meta"):                                 # no memory before the weights are there
        model = VideoChat2(cfg, found["stage"])
    load_strict(model, read_tensors(folder / "model.safetensors"), folder, fresh=(LLM_PREFIX,))
    tok = None
    if found["stage"] > 1:
        if not found["llm"]:
            raise ValueError(f"{folder}/config.json names no LLM, which a model of stage {found['stage']} needs")
        tok = attach_llm(model, Path(llm) if llm else find_llm(folder, found["llm"]["path"]), found["llm"], folder,
                         dtype=dtype, int8=int8, device=device)[0]
    left = [name for name, t in model.state_dict().items() if t.is_meta]
    if left:
        raise ValueError(f"{folder} does not fit this model: {len(left)} missing ({', '.join(left[:3])})")
    return model.to(device).eval(), WordPiece.load(folder / "vocab.txt"), tok


def attach_llm(model, where, expected, needed_by, **options):
    """Reads the LLM's folder `where` into the model -> (its tokenizer, {"path", "fingerprint"}).

    expected: {"path", "fingerprint"} of the LLM that needed_by was made with, or None; another is a ValueError.
    options: of llm_folder.load_llm_weights.
    """
    tok, sizes = llm_tokenizer(where), llm_config(where)
    if tok.vocab_size > sizes.vocab_size:
        raise ValueError(f"{where}/tokenizer.model has {tok.vocab_size} pieces, but the LLM beside it knows "
                         f"{sizes.vocab_size}: it is another LLM's")
    other = config_diff(sizes, model.cfg.llama)
    if other:
        raise ValueError(f"{needed_by} was made with another LLM than {where}, whose config.json says "
                         f"{', '.join(other.values())}; name the right one's folder by --llm")
    mark = load_llm_weights(model.llama_model, where, **options)
    if expected and mark != expected["fingerprint"]:
        raise ValueError(f"{needed_by} was made with the LLM {Path(expected['path']).name} (fingerprint "
                         f"{expected['fingerprint']}), but {where} is another one ({mark}), which would give "
                         "gibberish; name the right one's folder by --llm")
    return tok, {"path": str(where), "fingerprint": mark}


def find_llm(folder, path):
    """The LLM's folder: as written, or relative to the checkpoint (so that runs/ can be moved as a whole)."""
    for candidate in (Path(path), Path(folder) / path):
        if (candidate / "config.json").is_file():
            return candidate
    raise FileNotFoundError(f"{folder} was made with the LLM in {path}, which is not there; name its place by --llm")


def llm_record(llm, folder):
    """llm {"path", "fingerprint"} as a checkpoint in `folder` notes it: the path holds when runs/ moves as a whole."""
    # subtle: a link in either path would lead a relative one astray
    return llm and llm | {"path": os.path.relpath(os.path.realpath(llm["path"]), os.path.realpath(folder))}


def checkpoint_hash(folder):
    """16 hexadecimal digits of all that a checkpoint's answers depend on, but the LLM, which config.json names."""
    digest = hashlib.sha256(json.dumps(read_json(Path(folder) / "config.json")["config"], sort_keys=True).encode())
    for name in ("vocab.txt", "model.safetensors"):
        hash_file(Path(folder) / name, digest)
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------ options of every command that loads one


def add_model_options(parser):
    """--ckpt, --llm, --device, --dtype, --llm-int8."""
    parser.add_argument("--ckpt", required=True, help="checkpoint folder of stage 3 (or 2)")
    parser.add_argument("--llm", default="", help="the LLM's folder, if it moved since training")
    parser.add_argument("--device", default="", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="",
                        help="of the LLM's weights; bf16 and fp16 compute in it too (default: bf16 on a GPU, fp32 "
                             "elsewhere)")
    parser.add_argument("--llm-int8", action="store_true", help="keep the LLM's matrices in 8 bits")


def load_from_args(args):
    """(model, wordpiece, tok, what computes in args.dtype) by add_model_options; ValueError if it cannot speak."""
    device, dtype = device_of(args), dtype_of(args)
    model, wordpiece, tok = load_checkpoint(args.ckpt, args.llm, device, DTYPES[dtype], args.llm_int8)
    if tok is None:
        raise ValueError(f"{args.ckpt} is of stage 1 and has no LLM: a checkpoint of stage 2 or 3 is needed")
    return model, wordpiece, tok, torch.autocast(
        torch.device(device).type, DTYPES[dtype], enabled=dtype != "fp32")


def device_of(args):
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(args):
    return args.dtype or ("bf16" if device_of(args).startswith("cuda") else "fp32")
