"""Answers that are quick are the answers that greedy generation gives word by word. Run: pytest tests/test_engine.py"""
import pytest
import torch
from torch.testing import assert_close

from evaluation.engine import Engine, common_length, continuation
from evaluation.protocol import CONTROLS, Protocol, apply_control, clip_seed, noise_like
from prompt import QUESTION_PROMPT, SYSTEM, VIDEO, Prompt, pad_batch
from weights import checkpoint

@pytest.fixture(scope="module")
def loaded(ckpt):
    return checkpoint.load_checkpoint(ckpt)

def make_engine(loaded, **protocol):
    return Engine(*loaded, Protocol(**{"max_new_tokens": 6, **protocol}))

def asked(n=5, options=("It jumps.", "It spins twice.", "Nothing.")):
    return [{"task": "AC", "index": i, "question": f"What happens{', and when' * (i % 3)}?",
             "candidates": list(options), "answer": options[0]} for i in range(n)]

def tokens_of(engine, video, control, seeds, questions):
    """What the LLM reads of clips (B, T, 3, H, W)."""
    return engine.video_tokens(engine.encode_clips(video, control, seeds), control, seeds, questions)

def clips(cfg, n=5):
    return torch.randn(n, cfg.eval_frames, 3, cfg.vit.img_size, cfg.vit.img_size,
                       generator=torch.Generator().manual_seed(0))

def plain(engine, q, tokens):
    """The slow way: one question, its whole prompt at once, then token by token -> (text, letter probabilities)."""
    llm = engine.model.llama_model
    ids, _, mask = pad_batch([engine.prompt(q)], engine.llm_tok.eos_id, "left")
    embeds = engine.model.insert_video_tokens(ids, tokens[None])
    with torch.no_grad():
        letters = llm.lm_head(llm(embeds, mask)[:, -1]).softmax(-1)[0, engine.letter_ids]
    (new,) = llm.generate(embeds, mask, engine.protocol.max_new_tokens, engine.is_complete)
    return engine.text(new), letters[:len(q["candidates"])]

@pytest.mark.parametrize("protocol", [{}, {"system": ""}, {"answer_prompt": ""}, {"question_in_qformer": True}])
def test_many_together_are_what_each_is_alone_word_by_word(loaded, protocol):
    engine, questions = make_engine(loaded, **protocol), asked()
    tokens = tokens_of(engine, clips(loaded[0].cfg), "", [0] * 5, questions)
    found = engine.answer(questions, tokens)
    for q, answer, clip in zip(questions, found, tokens, strict=True):
        said, letters = plain(engine, q, clip)
        assert answer.text == said
        if engine.protocol.opening:
            assert_close(torch.tensor(answer.letters), letters, atol=1e-5, rtol=1e-4)
        else:
            assert answer.letters == []                                    # no bracket, so no place of a letter
    (alone,) = engine.answer(questions[3:4], tokens, [3])
    assert alone.text == found[3].text

def test_several_questions_about_a_clip_share_what_was_read_of_it(loaded):
    engine = make_engine(loaded)
    questions, places = asked(6), [1, 0, 1, 1, 0, 1]
    tokens = tokens_of(engine, clips(loaded[0].cfg, 2), "", [0, 0], questions[:2])
    for q, answer, place in zip(questions, engine.answer(questions, tokens, places), places, strict=True):
        said, letters = plain(engine, q, tokens[place])
        assert answer.text == said
        assert_close(torch.tensor(answer.letters), letters, atol=1e-5, rtol=1e-4)

def counting(model, calls):
    forward = model.forward
    model.forward = lambda *args, **more: calls.append(args[0].shape) or forward(*args, **more)
    return model

@pytest.mark.parametrize("known, steps", [(6, 1), (3, 3), (0, 5)])
def test_words_that_were_expected_are_read_at_once(loaded, known, steps, monkeypatch):
    """An answer of 6 ids, of which the options let expect the first `known`: as many steps of the LLM as that leaves,
    and the same answer."""
    engine, (q,) = make_engine(loaded), asked(1)
    tokens = tokens_of(engine, clips(loaded[0].cfg, 1), "", [0], [q])
    llm = engine.model.llama_model
    ids, _, mask = pad_batch([engine.prompt(q)], engine.llm_tok.eos_id, "left")
    embeds = engine.model.insert_video_tokens(ids, tokens)
    (true,) = llm.generate(embeds, mask, 6, engine.is_complete)
    assert len(true) == 6 and len(set(true[:4])) == 4 and true[4] == true[0]   # so the third step knows what follows
    monkeypatch.setattr(engine, "drafts", lambda q: [[7, *true[:known], *[11] * (6 - known)]])
    engine.answer([q], tokens)                                                # now the prompts' head is read
    calls = []
    monkeypatch.setattr(llm, "forward", counting(llm, calls).forward)
    (answer,) = engine.answer([q], tokens)
    assert answer.text == engine.text(true) and len(calls) == 2 + steps  # clip, question, then the answer's steps

def test_nothing_is_tried_beyond_the_room_that_there_is(loaded, monkeypatch):
    """A prompt and its answer fill the LLM's positions exactly; the options are longer. It is answered all the same."""
    engine, (q,) = make_engine(loaded, max_new_tokens=20), asked(1)
    tokens = tokens_of(engine, clips(loaded[0].cfg, 1), "", [0], [q])
    (free,) = engine.answer([q], tokens)
    ids = len(engine.prompt(q).ids)
    monkeypatch.setattr(loaded[0].cfg.llama, "max_positions", ids + 19)
    monkeypatch.setattr(engine, "drafts", lambda q: [[7, i] + [9] * 40 for i in engine.letter_ids])
    (answer,) = engine.answer([q], tokens)
    assert answer.text == free.text

def test_what_follows():
    a, b = [1, 5, 6, 7], [2, 5, 6, 8, 9]
    assert continuation([1], [a, b]) == [5, 6, 7] and continuation([2], [a, b]) == [5, 6, 8, 9]
    assert continuation([2, 5, 6], [a, b]) == [8, 9]                       # the longer piece, not the first
    assert continuation([4, 6], [a, b]) == [7] and continuation([3], [a, b]) == [] == continuation([9], [a, b])

def test_common_beginnings():
    assert common_length([Prompt(ids, []) for ids in ([1, 2, 3], [1, 2, 4, 5], [1, 2])]) == 2
    assert common_length([Prompt([1, 2], [])]) == 2

# ---- the other ways to answer ----------------------------------------------------------------------------------------

def test_by_letter(loaded):
    engine, questions = make_engine(loaded, decode="letter"), asked()
    tokens = tokens_of(engine, clips(loaded[0].cfg), "", [0] * 5, questions)
    for answer in engine.answer(questions, tokens):
        assert answer.text == f"({'ABC'[max(range(3), key=answer.letters.__getitem__)]})"

def test_by_likelihood(loaded):
    """Each option's text behind the prompt, alone, its mean log-probability by hand."""
    engine, questions = make_engine(loaded, decode="likelihood"), asked(3)
    tokens = tokens_of(engine, clips(loaded[0].cfg, 3), "", [0] * 3, questions)
    llm = engine.model.llama_model
    for i, answer in enumerate(engine.answer(questions, tokens)):
        for text, found in zip(questions[i]["candidates"], answer.likelihoods, strict=True):
            (prompt,) = [p for p in engine.option_prompts(questions[i])
                         if text in engine.llm_tok.decode(p.ids[p.slot + 8:])]
            shown = engine.llm_tok.decode([j for j in prompt.ids if j != VIDEO])
            assert shown.endswith(f"###Assistant: {text}") and shown.count(SYSTEM) == 2
            assert QUESTION_PROMPT not in shown and "Options" not in shown
            target = [label for label in prompt.labels if label >= 0]
            assert engine.llm_tok.decode(target) == text
            with torch.no_grad():
                embeds = engine.model.insert_video_tokens(torch.tensor([prompt.ids]), tokens[i:i + 1])
                logits = llm.lm_head(llm(embeds))[0]
            logp = logits.log_softmax(-1)[range(-len(target) - 1, -1), target]
            assert found == pytest.approx(logp.mean().item(), abs=1e-4)
        best = max(range(3), key=answer.likelihoods.__getitem__)
        assert answer.text == f"({'ABC'[best]}) {questions[i]['candidates'][best]}"

# ---- the controls ----------------------------------------------------------------------------------------------------

def test_frames_of_each_control():
    video = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 2, 2)

    def order(control, seed=3):
        return apply_control(video, control, seed)[:, 0, 0, 0].int().tolist()

    assert order("") == list(range(8)) and order("reverse") == list(range(7, -1, -1)) and order("single") == [4] * 8
    assert sorted(order("shuffle")) == list(range(8)) != order("shuffle")
    assert order("shuffle") == order("shuffle") != order("shuffle", 4)
    assert all(apply_control(video[:2], "shuffle", seed)[0, 0, 0, 0] == 1 for seed in range(9))     # never as it was
    assert apply_control(video[:1], "shuffle", 0).shape == video[:1].shape       # an image cannot be shuffled

def test_blank_and_noise_know_nothing_of_the_clip(loaded):
    engine, questions = make_engine(loaded), asked()
    one, other = clips(loaded[0].cfg), clips(loaded[0].cfg).flip(0) * 3
    for control in ("blank", "noise"):
        assert torch.equal(tokens_of(engine, one, control, [1, 2, 3, 4, 5], questions),
                           tokens_of(engine, other, control, [1, 2, 3, 4, 5], questions))
    zeros = torch.zeros(5, *loaded[0].encode_video(one).shape[1:])
    assert_close(tokens_of(engine, one, "blank", [0] * 5, questions),
                 engine.video_tokens(zeros, "", [0] * 5, questions))
    noise = tokens_of(engine, one, "noise", [1, 2, 1, 4, 5], questions)
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    in_qformer = make_engine(loaded, question_in_qformer=True)
    assert_close(tokens_of(in_qformer, one, "blank", [0] * 5, questions),
                 in_qformer.video_tokens(zeros, "", [0] * 5, questions))

def test_noise_is_as_large_as_what_it_replaces():
    tokens = torch.randn(1, 400, 6) * torch.arange(1.0, 7) + 5
    noise = noise_like(tokens.expand(2, -1, -1), [1, 2])
    assert_close(noise.std(1), tokens.std(1).expand(2, -1), rtol=0.15, atol=0)
    assert_close(noise.mean(1), tokens.mean(1).expand(2, -1), rtol=0, atol=1.0)

def test_seeds_are_the_clip_s_own():
    assert clip_seed("a.mp4", (1.0, 2.0)) == clip_seed("a.mp4", (1.0, 2.0)) == 1806773607
    assert len({clip_seed("a.mp4", None), clip_seed("b.mp4", None), clip_seed("a.mp4", (0, 1))}) == 3
    assert set(CONTROLS) == {"blank", "noise", "single", "shuffle", "reverse"}
