"""Official files in and out: names at real size, numbers at tiny size. Run: pytest tests/test_convert.py"""
import json
import shutil
from dataclasses import replace
from unittest import mock

import pytest
import sentencepiece
import torch
from conftest import GOLDEN, golden_tensors
from PIL import Image
from videos import write_video

import train
from data import collate_stage2, collate_stage3
from evaluation.engine import Engine
from evaluation.protocol import Protocol
from infra import files
from infra.distributed import Distributed
from llama import Llama, LlamaConfig
from model import PRESETS, Config, VideoChat2, set_trainable
from prompt import CAPTION_INSTRUCTIONS, IGNORE, SYSTEM, conversation_prompt
from qformer import QFormerConfig
from tokenizer import SentencePiece
from vit_video import ViTConfig
from weights import checkpoint, convert, official_names
from weights.hf_llama import write_llm

KEYS = json.loads((GOLDEN / "keys.json").read_text())
TIED = {"qformer.cls.predictions.decoder.weight", "qformer.cls.predictions.decoder.bias"}

# ------------------------------------------------------------------------------------------------- names, at real size

def state_dict(name):
    """A state dict of the real size on the meta device, from the recorded names and shapes."""
    return {key: torch.empty(shape, device="meta", dtype=getattr(torch, dtype))
            for key, (shape, dtype) in KEYS[name]["keys"].items()}

def own(stage, preset="vicuna-7b"):
    with torch.device("meta"):
        return VideoChat2(PRESETS[preset](), stage).state_dict()

def fitting(tensors, table, names, stage_own):
    """Translates and looks at every shape -> what was taken and what was dropped."""
    ours, without = official_names.from_official(tensors, "official", table, stage_own, drop_rules=names)
    files.check_state_dict({n: stage_own[n] for n in ours}, ours, "official")
    return ours, without

def test_the_vit_s_file_is_the_vit():
    model = own(1)
    ours, without = fitting(state_dict("umt_l_vit_num_frames4"), official_names.UMT, official_names.DROPPED_UMT, model)
    assert not without and set(ours) == {n for n in model if n.startswith("vision_encoder.")}
    assert sum(t.numel() for t in ours.values()) == KEYS["umt_l_vit_num_frames4"]["params"]["total"]

def test_stage_1_s_file_is_stage_1():
    model = own(1)
    ours, without = fitting(state_dict("stage1_qformer"), official_names.OFFICIAL[1], official_names.DROPPED, model)
    assert set(ours) == set(model)
    assert set(without) == TIED | {"qformer.bert.embeddings.position_ids"}
    assert sum(t.numel() for t in ours.values()) == KEYS["stage1_qformer"]["params"]["total"]

@pytest.mark.parametrize("stage, name", [(2, "stage2_pt_vicuna"), (3, "stage3_it_vicuna_lora")])
def test_the_whole_model_of_stages_2_and_3(stage, name):
    model = own(stage)
    ours, without = fitting(state_dict(name), official_names.OFFICIAL[stage], official_names.DROPPED, model)
    assert all(why.startswith(("follows", "counted")) for why in without.values()) and len(without) == 32 + 1
    lacking = set(model) - set(ours)
    if stage == 2:                                                         # it reads no text; stage 1's file does
        lacking -= {n for n in model if official_names.TEXT_HALF.match(n)}
    assert not lacking
    assert sum(t.numel() for t in ours.values()) == KEYS[name]["params"]["total"]

@pytest.mark.parametrize("stage, name", [(1, "stage1_qformer"), (2, "stage2_pt_vicuna"), (3, "stage3_it_vicuna_lora")])
def test_export_has_every_key_and_shape_of_the_official_file(stage, name):
    wanted = state_dict(name)
    if stage > 1:
        wanted = {key: wanted[key] for key in KEYS[name]["checkpoint_keys"]}   # without what is frozen
    ours = {n: t for n, t in own(stage).items() if not checkpoint.is_frozen_llm(n)}
    found = official_names.to_official(ours, stage, Config())
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in wanted.items()}
    assert stage < 3 or set(found) == set(KEYS["released_stage3"]["keys_in_release"])

def test_mistral_s_names():
    model = own(3, "mistral-7b")
    ours = {n: t for n, t in model.items() if not checkpoint.is_frozen_llm(n)}
    found = official_names.to_official(ours, 3, PRESETS["mistral-7b"]())
    lora = [n for n in found if "lora_" in n]
    assert len(lora) == 2 * (7 * 32 + 1) and not [n for n in found if "llama" in n]
    assert {"mistral_proj.weight", "mistral_model.base_model.model.lm_head.lora_A.default.weight",
            "mistral_model.base_model.model.model.layers.31.mlp.down_proj.lora_B.default.weight"} <= set(found)
    k_proj = "mistral_model.base_model.model.model.layers.0.self_attn.k_proj"
    assert found[f"{k_proj}.lora_B.default.weight"].shape[0] == 1024       # eight heads of keys, not 32
    again, without = official_names.from_official(found, "official", official_names.OFFICIAL[3], model, "mistral",
                                                  official_names.DROPPED)
    assert set(again) == set(ours) and set(without) == {"qformer.bert.embeddings.position_ids"}

def test_mistral_in_and_out_at_tiny_size(tmp_path):
    """LoRA on every linear layer and lm_head, eight-fold shared keys, no inv_freq: files, model and answer."""
    torch.manual_seed(0)
    cfg = PRESETS["mistral-7b"]()
    cfg = replace(cfg, vit=VIT, qformer=replace(TINY[3].qformer), n_query=8, n_extra=6, lora_r=4, eval_frames=4,
                  llama=replace(cfg.llama, vocab_size=32000, width=64, depth=2, heads=8, kv_heads=1, ffn=96))
    with files.atomic_folder(tmp_path / "llm") as folder:
        write_llm(Llama(cfg.llama), GOLDEN / "tokenizer.model", folder)
    model = VideoChat2(cfg, 3, defer_llm=True)
    wanted = official_names.to_official({n: torch.randn(t.shape) for n, t in model.state_dict().items()
                                   if not checkpoint.is_frozen_llm(n)}, 3, cfg)
    torch.save({"model": wanted}, tmp_path / "stage3.pth")
    given = convert.OfficialFiles(llm=str(tmp_path / "llm"), stage3=str(tmp_path / "stage3.pth"))
    convert.import_files(given, cfg, tmp_path / "run")
    convert.export(tmp_path / "run", tmp_path / "out.pth")
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], t) for n, t in wanted.items())
    ours = Engine(*checkpoint.load_checkpoint(tmp_path / "run"), Protocol(max_new_tokens=2))
    q = {"question": "What?", "candidates": ["This.", "That."], "answer": "This."}
    tokens = ours.video_tokens(ours.encode_clips(torch.randn(1, 4, 3, 32, 32), "", [0]), "", [0], [q])
    (answer,) = ours.answer([q], tokens)
    assert answer.text.startswith("(") and len(answer.letters) == 2

def test_every_row_of_every_table_is_read_both_ways():
    for table in (*official_names.OFFICIAL.values(), official_names.UMT):
        for prompt_style in ("vicuna", "mistral"):
            for left, _ in table:
                llm = "mistral" if prompt_style == "mistral" else "llama"
                name = left.replace("LLM", llm).replace("*", "model.layers.7.self_attn.q_proj")
                ours = official_names.rename_key(name, table, prompt_style)
                back = official_names.rename_key(ours, table, prompt_style, reverse=True)
                assert back == name or table is official_names.UMT, (name, ours, back)

# ----------------------------------------------------------------------------------------------- numbers, at tiny size

VIT = ViTConfig(img_size=32, patch_size=8, width=48, depth=3, heads=4, frames=4, pos_table="resized14")
TINY = {
    1: Config(vit=VIT, qformer=QFormerConfig(
        vocab_size=201, width=64, depth=4, heads=4, ffn=128, vision_width=48, embed_dim=32, max_positions=64,
        dropout=0.0, drop_path=0.0), n_query=8, n_extra=6),
    2: Config(vit=VIT, qformer=QFormerConfig(
        vocab_size=30523, width=64, depth=4, heads=4, ffn=128, vision_width=48, max_positions=128, dropout=0.0,
        drop_path=0.0), llama=LlamaConfig(width=32, depth=2, heads=4, kv_heads=4, ffn=64, max_positions=1024),
        n_query=8, n_extra=6, max_text=24, train_frames=4),
    3: Config(vit=VIT, qformer=QFormerConfig(
        vocab_size=30523, width=20, depth=4, heads=4, ffn=40, vision_width=48, max_positions=128, dropout=0.0,
        drop_path=0.0), llama=LlamaConfig(width=32, depth=2, heads=4, kv_heads=4, ffn=64, max_positions=1024),
        n_query=8, n_extra=6, max_text=128, train_frames=4, lora_r=4, lora_alpha=8, lora_dropout=0.0),
}
LLM_NAMES = {2: "llama_model.", 3: "llama_model.base_model.model."}

@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The official files at tiny size, with the recorded weights: an LLM folder, a BERT folder, stages 1 to 3."""
    folder = tmp_path_factory.mktemp("official")
    (folder / "tiny_bert").mkdir()
    (folder / "tiny_bert" / "vocab.txt").write_bytes((GOLDEN / "tiny_vocab.txt").read_bytes())
    torch.save(recorded("stage1_cat"), folder / "stage1.pth")
    for stage in (2, 3):
        tensors = recorded(f"stage{stage}")
        prefix = LLM_NAMES[stage]
        frozen = {n: t for n, t in tensors.items() if n.startswith(prefix) and "lora_" not in n and "inv_freq" not in n}
        llm = folder / f"llm{stage}"
        llm.mkdir()
        files.save_tensors({n.removeprefix(prefix): t for n, t in frozen.items()}, llm / "model.safetensors")
        config = json.loads((GOLDEN / f"stage{stage}.json").read_text())["config"]["llama"]
        (llm / "config.json").write_text(json.dumps(config))
        (llm / "tokenizer.model").write_bytes((GOLDEN / "tokenizer.model").read_bytes())
        rest = {n: t for n, t in tensors.items() if n not in frozen}
        torch.save({"model": rest} if stage == 3 else rest, folder / f"stage{stage}.pth")
    torch.manual_seed(0)                                                   # stage 2 lacks its text half: stage 1 has it
    with torch.device("meta"):
        names = VideoChat2(TINY[2], 2).state_dict()
    text = {n: torch.randn(t.shape) for n, t in names.items() if official_names.TEXT_HALF.match(n)}
    torch.save(text, folder / "text_half.pth")
    return folder

def recorded(name):
    return {n[2:]: t for n, t in golden_tensors(name).items() if n.startswith("w.")}

def official_files(given, stage):
    more = {1: {}, 2: {"stage1": str(given / "text_half.pth")}, 3: {}}[stage]
    return convert.OfficialFiles(**{"llm": str(given / f"llm{stage}") if stage > 1 else "",
                            "bert": "" if stage > 1 else str(given / "tiny_bert"),
                            f"stage{stage}": str(given / f"stage{stage}.pth")}, **more)

@pytest.fixture(scope="module")
def imported(given, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    for stage in (1, 2, 3):
        convert.import_files(official_files(given, stage), TINY[stage], out / f"stage{stage}")
    return out

@pytest.mark.parametrize("stage", [1, 2, 3])
def test_import_then_export_gives_back_every_key_shape_and_value(given, imported, tmp_path, stage):
    convert.export(imported / f"stage{stage}", tmp_path / "out.pth")
    wanted = files.read_torch_file(given / f"stage{stage}.pth")
    found = torch.load(tmp_path / "out.pth", weights_only=True)            # flat, as umt_l16_qformer.pth has to be
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        assert torch.equal(found[name], t) and found[name].dtype == t.dtype, name

def test_a_matching_head_of_another_width_asks_for_the_option_that_made_it(given, tmp_path):
    tensors = recorded("stage1_cat")
    tensors["itm_head.weight"] = tensors["itm_head.weight"][:, :64].clone()
    torch.save(tensors, tmp_path / "add.pth")
    start = convert.OfficialFiles(bert=str(given / "tiny_bert"), stage1=str(tmp_path / "add.pth"))
    with pytest.raises(ValueError, match=r"itm_head.weight is \(2, 64\): add --vtm-text-cls add .* or none"):
        convert.import_files(start, TINY[1], tmp_path / "run")
    convert.import_files(start, replace(TINY[1], vtm_text_cls="add"), tmp_path / "run")
    assert checkpoint.read_config(tmp_path / "run")[0].vtm_text_cls == "add"
    with pytest.raises(ValueError, match=r"itm_head.weight is \(2, 128\): add --vtm-text-cls cat"):
        convert.import_files(official_files(given, 1), replace(TINY[1], vtm_text_cls="none"), tmp_path / "other")

def close(found, wanted, name=""):
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4, msg=lambda text: f"{name}: {text}")

def gradients_are_the_recorded_ones(model, stage, g, prefix="grad."):
    named, seen = dict(model.named_parameters()), 0
    for key in [key for key in g if key.startswith(prefix) and (prefix != "grad." or "image_" not in key)]:
        name = official_names.rename_key(key.removeprefix(prefix), official_names.OFFICIAL[stage])
        close(named[name].grad, g[key], key)
        seen += 1
    return seen

def run_llm(model, batch, g, key=""):
    """Loss and gradients of a batch, and what the LLM makes of it on the way, against the recorded ones."""
    S = g[f"out.{key}attention_mask"].shape[1]
    llm = model.llama_model
    with mock.patch.object(llm, "forward_packed", wraps=llm.forward_packed) as packed:
        loss = model.lm_loss(batch)
    embeds, lengths = packed.call_args.args[0], batch["mask"].sum(1).tolist()  # (1, N, D): rows end to end
    with torch.no_grad():
        final = model.llama_model.forward_packed(embeds, lengths)          # (1, N, D)
        logits = model.llama_model.lm_head(final)                          # (1, N, V)
    mask = g[f"out.{key}attention_mask"].bool()
    assert torch.equal(batch["mask"][:, :S], mask.long()) and not batch["mask"][:, S:].any()
    assert torch.equal(batch["labels"][:, :S], g[f"out.{key}targets"])
    close(embeds[0], g[f"out.{key}inputs_embeds"][mask])
    close(final[0], g[f"out.{key}hidden_final"][mask])
    columns = json.loads((GOLDEN / "stage3.json").read_text())["config"]["logits_cols"]
    close(logits[0][:, columns], g[f"out.{key}logits_cols"][mask])
    assert torch.equal(logits[0].argmax(-1), g[f"out.{key}logits_argmax"][mask])
    close(loss, g[f"out.{key}loss"])
    model.zero_grad()
    loss.backward()

def test_stage_3_gives_the_official_numbers(imported):
    """Two conversations through the collate, the model and LoRA's gradients: ones for <s>, trained separators, the
    question in the Q-Former."""
    g, spec = golden_tensors("stage3"), json.loads((GOLDEN / "stage3_targets.json").read_text())["cases"]
    model, qformer_tok, llm_tok = checkpoint.load_checkpoint(imported / "stage3")
    cfg = model.cfg
    assert cfg.bos_ones and cfg.train_separators and cfg.question_in_qformer  # the preset's defaults
    set_trainable(model, 3)
    samples = [{"qas": case["qa"], "medium": "video", "path": "", "idx": 0, "bad": [], "video": video,
                "seconds": [float(s) for s in case["msg"].split(" at ")[1].replace(" seconds. ", "").split(", ")]}
               for case, video in zip(spec, g["in.image"], strict=False)]
    batch = collate_stage3(samples, cfg, qformer_tok, llm_tok)
    S = g["in.qformer_input_ids"].shape[1]
    assert torch.equal(batch["instruction_ids"][:, :S], g["in.qformer_input_ids"])
    vision = model.encode_video(batch["video"])
    close(vision, g["out.vision_embeds"])
    close(model.video_tokens(vision, batch["instruction_ids"], batch["instruction_mask"]), g["out.img_embeds"])
    run_llm(model, batch, g)
    assert gradients_are_the_recorded_ones(model, 3, g) == len([key for key in g if key.startswith("grad.")]) == 17

@pytest.mark.parametrize("medium, key", [("video", ""), ("image", "image_")])
def test_stage_2_gives_the_official_numbers(imported, medium, key):
    g, spec = golden_tensors("stage2"), json.loads((GOLDEN / "stage2.json").read_text())["config"]
    model, _, llm_tok = checkpoint.load_checkpoint(imported / "stage2")
    set_trainable(model, 2)
    asked = CAPTION_INSTRUCTIONS[medium].index(f"Describe the following {medium} concisely.")
    videos = g["in.image_image"] if medium == "image" else g["in.image"]
    samples = [{"text": text, "medium": medium, "path": "", "idx": 0, "bad": [], "video": video,
                "prompt_choice": (asked + 0.5) / len(CAPTION_INSTRUCTIONS[medium])}
               for text, video in zip(spec["captions"], videos, strict=True)]
    batch = collate_stage2(samples, model.cfg, None, llm_tok)
    close(model.video_tokens(model.encode_video(batch["video"])), g[f"out.{key}img_embeds"])
    run_llm(model, batch, g, key)
    seen = gradients_are_the_recorded_ones(model, 2, g, f"grad.{key}")
    assert seen == len([n for n in g if n.startswith("grad.image_")]) == 7

def test_stage_1_gives_the_official_losses(imported):
    g = golden_tensors("stage1_cat")
    model, qformer_tok, _ = checkpoint.load_checkpoint(imported / "stage1")
    set_trainable(model, 1)
    close(model.encode_video_stage1(g["in.image"]), g["out.vision_embeds"])
    batch = {"video": g["in.image"], "ids": g["in.input_ids"], "mask": g["in.attention_mask"], "idx": g["in.idx"]}
    negatives = g["in.vision_neg_indices"], g["in.text_neg_indices"]
    with mock.patch("qformer.hard_negatives", return_value=negatives):
        losses = model.stage1_losses(batch, qformer_tok.dec_id, Distributed())
    for ours, theirs in (("vtc", "vtc"), ("vtm", "vtm"), ("vtg", "cap")):
        close(losses[ours], g[f"out.loss_{theirs}"])
    sum(losses.values()).backward()
    assert gradients_are_the_recorded_ones(model, 1, g) == 14

def test_what_the_official_code_crashes_on_trains_on_the_right_targets(golden):
    """Questions that end in newlines or spaces, and two closing tags; with separators as in released training."""
    tok = SentencePiece(golden / "tokenizer.model")
    cases = json.loads((golden / "stage3_targets.json").read_text())["cases"]
    for case in [case for case in cases if "error" in case and "qa" in case]:
        prompt = conversation_prompt(tok, case["qa"], 14, case["msg"], train_separators=True)
        learnt = tok.decode([i for i in prompt.labels if i != IGNORE])
        for qa in case["qa"]:
            assert f"###Assistant: {qa['a'].strip()}" in learnt
            assert not qa["q"].strip() or qa["q"].strip() not in learnt

@pytest.mark.parametrize("ablation", [{}, {"system": ""}, {"answer_prompt": ""}, {"question_in_qformer": True}])
def test_mvbench_s_first_logits_are_those_of_transformers_and_peft(given, imported, ablation):
    """The notebook's order of things, put together by hand from segments that are tokenised apart, around 8 frames with
    a position table that was made for 4; <s> has its own embedding here, unlike in training."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    q = {"question": "What happened?", "candidates": ["He sat.", "He ran.", "He fell."], "answer": "He ran."}
    model, qformer_tok, llm_tok = checkpoint.load_checkpoint(imported / "stage3")
    ours = Engine(model, qformer_tok, llm_tok, Protocol(max_new_tokens=1, **ablation))
    video = torch.randn(1, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = ours.video_tokens(ours.encode_clips(video, "", [0]), "", [0], [q])    # (1, 14, D)
    seen = []
    model.llama_model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        ours.answer([q], tokens)

    system = ablation.get("system", SYSTEM)
    asked = "Question: What happened?\nOptions:\n(A) He sat.\n(B) He ran.\n(C) He fell.\nOnly give the best option."
    ending = ablation.get("answer_prompt", "Best option:(")
    segments = (f"{system}###Human: <Video>", f"</Video>\n###Human: {system}{asked}\n###Assistant:"
                + f" {ending}" * bool(ending))
    spm = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "tokenizer.model"))
    theirs = transformers.LlamaForCausalLM.from_pretrained(given / "llm3", dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(theirs, config).eval()
    lora = {n.removeprefix("llama_model."): t for n, t in recorded("stage3").items() if "lora_" in n}
    assert not theirs.load_state_dict(lora, strict=False).unexpected_keys
    embed = theirs.get_input_embeddings()
    before, after = embed(torch.tensor([[1, *spm.encode(segments[0])]])), embed(torch.tensor([spm.encode(segments[1])]))
    logits = theirs(inputs_embeds=torch.cat((before, tokens, after), 1)).logits[:, -1]
    close(seen[0], logits)

# --------------------------------------------------------------------------------------------- the beginning of stage 1

@pytest.fixture
def beginning(tmp_path):
    """A UMT and a BERT as they are given away: more blocks than needed, other parts, old names."""
    cfg = replace(TINY[1], qformer=replace(TINY[1].qformer, vocab_size=201))
    torch.manual_seed(1)
    with torch.device("meta"):
        model = VideoChat2(cfg, 1).state_dict()
    vit = {n.replace("vision_encoder.", "encoder."): torch.randn(t.shape) for n, t in model.items()
           if n.startswith("vision_encoder.")}
    last = {n.replace("blocks.2.", "blocks.3."): t for n, t in vit.items() if "blocks.2." in n}
    torch.save({"module": vit | last | {"encoder.norm.weight": torch.ones(48), "clip_decoder.0.weight": torch.ones(3),
                                        "encoder.pos_embed": torch.ones(1, 64, 48)}}, tmp_path / "umt.pth")
    bert = {n.removeprefix("qformer."): torch.randn(t.shape) for n, t in model.items()
            if n.startswith("qformer.") and "_query" not in n and "crossattention" not in n}
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        bert[name] = bert[name][:200]                                      # BERT knows no [DEC]
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for n, t in bert.items()}
    (tmp_path / "bert").mkdir()
    torch.save(old | {"bert.pooler.dense.weight": torch.ones(2), "cls.seq_relationship.bias": torch.ones(2),
                      "bert.embeddings.token_type_embeddings.weight": torch.ones(2, 64),
                      "cls.predictions.decoder.weight": bert["bert.embeddings.word_embeddings.weight"]},
               tmp_path / "bert" / "pytorch_model.bin")
    (tmp_path / "bert" / "vocab.txt").write_bytes((GOLDEN / "tiny_vocab.txt").read_bytes())
    return cfg, vit, bert, tmp_path

def test_stage_1_begins_with_umt_and_bert(beginning, capsys):
    cfg, vit, bert, folder = beginning
    bundle = convert.OfficialFiles(umt=str(folder / "umt.pth"), bert=str(folder / "bert"))
    convert.import_files(bundle, cfg, folder / "init")
    printed = capsys.readouterr().out
    for said in ("after the last block that VideoChat2 uses", "stage 1 initialises them", "crossattention"):
        assert said in printed
    tensors = files.read_tensors(folder / "init" / "model.safetensors")
    assert torch.equal(tensors["vision_encoder.blocks.2.attn.q_bias"], vit["encoder.blocks.2.attn.q_bias"])
    words = tensors["qformer.bert.embeddings.word_embeddings.weight"]
    assert torch.equal(words[:200], bert["bert.embeddings.word_embeddings.weight"]) and len(words) == 201
    assert words[200].std() < 0.05                                         # [DEC] begins at random
    for part in ("intermediate", "output"):                                # query rows begin as text rows
        text, query = (tensors[f"qformer.bert.encoder.layer.3.{part}{more}.dense.weight"] for more in ("", "_query"))
        assert torch.equal(text, query) and torch.equal(text, bert[f"bert.encoder.layer.3.{part}.dense.weight"])
    assert "qformer.bert.encoder.layer.0.attention.output_query.dense.weight" not in tensors
    assert not [n for n in tensors if "crossattention" in n or n.startswith("aligner.")]
    assert checkpoint.read_config(folder / "init")[1]["stage"] == 0

# --------------------------------------------------------------------------------------- training on what was imported

@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Real formats: videos, images of every kind, home-made keys and suffixes, clips with bounds, texts alone."""
    root = tmp_path_factory.mktemp("data")
    for i in range(4):
        write_video(root / "videos" / f"{i}.mp4", frames=30, rate=10, width=64, height=48)
    for i, mode in enumerate(["L", "P", "RGBA", "RGB"]):
        Image.new("RGB", (50, 40), (60 * i, 90, 200)).convert(mode).save(root / f"{i}.{'png' if i < 3 else 'webp'}")
    i = "Watch the video and answer."
    layouts = {
        "videos.json": [{"key": f"{n}", "caption": f"a man with {n} dogs"} for n in range(4)],
        "images.json": [{"image": f"{n}.{'png' if n < 3 else 'webp'}", "caption": [f"picture {n}", "a picture"]}
                        for n in range(4)],
        "qa.json": [{"video": f"{n}.mp4", "QA": [{"i": i, "q": "Who runs?", "a": "A dog."}, {"q": "Why?", "a": "Fun."}]}
                    for n in range(4)],
        "clips.json": [{"video": f"{n}.mp4", "start": 1.0, "end": 2.5, "QA": [{"i": "", "q": "", "a": "A red bar."}]}
                       for n in range(4)],
        "image_qa.json": [{"image": f"{n}.png", "QA": [{"i": "Look.", "q": "What?", "a": "A wall."}]}
                          for n in range(3)],
        "text.json": [{"QA": [{"q": "Who are you?", "a": "A model."}]}] * 4,
    }
    for name, entries in layouts.items():
        (root / name).write_text(json.dumps(entries))
    video = {"anno": "videos.json", "root": "videos", "media": "video", "media_key": "key", "suffix": ".mp4"}
    (root / "corpus_caption.json").write_text(json.dumps([video, ["images.json", "."]]))
    (root / "corpus_instruct.json").write_text(json.dumps([
        ["qa.json", "videos", "video"], ["clips.json", "videos", "video"], ["image_qa.json", "."],
        ["text.json", "", "text"]]))
    return root

def train_stage(corpora, out, stage, *more):
    train.main(["--preset", "vicuna-7b", "--stage", str(stage), "--data", str(corpora), "--out", str(out), "--steps",
                "4", "--batch", "2", "--workers", "0", "--dtype", "fp32", "--log-every", "1", "--lr", "1e-3", *more])
    return files.read_tensors(out / f"stage{stage}" / "model.safetensors")

def test_every_stage_trains_on_what_was_imported_and_goes_back(beginning, given, imported, corpora, tmp_path):
    """init -> stage 1; the official stage 1 -> stage 2 -> stage 3 -> a file for the official code."""
    cfg, _, _, folder = beginning
    start = convert.OfficialFiles(umt=str(folder / "umt.pth"), bert=str(folder / "bert"))
    convert.import_files(start, cfg, tmp_path / "init")
    before = files.read_tensors(tmp_path / "init" / "model.safetensors")
    after = train_stage(corpora, tmp_path, 1)                              # it finds init by itself
    frozen = [n for n in after if n.startswith("vision_encoder.")]
    assert frozen and all(torch.equal(after[n], before[n]) for n in frozen)
    name = "qformer.bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(after[name], before[name])

    run, llm = tmp_path / "run", ["--llm", str(given / "llm2")]
    second = train_stage(corpora, run, 2, "--init", str(imported / "stage1"), *llm)
    first, name = files.read_tensors(imported / "stage1" / "model.safetensors"), "vision_encoder.blocks.0.attn.q_bias"
    assert not torch.equal(second[name], first[name])
    third = train_stage(corpora, run, 3, "--max-text", "200")              # it knows the LLM of stage 2
    assert all(t.abs().sum() > 0 for n, t in third.items() if "lora_B" in n)
    convert.export(run / "stage3", run / "official.pth")
    assert "llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight" in torch.load(
        run / "official.pth", weights_only=True)

def test_a_released_stage_3_can_be_tuned_further_but_not_with_another_llm(given, imported, corpora, tmp_path):
    start = ["--init", str(imported / "stage3"), "--max-text", "120"]
    after = train_stage(corpora, tmp_path, 3, *start)
    before = files.read_tensors(imported / "stage3" / "model.safetensors")
    assert after.keys() == before.keys() and not torch.equal(after["llama_proj.weight"], before["llama_proj.weight"])
    with pytest.raises(ValueError, match="stage3 was made with the LLM llm3 .*llm2 is another one"):
        train_stage(corpora, tmp_path / "other", 3, *start, "--llm", str(given / "llm2"))

def test_an_option_is_of_one_stage_and_does_not_leak_into_the_next(given, imported, corpora, tmp_path):
    """The paper's stage 2 has 4 frames and 32 tokens; its stage 3 has not."""
    start = ["--init", str(imported / "stage1"), "--llm", str(given / "llm2")]
    train_stage(corpora, tmp_path, 2, *start, "--train-frames", "2", "--max-text", "32")
    train_stage(corpora, tmp_path, 3)
    seen = [checkpoint.read_config(tmp_path / f"stage{n}")[0] for n in (2, 3)]
    assert [(cfg.train_frames, cfg.max_text) for cfg in seen] == [(2, 32), (8, 512)]

def test_a_stopped_stage_2_goes_on_with_its_own_llm(given, imported, corpora, tmp_path):
    options = ["--init", str(imported / "stage1"), "--llm", str(given / "llm2")]
    train_stage(corpora, tmp_path, 2, *options)
    last = tmp_path / "stage2.unfinished" / "000001"
    last.parent.mkdir()
    (tmp_path / "stage2").rename(last)
    state = json.loads((last / "trainer.json").read_text())
    (last / "trainer.json").write_text(json.dumps({**state, "done": False, "files": {}}))
    with pytest.raises(ValueError, match="stage2 was made with the LLM llm2 .*llm3 is another one"):
        train_stage(corpora, tmp_path, 2, *options[:2], "--llm", str(given / "llm3"))

def test_stage_1_needs_no_llm(beginning, given, corpora, tmp_path):
    """Where it was imported it is known; where stage 1 trains it need not be."""
    cfg, _, _, folder = beginning
    shutil.copytree(given / "llm2", tmp_path / "llm")
    begin = convert.OfficialFiles(umt=str(folder / "umt.pth"), bert=str(folder / "bert"), llm=str(tmp_path / "llm"))
    convert.import_files(begin, replace(cfg, llama=TINY[2].llama), tmp_path / "run" / "init")
    (tmp_path / "llm").rename(tmp_path / "elsewhere")
    train_stage(corpora, tmp_path / "run", 1)
    assert checkpoint.read_config(tmp_path / "run" / "stage1")[1]["llm"]["path"] == "../../llm"
    with pytest.raises(FileNotFoundError, match="name its folder by --llm"):
        train_stage(corpora, tmp_path / "run", 2)
    train_stage(corpora, tmp_path / "run", 2, "--llm", str(tmp_path / "elsewhere"))

@pytest.fixture(scope="module")
def plain(imported, corpora, tmp_path_factory):
    """What four steps of stage 3 make of the official weights without any flag."""
    start = ["--init", str(imported / "stage3"), "--max-text", "120"]
    return train_stage(corpora, tmp_path_factory.mktemp("plain"), 3, *start)

@pytest.mark.parametrize("flags", [
    ["--no-bos-ones"], ["--no-train-separators"], ["--no-question-in-qformer"], ["--train-norm", "clip"], ["--flip"],
    ["--no-add-timestamps"], ["--train-frames", "2"], ["--llm-int8"], ["--dtype", "bf16"], ["--dtype", "fp16"]])
def test_each_oddity_is_one_flag_away(imported, corpora, plain, tmp_path, flags):
    """Every flag changes what is learned, and is written into the checkpoint's config where it is the model's."""
    changed = train_stage(corpora, tmp_path, 3, "--init", str(imported / "stage3"), "--max-text", "120", *flags)
    assert not torch.equal(changed["llama_proj.weight"], plain["llama_proj.weight"])
    assert all(t.isfinite().all() and t.dtype == torch.float32 for t in changed.values())
    option = flags[0].removeprefix("--").removeprefix("no-").replace("-", "_")
    if option in train.MODEL_OPTIONS:
        cfg, _ = checkpoint.read_config(tmp_path / "stage3")
        value = flags[1] if len(flags) > 1 else not flags[0].startswith("--no-")
        assert str(getattr(cfg, option)) == str(value)

@pytest.mark.parametrize("flags", [["--caption-sep"], ["--no-repeat-image"], ["--vtm-text-cls", "add"]])
def test_stage_1_s_oddities_too(beginning, corpora, tmp_path, flags):
    cfg, _, _, folder = beginning
    start = convert.OfficialFiles(umt=str(folder / "umt.pth"), bert=str(folder / "bert"))
    convert.import_files(start, cfg, tmp_path / "init")
    shutil.copytree(tmp_path / "init", tmp_path / "other" / "init")
    plain, changed = train_stage(corpora, tmp_path, 1), train_stage(corpora, tmp_path / "other", 1, *flags)
    assert not torch.equal(plain["query_tokens"], changed["query_tokens"])

# ------------------------------------------------------------------------------------------------------ what goes wrong

def test_another_llm_is_refused_with_both_named(given, imported):
    """The most common question about the official code: its released weights behind LLaMA-2, or a raw delta."""
    with pytest.raises(ValueError, match=r"made with the LLM llm3 \(fingerprint \w+\), but .*llm2 is another one"):
        checkpoint.load_checkpoint(imported / "stage3", llm=given / "llm2")
    wrong = replace(official_files(given, 3), llm=str(given / "llm2"))
    cfg = replace(TINY[3], llama=replace(TINY[3].llama, eps=1e-5))
    with pytest.raises(ValueError, match="llm2 is another LLM than preset vicuna-7b's .Vicuna-7B v0.*rms_norm_eps"):
        convert.collect(wrong, cfg)
    convert.collect(wrong, cfg, any_llm=True)

def test_a_file_that_holds_another_llm_s_weights_is_refused(given, tmp_path):
    """Some people's stage 3 files have the LLM in them: it must be the folder's."""
    whole = recorded("stage3")
    torch.save(whole, tmp_path / "whole.pth")
    convert.collect(replace(official_files(given, 3), stage3=str(tmp_path / "whole.pth")), TINY[3])
    name = "llama_model.base_model.model.model.layers.1.self_attn.q_proj.weight"
    torch.save(whole | {name: whole[name] + 1}, tmp_path / "whole.pth")
    with pytest.raises(ValueError, match="llm3 is another LLM .*layers.1.self_attn.q_proj.weight differs"):
        convert.collect(replace(official_files(given, 3), stage3=str(tmp_path / "whole.pth")), TINY[3])

def changed(given, tmp_path, stage, change):
    tensors = files.read_torch_file(given / f"stage{stage}.pth")
    change(tensors)
    torch.save(tensors, tmp_path / "changed.pth")
    return replace(official_files(given, stage), **{f"stage{stage}": str(tmp_path / "changed.pth")})

@pytest.mark.parametrize("stage, change, message", [
    (3, lambda t: t.pop("llama_proj.weight"), "1 tensors are in none of the files: llama_proj.weight"),
    (3, lambda t: t.update(depth_head=torch.ones(1)), "changed.pth: 1 tensors have names .* not know: depth_head"),
    (3, lambda t: t.update(query_tokens=torch.ones(1, 9, 20)), r"changed.pth.*query_tokens \(1, 9, 20\) instead of"),
    (1, lambda t: t.update({"qformer.cls.predictions.decoder.bias": torch.ones(201)}), "decoder.bias differs from"),
])
def test_what_does_not_fit_is_named(given, tmp_path, stage, change, message):
    with pytest.raises(ValueError, match=message):
        convert.collect(changed(given, tmp_path, stage, change), TINY[stage])

def test_the_wrong_file_for_an_option_is_named(given):
    with pytest.raises(ValueError, match="stage3.pth.*is this the file that the option asks for"):
        convert.collect(replace(official_files(given, 3), stage1=str(given / "stage3.pth")), TINY[3])
    with pytest.raises(ValueError, match="name --stage1, too"):
        convert.collect(replace(official_files(given, 2), stage1=""), TINY[2])
    with pytest.raises(ValueError, match="needs the frozen LLM.*--llm"):
        convert.collect(replace(official_files(given, 3), llm=""), TINY[3])
    with pytest.raises(ValueError, match="name --umt and --bert"):
        convert.collect(convert.OfficialFiles(llm="x"), TINY[1])

def test_torn_and_foreign_files_leave_nothing_behind(given, tmp_path):
    whole = (given / "stage3.pth").read_bytes()
    (tmp_path / "torn.pth").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "page.pth").write_text("<html>404</html>")
    for name in ("torn.pth", "page.pth"):
        with pytest.raises(ValueError, match=f"{name} is damaged or not a PyTorch file"):
            wrong = replace(official_files(given, 3), stage3=str(tmp_path / name))
            convert.import_files(wrong, TINY[3], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.pth", "torn.pth"]

def test_an_import_replaces_an_import_and_nothing_else(given, imported, tmp_path):
    shutil.copytree(imported / "stage3", tmp_path / "stage3")
    convert.import_files(official_files(given, 3), TINY[3], tmp_path / "stage3")
    with pytest.raises(ValueError, match="holds more than an import .stage3., and would be replaced"):
        convert.import_files(official_files(given, 3), TINY[3], tmp_path)           # forgot the last part of the path
    for name in ("trainer.json", "mvbench"):
        (tmp_path / "stage3" / name).mkdir()
        with pytest.raises(ValueError, match=f"holds more than an import .{name}.*name another --out"):
            convert.import_files(official_files(given, 3), TINY[3], tmp_path / "stage3")
        (tmp_path / "stage3" / name).rmdir()

def test_weights_for_which_the_model_has_no_place_are_refused(given, tmp_path):
    """LoRA on more layers than the preset's is another model, and so is a misspelt name."""
    for name in ("llama_model.base_model.model.model.layers.0.self_attn.k_proj.lora_A.default.weight",
                 "qformer.bert.encoder.layer.0.crossattentoin.self.query.weight"):
        wrong = changed(given, tmp_path, 3, lambda t, name=name: t.update({name: torch.ones(4, 32)}))
        with pytest.raises(ValueError, match="1 tensors have names that VideoChat2 does not know"):
            convert.collect(wrong, TINY[3])

def test_check_says_what_is_in_it(imported, given, capsys, tmp_path):
    convert.main(["check", "--ckpt", str(imported / "stage3")])
    printed = capsys.readouterr().out
    lora = next(line.split() for line in printed.splitlines() if line.split()[:1] == ["lora"])
    assert lora[1:4] == ["8", "1,024", "float32"] and "complete: every tensor" in printed and "llm3" in printed
    convert.main(["check", "--ckpt", str(given / "stage3.pth")])           # official files, too
    assert "llama_proj" in capsys.readouterr().out
    tensors = files.read_tensors(imported / "stage3" / "model.safetensors")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((imported / "stage3" / "config.json").read_bytes())
    files.save_tensors({n: t for n, t in tensors.items() if n != "query_tokens"}, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \(query_tokens\)"):
        convert.check(broken)
    files.save_tensors(tensors | {"query_tokens": torch.full((1, 8, 20), float("nan"))}, broken / "model.safetensors")
    with pytest.raises(ValueError, match="query_tokens holds NaN or infinite values"):
        convert.check(broken)

def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        checkpoint.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        checkpoint.read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="not a VideoChat2 checkpoint"):
        checkpoint.read_config(tmp_path)
