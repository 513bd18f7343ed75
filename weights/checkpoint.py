"""A checkpoint of VideoChat2 is a folder; the frozen LLM is not copied into it.

    runs/toy/stage3/
        config.json          Config, stage, path and fingerprint of the LLM
        model.safetensors    every tensor except the frozen LLM's (LoRA's are here)
        vocab.txt            WordPiece vocabulary of the Q-Former

With another LLM than its own, a checkpoint would give gibberish instead of an error, so the fingerprints are compared.
Not here: the LLM's folder (hf_llama.py), the official files (convert.py), optimizer state (training/resume.py).

    python -m weights.convert check --ckpt runs/toy/stage3   # tensors, parameters, dtype and norm of each part
"""
import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from infra.files import hash_file, load_strict, read_json, read_tensors, save_tensors, write_json
from model import DTYPES, Config, VideoChat2
from tokenizer import WordPiece
from weights.hf_llama import config_diff, llm_config, llm_tokenizer, load_llm_weights

LLM_PREFIX = "llama_model."                                    # of the LLM's parameters, and of LoRA's beside them

def is_frozen_llm(name):
    return name.startswith(LLM_PREFIX) and "lora_" not in name

def save_checkpoint(tensors, stage, cfg, folder, vocab, llm=None):
    """Writes a checkpoint into a folder that exists. llm: {"path", "fingerprint"} of the frozen LLM, if any."""
    save_tensors({n: t for n, t in tensors.items() if not is_frozen_llm(n)}, folder / "model.safetensors")
    shutil.copyfile(vocab, folder / "vocab.txt")
    write_json({"stage": stage, "config": asdict(cfg), "llm": llm}, folder / "config.json")

def read_config(folder):
    """config.json of a checkpoint -> (Config, the dict with "stage", "config", "llm"). ValueError if one is missing."""
    path = Path(folder) / "config.json"
    record = read_json(path)
    if missing := {"stage", "config", "llm"} - set(record):    # config.json is also what an LLM's folder has
        raise ValueError(f"{path} is not a VideoChat2 checkpoint's: it lacks {', '.join(sorted(missing))}")
    return Config.from_dict(record["config"]), record

def load_checkpoint(folder, llm="", device="cpu", dtype=torch.float32, int8=False, stages=(1, 2, 3)):
    """A checkpoint of one of these stages -> (VideoChat2, WordPiece, SentencePiece or None in stage 1), ready to run.
    llm: the LLM's folder, if it moved from where config.json says. dtype and int8: of the frozen LLM's weights."""
    folder = Path(folder)
    cfg, record = read_config(folder)
    stage, llm_tok = record["stage"], None
    if stage not in stages:
        raise ValueError(f"{folder} is of stage {stage}{' and has no LLM' * (stage == 1)}; this needs one of {stages}")

    # on the meta device the model takes no memory until its weights are read; the LLM's come from its own folder
    with torch.device("meta"):
        model = VideoChat2(cfg, stage)
    frozen = tuple(filter(is_frozen_llm, model.state_dict()))
    load_strict(model, read_tensors(folder / "model.safetensors"), folder, fresh=frozen)
    if stage > 1:
        if not (llm or record["llm"]):
            raise ValueError(f"{folder}/config.json names no LLM: name its folder by --llm")
        llm_folder = Path(llm) if llm else find_llm(folder, record["llm"]["path"])
        llm_tok, _ = attach_llm(model, llm_folder, record["llm"], folder, dtype=dtype, int8=int8, device=device)
    return model.to(device).eval(), WordPiece.load(folder / "vocab.txt"), llm_tok

def attach_llm(model, llm_folder, expected, needed_by, **options):
    """Reads an LLM folder into the model -> (its SentencePiece, {"path", "fingerprint"}). options: load_llm_weights's.
    expected: {"path", "fingerprint"} of the LLM that `needed_by` was made with, or None. ValueError for another LLM."""
    # what config.json and the tokenizer tell, before gigabytes are read
    llm_tok, llama_cfg = llm_tokenizer(llm_folder), llm_config(llm_folder)
    if llm_tok.vocab_size > llama_cfg.vocab_size:
        raise ValueError(f"{llm_folder}: its tokenizer has {llm_tok.vocab_size} pieces, its LLM {llama_cfg.vocab_size}")
    if differences := config_diff(llama_cfg, model.cfg.llama):
        raise ValueError(f"{needed_by} was made with another LLM than {llm_folder}, whose config.json says "
                         f"{', '.join(differences.values())}; name the right folder by --llm")

    # sizes and tokenizer match: only the weights tell LLMs of the same family apart
    digits = load_llm_weights(model.llama_model, llm_folder, **options)
    if expected and digits != expected["fingerprint"]:
        raise ValueError(f"{needed_by} was made with the LLM {Path(expected['path']).name} (fingerprint "
                         f"{expected['fingerprint']}), but {llm_folder} is another one ({digits}); name it by --llm")
    return llm_tok, {"path": str(llm_folder), "fingerprint": digits}

def find_llm(folder, path):
    """The LLM's folder: `path`, or `path` relative to the checkpoint `folder`, so that all of runs/ can be moved."""
    for candidate in (Path(path), Path(folder) / path):        # an absolute path makes both the same
        if (candidate / "config.json").is_file():
            return candidate
    raise FileNotFoundError(f"{folder} was made with the LLM in {path}, which is not there; name its folder by --llm")

def llm_record(llm, folder):
    """{"path", "fingerprint"} of an LLM as a checkpoint in `folder` stores it: the path is relative to `folder`."""
    # subtle: symbolic links in either path would make a relative one wrong
    return llm and llm | {"path": os.path.relpath(os.path.realpath(llm["path"]), os.path.realpath(folder))}

def checkpoint_hash(folder):
    """16 hexadecimal digits of everything that a checkpoint's answers depend on, except the LLM."""
    digest = hashlib.sha256(json.dumps(read_config(folder)[1]["config"], sort_keys=True).encode())
    for name in ("vocab.txt", "model.safetensors"):
        hash_file(Path(folder) / name, digest)
    return digest.hexdigest()[:16]

def add_model_options(parser):
    parser.add_argument("--ckpt", required=True, metavar="DIR", help="checkpoint folder of stage 3 (or 2)")
    parser.add_argument("--llm", default="", metavar="DIR", help="the LLM's folder, if it moved since training")
    parser.add_argument("--device", default="", help="cpu or cuda (default: cuda if there is a GPU)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="",
                        help="of the LLM's weights; bf16 and fp16 compute in it too (default: bf16 on GPUs, else fp32)")
    parser.add_argument("--llm-int8", action="store_true", help="hold the LLM's matrices in 8 bits")

def load_from_args(args):
    """Loads what add_model_options names -> (model, qformer_tok, llm_tok, autocast context). ValueError for stage 1."""
    device, dtype = device_of(args), dtype_of(args)
    autocast = torch.autocast(torch.device(device).type, DTYPES[dtype], enabled=dtype != "fp32")
    return *load_checkpoint(args.ckpt, args.llm, device, DTYPES[dtype], args.llm_int8, stages=(2, 3)), autocast

def device_of(args):
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")

def dtype_of(args):
    return args.dtype or ("bf16" if device_of(args).startswith("cuda") else "fp32")  # few CPUs have native bfloat16
