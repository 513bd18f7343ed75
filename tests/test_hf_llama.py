"""LLM folders of every kind that people have. Run: pytest tests/test_hf_llama.py"""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infra import files
from llama import Llama, LlamaConfig
from lora import add_lora
from weights import hf_llama

TINY = LlamaConfig(vocab_size=40, width=16, depth=2, heads=2, kv_heads=1, ffn=32)

def make(tmp_path, golden, seed=0, cfg=TINY):
    """A random LLM and its folder."""
    torch.manual_seed(seed)
    llama = Llama(cfg)
    with files.atomic_folder(tmp_path / f"llm{seed}") as folder:
        hf_llama.write_llm(llama, golden / "tokenizer.model", folder)
    return llama, tmp_path / f"llm{seed}"

def logits(llama):
    ids = torch.arange(12).view(2, 6)
    return llama.lm_head(llama(llama.embed(ids)))

def edit_config(folder, **changes):
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**found, **changes}))

# ---- formats ---------------------------------------------------------------------------------------------------------

def test_a_folder_survives_the_round_trip_and_transformers_reads_it(tmp_path, golden):
    transformers = pytest.importorskip("transformers")
    llama, folder = make(tmp_path, golden)
    again, _ = hf_llama.load_llm(folder)
    torch.testing.assert_close(logits(again), logits(llama))
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(theirs(torch.arange(12).view(2, 6)).logits, logits(llama), atol=1e-5, rtol=1e-4)

def reshape(folder, kind, parts):
    """Writes the folder's weights anew: as one file or several, safetensors or PyTorch's."""
    tensors = files.read_tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, save = {"safetensors": ("model", files.save_tensors), "bin": ("pytorch_model", torch.save)}[kind]
    if parts == 1:
        save(tensors, folder / f"{stem}.{kind}")
        return
    names = sorted(tensors)
    where = {name: f"{stem}-{1 + i % parts:05d}-of-{parts:05d}.{kind}" for i, name in enumerate(names)}
    for file in set(where.values()):
        save({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))

@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("parts", [1, 3])
def test_single_files_and_shards_of_both_kinds(tmp_path, golden, kind, parts):
    llama, folder = make(tmp_path, golden)
    mark = str(hf_llama.inspect_llm(folder)[1])
    reshape(folder, kind, parts)
    again, _ = hf_llama.load_llm(folder)
    torch.testing.assert_close(logits(again), logits(llama))
    assert hf_llama.inspect_llm(folder) == (TINY, mark)                       # the same LLM, however it is cut

def test_a_missing_shard_and_a_torn_one_are_named(tmp_path, golden):
    _, folder = make(tmp_path, golden)
    reshape(folder, "safetensors", 3)
    second = folder / "model-00002-of-00003.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors is damaged"):
        hf_llama.load_llm(folder)
    second.unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of its 3 shards: model-00002-of-00003.safetensors"):
        hf_llama.load_llm(folder)

def test_a_pickle_that_would_run_code_does_not(tmp_path, golden):
    _, folder = make(tmp_path, golden)
    tensors = files.read_tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors | {"trap": Trap(tmp_path / "sprung")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin holds .* besides tensors"):
        hf_llama.load_llm(folder)
    assert not (tmp_path / "sprung").exists()

class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")

# ---- architectures ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [
    {"kv_heads": 2}, {"rope_theta": 1e6}, {"head_dim": 6}, {"tied": True}, {"attention_bias": True, "mlp_bias": True}])
def test_whatever_is_of_llama_s_architecture_gives_transformers_numbers(tmp_path, golden, changes):
    transformers = pytest.importorskip("transformers")
    cfg = LlamaConfig(**{**vars(TINY), **changes})
    llama, folder = make(tmp_path, golden, cfg=cfg)
    assert hf_llama.llm_config(folder) == cfg
    if cfg.attention_bias:
        with torch.no_grad():
            for name, p in llama.named_parameters():
                if name.endswith("bias"):
                    p.normal_()
        files.save_tensors(llama.state_dict(), folder / "model.safetensors")
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    theirs.save_pretrained(tmp_path / "theirs")                            # a folder as transformers itself writes it
    (tmp_path / "theirs" / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    for place in (folder, tmp_path / "theirs"):
        again, _ = hf_llama.load_llm(place)
        wanted = theirs(torch.arange(12).view(2, 6)).logits
        torch.testing.assert_close(logits(again), wanted, atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize("changes, message", [
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling 'linear', which is not implemented"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling 'llama3', which is not implemented"),
    ({"model_type": "qwen2"}, "model_type 'qwen2', which is not implemented; known: llama, mistral"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"hidden_size": None}, "lacks hidden_size: is this the folder of a LLaMA model"),
])
def test_what_would_give_other_numbers_is_refused_by_name(tmp_path, golden, changes, message):
    _, folder = make(tmp_path, golden)
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        hf_llama.llm_config(folder)

def test_mistral_s_window_is_the_longest_input(tmp_path, golden):
    _, folder = make(tmp_path, golden)
    edit_config(folder, model_type="mistral", sliding_window=128)
    assert hf_llama.llm_config(folder).max_positions == 128

def test_other_sizes_than_config_says_are_listed(tmp_path, golden):
    _, folder = make(tmp_path, golden)
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"9 left over \(model.layers.1"):
        hf_llama.load_llm(folder)
    edit_config(folder, num_hidden_layers=2, intermediate_size=48)
    with pytest.raises(ValueError, match="6 of another shape"):
        hf_llama.inspect_llm(folder)

def test_a_raw_delta_is_recognised(tmp_path, golden):
    llama, folder = make(tmp_path, golden)
    with torch.no_grad():
        llama.model["norm"].weight.mul_(0.01)
    files.save_tensors(llama.state_dict(), folder / "model.safetensors")
    for read in (hf_llama.inspect_llm, hf_llama.load_llm):
        with pytest.raises(ValueError, match="looks like a raw delta.*apply_delta"):
            read(folder)

def test_a_folder_without_sentencepiece_says_so(tmp_path, golden):
    _, folder = make(tmp_path, golden)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="tokenizer.json alone is not read"):
        hf_llama.load_llm(folder)

# ---- into the model --------------------------------------------------------------------------------------------------

def test_lora_and_what_lies_on_the_meta_device(tmp_path, golden):
    llama, folder = make(tmp_path, golden)
    with torch.device("meta"):
        empty = Llama(TINY)
    add_lora(empty, ["q_proj", "lm_head"], 2, 4, 0.0)
    lora = {n: p.clone() for n, p in empty.named_parameters() if "lora_" in n}
    assert lora and not any(p.is_meta for p in lora.values())              # they exist although their base does not yet
    hf_llama.load_llm_weights(empty, folder, dtype=torch.bfloat16)
    own = dict(empty.named_parameters())
    assert all(torch.equal(own[n], p) and p.dtype == torch.float32 for n, p in lora.items())
    assert {p.dtype for n, p in own.items() if "lora_" not in n} == {torch.bfloat16}
    hf_llama.load_llm_weights(empty, folder)
    torch.testing.assert_close(logits(empty), logits(llama))               # B is zero: LoRA changes nothing yet

MEASURE = """
import sys
import torch
from weights import hf_llama
from tests.process import memory_of
from llama import Llama, LlamaConfig
with torch.device("meta"):
    Llama(LlamaConfig(vocab_size=8, width=8, depth=1, heads=1, kv_heads=1, ffn=8))     # what torch loads for it first
before = memory_of()
with torch.device("meta"):
    llama = Llama(hf_llama.llm_config(sys.argv[1]))
hf_llama.load_llm_weights(llama, sys.argv[1], dtype=torch.float16)
model = sum(p.numel() * p.element_size() for p in llama.parameters()) / 2**20
print(memory_of() - before, model)
"""

@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_reading_takes_the_model_and_one_shard(tmp_path, golden, kind):
    cfg = LlamaConfig(vocab_size=2000, width=512, depth=16, heads=8, kv_heads=8, ffn=1536)
    llama, folder = make(tmp_path, golden, cfg=cfg)
    files.save_tensors({n: t.half() for n, t in llama.state_dict().items()}, folder / "model.safetensors")
    reshape(folder, kind, 8)
    shard = max(path.stat().st_size for path in folder.glob(f"*.{kind}")) / 2**20
    result = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True,
                            cwd=Path(files.__file__).parent.parent, check=True)
    peak, model = map(float, result.stdout.split())
    assert model > 100 and 8 * shard > model                               # float16 in, float16 out: no slack from that
    assert peak < model + shard + 25, (peak, model, shard)                 # MiB; 25 for what importing goes on to touch
