"""What stage 0 learns from. Run: pytest tests/test_standins.py"""
import json
import random
import re

import numpy as np
import pytest
import torch

import qagen
import standins
import toyworld
from prompt import IGNORE, SYSTEM
from tokenizer import SentencePiece


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """text.jsonl of 200 documents, and the tokenizer made from it."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(toyworld.text_document(i, 0) for i in range(200)) + "\n")
    model, _ = standins.vocabulary(path, path.parent / "tokenizers", size=800)
    return path, SentencePiece(str(model))


def trained(tok, prompt):
    return tok.decode([label for label in prompt.labels if label != IGNORE])


@pytest.mark.parametrize("epoch", [0, 3, 7])
def test_a_drill_s_answer_is_the_one_option_that_its_text_tells(text, epoch):
    path, tok = text
    school = standins.School(path, tok, "vicuna", epoch_size=80)
    school.set_epoch(epoch)
    marked = 0
    for index in range(80):
        shown = tok.decode([i for i in school[index].ids if i != tok.bos_id])
        said, options, letter = re.fullmatch(r"(.*?)\n(\(A\).*)\nBest option:\((.)", shown, re.S).groups()
        rows = re.findall(r"\((.)\) (.*?)( yes| no)?(?:\n|$)", options)
        told = [row[0] for row in rows if re.search(rf"(?<!\w){re.escape(row[1])}(?!\w)", said)]
        assert letter in told and (told == [letter] or epoch == 7)
        if rows[0][2]:
            marked += 1
            assert [row[0] for row in rows if row[2] == " yes"] == [letter]
            assert trained(tok, school[index]) == " ".join(row[2].strip() for row in rows) + letter
        else:
            assert trained(tok, school[index]) == letter
    assert 30 < marked < 80


def test_conversations_train_answers_and_marks_and_never_the_question(text):
    path, tok = text
    school, rng = standins.School(path, tok, "vicuna", epoch_size=80), random.Random(0)
    kinds = set()
    for epoch in (8, 12):
        school.set_epoch(epoch)
        for caption, turns in school.documents[:60]:
            prompt = school.conversation(caption, turns, rng, system=epoch == 12)
            said = trained(tok, prompt)
            if said == f"{caption}###":
                kinds.add("caption")
                continue
            marks = [word for word in said.split() if word in ("yes", "no")]
            kinds.add(f"epoch {epoch} {'marked' if marks else 'plain'}")
            assert all(turn["a"] in said for turn in turns) and "Question" not in said
            assert tok.decode(prompt.ids).count(SYSTEM.strip()) == (2 if epoch == 12 else 0)
            assert not marks or marks.count("yes") == len(turns)
    assert {"caption", "epoch 8 marked", "epoch 8 plain", "epoch 12 plain"} <= kinds


def test_an_epoch_is_a_lesson_and_the_same_one_every_time(text):
    path, tok = text
    school, again = (standins.School(path, tok, "vicuna", epoch_size=40) for _ in range(2))
    for epoch in (0, 5, 9):
        school.set_epoch(epoch)
        again.set_epoch(epoch)
        assert [school[i].ids for i in range(40)] == [again[i].ids for i in range(40)]
    longest = {epoch: max(len(school[i].ids) for i in range(40)) for epoch in (0, 9) if school.set_epoch(epoch) is None}
    assert longest[0] < longest[9] / 2


def test_the_answer_of_a_document_stands_in_its_caption():
    rng = random.Random(0)
    clip = toyworld.simulate("character_order", rng)
    caption, turns = qagen.text_documents(clip, rng)
    order = turns[0]["a"].partition(") ")[2]
    assert all(letter in caption for letter in order.split(", "))


def test_the_teacher_s_loss_falls_when_its_heads_are_right():
    """By hand: logits on the true classes cost less than uniform ones, which cost log(n), and activity twice that."""
    from model import micro_config
    teacher = standins.Teacher(micro_config(), [3, 4, 5])
    for head in teacher.heads:
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    batch = {"video": torch.randn(2, 4, 3, 64, 64), "targets": torch.zeros(2, 4, 16, 3, dtype=torch.long)}
    uniform = teacher.losses(batch)
    assert {k: round(v.exp().item()) for k, v in uniform.items()} == {
        "colour": 3, "shape": 4, "activity": 5 ** 2, "place": 16, "time": 4}
    for head in teacher.heads:
        head.bias.data[0] = 9.0
    right = teacher.losses(batch)
    assert all(right[k] < 0.01 for k in ("colour", "shape", "activity"))
    assert right["place"] > 5 and right["time"] > 5  # of the first place and time alone is it right


def test_the_teacher_begins_with_straight_lines(tmp_path):
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
    data = standins.TeacherData(clips, targets, tmp_path / "annotations.jsonl", [0, 2], epoch_size=40)
    for epoch, expected in ((0, {0, 3}), (6, {0, 3}), (7, {0, 1, 2, 3})):
        data.set_epoch(epoch)
        drawn = [data[i] for i in range(40)]
        assert {sample["idx"] for sample in drawn} == expected
        assert all(sample["targets"].equal(torch.from_numpy(targets[sample["idx"]][[0, 2]])) for sample in drawn)
    assert sum(sample["idx"] == 2 for sample in drawn) == 20  # as many of the tasks as of the playground
