"""pytest tests/test_prompt.py"""
import json

import pytest
import torch

from prompt import (
    CAPTION_INSTRUCTIONS,
    IGNORE,
    QUESTION_PROMPT,
    SYSTEM,
    VIDEO,
    Prompt,
    caption_prompt,
    chat_prompt,
    conversation_prompt,
    mvbench_prompt,
    mvbench_question,
    pad_batch,
)
from tokenizer import SentencePiece

QAS = [{"i": "Watch the kite.", "q": "What moves?", "a": "A red kite."}, {"q": "Where?", "a": "In the sky."}]

@pytest.fixture(scope="module")
def tok(golden):
    return SentencePiece(golden / "tokenizer.model")

def learnt(tok, prompt):
    """The text under the labels that count."""
    return tok.decode([i for i in prompt.labels if i != IGNORE])

def read(tok, prompt):
    """The whole text, with <VIDEO> for the slot's tokens."""
    at, n = prompt.slot, prompt.ids.count(VIDEO)
    assert prompt.ids[at:at + n] == [VIDEO] * n
    return tok.decode(prompt.ids[:at]) + f"<{n}>" + tok.decode(prompt.ids[at + n:])

# ---- parity with the official code -----------------------------------------------------------------------------------

def test_stage3_labels_are_the_official_ones(golden, tok):
    """Every recorded conversation that the official code accepts, separators included."""
    cases = json.loads((golden / "stage3_targets.json").read_text())["cases"]
    accepted = [case for case in cases if "labels" in case]
    for case in accepted:
        qa = case.get("qa", [{"q": "q", "a": "a"}])                        # one is recorded as a conversation alone
        prompt = conversation_prompt(tok, qa, 14, case.get("msg", ""), max_text=2000, train_separators=True)
        assert prompt.labels == case["labels"], case["conversation"]
        assert len(prompt.ids) == case["seq_len"]
    assert len(accepted) == 28

def test_what_the_official_code_refuses_works(golden, tok):
    cases = json.loads((golden / "stage3_targets.json").read_text())["cases"]
    refused = [case for case in cases if "error" in case and "qa" in case]
    for case in refused:  # questions and answers that end in newlines or spaces
        prompt = conversation_prompt(tok, case["qa"], 14, case["msg"])
        answers = [qa["a"].strip() for qa in case["qa"]]
        assert [part.strip() for part in learnt(tok, prompt).split("###")] == [*answers, ""]
    assert len(refused) == 3

def test_caption_prompt_is_the_official_one(tok):
    """Recorded from the official stage 2: ids before the video, behind it, and of one caption."""
    prompt = caption_prompt(tok, "cat", 14, "Describe the following video concisely.")
    before = [1, 774, 28769, 6366, 28747, 523, 11761, 28767]
    behind = [1867, 11761, 28767, 27984, 272, 2296, 3798, 3078, 11973, 28723, 774, 7226, 11143, 28747, 28705]
    assert prompt.ids == before + [VIDEO] * 14 + behind + [5255, 27332]
    assert prompt.labels == [IGNORE] * (len(before) + 14 + len(behind)) + [5255, 27332]

def test_mvbench_prompt_is_the_official_one(tok):
    """First and last ids of both segments, recorded from the benchmark's notebook."""
    options = ["Ate the medicine.", "Tidied up the blanket.", "Put down the cup/glass/bottle.", "Took the box."]
    prompt = mvbench_prompt(tok, "What happened after the person took the food?", options, 96)
    behind = prompt.ids[prompt.slot + 96:]
    assert prompt.ids[:6] == [1, 8000, 3071, 3054, 272, 3798]
    assert behind[:8] == [1867, 11761, 28767, 13, 27332, 28769, 6366, 28747]
    assert behind[-6:] == [11143, 28747, 5470, 3551, 28747, 28732]
    assert set(prompt.labels) == {IGNORE}

def test_mvbench_question_is_the_official_one(golden):
    for case in json.loads((golden / "sampling.json").read_text())["qa_template"]:
        assert mvbench_question(case["question"], case["candidates"]) == case["out_question"] + "\n"

# ---- by hand ---------------------------------------------------------------------------------------------------------

def test_only_answers_and_their_ends_are_learnt(tok):
    prompt = conversation_prompt(tok, QAS, 3, "The video contains 2 frames sampled at 0.3, 0.9 seconds.")
    assert read(tok, prompt) == (
        "Watch the kite. ###Human: <Video><3></Video> The video contains 2 frames sampled at 0.3, 0.9 seconds. "
        "###Human: What moves? ###Assistant: A red kite. ###Human: Where? ###Assistant: In the sky. ###")
    assert learnt(tok, prompt) == "A red kite. ### In the sky. ###"
    separators = conversation_prompt(tok, QAS, 3, train_separators=True)
    assert learnt(tok, separators) == (
        "###Human: ###Assistant: A red kite. ###Human: ###Assistant: In the sky. ###")

def test_labels_stand_under_their_own_ids(tok):
    for prompt_style in ("vicuna", "mistral"):
        prompt = conversation_prompt(tok, QAS, 3, prompt_style=prompt_style)
        assert len(prompt.ids) == len(prompt.labels)
        assert all(label in (IGNORE, i) for i, label in zip(prompt.ids, prompt.labels, strict=True))

def test_mistral(tok):
    prompt = conversation_prompt(tok, QAS, 3, "Two frames.", prompt_style="mistral")
    assert read(tok, prompt).replace("  ", " ") == (
        "Watch the kite. [INST] <Video><3></Video> Two frames. [/INST] [INST] What moves? [/INST] A red kite. "
        "[INST] Where? [/INST] In the sky.")
    assert learnt(tok, prompt) == "A red kite. In the sky."
    assert prompt.labels.count(tok.eos_id) == 2
    with pytest.raises(ValueError, match="style 'llama3': expected vicuna or mistral"):
        conversation_prompt(tok, QAS, 3, prompt_style="llama3")

def test_captions_images_and_texts(tok):
    caption = [{"i": "", "q": "", "a": "A red kite."}]
    assert read(tok, conversation_prompt(tok, caption, 2, medium="image")) == (
        "###Human: <Image><2></Image> ###Assistant: A red kite. ###")
    text = conversation_prompt(tok, QAS[:1], 2, medium="text")
    assert VIDEO not in text.ids and text.ids[0] == tok.bos_id
    assert tok.decode(text.ids) == "Watch the kite. ###Human: What moves? ###Assistant: A red kite. ###"
    assert learnt(tok, text) == "A red kite. ###"

def test_max_text_cuts_the_end_but_never_the_video(tok):
    whole = conversation_prompt(tok, QAS, 3)
    short = conversation_prompt(tok, QAS, 3, max_text=30)
    assert short.ids == whole.ids[:33] and short.labels == whole.labels[:33]
    with pytest.raises(ValueError, match="before the video: shorten the instruction or raise max_text"):
        conversation_prompt(tok, QAS, 3, max_text=5)
    assert len([i for i in caption_prompt(tok, "kite " * 50, 3, "Say.", max_text=7).labels if i != IGNORE]) == 7

def test_mvbench_prompt_in_words(tok):
    prompt = mvbench_prompt(tok, "What moves?", ["kite", "cat"], 4)
    assert read(tok, prompt) == (
        f"{SYSTEM}###Human: <Video><4></Video>\n###Human: {SYSTEM}Question: What moves?\nOptions:\n(A) kite\n(B) cat\n"
        f"{QUESTION_PROMPT}\n###Assistant: Best option:(")
    assert tok.decode([*prompt.ids[prompt.slot + 4:], *tok.encode("(B")[-1:]]).endswith("Best option:(B")

def test_chat_remembers(tok):
    prompt = chat_prompt(tok, [("What moves?", "A kite.")], "Where?", 2, "Be brief. ")
    assert read(tok, prompt) == (
        "Be brief. ###Human: <Video><2></Video>\n###Human: What moves?\n###Assistant: A kite.\n###Human: Where?\n"
        "###Assistant:")
    assert set(prompt.labels) == {IGNORE}

def test_pad_batch():
    prompts = [Prompt([1, VIDEO, 5], [IGNORE, IGNORE, 5]), Prompt([1, VIDEO, 6, 7, 8, 9, 3, 4, 2], [IGNORE] * 9)]
    ids, labels, mask = pad_batch(prompts, pad_id=2)
    assert ids.shape == labels.shape == mask.shape == (2, 16) and ids.dtype == labels.dtype == torch.long
    assert ids[0].tolist() == [1, VIDEO, 5] + [2] * 13
    assert labels[0].tolist() == [IGNORE, IGNORE, 5] + [IGNORE] * 13
    assert mask.sum(1).tolist() == [3, 9]  # an id that equals pad_id is a token where the mask says so
    ids, labels, mask = pad_batch(prompts, pad_id=2, side="left")
    assert ids[0, -3:].tolist() == [1, VIDEO, 5] and mask[0].tolist() == [0] * 13 + [1] * 3 and labels[0, -1] == 5

def test_caption_instructions_name_their_medium():
    video, image = CAPTION_INSTRUCTIONS["video"], CAPTION_INSTRUCTIONS["image"]
    assert len(set(video)) == len(set(image)) == 10
    assert not any("image" in text or "picture" in text for text in video)
    assert not any("video" in text or "clip" in text for text in image)
