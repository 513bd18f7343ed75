"""The frozen LLM: a folder in Hugging Face layout, read shard by shard.

    config.json           its sizes; they count, not the preset's
    model.safetensors     or pytorch_model.bin, or shards of either kind, which model.safetensors.index.json lists
    tokenizer.model       SentencePiece

It reads Vicuna, LLaMA, Mistral and every other model of LLaMA's architecture. What would change the numbers and is not
implemented (scaled rotary embeddings, other activations) is refused by name. Memory: the model and one shard.
Not here: the network (llama.py), VideoChat2's own weights (checkpoint.py, convert.py).

    pytest tests/test_hf_llama.py
"""
import json
import shlex
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

from infra.files import check_state_dict, fingerprint, iter_tensors, read_json, save_tensors, set_parameter, write_json
from llama import Llama, LlamaConfig
from tokenizer import SentencePiece
from weights.int8 import Int8Linear, quantize_int8

HF_NAMES = {  # LlamaConfig field -> key of config.json
    "vocab_size": "vocab_size", "width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "ffn": "intermediate_size", "eps": "rms_norm_eps", "rope_theta": "rope_theta",
    "max_positions": "max_position_embeddings", "head_dim": "head_dim", "tied": "tie_word_embeddings",
    "attention_bias": "attention_bias", "mlp_bias": "mlp_bias"}
OPTIONAL = {"kv_heads", "rope_theta", "head_dim", "tied", "attention_bias", "mlp_bias"}

def check_llm_folder(folder):
    """ValueError if this is no LLM folder: what it is instead, and what to do."""
    folder, fault = Path(folder), ""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    config = read_json(folder / "config.json") if "config.json" in names else None

    # a part of an LLM that is useless alone has a remedy
    if config is None and "adapter_config.json" in names:
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "BASE"
        raise ValueError(f"{folder} is a LoRA adapter of {base}, not an LLM: merge the two, and name {folder}_merged "
                         f"instead:\n{merge_command(folder, base)}")

    # everything else is named
    if not folder.exists():
        fault = "does not exist"
    elif not folder.is_dir():
        with open(folder, "rb") as f:
            fault = "is a file" + " of llama.cpp (GGUF), which is not read" * (f.read(4) == b"GGUF")
    elif config is None:
        fault = f"has no config.json, only {', '.join(names[:4]) or 'nothing'}"
    elif not isinstance(config, dict):
        fault = f"has a config.json that holds a {type(config).__name__}"
    elif {"stage", "config", "llm"} <= config.keys():
        llm = f" (its LLM is {folder / config['llm']['path']})" if config["llm"] else ""
        fault = f"is a VideoChat2 checkpoint, not an LLM{llm}"
    if fault:
        raise ValueError(f"{folder} {fault}: expected the folder of a LLaMA model in Hugging Face layout, which has "
                         "config.json, tokenizer.model and the weights")

def merge_command(adapter, base):
    """The command that merges a LoRA adapter into its LLM, by peft, into the folder ADAPTER_merged."""
    adapter, merged, base = (json.dumps(str(path), ensure_ascii=False) for path in (adapter, f"{adapter}_merged", base))
    return "python -c " + shlex.quote(
        "import shutil; from peft import AutoPeftModelForCausalLM; from transformers.utils import cached_file; "
        f"AutoPeftModelForCausalLM.from_pretrained({adapter}).merge_and_unload().save_pretrained({merged}); "
        f'shutil.copy(cached_file({base}, "tokenizer.model"), {merged})')

def llm_config(folder):
    """config.json of an LLM folder -> LlamaConfig. ValueError names what llama.py does not implement."""
    check_llm_folder(folder)
    path = Path(folder) / "config.json"
    config = read_json(path)
    config.setdefault("max_position_embeddings", config.get("max_sequence_length"))        # its first name
    if missing := [hf for ours, hf in HF_NAMES.items()
                   if not isinstance(config.get(hf), int | float) and ours not in OPTIONAL]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: is this the folder of a LLaMA model?")

    # whatever would give other numbers than llama.py computes
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    for key, value, known in (("model_type", config.get("model_type", "llama"), ("llama", "mistral")),
                              ("hidden_act", config.get("hidden_act", "silu"), ("silu",)),
                              ("rope_scaling", rope.get("rope_type", rope.get("type", "default")), ("default",))):
        if value not in known:
            raise ValueError(f"{path} has {key} {value!r}, which is not implemented; known: {', '.join(known)}")

    sizes = {ours: config[hf] for ours, hf in HF_NAMES.items() if config.get(hf) is not None}
    if sizes.get("head_dim") == sizes["width"] // sizes["heads"]:
        del sizes["head_dim"]                                              # LlamaConfig's default
    if "rope_theta" in rope:                                               # newer folders have it there
        sizes["rope_theta"] = rope["rope_theta"]
    if config.get("sliding_window"):                                       # within one window, attention is full
        sizes["max_positions"] = min(sizes["max_positions"], config["sliding_window"])
    return LlamaConfig(**{"kv_heads": sizes["heads"], **sizes})

def config_diff(config, expected):
    """{field: "hidden_size 5120 instead of 4096"}: where two LlamaConfigs differ, in the words of config.json."""
    return {ours: f"{hf} {getattr(config, ours)} instead of {getattr(expected, ours)}" for ours, hf in HF_NAMES.items()
            if getattr(config, ours) != getattr(expected, ours)}

def llm_tokenizer(folder):
    check_llm_folder(folder)
    path = Path(folder) / "tokenizer.model"
    if not path.is_file() and path.with_suffix(".json").is_file():
        raise FileNotFoundError(f"{path} does not exist, and tokenizer.json alone is not read: use a folder with both")
    return SentencePiece(str(path))

def write_llm(llama, tokenizer_model, folder, tensors=None):
    """Writes an LLM folder as transformers does. tensors: {name: tensor} to write instead of the Llama's parameters."""
    # transformers needs more than the sizes
    write_json({**{hf: getattr(llama.cfg, ours) for ours, hf in HF_NAMES.items()}, "head_dim": llama.cfg.head_size,
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "bos_token_id": 1, "eos_token_id": 2}, folder / "config.json")
    parameters = dict(llama.named_parameters())                            # a tied one appears once
    save_tensors({name: (tensors or parameters)[name] for name in parameters}, folder / "model.safetensors")
    shutil.copyfile(tokenizer_model, folder / "tokenizer.model")

def shards(folder):
    """Paths of an LLM folder's weights. FileNotFoundError names what is missing."""
    for path in (Path(folder) / "model.safetensors", Path(folder) / "pytorch_model.bin"):
        if path.is_file():
            return [path]
        index = path.with_name(f"{path.name}.index.json")
        if index.is_file():
            files = sorted({path.with_name(file) for file in read_json(index).get("weight_map", {}).values()})
            absent = [file.name for file in files if not file.is_file()]
            if absent or not files:
                raise FileNotFoundError(f"{folder} lacks {len(absent)} of its {len(files)} shards: {', '.join(absent)}")
            return files
    raise FileNotFoundError(f"{folder} holds no weights: neither model.safetensors, pytorch_model.bin nor shards")

def hf_names(llama):
    """{name in the folder: name of the parameter}. LoRA wraps a layer, whose own weight is then called base.weight."""
    names = (n for n, _ in llama.named_parameters() if "lora_" not in n and not n.endswith(".scale"))
    return {n.replace(".base.", "."): n for n in names}

def read_weights(folder, llama, visit):
    """Calls visit(name, tensor) for each weight, shard by shard -> fingerprint. ValueError if the Llama has others."""
    # subtle: listed before visit fills the Llama, because replacing a tied weight makes two parameters of it
    expected = {hf: llama.get_parameter(ours) for hf, ours in hf_names(llama).items()}
    shapes, files = {}, shards(folder)

    def weights():
        for path in tqdm(files, desc=str(folder), unit="shard", leave=False, disable=len(files) == 1 or None):
            for name, t in iter_tensors(path):
                if name.endswith(".rotary_emb.inv_freq"):                  # follows from rope_theta
                    continue
                # Vicuna v0 was first released as its difference to LLaMA, which is no model by itself
                if name == "model.norm.weight" and (mean := t.float().abs().mean()) < 0.2:
                    raise ValueError(f"{folder} looks like a raw delta: its last norm averages {mean:.3f}, an LLM's is "
                                     "above 1; add it to the LLaMA-7B it was made from with FastChat's apply_delta")
                visit(name, t)
                shapes[name] = t.to("meta")
                yield name, t

    digits = fingerprint(weights())
    check_state_dict(expected, shapes, folder, dropped=("lm_head.",) if llama.cfg.tied else ())
    return digits

def inspect_llm(folder, expected=None):
    """Reads a folder without keeping its weights -> (LlamaConfig, fingerprint). ValueError if it is no complete LLaMA.
    expected: {name: tensor} that the folder's weights must equal, for the names that it has."""
    def compare(name, t):
        if expected and name in expected and not torch.equal(expected[name].float(), t.float()):
            raise ValueError(f"{folder} is another LLM than the one whose weights the checkpoint holds: {name} differs")

    with torch.device("meta"):
        llama = Llama(llm_config(folder))
    return llama.cfg, read_weights(folder, llama, compare)

def load_llm_weights(llama, folder, dtype=torch.float32, int8=False, device="cpu"):
    """Reads an LLM folder into a Llama, whose parameters may be on the meta device -> the weights' fingerprint.
    dtype: of all weights. int8: the layers' matrices in 8 bits, see int8.py. LoRA's weights stay as they are."""
    if int8:                                   # while the layers are empty; each weight is rounded as it is read
        quantize_int8(llama)
    names = hf_names(llama)

    def load(name, t):
        if name not in names or llama.get_parameter(names[name]).shape != t.shape:
            return                             # read_weights lists all that does not fit, at once
        layer, t = llama.get_submodule(names[name].rpartition(".")[0]), t.to(device, dtype)
        if isinstance(layer, Int8Linear) and name.endswith(".weight"):
            layer.quantize(t)
        else:
            set_parameter(llama, names[name], t)

    digits = read_weights(folder, llama, load)
    if llama.cfg.tied:                                                     # set_parameter made two of one
        llama.tie()
    return digits

def load_llm(folder):
    """-> (Llama, SentencePiece)."""
    with torch.device("meta"):
        llama = Llama(llm_config(folder))
    load_llm_weights(llama, folder)
    return llama, llm_tokenizer(folder)
