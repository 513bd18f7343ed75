"""The 20 tasks of MVBench in the toy world: one class each, which simulates a clip and describes it.

    simulate(rng, cast) -> {"objects", "events"}, the hero first; also "background" and more where the task needs it
    describe(clip, rng) -> (caption, facts), from the annotation alone, never from pixels

cast(n) gives n (shape, colour) pairs. Every state lasts two frames or more, so that 8 of the 16 frames still show it.
The middle of a clip, frames 7 and 8, looks alike whatever the answer is; tests/test_qagen.py measures how well.
Not here: drawing (draw.py). Source: MVBench (arXiv 2311.17005v4), table 1; similar worlds: CLEVRER, Something-Else.

    python -m toy.world --out data/toy --sheet sheet.png
"""
import math
from itertools import pairwise, permutations

import numpy as np

from qagen.generate import Fact, QATask, capitalize, excluding
from toy import things
from toy.things import Object, direction_vector, hero_slot, name_of, new_event, patch_point, random_point, sorted_events

class ActionSequence(QATask):
    """Three actions in a row. Asked: which came before or after the second. A frame shows one of them at most."""
    key, parent, n_options, rule = "action_sequence", "Action", 4, "one more that it did, two that it did not"
    actions = ("grows", "shrinks", "spins", "blinks", "jumps", "shakes")
    phrasings = {when: (f"What does {{hero}} do {when} it {{anchor}}?", f"What happens {when} {{hero}} {{anchor}}?",
                        f"Which action comes {when} {{hero}} {{anchor}}?") for when in ("after", "before")}

    def simulate(self, rng, cast):
        hero = Object(*cast(1)[0], *random_point(rng, 2), size=rng.uniform(13, 15))
        actions, starts = rng.sample(self.actions, 3), (1, 6, 11)  # in the middle frames: the second, not an answer
        events = [hero.perform(action, start, start + 4) for action, start in zip(actions, starts, strict=True)]
        return {"objects": [hero], "events": events}

    def describe(self, clip, rng):
        first, second, third = (event["action"] for event in sorted_events(clip))
        others, slots = excluding(self.actions, first, second, third), hero_slot(clip) | {"anchor": second}
        return f"it {second}. Before that it {first}. After that it {third}.", [
            Fact.from_template(when, capitalize(when) + " that it {}.", answer, [other, *rng.sample(others, 2)], slots)
            for when, answer, other in (("after", third, first), ("before", first, third))]

class ActionPrediction(QATask):
    """Round and round four places, for 4 to 7 visits. Asked: the next one. A frame shows no order."""
    key, parent, n_options, rule = "action_prediction", "Action", 4, "the four sides"
    phrasings = {"next": ("{Hero} goes round in a fixed order. Where will it go next?",
                          "What will {hero} do next, going on in the same order?",
                          "Which way does {hero} go next in its pattern?")}

    def simulate(self, rng, cast):
        hero = Object(*cast(1)[0], 24, 24, size=13)
        clockwise, first, turn = ("left", "up", "right", "down"), rng.randrange(4), rng.choice((-1, 1))
        visits = [(clockwise[(first + i * turn) % 4], 2 * i, 2 * i + 2) for i in range(rng.randint(4, 7))]
        for side, start, end in visits:  # 4 to 7 of them, so that any side can be the next
            dx, dy = direction_vector(side, 15)
            hero["x"][start:end], hero["y"][start:end] = [24 + dx] * 2, [24 + dy] * 2
            hero.set_activity(side, start, end)
        return {"objects": [hero], "events": [new_event(*visit) for visit in visits]}

    def describe(self, clip, rng):
        sides = [event["action"] for event in sorted_events(clip)]  # after the fourth the first comes again
        answer, last = sides[len(sides) % 4], {"up": "top", "down": "bottom"}.get(sides[-1], sides[-1])
        turns = "clockwise", "counter-clockwise"
        way = turns[tuple(sides[:2]) not in pairwise(("left", "up", "right", "down", "left"))]
        return f"it goes {answer} next, {way} from the {last}.", [
            Fact.from_template("next", "It goes {}.", answer, excluding(things.SIDES, answer), hero_slot(clip))]

class ActionAntonym(QATask):
    """One of two opposite changes, or neither. Asked: which. Halfway through they look the same."""
    key, parent, n_options, rule = "action_antonym", "Action", 3, "the opposite and \"not sure\""
    antonyms = {"size": ("grows", "shrinks"), "presence": ("appears", "disappears"), "height": ("rises", "falls")}
    phrasings = {"what": ("What does {hero} do?", "What happens to {hero}?", "Which of these does {hero} do?")}

    def simulate(self, rng, cast):
        (x, y), scale = random_point(rng, 3), rng.uniform(0.8, 1.2)
        hero = Object(*cast(1)[0], x, y, size=16 * scale)
        pair, which, change = rng.choice(list(self.antonyms)), rng.randrange(3), rng.choice((5, 10))
        verb = (*self.antonyms[pair], None)[which]

        # the ramp goes from -1 to 1, from 1 to -1, or stays at 0
        ramp = np.interp(range(things.FRAMES), (3, 12), ((-1, 1), (1, -1), (0, 0))[which]).tolist()
        if pair == "height":  # sets its own activity
            hero.move_along(*((t, x, y - 11 * r) for t, r in enumerate(ramp)))
        elif pair == "size":
            hero["size"] = [scale * (16 + 5 * r) for r in ramp]
            hero.set_activity(verb or "still", 3, 13)
        else:  # neither: always in view, or gone for the middle only
            neither = rng.choice(([(0, 16)], [(0, 5), (10, 16)]))
            hero.show_during(*([(change, 16)], [(0, change)], neither)[which])
            hero.set_activity(verb or "still", change - 2, change + 2)
        return {"objects": [hero], "events": [new_event(verb, 3, 13)] if verb else [], "asked": pair}

    def describe(self, clip, rng):
        pair = self.antonyms[clip["asked"]]
        answers = [*(f"It {verb}." for verb in pair), "Not sure."]
        answer = f"It {clip['events'][0]['action']}." if clip["events"] else "Not sure."
        caption = answer.replace("It", "it") if clip["events"] else f"it is not sure that it {pair[0]} or {pair[1]}."
        cell = answers.index(answer), clip["asked"]  # "not sure" is right one time in three
        return caption, [Fact("what", answer, excluding(answers, answer), hero_slot(clip), cell)]

class FineGrainedAction(QATask):
    """One of five movements that differ in detail. Asked: which. A frame of one looks like a frame of another."""
    key, parent, n_options, rule = "fine_grained_action", "Action", 4, "three of the four other movements"
    phrasings = {"how": ("How does {hero} move?", "Which movement does {hero} make?",
                         "What exactly does {hero} do in the video?")}

    def simulate(self, rng, cast):
        hero = Object(*cast(1)[0], *patch_point(rng), size=13, angle=90 * rng.randrange(4))
        action = rng.choice(things.FINE_ACTIONS)
        if action not in ("bounces", "zigzags"):  # the others get a height that these two have in a frame
            hero["y"] = [hero["y"][0] + rng.choice((6, 0, -3, -6))] * things.FRAMES
        return {"objects": [hero], "events": [hero.perform(action, start=-rng.randrange(4))]}  # at a random phase

    def describe(self, clip, rng):
        action = clip["events"][0]["action"]
        wrong = rng.sample(excluding(things.FINE_ACTIONS, action), 3)
        return f"it {action}.", [Fact.from_template("how", "It {}.", action, wrong, hero_slot(clip))]

class UnexpectedAction(QATask):
    """It falls towards a wall, and something unexpected happens. Asked: what. Until frame 8 all clips are alike."""
    key, parent, n_options, rule = "unexpected_action", "Action", 4, "the four surprises"
    surprises = ("teleports", "passes through the wall", "stops in mid-fall", "splits in two")
    phrasings = {"what": ("What unexpected thing happens to {hero}?", "What is surprising about {hero}?",
                          "Which surprising thing does {hero} do?")}

    def simulate(self, rng, cast):
        shape, colour = cast(1)[0]
        side, (x, y), surprise = rng.choice((-1, 1)), random_point(rng, 2, -4, -3), rng.choice(self.surprises)
        hero, twin = Object(shape, colour, 0, 0, size=12), Object(shape, colour, 0, 0, size=9)
        wall = Object("wall", "grey", 24 + side * 9, 24, size=48)
        twin.show_during()  # hidden, unless the hero splits

        # the fall, then what is unexpected from frame 9 on
        fall = [(0, 24 + side * (x - 13), y + 11), (8, 24 + side * x, y + 24)]
        then = {"teleports": [(9, 24 + side * x, y + 25), (10, 24 - side * 14, 38)], "stops in mid-fall": [],
                "passes through the wall": [(14, 24 + side * 18, 38)], "splits in two": [(14, 24 - side * 18, 38)]}
        hero.move_along(*fall, *then[surprise])
        hero.set_activity(surprise, 9)
        if surprise == "splits in two":
            twin.move_along(*fall, (14, 24 + side * 1, 40))
            twin.set_activity(surprise, 9)
            hero["size"][9:] = [9] * 7  # both halves are smaller
            twin.show_during((9, 16))
        return {"objects": [hero, twin, wall], "events": [new_event("falls", 0, 9), new_event(surprise, 9)]}

    def describe(self, clip, rng):
        surprise = sorted_events(clip, *self.surprises)[0]["action"]
        return f"it {surprise}.", [
            Fact.from_template("what", "It {}.", surprise, excluding(self.surprises, surprise), hero_slot(clip))]

class ObjectExistence(QATask):
    """Two objects move, one in each half; a lamp blinks in one half or never. Asked: which moves then."""
    key, parent, n_options, rule = "object_existence", "Object", 3, "yes, no, not sure"
    phrasings = {"is": ("Is there {a} moving while the lamp blinks?", "While the lamp blinks, does {a} move?",
                        "Does {a} move when the lamp blinks?")}

    def simulate(self, rng, cast):
        pairs, lamp = cast(2), Object("lamp", "grey", 24, 10, size=15)
        spots, halves, blink = rng.sample((11, 37), 2), rng.sample((0, 8), 2), rng.choice((0, 8, None))  # first frames
        movers = [Object(*pair, x, 36) for pair, x in zip(pairs, spots, strict=True)]
        for obj, x, start in zip(movers, spots, halves, strict=True):
            obj.move_along((start, x, 36), (start + 3, x, 23), (start + 6, x, 36))
        events = [new_event("moves", start, start + 7, i) for i, start in enumerate(halves)]
        if blink is not None:
            for t in (1, 2, 4, 5):
                lamp["look"][blink + t] = lamp["activity"][blink + t] = "lit"
            events.append(new_event("blinks", blink, blink + 7, 2))
        return {"objects": [*movers, lamp], "events": events}

    def describe(self, clip, rng):
        blinks, facts, phrases = sorted_events(clip, "blinks"), [], {}
        for move in sorted_events(clip, "moves"):
            name = name_of(clip["objects"][move["object"]])
            answers = {"yes": f"{name} moves with the lamp", "no": f"{name} moves without the lamp",
                       "not sure": "the lamp never blinks"}
            together = blinks and move["start"] < blinks[0]["end"] and blinks[0]["start"] < move["end"]
            verdict = "not sure" if not blinks else "yes" if together else "no"
            phrases[verdict] = answers[verdict]
            answer, *wrong = (f"{capitalize(v)}, {answers[v]}." for v in (verdict, *excluding(answers, verdict)))
            a_name = name.replace("the", "an" if name.startswith("the o") else "a", 1)
            facts.append(Fact("is", answer, wrong, {"a": a_name}, (verdict, answer)))  # yes, no, not sure equally often
        return ", ".join(phrases[verdict] for verdict in sorted(phrases, reverse=True)) + ".", facts  # yes before no

class ObjectInteraction(QATask):
    """It touches one of four objects and approaches another. Asked: which. In the middle of the clip it is at rest."""
    key, parent, n_options, rule = "object_interaction", "Object", 4, "the other objects of the clip"
    phrasings = {kind: (f"Which object is it that {{hero}} {verb}?", f"What is the thing that {{hero}} {verb}?",
                        f"{{Hero}} {verb} one of the objects. Which one?")
                 for kind, verb in (("touch", "touches"), ("near", "only approaches"))}

    def simulate(self, rng, cast):
        spots = [(24, 24), (9, 9), (39, 9), (9, 39), (39, 39)]
        hero, *others = (Object(*pair, x, y, size=11) for pair, (x, y) in zip(cast(5), spots, strict=True))
        touch, approach = zip(rng.sample(range(4), 2), rng.sample((0, 8), 2), strict=True)  # (which, first frame)
        keys, events = [], []
        for (i, start), share, verb, activity in ((touch, 0.55, "touches", "touched"),
                                                  (approach, 0.22, "approaches", "approached")):
            end = [24 + (c - 24) * share for c in spots[i + 1]]  # share: of the way there
            keys += [(start + t, *place) for t, place in ((0, spots[0]), (2, end), (4, end), (6, spots[0]))]
            others[i].set_activity(activity, start + 2, start + 5)
            events.append(new_event(verb, start + 2, start + 5, target=i + 1))
        hero.move_along(*sorted(keys))
        return {"objects": [hero, *others], "events": events}

    def describe(self, clip, rng):
        names = [name_of(obj) for obj in clip["objects"]]
        touched, approached = (names[sorted_events(clip, verb)[0]["target"]] for verb in ("touches", "approaches"))
        rows = ("touch", "It touches {}.", touched), ("near", "It only approaches {}.", approached)
        return f"it touches {touched} and only approaches {approached}.", [
            Fact.from_template(*row, excluding(names[1:], row[-1]), hero_slot(clip)) for row in rows]

class ObjectShuffle(QATask):
    """A cup hides a ball, then two pairs of cups swap. Asked: where the ball ends. A frame hides it."""
    key, parent, n_options, rule = "object_shuffle", "Object", 3, "left, middle, right"
    phrasings = {"where": ("Where is the ball at the end?", "Where is the hidden ball at the end of the video?",
                           "Under which cup is the ball when the cups have stopped?")}

    def simulate(self, rng, cast):
        spots, order, first = [9, 24, 39], [0, 1, 2], rng.randrange(3)      # order: the cups from left to right
        keys, events = [[(0, x, 30), (4, x, 30)] for x in spots], [new_event("hides", 0, 4, target=first + 1)]

        # both swaps are drawn freely: from any cup, the ball gets to each of the three spots equally often
        for t in (4, 8):
            a, b = rng.sample(range(3), 2)
            events.append(new_event("swaps", t, t + 5, order[a] + 1, target=order[b] + 1))
            for source, target, rise in ((a, b, -11), (b, a, 11), (3 - a - b, 3 - a - b, 0)):
                halfway = (t + 2, (spots[source] + spots[target]) / 2, 30 + rise)
                keys[order[source]] += [halfway, (t + 4, spots[target], 30)]
            order[a], order[b] = order[b], order[a]
        cups = [Object("cup", colour, 0, 0) for colour in rng.sample(things.COLOURS, 3)]
        for cup, cup_keys in zip(cups, keys, strict=True):
            cup.move_along(*cup_keys)

        # in the first three frames the cup is lifted, to show what is under it; then it hides the ball
        ball = Object("ball", "black", 0, 0, size=8)
        ball["x"], ball["y"] = cups[first]["x"][:], [y + 5 for y in cups[first]["y"]]
        ball.show_during((0, 3))
        cups[first]["y"][:3] = [17, 17, 17]
        cups[first].set_activity("hides the ball", 0)
        return {"objects": [ball, *cups], "events": events}

    def describe(self, clip, rng):
        row = sorted((1, 2, 3), key=lambda i: clip["objects"][i]["x"][-1])  # the numbers of the cups, left to right
        names, cup = ("left", "middle", "right"), sorted_events(clip, "hides")[0]["target"]
        answer = names[row.index(cup)]
        colour, colours = clip["objects"][cup]["colour"], ", ".join(clip["objects"][i]["colour"] for i in row)
        return f"at the end the ball is under the {answer} cup, the {colour} one of {colours}.", [
            Fact.from_template("where", "Under the {} cup.", answer, excluding(names, answer))]

class MovingDirection(QATask):
    """It moves straight in one of eight directions, or rests. Asked: which. Half-way it is near the centre."""
    key, parent, n_options, rule = "moving_direction", "Position", 4, "three of the eight directions and \"stationary\""
    phrasings = {"way": ("In which direction does {hero} move?", "What direction is {hero} moving in?",
                         "Which way does {hero} go?")}

    def simulate(self, rng, cast):
        direction, (x, y) = rng.choice((*things.DIRECTIONS, None)), random_point(rng, 3)
        hero, (dx, dy) = Object(*cast(1)[0], x, y), direction_vector(direction, 12) if direction else (0, 0)
        hero.move_along((0, x - dx, y - dy), (15, x + dx, y + dy))
        return {"objects": [hero], "events": [new_event(direction, 0)] if direction else []}

    def describe(self, clip, rng):
        pool = [*(f"moves {direction}" for direction in things.DIRECTIONS), "is stationary"]
        answer = f"moves {clip['events'][0]['action']}" if clip["events"] else pool[-1]
        wrong = rng.sample(excluding(pool, answer), 3)
        return f"it {answer}.", [Fact.from_template("way", "It {}.", answer, wrong, hero_slot(clip))]

class ActionLocalization(QATask):
    """An action in one third of the clip, or in nearly all of it. Asked: when. A frame does not say when it was."""
    key, parent, n_options, rule = "action_localization", "Position", 4, "beginning, middle, end, throughout"
    actions = ("spins", "jumps", "shakes", "wobbles")
    phrasings = {"when": ("During which part of the video does it happen that {hero} {action}?",
                          "When can it be seen that {hero} {action}?", "At what time is it that {hero} {action}?")}

    def simulate(self, rng, cast):
        hero = Object(*cast(1)[0], *random_point(rng, 2), size=15, angle=90 * rng.randrange(4))
        span = rng.choice(((1, 5), (6, 10), (11, 15), (1, 15)))  # frames: a third of the clip or nearly all of it
        return {"objects": [hero], "events": [hero.perform(rng.choice(self.actions), *span)]}

    def describe(self, clip, rng):
        parts = ("At the beginning.", "In the middle.", "At the end.", "Throughout the video.")
        action, start, end = (clip["events"][0][key] for key in ("action", "start", "end"))
        third = int(3 * (start + end) / 2 / clip["duration"])               # that has the middle of the action
        answer = parts[3 if end - start > clip["duration"] / 2 else third]  # throughout: more than half of the clip
        return f"it {action} {answer[0].lower()}{answer[1:]}", [
            Fact("when", answer, excluding(parts, answer), hero_slot(clip) | {"action": action})]

class SceneTransition(QATask):
    """One place, darkness, another place. Asked: how the scene changes. A frame shows one place or none."""
    key, parent, n_options, rule = "scene_transition", "Scene", 4, "the reverse, another change and its reverse"
    phrasings = {"change": ("How does the scene change?", "What is the change of scene in the video?",
                            "Which option describes the change of scene?")}

    def simulate(self, rng, cast):
        before, after = rng.sample(things.PLACES, 2)
        return {"objects": [], "events": [], "background": [before] * 7 + ["dark"] * 2 + [after] * 7}

    def describe(self, clip, rng):
        # both changes share a place, so that no option is right more often for what it names
        before, after = clip["background"][0], clip["background"][-1]
        shared, third = rng.choice((before, after)), rng.choice(excluding(things.PLACES, before, after))
        pairs = (before, after), (after, before), (shared, third), (third, shared)
        answer, *wrong = (f"{a} to {b}" for a, b in pairs)
        return f"the scene changes from {answer}.", [Fact.from_template("change", "It changes from {}.", answer, wrong)]

class ActionCount(QATask):
    """It acts in one to four of four turns of four frames, never in frames 7 and 8. Asked: how often."""
    key, parent, n_options, rule = "action_count", "Count", 3, "two other numbers from 1 to 4"
    actions = ("jumps", "blinks")
    phrasings = {"count": ("How many times is it that {hero} {action}?", "How often is it that {hero} {action}?",
                           "What is the number of times that {hero} {action}?")}

    def simulate(self, rng, cast):
        hero, action = Object(*cast(1)[0], *random_point(rng, 2)), rng.choice(self.actions)
        turns = sorted(rng.sample(range(4), rng.randint(1, 4)))  # every count equally often
        return {"objects": [hero], "events": [hero.perform(action, 4 * turn + 1, 4 * turn + 5) for turn in turns]}

    def describe(self, clip, rng):
        action, count = clip["events"][0]["action"], str(len(clip["events"]))
        return f"it {action} {count} {'time' if count == '1' else 'times'}.", [
            Fact("count", count, rng.sample(excluding("1234", count), 2), hero_slot(clip) | {"action": action})]

class MovingCount(QATask):
    """Four objects, of which one to four move. Asked: how many. In a single frame nothing moves."""
    key, parent, n_options, rule = "moving_count", "Count", 4, "1 to 4"
    phrasings = {"count": ("How many objects move?", "What is the number of moving objects?",
                           "How many objects are moving in the video?")}

    def simulate(self, rng, cast):
        return things.four_movers(rng, cast, rng.randint(1, 4))

    def describe(self, clip, rng):
        count = str(len(clip["events"]))
        return f"{count} {'object moves' if count == '1' else 'objects move'}.", [
            Fact("count", count, excluding("1234", count))]

class MovingAttribute(QATask):
    """Four objects, of which one moves. Asked: its colour or its shape. In a single frame nothing moves."""
    key, parent, n_options, rule = "moving_attribute", "Attribute", 3, "of two objects that do not move"
    phrasings = {kind: (f"What is the {kind} of the object that moves?", f"Which {kind} does the moving object have?",
                        f"What {kind} is the moving object?") for kind in ("colour", "shape")}

    def simulate(self, rng, cast):
        return things.four_movers(rng, cast, 1)

    def describe(self, clip, rng):
        mover = clip["objects"][clip["events"][0]["object"]]
        resting = [obj for obj in clip["objects"] if obj is not mover]  # wrong options are in the picture, too
        return f"{name_of(mover)} moves.", [
            Fact.from_template(kind, template, mover[kind], [obj[kind] for obj in rng.sample(resting, 2)])
            for kind, template in (("colour", "It is {}."), ("shape", "It is a {}."))]

class StateChange(QATask):
    """A lamp in three states. Asked: the change from the first to the last. The one in the middle means nothing."""
    key, parent, n_options, rule = "state_change", "Attribute", 3, "on, off, unchanged"
    phrasings = {"state": ("How did the state of the lamp change from the start to the end?",
                           "From the first moment to the last, how did the lamp change?",
                           "Compared with the start, what is the lamp's state at the end?")}

    def simulate(self, rng, cast):
        states = [rng.choice(("plain", "lit")) for _ in range(3)]
        if rng.random() < 1 / 3:  # change : no change = 2 : 1, so on, off and unchanged are equally often right
            states[2] = "lit" if states[0] == "plain" else "plain"
        lamp, events = Object("lamp", "grey", *random_point(rng, 5), size=26), []
        for state, (start, end) in zip(states, ((0, 5), (5, 11), (11, 16)), strict=True):
            lamp["look"][start:end] = [state] * (end - start)
            lamp.set_activity("lit" if state == "lit" else "still", start, end)  # a class of toy/draw.py
            events.append(new_event("on" if state == "lit" else "off", start, end))
        return {"objects": [lamp], "events": events}

    def describe(self, clip, rng):
        answers = {("off", "on"): "It was turned on.", ("on", "off"): "It was turned off.", None: "It did not change."}
        states = [event["action"] for event in sorted_events(clip)]
        answer = answers.get((states[0], states[-1]), answers[None])
        return answer.replace("It", "the lamp"), [Fact("state", answer, excluding(answers.values(), answer))]

class FineGrainedPose(QATask):
    """A figure takes four poses in five turns. Asked: the last. The middle pose is the last as often as any other."""
    key, parent, n_options, rule = "fine_grained_pose", "Pose", 4, "the other poses of the clip"
    phrasings = {"last": ("Which pose does the figure end in?", "What does the figure do at the end?",
                          "What is the last thing that the figure does?")}

    def simulate(self, rng, cast):
        # turns in which all poses occur, none twice in a row; the last one is pose 3
        poses, middle, order = rng.sample(things.POSES, 4), rng.randrange(4), [0] * 5
        while len(set(order)) < 4 or (order[2], order[4]) != (middle, 3) or any(a == b for a, b in pairwise(order)):
            order = [rng.randrange(4) for _ in range(5)]
        spans, (x, y) = [(0, 3), (3, 6), (6, 9), (9, 12), (12, 16)], random_point(rng, 2)  # one spot for all four
        figures = [Object(pose, "black", x, y, size=26) for pose in poses]
        for i, figure in enumerate(figures):
            figure.show_during(*(span for span, pose in zip(spans, order, strict=True) if pose == i))
        events = [new_event(poses[i], *span, i) for i, span in zip(order, spans, strict=True)]
        return {"objects": figures, "events": events}

    def describe(self, clip, rng):
        poses = [event["action"] for event in sorted_events(clip)]
        others = sorted(set(poses) - {poses[-1]})  # sorted, because the order of a set is not the same in every run
        return f"at the end the figure {poses[-1]}.", [Fact.from_template("last", "It {}.", poses[-1], others)]

class CharacterOrder(QATask):
    """Three letters, one after the other in the same spot. Asked: their order. A frame shows one or none."""
    key, parent, n_options, rule = "character_order", "Character", 3, "two other orders of the same letters"
    phrasings = {"order": ("In which order are the letters shown?", "What is the order of the letters in the video?",
                           "Which order do the letters appear in?")}

    def simulate(self, rng, cast):
        spans = [(0, 3), (4, 7), (10, 14)]  # none in the middle frames
        (x, y), colour = patch_point(rng, 1), rng.choice(things.COLOURS)
        letters = [Object(letter, colour, x, y, size=13) for letter in rng.sample(things.GLYPHS, 3)]
        for letter, span in zip(letters, spans, strict=True):
            letter.show_during(span)
        return {"objects": letters, "events": [new_event("shows", *span, i) for i, span in enumerate(spans)]}

    def describe(self, clip, rng):
        letters = [clip["objects"][event["object"]]["shape"] for event in sorted_events(clip)]
        answer, *others = (f"first {a}, then {b}, last {c}" for a, b, c in permutations(letters))
        return f"the letters are {answer}.", [
            Fact.from_template("order", "They are {}.", answer, rng.sample(others, 2))]

class EgocentricNavigation(QATask):
    """An agent makes one to four moves of a route that the question gives. Asked: the next. A frame shows no count."""
    key, parent, n_options, rule = "egocentric_navigation", "Cognition", 4, "forward, left, right, stop"
    moves = {"forward": "go forward", "left": "turn left", "right": "turn right"}  # after a turn it goes forward
    phrasings = {"next": ("The agent follows this route: {route}. What is its next move?",
                          "The route is: {route}. What should the agent do next?",
                          "Route: {route}. Given the video so far, what comes next?")}

    def simulate(self, rng, cast):
        # the last three moves and the stop are the possible answers, in any order
        route, done, heading = ["forward", *rng.sample(list(self.moves), 3)], rng.randint(1, 4), rng.randrange(4)
        agent, x, y, keys, angles = Object("agent", "purple", 0, 0), 0.0, 0.0, [(0, 0.0, 0.0)], [90 * heading]
        for i, move in enumerate(route[:done]):
            heading += {"forward": 0, "left": -1, "right": 1}[move]
            keys.append((3 * i + 1, x, y))
            x, y = x + 7.5 * math.sin(math.pi / 2 * heading), y - 7.5 * math.cos(math.pi / 2 * heading)
            keys.append((3 * i + 3, x, y))
            angles += [90 * heading] * 3

        # anywhere in the picture, as long as the whole path is in view
        dx, dy = (rng.uniform(7 - min(track), 41 - max(track)) for track in list(zip(*keys, strict=True))[1:])
        agent.move_along(*((t, x + dx, y + dy) for t, x, y in keys))
        agent["angle"] = (angles + angles[-1:] * things.FRAMES)[:things.FRAMES]  # it keeps the last one
        events = [new_event(move, 3 * i, 3 * i + 3) for i, move in enumerate(route[:done])]
        return {"objects": [agent], "events": events, "route": route}

    def describe(self, clip, rng):
        n_done, route = len(clip["events"]), [*(self.moves[move] for move in clip["route"]), "stop"]
        moves = [f"{number} {move}" for number, move in enumerate(route, 1)]
        answer, *wrong = (f"Move {move}." for move in (moves[n_done], *excluding(moves[1:], moves[n_done])))
        slots, cell = {"route": ", ".join(moves)}, (n_done, answer)  # every number of moves equally often
        return f"next is move {n_done + 1}.", [Fact("next", answer, wrong, slots, cell)]

class EpisodicReasoning(QATask):
    """A gift goes from one person to a second and, in another place, to a third. Asked: who has it when, and where."""
    key, parent, n_options, rule = "episodic_reasoning", "Cognition", 5, "the others of the clip and of the world"
    phrasings = {
        kind: (f"Who has the gift {when}?", f"Whose is the gift {when}?", f"Which person has the gift {when}?")
        for kind, when in (("start", "at the start"), ("between", "in between"), ("end", "at the end"))
    } | {
        f"where_{when}": (f"Where is the gift given {when}?", f"In which place is the gift given {when}?",
                          f"What is the place where the gift is given {when}?") for when in ("first", "last")}

    def simulate(self, rng, cast):
        places, colours = rng.sample(things.PLACES, 2), rng.sample(things.COLOURS, 3)
        gift, (x1, x2) = Object("gift", "white", 0, 0, size=11), [rng.choice((12, 36)) for _ in places]  # the givers' x
        people = [Object("person", colour, 0, 31, size=30) for colour in colours]
        people[0]["x"], people[2]["x"] = [x1] * things.FRAMES, [48 - x2] * things.FRAMES
        people[1]["x"] = [48 - x1] * 8 + [x2] * 8  # receives in the first place, gives in the second
        for obj, spans in zip([*people, gift], ([1], [1, 2], [2], [1, 2]), strict=True):
            obj.show_during(*((0, 7) if place == 1 else (9, 16) for place in spans))
        gift.move_along((2, x1, 8), (5, 48 - x1, 8), (8, 48 - x1, 8), (9, x2, 8), (10, x2, 8), (13, 48 - x2, 8))
        return {"objects": [gift, *people], "background": [places[0]] * 7 + ["dark"] * 2 + [places[1]] * 7,
                "events": [new_event("gives", 2, 6, 1, target=2, place=places[0]),
                           new_event("gives", 10, 14, 2, target=3, place=places[1])]}

    def describe(self, clip, rng):
        first, last = sorted_events(clip, "gives")
        a, b, c = (name_of(clip["objects"][i]) for i in (first["object"], first["target"], last["target"]))
        strangers = excluding((f"the {colour} person" for colour in things.COLOURS), a, b, c)  # not in the clip
        people, where = [a, b, c, *rng.sample(strangers, 2)], (first["place"], last["place"])
        rows = (("start", "At the start {}.", a, people), ("between", "In between {}.", b, people),
                ("end", "At the end {}.", c, people),
                ("where_first", "It is given first in {}.", where[0], things.PLACES),
                ("where_last", "It is given last in {}.", where[1], things.PLACES))
        return (f"at the start {a} has the gift. In between {b}. At the end {c}. It is given first in {where[0]}, last "
                f"in {where[1]}."), [Fact.from_template(*row, excluding(pool, row[-1])) for *row, pool in rows]

class CounterfactualInference(QATask):
    """It hits one of four blocks, in the middle of the clip none. Asked: what it would hit without that block."""
    key, parent, n_options, rule = "counterfactual_inference", "Cognition", 4, "the other objects and nothing"
    phrasings = {"without": ("If the block that {hero} hits were not there, what would it hit?",
                             "What would {hero} hit without the block that stops it?",
                             "Without the block that it hits, what would {hero} run into?")}

    def simulate(self, rng, cast):
        ways, pairs = [direction_vector(side, 1) for side in rng.sample(things.SIDES, 4)], cast(4)
        hero = Object(*pairs[0], 24, 24, size=10)
        near, middle, far = ([(24 + r * dx, 24 + r * dy) for dx, dy in ways] for r in (5.5, 12, 19))
        others = [Object(*pair, *spot, size=10) for pair, spot in zip(pairs[1:], far[:3], strict=True)]
        blocks = [Object("block", "grey", *middle[i], angle=90 * (ways[i][1] != 0)) for i in range(4)]

        # it meets block i twice; only the first three blocks have something behind them
        i = rng.randrange(4)
        hero.move_along(*((start + t, *spot) for start in (0, 9) for t, spot in (
            (0, (24, 24)), (2, near[i]), (4, near[i]), (6, (24, 24)))))
        return {"objects": [hero, *others, *blocks],
                "events": [new_event("hits", start, start + 3, target=4 + i) for start in (2, 11)],
                "counterfactual": {"without": 4 + i, "hits": 1 + i if i < 3 else None}}

    def describe(self, clip, rng):
        hits = clip["counterfactual"]["hits"]
        answer = "nothing" if hits is None else name_of(clip["objects"][hits])
        options = [*sorted(name_of(obj) for obj in clip["objects"][1:] if obj["shape"] != "block"), "nothing"]
        right, *wrong = (f"{capitalize(option)}." for option in (answer, *excluding(options, answer)))
        cell = options.index(answer), answer  # "nothing" is right one time in four
        return f"without the block it hits {answer}.", [Fact("without", right, wrong, hero_slot(clip), cell)]

class Playground(QATask):
    """No task of MVBench: one to three objects that do something all the time. A ViT learns to see movement from it."""
    key, parent, n_options, rule = "playground", "Action", 4, "what the others do, and what nobody does"
    phrasings = {"does": ("What does {hero} do?", "What is {hero} doing?", "Which of these does {hero} do?")}

    def simulate(self, rng, cast):
        # in one clip of four they only go straight ahead or rest; in one of five they are letters
        n = rng.choice((1, 2, 3))
        spots = rng.sample(things.QUARTERS, n) if rng.random() < 0.5 or n > 1 else [(24, 24)]
        plays = things.STRAIGHT if rng.random() < 0.25 else things.PLAYS
        objects = [Object(*pair, *random_point(rng, 3, *spot), size=rng.uniform(12, 16))
                   for pair, spot in zip(cast(n), spots, strict=True)]
        if rng.random() < 0.2:
            for obj, letter in zip(objects, rng.sample(things.GLYPHS, n), strict=True):
                obj["shape"] = letter

        # all of them start in frame 0 and do not stop
        actions = [rng.choice(plays) for _ in objects]
        for obj, action in zip(objects, actions, strict=True):
            if action in things.DIRECTIONS:
                (x, y), (dx, dy) = (obj["x"][0], obj["y"][0]), direction_vector(action, 9)
                obj.move_along((0, x - dx, y - dy), (15, x + dx, y + dy))
            elif action != "rests":
                obj.perform(action)
        return {"objects": objects, "events": [new_event(action, 0, obj=i) for i, action in enumerate(actions)]}

    def describe(self, clip, rng):
        verbs = {play: f"moves {play}" if play in things.DIRECTIONS else play for play in things.PLAYS}
        actions = {name_of(clip["objects"][e["object"]]): verbs[e["action"]] for e in clip["events"]}
        facts, others = [], excluding(verbs.values(), *actions.values())  # what nobody does
        for name, action in actions.items():
            wrong = excluding(dict.fromkeys(actions.values()), action)  # what the others do, each once
            wrong += rng.sample(others, 3 - len(wrong))
            facts.append(Fact.from_template("does", capitalize(name) + " {}.", action, wrong, {"hero": name}))

        # in reading order of their mean place; in random order a model could not know which comes next
        x, y = ({name_of(obj): sum(obj[key]) / len(obj[key]) for obj in clip["objects"]} for key in "xy")
        names = sorted(x, key=lambda name: (y[name] > 24, x[name]))
        return " ".join(f"{capitalize(name)} {actions[name]}." for name in names), facts

SCENARIOS = {scenario.key: scenario() for scenario in (  # in the order of the published table
    ActionSequence, ActionPrediction, ActionAntonym, FineGrainedAction, UnexpectedAction, ObjectExistence,
    ObjectInteraction, ObjectShuffle, MovingDirection, ActionLocalization, SceneTransition, ActionCount, MovingCount,
    MovingAttribute, StateChange, FineGrainedPose, CharacterOrder, EgocentricNavigation, EpisodicReasoning,
    CounterfactualInference, Playground)}
