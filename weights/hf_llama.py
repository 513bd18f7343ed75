"""The frozen LLM: a folder in Hugging Face layout, read shard by shard.

    config.json                        its sizes: they decide, not the preset
    model.safetensors                  or model-00001-of-00002.safetensors ... with model.safetensors.index.json, or
    pytorch_model.bin                  or pytorch_model-00001-of-00002.bin ... with pytorch_model.bin.index.json
    tokenizer.model                    SentencePiece

Vicuna, LLaMA, Mistral and whatever else says to be of LLaMA's architecture; what would change the numbers and is not
built here (a scaled rotary embedding, another activation) is refused by name. The most memory that reading takes is the
model and one shard. Not here: the network (llama.py), VideoChat2's own weights (checkpoint.py, weights.py).

    pytest tests/test_hf_llama.py
"""
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from infra.files import check_state_dict, iter_tensors, read_json, save_tensors, set_parameter
from llama import Llama, LlamaConfig
from tokenizer import SentencePiece
from weights.int8 import Int8Linear, quantize_int8

HF_NAMES = {  # LlamaConfig field -> key of config.json
    "vocab_size": "vocab_size", "width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "ffn": "intermediate_size", "eps": "rms_norm_eps", "rope_theta": "rope_theta",
    "max_positions": "max_position_embeddings", "head_dim": "head_dim", "tied": "tie_word_embeddings",
    "attention_bias": "attention_bias", "mlp_bias": "mlp_bias"}
OPTIONAL = {"kv_heads", "rope_theta", "head_dim", "tied", "attention_bias", "mlp_bias"}
DROPPED = re.compile(r"\.rotary_emb\.inv_freq$")  # follows from rope_theta

# --------------------------------------------------------------------------------------------------------- config.json


def llm_config(folder):
    """config.json of an LLM folder -> LlamaConfig. ValueError names what this project's LLaMA cannot do."""
    path = Path(folder) / "config.json"
    found = read_json(path)
    missing = [hf for ours, hf in HF_NAMES.items() if found.get(hf) is None and ours not in OPTIONAL]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: is this the folder of a LLaMA model?")
    rope = found.get("rope_scaling") or found.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    for key, value, known in (("model_type", found.get("model_type", "llama"), ("llama", "mistral")),
                              ("hidden_act", found.get("hidden_act", "silu"), ("silu",)),
                              ("rope_scaling", kind, ("default",))):
        if value not in known:
            raise ValueError(f"{path} says {key} {value!r}, which is not built here; known: {', '.join(known)}")
    sizes = {ours: found[hf] for ours, hf in HF_NAMES.items() if found.get(hf) is not None}
    if sizes.get("head_dim") == sizes["width"] // sizes["heads"]:
        del sizes["head_dim"]                                              # what it would be anyway
    if "rope_theta" in rope:                                               # where newer folders have it
        sizes["rope_theta"] = rope["rope_theta"]
    if found.get("sliding_window"):                                        # within one window it makes no difference
        sizes["max_positions"] = min(sizes["max_positions"], found["sliding_window"])
    return LlamaConfig(**{"kv_heads": sizes["heads"], **sizes})


def write_llm(llama, tokenizer_model, folder, tensors=None):
    """The files of an LLM folder: what stage 0 makes is what Vicuna comes as. tensors: instead of the weights now."""
    config = {hf: getattr(llama.cfg, ours) for ours, hf in HF_NAMES.items()}
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
               "head_dim": llama.cfg.head_size, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    own = dict(llama.named_parameters())                                        # one that is tied only once
    save_tensors({name: (tensors or own)[name] for name in own}, folder / "model.safetensors")
    shutil.copyfile(tokenizer_model, folder / "tokenizer.model")


# -------------------------------------------------------------------------------------------------------------- shards


def shards(folder):
    """The weight files of an LLM folder. ValueError or FileNotFoundError name what is missing."""
    folder = Path(folder)
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.is_file():
            files = sorted(set(read_json(index).get("weight_map", {}).values()))
            absent = [name for name in files if not (folder / name).is_file()]
            if absent or not files:
                raise FileNotFoundError(f"{folder} lacks {len(absent)} of its {len(files)} shards: {', '.join(absent)}")
            return [folder / name for name in files]
    raise FileNotFoundError(f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index "
                            "of their shards")


def each_weight(folder):
    """Yields (name, tensor) of all shards, one shard in memory at a time; what is never needed is left out."""
    files = shards(folder)
    for path in tqdm(files, desc=str(folder), unit="shard", leave=False,
                     disable=len(files) == 1 or not sys.stderr.isatty()):
        for name, t in iter_tensors(path):
            if not DROPPED.search(name):
                yield name, t


class Fingerprint:
    """Short hash of a model's weights: their names, shapes and 16 values of each tensor, in any order."""

    def __init__(self):
        self.parts = {}

    def add(self, name, t):
        flat = t.reshape(-1)
        values = flat[:: max(1, flat.numel() // 16)][:16].float().numpy().tobytes()
        self.parts[name] = f"{name} {tuple(t.shape)}".encode() + values

    def __str__(self):
        return hashlib.sha256(b"".join(self.parts[name] for name in sorted(self.parts))).hexdigest()[:16]


def fingerprint(tensors):
    """Fingerprint of {name: tensor}."""
    mark = Fingerprint()
    for name, t in tensors.items():
        mark.add(name, t)
    return str(mark)


def reject_delta(folder, name, t):
    """Vicuna was first given away as its difference to LLaMA, which is no model by itself."""
    if name == "model.norm.weight" and t.float().abs().mean() < 0.2:
        raise ValueError(f"{folder} looks like a raw delta, not like an LLM (the weights of its last norm are "
                         f"{t.float().abs().mean():.3f} in the mean, those of a whole LLaMA above 1): add it to the "
                         "LLaMA-7B that it was made from, with FastChat's apply_delta, and name the sum's folder")


def check_and_visit(folder, llama, use):
    """Hands each weight of a folder to use(name, tensor) -> their fingerprint.

    ValueError if they are not, by names and shapes, those of the Llama.
    """
    own = {hf: llama.get_parameter(ours) for hf, ours in hf_names(llama).items()}
    mark, found = Fingerprint(), {}
    for name, t in each_weight(folder):
        reject_delta(folder, name, t)
        use(name, t)
        mark.add(name, t)
        found[name] = t.to("meta")
    check_state_dict(own, found, folder, dropped=("lm_head.",) if llama.cfg.tied else ())
    return str(mark)


def inspect_llm(folder, compare=None):
    """Reads all of a folder and keeps nothing -> (LlamaConfig, fingerprint). ValueError if it is not a whole LLaMA.

    compare: {name: tensor} that must be the same in the folder, where given.
    """
    def same(name, t):
        if name in (compare or {}) and not torch.equal(compare[name].float(), t.float()):
            raise ValueError(f"{folder} is another LLM than the one whose weights the checkpoint holds: {name} differs")

    with torch.device("meta"):
        llama = Llama(llm_config(folder))
    return llama.cfg, check_and_visit(folder, llama, same)


def config_diff(found, expected):
    """{field: "hidden_size 5120 instead of 4096"}: in what two LlamaConfigs differ, in config.json's words."""
    return {ours: f"{hf} {getattr(found, ours)} instead of {getattr(expected, ours)}" for ours, hf in HF_NAMES.items()
            if getattr(found, ours) != getattr(expected, ours)}


# ------------------------------------------------------------------------------------------------------- into the model


def hf_names(llama):
    """{name in the folder: name of the parameter} of a Llama; LoRA wraps a layer, whose own weight is then its base."""
    own = (n for n, _ in llama.named_parameters() if "lora_" not in n and not n.endswith(".scale"))
    return {n.replace(".base.", "."): n for n in own}


def load_llm_weights(llama, folder, dtype=torch.float32, int8=False, device="cpu"):
    """Reads an LLM folder into a Llama, whose parameters may lie on the meta device -> its fingerprint.

    dtype: of all weights. int8: those of the layers' matrices in 8 bits, see int8.py. LoRA's are left alone.
    """
    if int8:
        quantize_int8(llama)
    places = hf_names(llama)

    def take(name, t):
        if name in places and llama.get_parameter(places[name]).shape == t.shape:
            fill(llama, places[name], t.to(device, dtype))

    mark = check_and_visit(folder, llama, take)
    if llama.cfg.tied:
        llama.tie()
    return mark


def fill(llama, name, t):
    """Gives one parameter its values, in 8 bits where its layer is an Int8Linear."""
    layer, _, leaf = name.rpartition(".")
    layer = llama.get_submodule(layer)
    if isinstance(layer, Int8Linear) and leaf == "weight":
        layer.fill(t)
    else:
        set_parameter(llama, name, t)


def load_llm(folder, dtype=torch.float32):
    """An LLM folder -> (Llama, SentencePiece)."""
    with torch.device("meta"):
        llama = Llama(llm_config(folder))
    load_llm_weights(llama, folder, dtype)
    return llama, llm_tokenizer(folder)


def llm_tokenizer(folder):
    """tokenizer.model of an LLM folder -> SentencePiece."""
    path = Path(folder) / "tokenizer.model"
    if not path.is_file() and (Path(folder) / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{path} does not exist; tokenizer.json alone is not read: take the folder of a LLaMA "
                                "or Mistral that comes with its SentencePiece model")
    return SentencePiece(str(path))
