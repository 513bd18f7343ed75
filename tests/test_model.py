"""The assembled model: official sizes, what trains when, the video's slot, the loss. Run: pytest tests/test_model.py"""
import json
from dataclasses import asdict

import pytest
import torch

from infra.distributed import Distributed
from model import PRESETS, Config, VideoChat2, set_trainable
from prompt import IGNORE, VIDEO

B, S = 3, 16
TRAINED = {  # stage -> parameters that train, as the official code counts them at the real size
    1: {"query_tokens": 24_576, "vision_temp_embed": 4_096, "vision_encoder": 0, "vision_layernorm": 2_048,
        # tied once: bert 182,121,216 + cls 622,651, whose decoder is the word embeddings' own matrix
        "qformer": 182_743_867,
        "aligner": 1 + 590_592 + 590_592 + 3_074},  # temp, vision_proj, text_proj, itm_head
    2: {"query_tokens": 24_576, "extra_query_tokens": 49_152, "vision_encoder": 290_477_056,
        "vision_layernorm": 2_048, "qformer": 101_598_720, "llama_proj": 3_149_824, "llama_model": 0},
    3: {"query_tokens": 24_576, "extra_query_tokens": 49_152, "vision_encoder": 290_477_056,
        "vision_layernorm": 2_048, "qformer": 182_121_216, "llama_proj": 3_149_824, "llama_model": 0,
        "lora": 8_388_608},
}
OFFICIAL = {1: 183_958_846, 2: 395_301_376, 3: 484_212_480}  # all of them together
OFFICIAL_TOTAL = {
    1: 474_435_902,
    # subtle: officially stage 2 deletes from the Q-Former what has no use without text, and stage 3 takes it from stage
    # 1's file. Here set_trainable freezes it, so that a checkpoint of stage 2 is all that stage 3 needs.
    2: 7_133_716_992 + (182_121_216 - 101_598_720),
    3: 7_222_628_096,
}

def micro(stage, **changes):
    """A micro model in which every weight counts: zeros (extra queries, vision_temp_embed, LoRA's B) are filled."""
    torch.manual_seed(0)
    cfg = PRESETS["micro"]()
    cfg.llama.vocab_size, cfg.qformer.vocab_size = 60, 80
    for name, value in changes.items():
        setattr(cfg, name, value)
    model = VideoChat2(cfg, stage)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.1)
    return model.eval()

def pixels(model, B=B, T=4):
    return torch.randn(B, T, 3, model.cfg.vit.img_size, model.cfg.vit.img_size)

def batch_of(model, start=2):
    """Right-padded prompts of 14, 15 and 16 ids; the slot begins at `start`, the last four ids of each are labels."""
    n = model.cfg.n_query + model.cfg.n_extra
    ids = torch.randint(3, 60, (B, S))
    ids[:, start:start + n] = VIDEO
    labels, mask = torch.full_like(ids, IGNORE), torch.ones_like(ids)
    for row, length in enumerate((14, 15, 16)):
        mask[row, length:] = 0
        labels[row, length - 4:length] = ids[row, length - 4:length]
    return {"video": pixels(model), "ids": ids, "labels": labels, "mask": mask,
            "instruction_ids": torch.randint(5, 80, (B, 6)), "instruction_mask": torch.ones(B, 6, dtype=torch.long)}

# ------------------------------------------------------------------------------------------ sizes, and what trains when

def test_a_config_of_an_older_checkpoint_is_read_under_its_old_names():
    """Three fields had other names when the first checkpoints were written."""
    cfg = PRESETS["mistral-7b"]()
    cfg.frame_sampling = "mvbench"
    stored = json.loads(json.dumps(asdict(cfg)))
    for old, new in (("style", "prompt_style"), ("tell_seconds", "add_timestamps"), ("train_choice", "frame_sampling")):
        stored[old] = stored.pop(new)
    assert (stored["style"], stored["tell_seconds"], stored["train_choice"]) == ("mistral", False, "mvbench")
    assert Config.from_dict(stored) == cfg

@pytest.mark.parametrize("old, new", [(True, "cat"), (False, "none")])
def test_the_older_vtm_cat_text_cls_is_read(old, new):
    stored = json.loads(json.dumps(asdict(PRESETS["toy"]())))
    del stored["vtm_text_cls"]
    stored["qformer"]["vtm_cat_text_cls"] = old
    assert Config.from_dict(stored).vtm_text_cls == new and stored["qformer"]["vtm_cat_text_cls"] is old

def test_a_config_with_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="LlamaConfig has no option n_layers"):
        Config.from_dict({"llama": {"n_layers": 2}})

def test_presets_are_independent_of_each_other():
    """Sizes that the toy's tokenizers decide are filled in; the next Config must not have them."""
    for name, make in PRESETS.items():
        make().llama.vocab_size = 1
        assert make().llama.vocab_size != 1 and make().preset == name

@pytest.mark.parametrize("stage", (1, 2, 3))
def test_parts_have_the_official_parameter_counts(stage):
    with torch.device("meta"):
        model = VideoChat2(PRESETS["vicuna-7b"](), stage)
    rows = set_trainable(model, stage)
    assert {part: trained for part, _, trained in rows} == TRAINED[stage]
    assert sum(trained for *_, trained in rows) == OFFICIAL[stage]
    totals = {part: total for part, total, _ in rows}
    assert sum(totals.values()) == OFFICIAL_TOTAL[stage] and totals["vision_encoder"] == 290_477_056
    assert totals.get("llama_model", 0) == (6_738_415_616 if stage > 1 else 0)

@pytest.mark.parametrize("stage", (1, 2, 3))
def test_what_is_set_to_train_gets_a_gradient_and_nothing_else_does(stage):
    """Counts alone would not see a part that trains but takes no part in the loss, which AdamW would only decay."""
    model = micro(stage)
    rows = set_trainable(model, stage)
    batch = batch_of(model)
    if stage == 1:
        words = {"ids": batch["instruction_ids"], "mask": batch["instruction_mask"], "idx": torch.arange(B)}
        sum(model.stage1_losses(batch | words, 4, Distributed(), torch.Generator().manual_seed(0)).values()).backward()
    else:
        if stage == 2:
            batch.pop("instruction_ids"), batch.pop("instruction_mask")
        model.lm_loss(batch).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    for part, total, trained in rows:
        params = {n: p for n, p in model.named_parameters() if ("lora" if "lora_" in n else n.split(".")[0]) == part}
        assert total == sum(p.numel() for p in params.values())
        assert trained == sum(p.numel() for p in params.values() if p.requires_grad)

# --------------------------------------------------------------------------------------------------- what the LLM reads

def test_splice_puts_video_tokens_into_their_places_in_order():
    model = micro(2)
    n = model.cfg.n_query + model.cfg.n_extra
    ids = torch.randint(3, 60, (B, S))
    starts = (0, 2, S - n)                                                 # another place in every row
    for row, start in enumerate(starts):
        ids[row, start:start + n] = VIDEO
    tokens = torch.randn(B, n, model.cfg.llama.width)
    embeds = model.insert_video_tokens(ids, tokens)                                     # (B, S, D)
    for row, start in enumerate(starts):
        assert torch.equal(embeds[row, start:start + n], tokens[row])
    words = ids != VIDEO
    assert torch.equal(embeds[words], model.llama_model.embed(ids[words]))

def test_queries_read_video_and_instruction_and_are_as_many_as_the_slot():
    model = micro(3)
    batch = batch_of(model)
    vision = model.encode_video(batch["video"])                                  # (B, N, C)
    tokens = model.video_tokens(vision, batch["instruction_ids"], batch["instruction_mask"])      # (B, Q, D)
    assert tokens.shape == (B, model.cfg.n_query + model.cfg.n_extra, model.cfg.llama.width)
    assert not torch.allclose(tokens, model.video_tokens(vision), atol=1e-4)    # without the instruction
    other = model.video_tokens(vision.roll(1, 0), batch["instruction_ids"], batch["instruction_mask"])
    assert not torch.allclose(tokens, other, atol=1e-4)

@pytest.mark.parametrize("stage", (2, 3))
def test_an_image_is_a_video_of_one_frame(stage):
    model = micro(stage)
    image = pixels(model, T=1)
    L = (model.cfg.vit.img_size // model.cfg.vit.patch_size) ** 2
    assert model.encode_video(image).shape == (B, L, model.cfg.vit.width)
    assert model.encode_video(pixels(model)).shape == (B, 4 * L, model.cfg.vit.width)
    assert model.lm_loss(batch_of(model) | {"video": image}).isfinite()

def test_align_takes_images_and_repeats_them_for_each_temporal_embedding():
    model = micro(1)
    words = {"ids": torch.randint(5, 80, (B, 6)), "mask": torch.ones(B, 6, dtype=torch.long), "idx": torch.arange(B)}
    seen = []
    model.vision_layernorm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = pixels(model, T=1)
    losses = model.stage1_losses(words | {"video": image}, 4, Distributed(), torch.Generator().manual_seed(0))
    assert set(losses) == {"vtc", "vtm", "vtg"} and all(loss.isfinite() for loss in losses.values())
    one = model.vision_encoder(image)                                      # (B, 1, L, C)
    frames = [one[:, 0] + model.vision_temp_embed[:, t] for t in range(4)]  # 4 x (B, L, C)
    torch.testing.assert_close(seen[0], torch.cat(frames, 1))

# ------------------------------------------------------------------------------------------------------------- the loss

def test_loss_is_the_cross_entropy_of_the_label_positions():
    """By hand: each label against the logits of the position before it, mean over the labels of the whole batch."""
    model = micro(3)
    batch = batch_of(model)
    hidden = model.llama_model(model.input_embeds(batch), batch["mask"])           # (B, S, D)
    logp = model.llama_model.lm_head(hidden).log_softmax(-1)               # (B, S, V)
    terms = [-logp[row, at - 1, batch["labels"][row, at]]
             for row in range(B) for at in range(1, S) if batch["labels"][row, at] != IGNORE]
    assert len(terms) == 12
    # the model itself reads the texts end to end, without padding, and ends where no word is learnt
    by_hand, own = torch.stack(terms).mean(), model.lm_loss(batch)
    torch.testing.assert_close(own, by_hand)
    trained = [p for n, p in model.named_parameters() if "lora_" in n or n.startswith(("llama_proj", "query_tokens"))]
    for one, other in zip(*(torch.autograd.grad(loss, trained) for loss in (own, by_hand)), strict=True):
        torch.testing.assert_close(one, other)

def test_left_padding_does_not_change_the_answer():
    """Prompts of different lengths are answered together: the short one as if it were alone."""
    model = micro(3)
    batch = batch_of(model)
    embeds = model.input_embeds(batch)[:1, :14].detach()                   # (1, 14, D), the first row without padding
    padded = torch.cat([torch.randn(1, 3, embeds.shape[-1]), embeds], 1)   # (1, 17, D)
    mask = torch.ones(1, 17, dtype=torch.long)
    mask[:, :3] = 0
    llm = model.llama_model
    rows, rows_padded = llm.generate(embeds, mask[:, 3:], 4), llm.generate(padded, mask, 4)
    assert rows == rows_padded and len(rows[0]) == 4
    torch.testing.assert_close(llm(padded, mask, logits_to_keep=1), llm(embeds, logits_to_keep=1))

def test_a_batch_of_text_alone_needs_no_video():
    model = micro(3)
    batch = batch_of(model)
    text = batch | {"video": None, "ids": batch["ids"].masked_fill(batch["ids"] == VIDEO, 5)}
    assert torch.equal(model.input_embeds(text), model.llama_model.embed(text["ids"]))
    model.lm_loss(text).backward()
    assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_" in n)
    assert model.llama_proj.weight.grad is None or not model.llama_proj.weight.grad.any()

def test_a_batch_without_labels_has_loss_zero_and_gradient_zero():
    """Truncation can cut every answer of a batch; the official loss is then NaN and would spoil every weight."""
    model = micro(3)
    set_trainable(model, 3)
    batch = batch_of(model)
    loss = model.lm_loss(batch | {"labels": torch.full_like(batch["labels"], IGNORE)})
    assert loss.item() == 0
    loss.backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)

def test_the_toy_s_queries_differ_before_training():
    """At the full strength of every branch, 4 layers made 16 queries one: their mean cosine was 0.9."""
    torch.manual_seed(0)
    cfg = PRESETS["toy"]()
    cfg.qformer.vocab_size = 10
    model = VideoChat2(cfg, 1).eval()
    with torch.no_grad():
        hidden = model.qformer(model.query_tokens, vision=model.encode_video_stage1(torch.randn(1, 8, 3, 64, 64)))[0]
    hidden = torch.nn.functional.normalize(hidden, dim=-1)                  # (Q, E)
    cosine = (hidden @ hidden.T).fill_diagonal_(0).sum() / (16 * 15)
    assert cosine < 0.4, cosine
