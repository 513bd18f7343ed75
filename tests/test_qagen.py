"""python -m pytest tests/test_qagen.py"""

import random
import re
from collections import Counter, defaultdict
from functools import cache, partial

import numpy as np
import pytest

from evaluation.tasks import TASKS
from qagen import generate
from toy import draw, world
from toy.scenarios import SCENARIOS
from toy.things import name_of

ROUND = 1  # "equally often" means within one
QUESTIONS = 60
FILES = [task.file for task in TASKS]

@cache
def bench(task, count=QUESTIONS):
    rng = random.Random(f"bench {task}")
    return generate.benchmark(SCENARIOS[task], count, partial(world.simulate, task, rng, "test"), rng)

@cache
def training(task, count=300):
    """(clip, question) pairs as training has them."""
    pairs = []
    for i in range(count):
        rng = random.Random(f"train {task} {i}")
        clip = world.simulate(task, rng)
        _, facts = generate.caption_and_facts(SCENARIOS[task], clip, rng)
        pairs.append((clip, generate.multiple_choice(SCENARIOS[task], rng.choice(facts), rng)))
    return pairs

def test_the_table_has_the_official_twenty_tasks():
    assert len(FILES) == 20 and list(SCENARIOS) == [*FILES, "playground"]
    assert len({SCENARIOS[task].parent for task in FILES}) == 9
    assert all(len(asks) >= 3 for task in FILES for asks in SCENARIOS[task].phrasings.values())
    assert [task.file for task in TASKS if task.bound] == [
        "action_sequence", "action_prediction", "object_interaction", "action_localization", "episodic_reasoning"]

@pytest.mark.parametrize("task", FILES)
def test_letters_and_answers_are_balanced(task):
    letters, right, offered = Counter(), Counter(), Counter()
    for _, choice in bench(task):
        assert len(set(choice["candidates"])) == len(choice["candidates"]) == SCENARIOS[task].n_options
        letters[choice["candidates"].index(choice["answer"])] += 1
        right[choice["answer"]] += 1
        offered.update(choice["candidates"])
    assert len(letters) == SCENARIOS[task].n_options and max(letters.values()) - min(letters.values()) <= ROUND
    always = {"counterfactual_inference": "Nothing.", "egocentric_navigation": "Move 5 stop.",
              "action_antonym": "Not sure.", "object_existence": "Not sure, the lamp never blinks."}
    if task in always:  # offered every time
        assert right.pop(always[task]) == QUESTIONS // SCENARIOS[task].n_options
    if task == "object_existence":
        assert {word: sum(n for text, n in right.items() if text.startswith(word)) for word in ("Yes", "No")} == {
            "Yes": QUESTIONS // 3, "No": QUESTIONS // 3}
    assert max(right.values()) - min(right.values()) <= (2 * ROUND if len(right) > 12 else ROUND)

def chance(tasks):
    return np.mean([1 / SCENARIOS[task].n_options for task in tasks])

def scored(predict):
    """Share of right answers over all tasks of a predictor (task, clip, choice) -> {candidate: score}."""
    hits = []
    for task in FILES:
        for clip, choice in bench(task):
            scores = predict(task, clip, choice)
            best = [c for c in choice["candidates"] if scores[c] == max(scores[d] for d in choice["candidates"])]
            hits.append((choice["answer"] in best) / len(best))
    return np.mean(hits)

def test_the_text_alone_stays_at_chance():
    """How often each candidate was right when offered, overall, after this question and at this place in it."""
    right, offered = Counter(), Counter()

    def clues(task, choice):
        words, others = choice["question"], tuple(sorted(choice["candidates"]))
        for one in choice["candidates"]:
            place = words.lower().find(one.lower().rstrip("."))
            yield one, [(task, one), (task, words, one), (task, "at", place), (task, others, one)]

    for task in FILES:
        for _, choice in training(task):
            for candidate, keys in clues(task, choice):
                offered.update(keys)
                right.update(keys if candidate == choice["answer"] else ())

    def predict(task, clip, choice):
        rate = 1 / SCENARIOS[task].n_options
        return {candidate: sum(np.log((right[key] + 9 * rate) / (offered[key] + 9)) for key in keys)
                for candidate, keys in clues(task, choice)}

    assert abs(scored(predict) - chance(FILES)) < 0.04

def test_the_middle_frame_alone_stays_at_chance():
    """What was the answer for the training clips whose middle frame looks most like this one?"""
    def middle(clip):
        frame = draw.render({**clip, "background": ["light" if name in world.PLAIN_BACKGROUNDS else name
                                                      for name in clip["background"]]}, 24)[8]
        return np.asarray(frame.convert("RGB"), dtype=np.float32).ravel()

    known = {task: (np.stack([middle(clip) for clip, _ in training(task)]), [choice for _, choice in training(task)])
             for task in FILES}

    def predict(task, clip, choice):
        frames, choices = known[task]
        nearest = np.argsort(((frames - middle(clip)) ** 2).sum(1))[:25]
        scores = defaultdict(float)
        for other in (choices[i] for i in nearest):
            for candidate in other["candidates"]:
                scores[candidate] += (candidate == other["answer"]) - 1 / len(other["candidates"])
        return scores

    assert abs(scored(predict) - chance(FILES)) < 0.04

@pytest.mark.parametrize("task", FILES)
def test_the_answer_stands_in_the_caption(task):
    """Stages 1 and 2 see captions only: what stage 3 asks for must have been told there, in about 40 words."""
    for clip, choice in training(task)[:40]:
        text = generate.caption_and_facts(SCENARIOS[task], clip, random.Random(0))[0].lower()
        answer = choice["answer"].lower().rstrip(".")
        if task == "egocentric_navigation":
            number, = re.findall(r"next is move (\d)", text)
            assert answer.startswith(f"move {number} ") and answer.removeprefix("move ") in choice["question"]
        else:
            parts = answer
            for opening in ("yes, ", "no, ", "not sure, ", "it is given ", "it is a ", "it is ", "it was ", "it goes ",
                            "it ", "they are ", "under "):
                parts = parts.removeprefix(opening)
            assert parts in text, (text, answer)
        assert len(text.split()) <= 45

def test_the_playground_tells_what_each_does_from_top_left_to_bottom_right():
    red, blue, green = ({"shape": "star", "colour": colour, "x": [x] * 16, "y": [y] * 16}
                        for colour, x, y in (("red", 36, 36), ("blue", 36, 12), ("green", 12, 12)))
    clip = {"scenario": "playground", "duration": 8.0, "objects": [red, blue, green],
            "events": [{"object": i, "action": action} for i, action in enumerate(("up-left", "grows", "rests"))]}
    text, facts = generate.caption_and_facts(SCENARIOS[clip["scenario"]], clip, random.Random(0))
    assert text == "The green star rests. The blue star grows. The red star moves up-left."
    assert [fact.answer for fact in facts] == [
        "The red star moves up-left.", "The blue star grows.", "The green star rests."]
    assert [fact.wrong[:2] for fact in facts] == [
        ["The red star grows.", "The red star rests."], ["The blue star moves up-left.", "The blue star rests."],
        ["The green star moves up-left.", "The green star grows."]]

def test_conversations_ask_with_options_and_without():
    """One in five as the benchmark does, its long prompt in all turns' instruction: the order of turns is random."""
    prompted = described = 0
    task = SCENARIOS["action_sequence"]
    for i, (clip, _) in enumerate(training("action_sequence")):
        many, plain, *rest = generate.conversations(task, clip, random.Random(i))
        assert len(many) == len(plain) == 2 and len({turn["q"] for turn in plain}) == 2  # no fact twice
        for asked, opened in zip(many, plain, strict=True):
            assert f"Question: {opened['q']}\nOptions:\n(A)" in asked["q"]
            assert asked["a"].partition(") ")[2] == opened["a"] and opened["i"] in generate.OPEN
        assert len({turn["i"] for turn in many}) == 1 and many[0]["i"] in ("", generate.SYSTEM)
        assert many[0]["q"].startswith(generate.SYSTEM) == bool(many[0]["i"])
        assert [turns[0]["a"] for turns in rest] in ([], [generate.caption_and_facts(task, clip, random.Random(0))[0]])
        prompted += bool(many[0]["i"])
        described += len(rest)
    assert 40 < prompted < 80 and 110 < described < 190                    # of 300

def test_the_language_is_small():
    rng, words = random.Random(0), set()
    for task in SCENARIOS:
        for clip, _ in training(task):
            text, turns, _ = generate.text_document(SCENARIOS[task], clip, rng)
            for part in (text, *(turn["q"] + " " + turn["a"] for turn in turns)):
                words.update("".join(c if c.isalnum() else " " for c in part.lower()).split())
    assert len(words) < 400

def test_answers_follow_from_the_annotations():
    """Derived again by other ways than the readers', for a few tasks."""
    for clip, choice in bench("moving_direction"):
        (hero,), way = clip["objects"], choice["answer"].rstrip(".").split()[-1]
        dx, dy = hero["x"][-1] - hero["x"][0], hero["y"][-1] - hero["y"][0]
        words = [w for w, on in (("up", dy < -8), ("down", dy > 8), ("left", dx < -8), ("right", dx > 8)) if on]
        assert "-".join(words or ["stationary"]) == way
    for clip, choice in bench("object_shuffle"):
        ball, cups = clip["objects"][0], clip["objects"][1:]
        under = min(cups, key=lambda cup: abs(cup["x"][0] - ball["x"][0]))  # the one lifted off the ball
        assert {9: "left", 24: "middle", 39: "right"}[under["x"][-1]] in choice["answer"]
    for clip, choice in bench("moving_count"):
        assert choice["answer"] == str(sum(len(set(one["x"] + one["y"])) > 2 for one in clip["objects"]))
    for clip, choice in bench("action_count"):
        busy = [label != "still" for label in clip["objects"][0]["activity"]]
        assert choice["answer"] == str(sum(busy) // 4 + (sum(busy) % 4 > 0))
    for clip, choice in bench("object_existence"):
        *things, lamp = clip["objects"]
        named = next(one for one in things if f"{one['colour']} {one['shape']} " in choice["question"])
        lit = [t for t in range(16) if lamp["look"][t] == "lit"]
        together = any(named["activity"][t] != "still" for t in lit)
        assert choice["answer"].startswith("Not sure," if not lit else "Yes," if together else "No,")
    for clip, choice in bench("counterfactual_inference"):
        hero = clip["objects"][0]
        way = hero["x"][3] - hero["x"][0], hero["y"][3] - hero["y"][0]
        beyond = [one for one in clip["objects"][1:] if one["shape"] != "block"
                  and (one["x"][0] - 24) * way[0] + (one["y"][0] - 24) * way[1] > 50]
        assert choice["answer"] == (f"{generate.capitalize(name_of(beyond[0]))}." if beyond else "Nothing.")

def test_a_clip_of_another_data_set_needs_only_events():
    """qagen knows nothing of drawing: names and times are enough."""
    clip = {"scenario": "action_sequence", "duration": 12.5, "objects": [{"colour": "tall", "shape": "man"}],
            "events": [{"object": 0, "action": "sits down", "start": 8.0, "end": 9.0},
                       {"object": 0, "action": "opens a door", "start": 0.5, "end": 2.0},
                       {"object": 0, "action": "reads", "start": 3.0, "end": 7.0}]}
    text, facts = generate.caption_and_facts(SCENARIOS[clip["scenario"]], clip, random.Random(0))
    assert "opens a door" in text and [fact.answer for fact in facts] == [
        "After that it sits down.", "Before that it opens a door."]

def test_filters():
    clip, _ = training("action_count")[0]
    task, clip = SCENARIOS["action_count"], {**clip, "duration": 60.0}
    assert generate.caption_and_facts(task, clip, random.Random(0))[1] == []
    assert generate.conversations(task, clip, random.Random(0)) == []

def test_turns_read_as_the_benchmark_asks():
    choice = {"question": "What?", "candidates": ["It spins.", "It grows."], "answer": "It grows."}
    turn = generate.as_turn(choice)
    assert turn["q"] == "Question: What?\nOptions:\n(A) It spins.\n(B) It grows.\nOnly give the best option."
    assert turn["a"] == "Best option:(B) It grows."
