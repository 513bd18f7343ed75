"""What the toy's ViT and LLM learn from. Run: pytest tests/test_pretrain.py"""
import itertools
import json
import random
import re

import numpy as np
import pytest
import torch

from llama import Llama, LlamaConfig
from model import PRESETS
from prompt import IGNORE, SYSTEM, VIDEO
from qagen import generate
from tokenizer import SentencePiece
from toy import pretrain, world
from toy.pretrain_llm import needs_order
from toy.scenarios import SCENARIOS

@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """text.jsonl of 200 documents, and the tokenizer made from it."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(world.text_document(i, "", world.WorldConfig()) for i in range(200)) + "\n")
    model, _ = pretrain.train_tokenizers(path, path.parent / "tokenizers", size=800)
    return path, SentencePiece(str(model))

def trained(tok, prompt):
    return tok.decode([label for label in prompt.labels if label != IGNORE])

def test_a_fifth_of_the_conversations_are_open_questions(text):
    path, tok = text
    curriculum = pretrain.TextCurriculum(path, tok, "vicuna", 32, epoch_size=40)
    told = {(caption, " ".join(f"{qa['a']} ###" for qa in plain)) for caption, _, plain in curriculum.documents}
    for epoch in (8, 13):
        curriculum.set_epoch(epoch)
        for index in range(8):
            shown = tok.decode([i for i in curriculum[index].ids if i != tok.bos_id])
            caption = re.search("<Video>(.*?)</Video>", shown)[1].strip()
            assert "Options" not in shown and shown.startswith(tuple(generate.OPEN))
            assert (caption, " ".join(trained(tok, curriculum[index]).split())) in told

@pytest.mark.parametrize("epoch", [0, 3, 7])
def test_a_drill_s_answer_is_the_one_option_that_its_text_tells(text, epoch):
    path, tok = text
    curriculum = pretrain.TextCurriculum(path, tok, "vicuna", 32, epoch_size=80)
    curriculum.set_epoch(epoch)
    marked = 0
    for index in range(80):
        shown = tok.decode([i for i in curriculum[index].ids if i != tok.bos_id])
        assert SYSTEM.strip() not in shown
        said, options, letter = re.search(
            r"<Video>(.*?)</Video>.*Options:\n(\(A\).*)\nOnly give .*Best option:\((.)", shown, re.S).groups()
        rows = re.findall(r"\((.)\) (.*?)( yes| no)?(?:\n|$)", options)
        told = [row[0] for row in rows if re.search(rf"(?<!\w){re.escape(row[1])}(?!\w)", said)]
        assert letter in told and (told == [letter] or epoch == 7)
        answer = f"Best option:({letter}) {rows['ABCDE'.index(letter)][1]} ###"
        if rows[0][2]:
            marked += 1
            assert [row[0] for row in rows if row[2] == " yes"] == [letter]
            answer = " ".join(row[2].strip() for row in rows) + " " + answer
        assert trained(tok, curriculum[index]) == answer
    assert 30 < marked < 80

def test_conversations_train_answers_and_marks_and_never_the_question(text):
    path, tok = text
    curriculum = pretrain.TextCurriculum(path, tok, "vicuna", 32, epoch_size=80)
    documents = [(caption, [qa["a"] for qa in many]) for caption, many, _ in curriculum.documents]
    kinds = set()
    for epoch, index in itertools.product((8, 13, 15), range(32, 80)):
        curriculum.set_epoch(epoch)
        shown = tok.decode([i for i in curriculum[index].ids if i not in (tok.bos_id, VIDEO)])
        said = trained(tok, curriculum[index])
        caption = re.search("<Video>(.*?)</Video>", shown)[1].strip()
        if said in {f"{told}###" for told, _ in documents}:
            kinds.add("caption")
            continue
        marks = [word for word in said.split() if word in ("yes", "no")]
        kinds.add(f"epoch {epoch} {'marked' if marks else 'plain'} {'system' if index >= 64 else ''}")
        # from phase 14 on some of its words are lost
        turns = [answers for told, answers in documents
                 if (told == caption or epoch == 15) and all(a in said for a in answers)]
        assert turns and "Question" not in said
        assert shown.count(SYSTEM.strip()) == (2 if epoch == 15 and index >= 64 else 0)
        assert not marks or marks.count("yes") == said.count("Best option")
    assert {"caption", "epoch 8 marked ", "epoch 8 plain ", "epoch 13 plain ", "epoch 15 plain system"} <= kinds

def test_an_epoch_is_a_phase_and_the_same_one_every_time(text):
    path, tok = text
    curriculum, again = (pretrain.TextCurriculum(path, tok, "vicuna", 32, epoch_size=40) for _ in range(2))
    for epoch in (0, 5, 9):
        curriculum.set_epoch(epoch)
        again.set_epoch(epoch)
        assert [curriculum[i].ids for i in range(40)] == [again[i].ids for i in range(40)]
    longest = {}
    for epoch in (0, 9):
        curriculum.set_epoch(epoch)
        longest[epoch] = max(len(curriculum[i].ids) for i in range(40))
    assert longest[0] < longest[9] / 2

def test_the_answer_of_a_document_stands_in_its_caption():
    rng = random.Random(0)
    clip = world.simulate("character_order", rng)
    caption, (choice,), (plain,) = generate.text_document(SCENARIOS["character_order"], clip, rng)
    assert choice["a"].partition(") ")[2] == plain["a"] and plain["q"] in choice["q"]
    assert plain["a"].removeprefix("They") in caption

def test_the_classifier_s_loss_falls_when_its_heads_are_right():
    """By hand: logits on the true classes cost less than uniform ones, which cost log(n), and activity twice that."""
    model = pretrain.PatchClassifier(PRESETS["micro"](), [3, 4, 5])
    for head in model.heads:
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    batch = {"video": torch.randn(2, 4, 3, 64, 64), "targets": torch.zeros(2, 4, 16, 3, dtype=torch.long)}
    uniform = model.losses(batch)
    assert {k: round(v.exp().item()) for k, v in uniform.items()} == {
        "colour": 3, "shape": 4, "activity": 5 ** 2, "place": 16, "time": 4}
    for head in model.heads:
        head.bias.data[0] = 9.0
    right = model.losses(batch)
    assert all(right[k] < 0.01 for k in ("colour", "shape", "activity"))
    assert right["place"] > 5 and right["time"] > 5  # of the first place and time alone is it right

def test_the_patch_labels_begin_with_straight_lines(tmp_path):
    scenarios = ["playground", "playground", "moving_count", "playground"]
    plays = [["right", "rests"], ["right", "grows"], ["moves"], ["up-left"]]
    (tmp_path / "annotations.jsonl").write_text("".join(
        json.dumps({"scenario": s, "events": [{"action": a} for a in p]}) + "\n"
        for s, p in zip(scenarios, plays, strict=True)))

    class Clips(list):
        def set_epoch(self, epoch):
            pass

    targets = np.arange(4 * 16 * 2 * 3).reshape(4, 16, 2, 3) % 250
    clips = Clips({"idx": i} for i in range(4))
    data = pretrain.PatchLabels(clips, targets, tmp_path / "annotations.jsonl", [0, 2], epoch_size=40)
    for epoch, expected in ((0, {0, 3}), (6, {0, 3}), (7, {0, 1, 2, 3})):
        data.set_epoch(epoch)
        drawn = [data[i] for i in range(40)]
        assert {sample["idx"] for sample in drawn} == expected
        assert all(sample["targets"].equal(torch.from_numpy(targets[sample["idx"]][[0, 2]])) for sample in drawn)
    assert sum(sample["idx"] == 2 for sample in drawn) == 20  # as many of the tasks as of the playground

def test_late_captions_fill_the_video_s_places_under_noise_and_lose_words(text):
    path, tok = text
    curriculum = pretrain.TextCurriculum(path, tok, "vicuna", 32, epoch_size=80)
    captions = [tok.encode(caption) for caption, *_ in curriculum.documents]
    curriculum.set_epoch(14)
    prompts = [curriculum[index] for index in range(32, 80)]
    noisy = [prompt for prompt in prompts if prompt.noisy]
    assert 24 < len(noisy) < 46                                        # three in four
    n_lost = 0
    for prompt in noisy:
        slot = [prompt.ids[i] for i in prompt.noisy]
        assert len(slot) == 32 and VIDEO not in prompt.ids[:prompt.noisy.start] + prompt.ids[prompt.noisy.stop:]
        fitting = [words for words in captions if len(words) <= 32 and all(
            i in (word, VIDEO) for i, word in zip(slot, [*words, *[VIDEO] * 32], strict=False))]
        assert fitting                                                 # each word is at its own place, or lost
        n_lost += max(map(len, fitting)) > sum(i != VIDEO for i in slot)
    assert n_lost > 10
    batch = pretrain.collate_prompts(noisy[:2])
    llama = Llama(LlamaConfig(vocab_size=tok.vocab_size, width=32, depth=1, heads=2, kv_heads=2, ffn=64))
    embeds = pretrain.noisy_embeds(llama, batch["ids"], batch["noisy"])
    same = (embeds == llama.embed(batch["ids"].clamp(min=0))).all(-1)
    assert torch.equal(same, batch["noisy"] == 0)

@pytest.mark.parametrize("caption, right, wrong, expected", [
    ("It jumps. Before that it grows. After that it spins.", "After that it spins.", "After that it grows.", True),
    ("It jumps. Before that it grows. After that it spins.", "After that it spins.", "After that it shakes.", False),
    ("The letters are first A, then C, last T.", "They are first A, then C, last T.",
     "They are first C, then A, last T.", True),
    ("It blinks 3 times.", "3", "2", False)])
def test_which_questions_need_the_order_of_words(caption, right, wrong, expected):
    choice = {"question": "What?", "candidates": [wrong, right], "answer": right}
    assert needs_order(caption, [generate.as_turn(choice)]) == needs_order(
        caption, [generate.as_turn(choice, worked=True)]) == expected

def test_the_text_half_is_what_bert_base_has():
    cfg = PRESETS["micro"]()
    cfg.qformer.vocab_size = 20
    model = pretrain.CaptionAutoencoder(cfg, mask_id=4)
    half = pretrain.text_half(model.state_dict())
    missing = {name for name in model.qformer.state_dict() if f"qformer.{name}" not in half}
    assert all("crossattention" in name or "_query." in name for name in missing) and len(missing) == 2 * (10 + 6)

    # a step teaches all of it
    batch = {"ids": torch.randint(5, 20, (3, 7)), "mask": torch.ones(3, 7, dtype=torch.long)}
    torch.manual_seed(0)
    losses = model.losses(batch)
    sum(losses.values()).backward()
    assert set(losses) == {"vtg", "mlm"} and all(loss.isfinite() for loss in losses.values())
    parameters = dict(model.named_parameters())
    assert all(parameters[name].grad.abs().sum() > 0 for name in half if name in parameters)

def test_a_vocabulary_that_another_process_has_finished_stays(text, monkeypatch):
    """Both parts may start at the same time."""
    folder = text[0].parent / "raced"

    def slow(texts, path, vocab_size):
        folder.mkdir()
        (folder / "tokenizer.model").write_text("the other's")

    monkeypatch.setattr(pretrain, "train_sentencepiece", slow)
    pretrain.train_tokenizers(text[0], folder)
    assert (folder / "tokenizer.model").read_text() == "the other's" and len(list(folder.parent.glob(".raced*"))) == 0
