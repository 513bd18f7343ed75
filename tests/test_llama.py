"""python -m pytest tests/test_llama.py"""
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig as ReferenceConfig
from transformers import LlamaForCausalLM

from llama import KVCache, Llama, LlamaConfig, apply_rope, attention_mask

SIZES = dict(vocab_size=97, width=32, depth=3, heads=4, ffn=56, max_positions=64)

def make(kv_heads=4, rope_theta=1e4, **options):
    """Ours and transformers' LLaMA with the same random weights, large enough that every part matters."""
    torch.manual_seed(0)
    ours = Llama(LlamaConfig(**SIZES, kv_heads=kv_heads, rope_theta=rope_theta, **options)).eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.3)
    reference = LlamaForCausalLM(ReferenceConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=kv_heads,
        intermediate_size=56, max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()
    reference.load_state_dict(ours.state_dict())        # strict: the names are the same
    return ours, reference

def prompts(lengths=(7, 7), side="left"):
    """ids and mask (B, S) of random prompts, padded on one side."""
    S = max(lengths)
    ids = torch.randint(1, 97, (len(lengths), S), generator=torch.Generator().manual_seed(1))
    pad = torch.tensor([[S - n] for n in lengths])                              # (B, 1)
    column = torch.arange(S)[None]                                              # (1, S)
    mask = column >= pad if side == "left" else column < S - pad                # (B, S)
    return ids * mask, mask.long()

def logits(model, ids, mask=None, cache=None):
    return model.lm_head(model(model.embed(ids), mask, cache))

@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("rope_theta", [1e4, 1e6])
def test_logits_equal_transformers(kv_heads, rope_theta):
    ours, reference = make(kv_heads, rope_theta)
    ids, _ = prompts((17, 17))
    with torch.no_grad():
        assert_close(logits(ours, ids), reference(ids).logits, atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_transformers(side):
    ours, reference = make(kv_heads=2)
    ids, mask = prompts((9, 4, 1), side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask, position_ids=positions).logits
        assert_close(logits(ours, ids, mask)[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)

@pytest.mark.parametrize("kv_heads", [4, 2])
def test_greedy_tokens_equal_transformers(kv_heads):
    ours, reference = make(kv_heads)
    ids, mask = prompts((8, 3, 5))
    expected = reference.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, ids.shape[1]:]
    assert ours.generate(ours.embed(ids), mask, max_new_tokens=12) == expected.tolist()

def test_padding_in_the_middle_leaves_no_gap():
    ours, _ = make()
    ids, _ = prompts((6,))
    gap, mask = torch.cat((ids[:, :4], ids[:, :1], ids[:, 4:]), 1), torch.tensor([[1, 1, 1, 1, 0, 1, 1]])
    assert_close(logits(ours, gap, mask)[mask.bool()], logits(ours, ids)[0], atol=1e-4, rtol=1e-4)

def test_greedy_tokens_without_a_cache_are_the_same():
    ours, _ = make(kv_heads=2)
    ids, mask = prompts((8, 3, 5))
    cached = ours.generate(ours.embed(ids), mask, max_new_tokens=6)
    for step in range(6):
        new = logits(ours, ids, mask)[:, -1].argmax(-1)
        assert new.tolist() == [row[step] for row in cached]
        ids, mask = torch.cat((ids, new[:, None]), 1), torch.cat((mask, torch.ones_like(mask[:, :1])), 1)

@pytest.mark.parametrize("cuts", [(0, 5, 9), (0, 1, 2, 3, 9), (0, 9)])
def test_a_cache_in_pieces_equals_one_pass(cuts):
    ours, _ = make(kv_heads=2)
    ids, mask = prompts((9, 6))
    cache = KVCache(depth=3)
    pieces = [logits(ours, ids[:, a:b], mask[:, a:b], cache) for a, b in pairwise(cuts)]
    assert_close(torch.cat(pieces, 1)[mask.bool()], logits(ours, ids, mask)[mask.bool()], atol=1e-4, rtol=1e-4)

def test_a_cache_whose_rows_are_taken_and_whose_tokens_are_hidden_equals_one_pass():
    """Two prompts begin alike: the beginning is read once, and a word that was tried in vain leaves no trace."""
    ours, _ = make(kv_heads=2)
    ids, _ = prompts((9, 9))
    ids[1, :4] = ids[0, :4]
    head = KVCache(depth=3)
    assert ours(ours.embed(ids[:1, :4]), cache=head, logits_to_keep=0).shape[1] == 0
    for room in (0, 1, 64):
        cache = head.select_rows([0, 0], room)
        ours(ours.embed(ids[:, 4:7]), cache=cache)
        ours(ours.embed(ids[:, :1]), cache=cache)                          # in vain
        cache.mask[:, -1] = 0
        last = ours(ours.embed(ids[:, 7:]), cache=cache, logits_to_keep=1)           # (B, 1, D)
        assert_close(ours.lm_head(last[:, 0]), logits(ours, ids)[:, -1], atol=1e-4, rtol=1e-4)
        assert cache.select_rows([1]).mask.tolist() == [[1] * 7 + [0, 1, 1]] and head.mask.shape == (1, 4)

@pytest.mark.parametrize("last", [0, 1, 2, 9])
def test_the_last_tokens_alone_are_what_they_are_among_all(last):
    ours, _ = make(kv_heads=2)
    ids, mask = prompts((9, 7))
    found = ours(ours.embed(ids), mask, logits_to_keep=last)
    assert_close(found, ours(ours.embed(ids), mask)[:, 9 - last:], atol=1e-5, rtol=1e-5)

def test_a_row_of_a_batch_is_what_it_is_alone():
    ours, _ = make()
    ids, mask = prompts((9, 4, 1))
    together = ours.generate(ours.embed(ids), mask, max_new_tokens=8)
    for row, n in enumerate((9, 4, 1)):
        assert ours.generate(ours.embed(ids[row:row + 1, -n:]), max_new_tokens=8) == [together[row]]

def test_gradients_equal_transformers_with_and_without_checkpointing():
    ids, mask = prompts((9, 4))
    for recompute in (False, True):
        ours, reference = make(kv_heads=2, checkpoint_layers=recompute)
        logits(ours.train(), ids, mask)[mask.bool()].square().mean().backward()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        reference(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()].square().mean().backward()
        expected = dict(reference.named_parameters())
        for name, p in ours.named_parameters():
            assert_close(p.grad, expected[name].grad, atol=1e-4, rtol=1e-4)

def test_left_padding_gives_no_nan_gradients():
    """A row of padding that may see nothing is a softmax over nothing: NaN, which spoils every gradient."""
    ours, _ = make()
    ids, mask = prompts((9, 1))
    hidden = ours(ours.embed(ids), mask)
    hidden.sum().backward()
    assert hidden.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())

def test_no_dense_mask_where_causality_is_enough():
    right, left = torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.tensor([[1, 1, 1], [0, 0, 1]])

    def visible(mask, s):
        scores = attention_mask(mask, s, torch.float32)                         # (B, 1, s, S), 0 or -inf
        assert scores is None or (scores[scores != 0] == -torch.inf).all()
        return scores if scores is None else (scores == 0).int()

    assert visible(torch.ones(2, 3), s=3) is None
    assert visible(torch.ones(2, 3), s=1) is None
    assert visible(right, s=3) is None
    assert visible(left, s=3)[1, 0].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert visible(left, s=1)[:, 0, 0].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert visible(torch.ones(1, 3), s=2)[0, 0].tolist() == [[1, 1, 0], [1, 1, 1]]

def test_a_quarter_turn_by_hand():
    # channels (0, 2) and (1, 3) are the pairs; turning (1, 0) by 90 degrees gives (0, 1)
    x = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])
    assert apply_rope(x, torch.zeros(4), torch.ones(4)).flatten().tolist() == [0.0, 0.0, 1.0, 0.0]

def test_every_row_stops_by_itself():
    ours, _ = make()
    ids, mask = prompts((8, 3))
    free = ours.generate(ours.embed(ids), mask, max_new_tokens=8)
    stop = free[0][2]
    stopped = ours.generate(ours.embed(ids), mask, max_new_tokens=8, stop=lambda new: new[-1] == stop)
    assert stopped == [row[:row.index(stop) + 1] if stop in row else row for row in free]
    two = ours.generate(ours.embed(ids), mask, max_new_tokens=8, stop=lambda new: len(new) == 2)
    assert two == [row[:2] for row in free]

def test_sampling_repeats_with_the_same_seed():
    ours, _ = make()
    embeds = ours.embed(prompts()[0])
    draw = [ours.generate(embeds, max_new_tokens=10, temperature=2.0, generator=torch.Generator().manual_seed(seed))
            for seed in (3, 3, 4)]
    assert draw[0] == draw[1] != draw[2]

def test_bfloat16_stays_bfloat16():
    ours, _ = make(kv_heads=2)
    ours.bfloat16()
    assert ours(ours.embed(prompts()[0])).dtype == torch.bfloat16

def test_real_size_has_the_official_number_of_parameters():
    with torch.device("meta"):
        llm = Llama(LlamaConfig())
    assert sum(p.numel() for p in llm.parameters()) == 6_738_415_616
    assert len(llm.state_dict()) == 291

def test_errors_name_the_numbers():
    ours, _ = make()
    with pytest.raises(ValueError, match="65 tokens, but the LLM takes at most 64"):
        ours(torch.zeros(1, 65, 32))
    with pytest.raises(ValueError, match="padded on the left"):
        ours.generate(torch.zeros(2, 3, 32), prompts((3, 1), "right")[1])
    with pytest.raises(ValueError, match="cannot share 3"):
        LlamaConfig(kv_heads=3)
    with pytest.raises(ValueError, match="even size"):
        LlamaConfig(width=100)
