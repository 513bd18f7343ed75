"""python -m pytest tests/test_qformer.py"""
import json
import re
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from conftest import golden_tensors
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from infra.distributed import Distributed
from qformer import (
    QFormer,
    QFormerConfig,
    Stage1Heads,
    drop_path,
    hard_negatives,
    negative_weights,
    similarity,
    vtc_loss,
    vtg_loss,
)
from vit_video import VisionTransformer, ViTConfig

TINY = QFormerConfig(vocab_size=50, width=16, depth=3, heads=2, ffn=32, vision_width=12, max_positions=20,
                     dropout=0.0, drop_path=0.0, embed_dim=8)
# in the official state dict, not in ours: the head's matrix and bias twice over, and the numbers 0, 1, 2, ...
TWICE = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "bert.embeddings.position_ids")

def config_of(official, **sizes):
    bert = official["bert"]
    return QFormerConfig(
        vocab_size=bert["vocab_size"], width=bert["hidden_size"], depth=bert["num_hidden_layers"],
        heads=bert["num_attention_heads"], ffn=bert["intermediate_size"], eps=bert["layer_norm_eps"],
        max_positions=bert["max_position_embeddings"], dropout=0.0, drop_path=0.0, **sizes)

def load_part(module, tensors, prefix):
    """Official weights into module, strictly."""
    state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    module.load_state_dict({key: t for key, t in state.items() if key not in TWICE})
    return module.eval()

def load_golden(golden, name):
    """The Q-Former of a golden file with the official weights, the file's tensors, and a list its layers write to."""
    tensors = golden_tensors(name)
    official = json.loads((golden / f"{name}.json").read_text())["config"]
    qformer = load_part(QFormer(config_of(official, vision_width=official["extra"]["encoder_width"])), tensors, "w.")
    hidden = []
    for layer in qformer.bert["encoder"]["layer"]:
        layer.register_forward_hook(lambda module, args, out: hidden.append(out[0]))
    return qformer, tensors, hidden

def assert_layers_equal(hidden, tensors):
    for i, ours in enumerate(hidden, start=1):
        assert_close(ours, tensors[f"out.hidden{i}"], atol=1e-5, rtol=1e-4)

# ---- the network, against the official one

def test_queries_alone_and_their_cache(golden):
    qformer, tensors, hidden = load_golden(golden, "qformer_query")
    out, self_kv, _ = qformer(tensors["in.query_embeds"], vision=tensors["in.encoder_hidden_states"], return_kv=True)
    assert_layers_equal(hidden, tensors)
    assert_close(out, tensors["out.last_hidden_state"], atol=1e-5, rtol=1e-4)
    for i, (k, v) in enumerate(self_kv):
        assert_close(k, tensors[f"out.past_key.{i}"], atol=1e-5, rtol=1e-4)
        assert_close(v, tensors[f"out.past_value.{i}"], atol=1e-5, rtol=1e-4)

def test_text_alone(golden):
    qformer, tensors, hidden = load_golden(golden, "qformer_text")
    out = qformer(ids=tensors["in.input_ids"], mask=tensors["in.attention_mask"])
    assert_layers_equal(hidden, tensors)
    assert_close(out, tensors["out.last_hidden_state"], atol=1e-5, rtol=1e-4)

def test_queries_and_text_together(golden):
    qformer, tensors, hidden = load_golden(golden, "qformer_joint")
    query = tensors["in.query_embeds"]
    mask = tensors["in.attention_mask"][:, query.shape[1]:]                     # the official one covers queries too
    out = qformer(query, tensors["in.input_ids"], mask, tensors["in.encoder_hidden_states"])
    assert_layers_equal(hidden, tensors)
    assert_close(out, tensors["out.last_hidden_state"], atol=1e-5, rtol=1e-4)

def test_caption_after_cached_queries(golden):
    qformer, tensors, hidden = load_golden(golden, "qformer_cap")
    depth, n_query = qformer.cfg.depth, tensors["in.query_embeds"].shape[1]
    self_kv = [(tensors[f"in.past_key.{i}"], tensors[f"in.past_value.{i}"]) for i in range(depth)]
    ids, mask = tensors["in.input_ids"], tensors["in.attention_mask"][:, n_query:]
    logits = qformer.caption_logits(ids, mask, self_kv)
    assert_layers_equal(hidden, tensors)
    assert_close(logits, tensors["out.logits"], atol=1e-4, rtol=1e-4)
    assert_close(vtg_loss(logits, ids, mask, 0.1), tensors["out.loss"], atol=1e-5, rtol=1e-5)

# ---- stage 1, from pixels to losses and gradients, against the official one

class Stage1(nn.Module):
    """The parts of stage 1 around the Q-Former, as model.py has them."""
    def __init__(self, golden):
        super().__init__()
        official = json.loads((golden / "stage1_cat.json").read_text())["config"]
        model = official["model"]
        vit = model["vision_encoder"]
        C = vit["encoder_embed_dim"]
        tensors = self.tensors = load_file(golden / "stage1_cat.safetensors")
        official["bert"]["vocab_size"] += 1                                     # [DEC]
        cfg = config_of(official, vision_width=C, embed_dim=model["embed_dim"])
        self.dec_id = cfg.vocab_size - 1
        self.vision_encoder = load_part(VisionTransformer(ViTConfig(
            img_size=vit["img_size"], patch_size=vit["patch_size"], width=C, depth=vit["encoder_depth"] - 1,
            heads=vit["encoder_num_heads"], pos_table="resized14")), tensors, "w.vision_encoder.encoder.")
        self.vision_encoder.requires_grad_(False)
        self.vision_layernorm = load_part(nn.LayerNorm(C, eps=1e-12), tensors, "w.vision_layernorm.")
        self.vision_temp_embed = nn.Parameter(tensors["w.vision_temp_embed"])
        self.query_tokens = nn.Parameter(tensors["w.query_tokens"])
        self.qformer = load_part(QFormer(cfg), tensors, "w.qformer.")
        self.aligner = Stage1Heads(cfg, "cat").eval()
        self.aligner.load_state_dict({name: tensors[f"w.{name}"] for name in self.aligner.state_dict()})

    def vision(self):
        x = self.vision_encoder(self.tensors["in.image"]) + self.vision_temp_embed      # (B, T, L, C)
        return self.vision_layernorm(x.flatten(1, 2))                                   # (B, N, C)

    def losses(self):
        """With the negatives that the official code drew."""
        t = self.tensors
        batch = {"ids": t["in.input_ids"], "mask": t["in.attention_mask"], "idx": t["in.idx"]}
        negatives = t["in.vision_neg_indices"], t["in.text_neg_indices"]
        with patch("qformer.hard_negatives", return_value=negatives):
            return self.aligner.losses(self.qformer, self.query_tokens, self.vision(), batch, self.dec_id,
                                       dist=Distributed())

    def official(self, name):
        """The parameter that has this name in the official state dict."""
        parameters = dict(self.named_parameters())
        return parameters[name] if name in parameters else parameters[f"aligner.{name}"]

@pytest.fixture
def stage1(golden):
    return Stage1(golden)

def test_stage1_losses(stage1):
    losses, tensors = stage1.losses(), stage1.tensors
    for ours, official in (("vtc", "vtc"), ("vtm", "vtm"), ("vtg", "cap")):
        assert_close(losses[ours], tensors[f"out.loss_{official}"], atol=1e-5, rtol=1e-5)
    assert_close(sum(losses.values()), tensors["out.loss_total"], atol=1e-5, rtol=1e-5)

def test_stage1_gradients(stage1):
    sum(stage1.losses().values()).backward()
    names = [key.removeprefix("grad.") for key in stage1.tensors if key.startswith("grad.")]
    assert len(names) == 14
    for name in names:
        assert_close(stage1.official(name).grad, stage1.tensors[f"grad.{name}"], atol=1e-4, rtol=1e-4, msg=name)

@pytest.mark.parametrize("ours, official", [("vtc", "vtc"), ("vtm", "vtm"), ("vtg", "cap")])
def test_stage1_gradient_of_each_loss(stage1, ours, official):
    stage1.losses()[ours].backward()
    expected = stage1.tensors[f"grad_loss_{official}.query_tokens"]
    assert_close(stage1.query_tokens.grad, expected, atol=1e-4, rtol=1e-4)
    if ours == "vtc":
        assert_close(stage1.aligner.temp.grad, stage1.tensors["grad_loss_vtc.temp"], atol=1e-4, rtol=1e-4)
    else:
        assert stage1.aligner.temp.grad is None

def test_stage1_intermediate_values(stage1):
    t, aligner = stage1.tensors, stage1.aligner
    ids, mask, idx, vision = t["in.input_ids"], t["in.attention_mask"], t["in.idx"], stage1.vision()
    assert_close(vision, t["out.vision_embeds"], atol=1e-5, rtol=1e-4)
    query = stage1.query_tokens.expand(len(ids), -1, -1)
    video, self_kv, _ = stage1.qformer(query, vision=vision, return_kv=True)
    assert_close(video, t["out.vision_query_embeds"], atol=1e-5, rtol=1e-4)
    text = stage1.qformer(ids=ids, mask=mask)
    assert_close(text[:, 0], t["out.pooled_text_embeds"], atol=1e-5, rtol=1e-4)
    sim = similarity(aligner.video_features(video), aligner.text_features(text)) / aligner.temperature()
    assert_close(sim, t["out.sim_v2t"], atol=1e-4, rtol=1e-4)
    assert_close(sim.T, t["out.sim_t2v"], atol=1e-4, rtol=1e-4)
    assert_close(negative_weights(sim, idx), t["out.weights_v2t"], atol=1e-5, rtol=1e-4)
    assert_close(negative_weights(sim.T, idx), t["out.weights_t2v"], atol=1e-5, rtol=1e-4)
    # the first B of the 3 * B rows of matching are the true pairs
    logits = aligner.itm_logits(stage1.qformer, stage1.query_tokens, ids, mask, vision)
    assert_close(logits, t["out.vtm_logits"][:len(ids)], atol=1e-4, rtol=1e-4)

# ---- by hand

def test_vtc_by_hand():
    # all four pairs equally alike: log 2 both ways, whatever the targets are
    assert_close(vtc_loss(torch.zeros(2, 2), torch.tensor([1, 2])), torch.tensor(2.0).log())
    # two captions of one clip share the target, so being alike to both costs log 2 and no less
    assert_close(vtc_loss(torch.full((2, 2), 9.0), torch.tensor([5, 5])), torch.tensor(2.0).log())
    assert vtc_loss(torch.eye(2) * 50, torch.tensor([1, 2])) < 1e-6

def test_vtg_by_hand():
    # [DEC] a cat: the first row is given, padding is no target, and uniform logits cost log V with any smoothing
    ids, mask = torch.tensor([[9, 1, 2, 0]]), torch.tensor([[1, 1, 1, 0]])
    assert_close(vtg_loss(torch.zeros(1, 4, 10), ids, mask, 0.1), torch.tensor(10.0).log())
    sure = F.one_hot(torch.tensor([[1, 2, 7, 7]]), 10) * 50.0                   # row i predicts word i + 1
    assert vtg_loss(sure, ids, mask, 0.0) < 1e-6

def test_hard_negatives_are_hard_never_the_same_clip_and_repeatable():
    idx = torch.tensor([1, 2, 1, 3])                                            # rows 0 and 2 are one clip
    sim = torch.zeros(4, 4)
    sim[1, 3] = 20.0                                                            # video 1 looks like text 3
    draws = [hard_negatives(sim, idx, torch.Generator().manual_seed(seed)) for seed in range(50)]
    for videos, texts in draws:
        assert (idx[videos] != idx).all() and (idx[texts] != idx).all()
        assert texts[1] == 3 and videos[3] == 1
    again = hard_negatives(sim, idx, torch.Generator().manual_seed(7))
    assert all(torch.equal(a, b) for a, b in zip(draws[7], again, strict=True))

def test_similarity_is_the_mean_over_queries():
    video, text = F.normalize(torch.randn(3, 5, 8), dim=-1), F.normalize(torch.randn(2, 8), dim=-1)
    assert_close(similarity(video, text), torch.einsum("vqe,te->vqt", video, text).mean(1))

def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    x = drop_path(torch.ones(1000, 2, 3), 0.25, training=True)
    per_sample = x.flatten(1)
    assert ((per_sample == 0).all(1) | (per_sample == 1 / 0.75).all(1)).all()
    assert x.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(drop_path(x, 0.25, training=False), x)
    layers = QFormer(replace(TINY, drop_path=0.2)).bert["encoder"]["layer"]
    assert [layer.output.path_rate for layer in layers] == pytest.approx([0.0, 0.1, 0.2])

# ---- what each part may see, and what trains

def tiny():
    torch.manual_seed(0)
    return QFormer(TINY), torch.randn(2, 4, 16), torch.randn(2, 6, 12), torch.randint(1, 50, (2, 5))

def test_padding_changes_nothing():
    qformer, query, vision, ids = tiny()
    mask = torch.ones_like(ids)
    padded, padded_mask = F.pad(ids, (0, 3), value=7), F.pad(mask, (0, 3))
    assert_close(qformer(query, padded, padded_mask, vision)[:, :9], qformer(query, ids, mask, vision))

@torch.no_grad()
def test_what_is_the_same_for_all_videos_may_have_one_row_and_the_text_may_be_left_out():
    torch.manual_seed(0)
    qformer = QFormer(TINY).eval()
    query, vision = torch.randn(1, 5, 16), torch.randn(3, 7, 12)
    ids, mask = torch.randint(0, 50, (1, 6)), torch.tensor([[1, 1, 1, 1, 0, 0]])
    each = qformer(query.expand(3, -1, -1), ids.expand(3, -1), mask.expand(3, -1), vision)     # (3, 5 + 6, E)
    assert_close(qformer(query, ids, mask, vision), each)
    assert_close(qformer(query, ids, mask, vision, n_text_out=0), each[:, :5])
    assert_close(qformer(query, ids, mask, vision, n_text_out=1), each[:, :6])

def test_captions_are_causal():
    qformer, query, vision, ids = tiny()
    _, self_kv, _ = qformer(query, vision=vision, return_kv=True)
    mask, other = torch.ones_like(ids), ids.clone()
    other[:, 3] = 11
    a, b = qformer.caption_logits(ids, mask, self_kv), qformer.caption_logits(other, mask, self_kv)
    assert_close(a[:, :3], b[:, :3])
    assert not torch.allclose(a[:, 3:], b[:, 3:])

def test_weights_without_use_get_no_gradient():
    """Zeros instead of None would let the optimizer decay the text rows' weights in stage 2, where no text enters."""
    qformer, query, vision, _ = tiny()
    qformer(query, vision=vision).sum().backward()
    idle = {name for name, p in qformer.named_parameters() if p.grad is None}
    assert "bert.encoder.layer.0.output.dense.weight" in idle
    assert "bert.encoder.layer.0.output_query.dense.weight" not in idle
    assert all(re.search(r"layer\.\d+\.(intermediate|output)\.|_embeddings\.|^cls\.", name) for name in idle)

def test_the_head_and_the_word_embeddings_are_one_matrix():
    qformer, query, vision, ids = tiny()
    _, self_kv, _ = qformer(query, vision=vision, return_kv=True)
    with torch.no_grad():
        qformer.bert["embeddings"].word_embeddings.weight[42] += 100.0          # not a word of ids
    ids[ids == 42] = 1
    qformer.caption_logits(ids, torch.ones_like(ids), self_kv)[..., 42].sum().backward()
    assert qformer.bert["embeddings"].word_embeddings.weight.grad[42].abs().sum() > 0
    assert not [name for name in qformer.state_dict() if "decoder" in name]

@pytest.mark.parametrize("start, used", [(0.07, 0.07), (2.0, 0.5), (-1.0, 0.001)])
def test_the_temperature_is_bounded_but_no_forward_pass_changes_it(start, used):
    aligner = Stage1Heads(TINY, "cat")
    nn.init.constant_(aligner.temp, start)
    aligner.temperature().backward()
    assert aligner.temperature().item() == pytest.approx(used)
    assert aligner.temp.item() == pytest.approx(start) and aligner.temp.grad == 1

def test_matching_by_queries_alone():
    qformer, query, vision, ids = tiny()
    aligner = Stage1Heads(TINY, "none")
    assert aligner.itm_logits(qformer, query[:1], ids, torch.ones_like(ids), vision).shape == (2, 2)

@torch.no_grad()
@pytest.mark.parametrize("text_cls", ["cat", "add", "none"])
def test_what_matching_classifies_by_hand(stage1, text_cls):
    """On the recorded videos and captions: the mean of the query rows, and the [CLS] row beside it, added, or left out
    (videochat2_qformer.py, vtm_embed)."""
    t, Q, E = stage1.tensors, stage1.query_tokens.shape[1], stage1.qformer.cfg.width
    ids, mask, vision = t["in.input_ids"], t["in.attention_mask"], stage1.vision()
    hidden = stage1.qformer(stage1.query_tokens.expand(len(ids), -1, -1), ids, mask, vision)   # (B, Q + S, E)
    queries, cls = hidden[:, :Q].sum(1) / Q, hidden[:, Q]                       # (B, E), (B, E)

    heads = Stage1Heads(stage1.qformer.cfg, text_cls).eval()
    W, b = heads.itm_head.weight, heads.itm_head.bias
    by_hand = {"cat": lambda: queries @ W[:, :E].T + cls @ W[:, E:].T, "add": lambda: (queries + cls) @ W.T,
               "none": lambda: queries @ W.T}[text_cls]() + b                   # (B, 2)
    assert W.shape == (2, 2 * E if text_cls == "cat" else E) and cls.abs().max() > 0.1
    assert_close(heads.itm_logits(stage1.qformer, stage1.query_tokens, ids, mask, vision), by_hand)

def test_an_unknown_way_of_matching_is_refused():
    with pytest.raises(ValueError, match="vtm_text_cls 'sum': expected one of cat, add, none"):
        Stage1Heads(TINY, "sum")

def test_real_size_has_the_official_number_of_parameters():
    with torch.device("meta"):
        qformer, aligner = QFormer(QFormerConfig()), Stage1Heads(QFormerConfig(), "cat")
    assert sum(p.numel() for p in qformer.bert.parameters()) == 182_121_216
    assert sum(p.numel() for p in qformer.cls.parameters()) == 622_651
    assert sum(p.numel() for p in aligner.parameters()) == 590_592 + 590_592 + 3_074 + 1

def test_errors_name_what_is_wrong():
    qformer, query, vision, ids = tiny()
    mask = torch.ones_like(ids)
    with pytest.raises(ValueError, match="no vision"):
        qformer(query)
    with pytest.raises(ValueError, match="21 word pieces, but the Q-Former takes at most 20"):
        qformer(ids=torch.ones(1, 21, dtype=torch.long))
    with pytest.raises(ValueError, match="batch of 2 holds a single clip, idx 4"):
        batch = {"ids": ids, "mask": mask, "idx": torch.tensor([4, 4])}
        Stage1Heads(TINY, "cat").losses(qformer, query[:1], vision, batch, dec_id=49, dist=Distributed())
    with pytest.raises(ValueError, match="5 heads"):
        QFormerConfig(heads=5)
