"""A small world of coloured things with exact ground truth, kept as short video files: the embedded default data.

Is: 20 simulations, one for each MVBench task, and a playground; the annotation each of them returns (tracks and
events, never pixels); the writer of a whole world: clips, captions, instructions, the teacher of stage 0, text, and
a benchmark.
Is not: drawing (render.py), nor language: what is said and asked about an annotation is the business of qagen.py.
Source: MVBench (arXiv 2311.17005v4) section 3 for the tasks; CLEVRER and Something-Else for the taste in worlds.

    python -m toy.world --out data/toy --sheet sheet.png

A clip is 16 frames in which every state lasts two frames or more, so that 8 frames of it still tell the story. Its
middle, frames 7 and 8, is made to look alike whatever the answer is (test_qagen.py measures how well that holds).
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from itertools import pairwise
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from qagen import generate
from toy.draw import (
    ACTIVITIES,
    COLOURS,
    FPS,
    FRAMES,
    PIXELS,
    SHAPES,
    UNITS,
    contact_sheet,
    render,
    token_targets,
    write_frames,
    write_gif,
)

PLAIN = ("light", "cream", "mist")  # the backgrounds that mean nothing
HELD_OUT = {("star", "red"), ("circle", "green"), ("cross", "blue"),
            ("triangle", "yellow"), ("square", "purple"), ("diamond", "orange")}  # training never shows these six

# ---------------------------------------------------------------------------------------------------------------------
# Things and what they do. A thing is a dict of a shape, a colour and one track of 16 values for all that may change.


def thing(shape, colour, x, y, size=14, angle=0, look="plain"):
    """A thing at rest; size is its diameter, angle is clockwise in degrees, look: plain | hollow | lit | hidden."""
    tracks = {"x": x, "y": y, "size": size, "angle": angle, "look": look, "activity": "still"}
    return {"shape": shape, "colour": colour, **{key: [value] * FRAMES for key, value in tracks.items()}}


def wave(k):
    """Between -1 and 1, up and down in eight frames."""
    return abs(k % 8 - 4) / 2 - 1


def quarters(k):
    """A quarter turn more every two frames: a thing that turns stands no more aslant in any frame than one at rest."""
    return 90 * (k // 2 + 1)


ACTS = {  # what frame k of n adds to x, y and angle, multiplies size by, or puts in the place of the look
    "grows": lambda k, n: {"size": 1 + 0.6 * (k + 1) / n},
    "shrinks": lambda k, n: {"size": 1 - 0.45 * (k + 1) / n},
    "spins": lambda k, n: {"angle": quarters(k)},
    "spins clockwise": lambda k, n: {"angle": quarters(k)},
    "spins counter-clockwise": lambda k, n: {"angle": -quarters(k)},
    "blinks": lambda k, n: {"look": "hollow" if k % 4 < 2 else "plain"},
    "jumps": lambda k, n: {"y": -10 if k % 4 < 2 else 0},
    "shakes": lambda k, n: {"x": 6 if k % 4 < 2 else -6},
    "wobbles": lambda k, n: {"angle": quarters(k) % 180},
    "bounces": lambda k, n: {"y": 6 - 12 * abs(math.sin(math.pi * k / 4))},
    "zigzags": lambda k, n: {"x": 20 * k / (n - 1) - 10, "y": 6 * (abs(k % 4 - 2) - 1)},
}


def event(action, start, end=FRAMES, who=0, **more):
    """Thing number `who` does it from frame `start` until before frame `end`; written in seconds, as data sets do."""
    return {"object": who, "action": action, "start": start / FPS, "end": end / FPS, **more}


def act(one, action, start=0, end=FRAMES):
    """Change the tracks of a thing by ACTS[action] in frames start .. end - 1; it may have begun before the clip."""
    for t in range(max(start, 0), min(end, FRAMES)):
        for key, change in ACTS[action](t - start, end - start).items():
            old = one[key][t]
            one[key][t] = change if key == "look" else old * change if key == "size" else old + change
    label(one, "spins clockwise" if action == "spins" else action, max(start, 0), end)
    return event(action, max(start, 0), end)


def path(one, *keys):
    """Send a thing along straight lines through (frame, x, y) keys; its activity is the direction it goes in."""
    when, xs, ys = zip(*keys, strict=True)
    one["x"] = [float(x) for x in np.interp(range(FRAMES), when, xs)]
    one["y"] = [float(y) for y in np.interp(range(FRAMES), when, ys)]
    for t in range(1, FRAMES):
        one["activity"][t] = direction(one["x"][t] - one["x"][t - 1], one["y"][t] - one["y"][t - 1])
    if one["activity"][1] != "still":
        one["activity"][0] = one["activity"][1]


def direction(dx, dy):
    """The name of the nearest of the eight directions; "still" below a third of a unit."""
    if math.hypot(dx, dy) < 1 / 3:
        return "still"
    return generate.DIRECTIONS[round(math.degrees(math.atan2(dy, dx)) / 45) % 8]


def step(name, length):
    """(dx, dy) of a step in one of the eight directions."""
    turn = math.radians(45 * generate.DIRECTIONS.index(name))
    return length * math.cos(turn), length * math.sin(turn)


def show(one, *spans, look="plain"):
    """Visible in these [start, end) spans of frames only."""
    one["look"] = [look if any(a <= t < b for a, b in spans) else "hidden" for t in range(FRAMES)]


def label(one, activity, start, end=FRAMES):
    one["activity"][start:end] = [activity] * (min(end, FRAMES) - start)


def cast(rng, split, n):
    """n (shape, colour) pairs, all shapes and all colours different; the first is the hero's.

    Held-out pairs are the hero's alone: never in training ("train"), half of the time in the benchmark ("test").
    """
    novel = split == "test" and rng.random() < 0.5
    while True:
        pairs = list(zip(rng.sample(generate.SHAPES, n), rng.sample(generate.COLOURS, n), strict=True))
        if ((pairs[0] in HELD_OUT) == novel) and not HELD_OUT.intersection(pairs[1:]):
            return pairs


def near(rng, spread, x=24, y=24):
    """A point at random around (x, y): where a thing stands must not tell what it does."""
    return x + rng.uniform(-spread, spread), y + rng.uniform(-spread, spread)


def cell(rng, spread=1.5):
    """A point about the middle of one of the four inner patches: what stands there, one token sees whole."""
    return near(rng, spread, rng.choice((18, 30)), rng.choice((18, 30)))


def simulate(scenario, rng, split="train"):
    """One clip of a scenario (a key of qagen.ROWS) as an annotation, a plain dict that JSON can hold.

    {"scenario", "duration" in seconds, "background": a name per frame, "objects": [things], "events": [events], ...}
    """
    world = SCENARIOS[scenario](rng, partial(cast, rng, split))
    world = {"scenario": scenario, "duration": FRAMES / FPS, "background": [rng.choice(PLAIN)] * FRAMES} | world
    for one in world["objects"]:
        for key in ("x", "y", "size", "angle"):
            one[key] = [round(value, 1) for value in one[key]]
    return world


# ---------------------------------------------------------------------------------------------------------------------
# The twenty scenarios. Each takes (rng, cast) and returns objects and events, the hero first; and, where the data set
# that it stands for would say so, the background and one more fact.


def playground(rng, cast):
    """No task: one to three things, each of which does something all the time. Here a ViT learns to see movement.

    In one clip of four they only go straight ahead or rest; in one of five they are letters.
    """
    n = rng.choice((1, 2, 3))
    spots = rng.sample([(12, 12), (36, 12), (12, 36), (36, 36)], n) if rng.random() < 0.5 or n > 1 else [(24, 24)]
    plays = generate.STRAIGHT if rng.random() < 0.25 else generate.PLAYS
    things = [thing(*pair, *near(rng, 3, *spot), size=rng.uniform(12, 16))
              for pair, spot in zip(cast(n), spots, strict=True)]
    if rng.random() < 0.2:
        for one, letter in zip(things, rng.sample(generate.LETTERS, n), strict=True):
            one["shape"] = letter
    events = []
    for who, one in enumerate(things):
        action = rng.choice(plays)
        if action in generate.DIRECTIONS:
            (x, y), (dx, dy) = (one["x"][0], one["y"][0]), step(action, 9)
            path(one, (0, x - dx, y - dy), (15, x + dx, y + dy))
        elif action != "rests":
            act(one, action)
        events.append(event(action, 0, who=who))
    return {"objects": things, "events": events}


def action_sequence(rng, cast):
    hero = thing(*cast(1)[0], *near(rng, 2), size=rng.uniform(13, 15))
    actions = rng.sample(generate.ACTIONS, 3)
    return {"objects": [hero],
            "events": [act(hero, action, start, start + 4) for action, start in zip(actions, (1, 6, 11), strict=True)]}


def action_prediction(rng, cast):
    """Round and round four places, clockwise or the other way; 4 to 7 visits, so that any of them can be the next."""
    hero, home = thing(*cast(1)[0], 24, 24, size=13), [(24, 24)]
    ring, first, turn = ("left", "up", "right", "down"), rng.randrange(4), rng.choice((-1, 1))
    order, visits = [ring[(first + i * turn) % 4] for i in range(4)], rng.randint(4, 7)
    places = [(24 + dx, 24 + dy) for dx, dy in (step(order[i % 4], 15) for i in range(visits))]
    seen = [place for place in places for _ in range(2)] + home * FRAMES
    hero["x"], hero["y"] = (list(track) for track in zip(*seen[:FRAMES], strict=True))
    for i in range(visits):
        label(hero, order[i % 4], 2 * i, 2 * i + 2)
    return {"objects": [hero], "events": [event(order[i % 4], 2 * i, 2 * i + 2) for i in range(visits)]}


def action_antonym(rng, cast):
    (x, y), scale = near(rng, 3), rng.uniform(0.8, 1.2)
    hero, pair, turn = thing(*cast(1)[0], x, y, size=16 * scale), rng.choice(list(generate.ANTONYMS)), rng.randrange(3)
    ramp = np.interp(range(FRAMES), (3, 12), ((-1, 1), (1, -1), (0, 0))[turn])
    change = rng.choice((5, 10))
    if pair == "size":
        hero["size"] = [scale * (16 + 5 * float(r)) for r in ramp]
    elif pair == "height":
        path(hero, *((t, x, y - 11 * float(ramp[t])) for t in range(FRAMES)))
    else:  # neither: always in view, or gone for the middle only
        show(hero, *([(change, 16)], [(0, change)], rng.choice(([(0, 16)], [(0, 5), (10, 16)])))[turn])
    verb = (*generate.ANTONYMS[pair], None)[turn]
    if verb and pair != "height":
        label(hero, verb, *((3, 13) if pair == "size" else (change - 2, change + 2)))
    return {"objects": [hero], "events": [event(verb, 3, 13)] if verb else [], "asked": pair}


def fine_grained_action(rng, cast):
    hero = thing(*cast(1)[0], *cell(rng), size=13, angle=90 * rng.randrange(4))
    action = rng.choice(generate.FINE_ACTIONS)
    if action not in ("bounces", "zigzags"):  # it stands where those two could be in a frame
        offset = rng.choice((6, 0, -3, -6))
        hero["y"] = [y + offset for y in hero["y"]]
    return {"objects": [hero], "events": [act(hero, action, -rng.randrange(4))]}


def unexpected_action(rng, cast):
    """It falls slantwise towards a wall; until frame 8 every clip is the same."""
    shape, colour = cast(1)[0]
    side, (x, y), what = rng.choice((-1, 1)), near(rng, 2, -4, -3), rng.choice(generate.SURPRISES)
    hero, twin = thing(shape, colour, 0, 0, size=12), thing(shape, colour, 0, 0, size=9)
    wall = thing("wall", "grey", 24 + side * 9, 24, size=48)
    show(twin)
    fall = [(0, 24 + side * (x - 13), y + 11), (8, 24 + side * x, y + 24)]
    end = {"teleports": [(9, 24 + side * x, y + 25), (10, 24 - side * 14, 38)], "stops in mid-fall": [],
           "passes through the wall": [(14, 24 + side * 18, 38)], "splits in two": [(14, 24 - side * 18, 38)]}[what]
    path(hero, *fall, *end)
    if what == "splits in two":
        path(twin, *fall, (14, 24 + side * 1, 40))
        hero["size"][9:] = [9] * 7
        show(twin, (9, 16))
        label(twin, what, 9)
    label(hero, what, 9)
    return {"objects": [hero, twin, wall], "events": [event("falls", 0, 9), event(what, 9)]}


def object_existence(rng, cast):
    """Two things move, one in each half; the lamp blinks in one of the halves or in none."""
    pairs, lamp = cast(2), thing("lamp", "grey", 24, 10, size=15)
    spots, halves, blink = rng.sample((11, 37), 2), rng.sample((0, 8), 2), rng.choice((0, 8, None))
    movers = [thing(*pair, x, 36) for pair, x in zip(pairs, spots, strict=True)]
    for one, x, start in zip(movers, spots, halves, strict=True):
        path(one, (start, x, 36), (start + 3, x, 23), (start + 6, x, 36))
    events = [event("moves", start, start + 7, who) for who, start in enumerate(halves)]
    if blink is not None:
        for t in (1, 2, 4, 5):
            lamp["look"][blink + t] = lamp["activity"][blink + t] = "lit"
        events.append(event("blinks", blink, blink + 7, 2))
    return {"objects": [*movers, lamp], "events": events}


def object_interaction(rng, cast):
    """From the centre to touch one of four things, and a little way towards another, in either order."""
    corners = [(9, 9), (39, 9), (9, 39), (39, 39)]
    hero, *others = (thing(*pair, x, y, size=11) for pair, (x, y) in zip(cast(5), [(24, 24), *corners], strict=True))
    touched, approached = rng.sample(range(4), 2)
    first, second = rng.sample((0, 8), 2)
    far, little = ([24 + (c - 24) * part for c in corners[i]] for i, part in ((touched, 0.55), (approached, 0.22)))
    path(hero, *sorted([(t + first, *p) for t, p in ((0, (24, 24)), (2, far), (4, far), (6, (24, 24)))]
                       + [(t + second, *p) for t, p in ((0, (24, 24)), (2, little), (4, little), (6, (24, 24)))]))
    label(others[touched], "touched", first + 2, first + 5)
    label(others[approached], "approached", second + 2, second + 5)
    return {"objects": [hero, *others], "events": [event("touches", first + 2, first + 5, target=touched + 1),
                                                   event("approaches", second + 2, second + 5, target=approached + 1)]}


def object_shuffle(rng, cast):
    """Two swaps drawn freely: whatever cup the ball starts under, it ends under each of the three equally often."""
    spots, order, start = [9, 24, 39], [0, 1, 2], rng.randrange(3)
    keys, events = [[(0, x, 30), (4, x, 30)] for x in spots], [event("hides", 0, 4, target=start + 1)]
    for t in (4, 8):
        a, b = rng.sample(range(3), 2)
        for here, there, rise in ((a, b, -11), (b, a, 11)):
            middle = (spots[here] + spots[there]) / 2
            keys[order[here]] += [(t + 2, middle, 30 + rise), (t + 4, spots[there], 30)]
        events.append(event("swaps", t, t + 5, order[a] + 1, target=order[b] + 1))
        order[a], order[b] = order[b], order[a]
        for cup in set(range(3)) - {order[a], order[b]}:
            keys[cup].append((t + 4, *keys[cup][-1][1:]))
    cups = [thing("cup", colour, 0, 0, size=14) for colour in rng.sample(generate.COLOURS, 3)]
    for cup, way in zip(cups, keys, strict=True):
        path(cup, *way)
    ball = thing("ball", "black", spots[start], 35, size=8)
    ball["x"], ball["y"] = cups[start]["x"][:], [y + 5 for y in cups[start]["y"]]
    cups[start]["y"][:3] = [17, 17, 17]  # lifted, to show what is under it
    show(ball, (0, 3))
    label(cups[start], "hides the ball", 0)
    return {"objects": [ball, *cups], "events": events}


def moving_direction(rng, cast):
    way, (x, y) = rng.choice((*generate.DIRECTIONS, None)), near(rng, 3)
    hero, (dx, dy) = thing(*cast(1)[0], x, y), step(way, 12) if way else (0, 0)
    path(hero, (0, x - dx, y - dy), (15, x + dx, y + dy))
    return {"objects": [hero], "events": [event(way, 0)] if way else []}


def action_localization(rng, cast):
    hero = thing(*cast(1)[0], *near(rng, 2), size=15, angle=90 * rng.randrange(4))
    span = rng.choice(((1, 5), (6, 10), (11, 15), (1, 15)))
    return {"objects": [hero], "events": [act(hero, rng.choice(generate.LOCAL_ACTIONS), *span)]}


def scene_transition(rng, cast):
    before, after = rng.sample(generate.PLACES, 2)
    return {"objects": [], "events": [], "background": [before] * 7 + ["dark"] * 2 + [after] * 7}


def action_count(rng, cast):
    """Four turns of four frames, in some of which it acts; in frames 7 and 8 it never does."""
    hero, action = thing(*cast(1)[0], *near(rng, 2)), rng.choice(generate.COUNTED_ACTIONS)
    turns = sorted(rng.sample(range(4), rng.randint(1, 4)))
    return {"objects": [hero], "events": [act(hero, action, 4 * turn + 1, 4 * turn + 5) for turn in turns]}


def shuttle(one, rng, moving):
    """To and fro over ten units; a thing that rests does so at a point of the same way, so one frame tells nothing."""
    phase, (dx, dy), x, y = rng.randrange(8), rng.choice(((5, 0), (0, 5))), one["x"][0], one["y"][0]
    waves = [wave(phase + t * moving) for t in range(FRAMES)]
    path(one, *((t, x + dx * w, y + dy * w) for t, w in enumerate(waves)))


def movers(rng, cast, count):
    """Four things in the four quarters, of which the first `count` move."""
    quarters = rng.sample([(12, 12), (36, 12), (12, 36), (36, 36)], 4)
    things = [thing(*pair, x, y, size=12) for pair, (x, y) in zip(cast(4), quarters, strict=True)]
    for i, one in enumerate(things):
        shuttle(one, rng, moving=i < count)
    return {"objects": things, "events": [event("moves", 0, who=i) for i in range(count)]}


def moving_count(rng, cast):
    return movers(rng, cast, rng.randint(1, 4))


def moving_attribute(rng, cast):
    return movers(rng, cast, 1)


def state_change(rng, cast):
    """Three states, of which the first and the last are asked about and the one in the middle means nothing."""
    states = [rng.choice(("plain", "lit")) for _ in range(3)]
    if rng.random() < 1 / 3:  # so change and no change come 2 : 1, and on, off and unchanged equally often
        states[2] = "lit" if states[0] == "plain" else "plain"
    lamp = thing("lamp", "grey", *near(rng, 5), size=26)
    lamp["look"] = [state for state, n in zip(states, (5, 6, 5), strict=True) for _ in range(n)]
    lamp["activity"] = ["lit" if look == "lit" else "still" for look in lamp["look"]]
    spans, names = ((0, 5), (5, 11), (11, 16)), {"lit": "on", "plain": "off"}
    return {"objects": [lamp],
            "events": [event(names[state], *span) for state, span in zip(states, spans, strict=True)]}


def fine_grained_pose(rng, cast):
    """Five turns through four poses; the middle one's is as often the last pose as any other."""
    poses, middle = rng.sample(generate.POSES, 4), rng.randrange(4)
    while True:
        order = [rng.randrange(4) for _ in range(5)]
        if order[2] == middle and order[4] == 3 and len(set(order)) == 4 and all(a != b for a, b in pairwise(order)):
            break
    spans = [(0, 3), (3, 6), (6, 9), (9, 12), (12, 16)]
    x, y = near(rng, 2)
    figures = [thing(pose, "black", x, y, size=26) for pose in poses]
    for i, figure in enumerate(figures):
        show(figure, *(span for span, pose in zip(spans, order, strict=True) if pose == i))
    return {"objects": figures, "events": [event(poses[i], *span, i) for i, span in zip(order, spans, strict=True)]}


def character_order(rng, cast):
    spans, (x, y), colour = [(0, 3), (4, 7), (10, 14)], cell(rng, 1), rng.choice(generate.COLOURS)
    letters = [thing(letter, colour, x, y, size=13) for letter in rng.sample(generate.LETTERS, 3)]
    for letter, span in zip(letters, spans, strict=True):
        show(letter, span)
    return {"objects": letters, "events": [event("shows", *span, i) for i, span in enumerate(spans)]}


def egocentric_navigation(rng, cast):
    """Some moves of a route whose last three and the stop are the four possible answers in any order."""
    route, done, heading = ["forward", *rng.sample(list(generate.MOVES), 3)], rng.randint(1, 4), rng.randrange(4)
    agent, at, keys, angles = thing("agent", "purple", 0, 0, size=14), (0.0, 0.0), [(0, 0.0, 0.0)], [90 * heading]
    for i, move in enumerate(route[:done]):
        heading += {"forward": 0, "left": -1, "right": 1}[move]
        at = at[0] + 7.5 * math.sin(math.pi / 2 * heading), at[1] - 7.5 * math.cos(math.pi / 2 * heading)
        angles += [90 * heading] * 3
        keys += [(3 * i + 1, *keys[-1][1:]), (3 * i + 3, *at)]
    shift = [rng.uniform(7 - min(c), 41 - max(c)) for c in list(zip(*keys, strict=True))[1:]]
    path(agent, *((t, x + shift[0], y + shift[1]) for t, x, y in keys))
    agent["angle"] = (angles + angles[-1:] * FRAMES)[:FRAMES]
    return {"objects": [agent], "events": [event(move, 3 * i, 3 * i + 3) for i, move in enumerate(route[:done])],
            "route": route}


def episodic_reasoning(rng, cast):
    """A gift goes from one person to another in one place, and from that one to a third in the next."""
    places, colours = rng.sample(generate.PLACES, 2), rng.sample(generate.COLOURS, 3)
    gift, left = thing("gift", "white", 0, 0, size=11), [rng.choice((12, 36)) for _ in places]
    people = [thing("person", colours[i], 0, 31, size=30) for i in (0, 1, 2)]
    people[1]["x"] = [48 - left[0]] * 8 + [left[1]] * 8
    people[0]["x"], people[2]["x"] = [left[0]] * FRAMES, [48 - left[1]] * FRAMES
    for person, span in zip(people, ([(0, 7)], [(0, 7), (9, 16)], [(9, 16)]), strict=True):
        show(person, *span)
    path(gift, (2, left[0], 8), (5, 48 - left[0], 8), (8, 48 - left[0], 8),
         (9, left[1], 8), (10, left[1], 8), (13, 48 - left[1], 8))
    show(gift, (0, 7), (9, 16))
    return {"objects": [gift, *people], "background": [places[0]] * 7 + ["dark"] * 2 + [places[1]] * 7,
            "events": [event("gives", 2, 6, 1, target=2, place=places[0]),
                       event("gives", 10, 14, 2, target=3, place=places[1])]}


def counterfactual_inference(rng, cast):
    """It hits one of four grey blocks twice; behind three of the blocks stands something."""
    sides, pairs = rng.sample(generate.SIDES, 4), cast(4)
    away = {side: step(side, 1) for side in sides}
    hero = thing(*pairs[0], 24, 24, size=10)
    others = [thing(*pair, *(24 + 19 * d for d in away[side]), size=10)
              for pair, side in zip(pairs[1:], sides[:3], strict=True)]
    blocks = [thing("block", "grey", *(24 + 12 * d for d in away[s]), size=14, angle=90 * (dy != 0))
              for s, (_, dy) in away.items()]
    way, home = rng.randrange(4), (24, 24)
    touch = tuple(24 + 5.5 * d for d in away[sides[way]])
    path(hero, (0, *home), (2, *touch), (4, *touch), (6, *home), (9, *home), (11, *touch), (13, *touch), (15, *home))
    things = [hero, *others, *blocks]
    hit = first_hit(things, away[sides[way]])
    return {"objects": things, "events": [event("hits", start, start + 3, target=hit) for start in (2, 11)],
            "counterfactual": {"without": hit, "hits": first_hit(things, away[sides[way]], without=hit)}}


def first_hit(things, way, without=None):
    """The number of the first thing in the way of thing 0 when it sets out in the direction `way`, or None."""
    x, y = things[0]["x"][0], things[0]["y"][0]
    while 0 < x < UNITS and 0 < y < UNITS:
        x, y = x + way[0], y + way[1]
        for i, one in enumerate(things[1:], 1):
            if i != without and math.hypot(one["x"][0] - x, one["y"][0] - y) < 5:
                return i
    return None


SCENARIOS = {scenario.__name__: scenario for scenario in (
    action_sequence, action_prediction, action_antonym, fine_grained_action, unexpected_action, object_existence,
    object_interaction, object_shuffle, moving_direction, action_localization, scene_transition, action_count,
    moving_count, moving_attribute, state_change, fine_grained_pose, character_order, egocentric_navigation,
    episodic_reasoning, counterfactual_inference, playground)}


def scenario_of(index, playground):
    """The 20 tasks in turn, or the playground."""
    return "playground" if playground else list(generate.TASKS)[index % len(generate.TASKS)]

# ---------------------------------------------------------------------------------------------------------------------
# A world on disk. Every clip has a generator of its own, so that the bytes depend on the seed and not on the workers.


def told_clips(count):
    """How many of `count` training clips, from the first, stages 1 to 3 see: the others are for the ViT alone.

    These are all clips of the tasks (five in eight) and a quarter of the playground's.
    """
    return count * 23 // 32


def train_clip(index, count, out, seed, patch):
    """Write training clip `index` of `count`; return all that the files of the world say about it."""
    rng, video = random.Random(f"{seed}/train/{index}"), f"{index // 1000:02d}/{index:05d}.gif"
    clip = {"id": video} | simulate(scenario_of(index, playground=index >= 5 * count / 8), rng)
    write_gif(render(clip), out / "videos" / video)
    asked = clip["scenario"] != "playground" or index < told_clips(count) and index % 2 == 0  # stage 3 is for the tasks
    talks = [{"video": video, "QA": turns} for turns in generate.conversations(clip, rng)] if asked else []
    return clip, {"video": video, "caption": generate.caption(clip, rng)}, talks, token_targets(clip, patch)


def text_document(index, seed):
    """One line of text.jsonl: [caption, turns of a conversation, the same turns without options]."""
    rng = random.Random(f"{seed}/text/{index}")
    clip = simulate(scenario_of(3 * index // 4, playground=index % 4 == 0), rng)
    return json.dumps(generate.text_document(clip, rng))


def bench_task(task, out, seed, questions):
    """Write one task of the benchmark in the official layout; return its clips' annotations."""
    rng, row = random.Random(f"{seed}/test/{task}"), generate.TASKS[task]
    folder, entries, clips = out / "mvbench" / "video" / row.folder, [], []
    folder.mkdir(parents=True, exist_ok=True)
    for clip, choice in generate.benchmark(task, questions, partial(simulate, task, rng, "test"), rng):
        name = f"{rng.getrandbits(48):012x}"  # neutral: a file's name must not tell what is in it
        if row.folder.startswith("tvqa"):
            write_frames(render(clip), folder / name)
        else:
            name += ".gif"
            write_gif(render(clip), folder / name)
        entries.append({"video": name, **choice} | ({"start": 0.0, "end": clip["duration"]} if row.bound else {}))
        clips.append({"id": f"{row.folder}/{name}", **clip})
    write_json(out / "mvbench" / "json" / f"{task}.json", entries)
    return clips


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


def write_lines(path, values):
    with open(path, "w") as file:
        for value in values:
            file.write((value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))) + "\n")


def write_world(out, settings, each):
    """Everything but meta.json into the folder `out`. `each(function, values, title)` is a map with a progress bar."""
    seed, patch, count = settings["seed"], settings["patch"], settings["clips"]
    for i in range(-(-count // 1000)):
        (out / "videos" / f"{i:02d}").mkdir(parents=True)
    targets = np.lib.format.open_memmap(out / "targets.npy", "w+", np.uint8, (count, FRAMES, (UNITS // patch) ** 2, 3))
    clips, captions, instructions = [], [], []
    for i, (clip, told, talks, target) in enumerate(
            each(partial(train_clip, count=count, out=out, seed=seed, patch=patch), range(count), "clips")):
        targets[i] = target
        clips.append(clip)
        captions.append(told)
        instructions += talks
    targets.flush()
    write_lines(out / "annotations.jsonl", clips)
    write_json(out / "captions.json", captions[:told_clips(count)])
    write_json(out / "captions_more.json", captions[told_clips(count):])
    write_json(out / "instructions.json", instructions)
    for corpus, files in (("clips", ("captions", "captions_more")), ("caption", ("captions",))):
        write_json(out / f"corpus_{corpus}.json", [[f"{name}.json", "videos", "video"] for name in files])
    write_json(out / "corpus_instruct.json", [["instructions.json", "videos", "video"]])
    write_lines(out / "text.jsonl", each(partial(text_document, seed=seed), range(settings["texts"]), "texts"))
    (out / "mvbench" / "json").mkdir(parents=True)
    bench = partial(bench_task, out=out, seed=seed, questions=settings["questions"])
    write_lines(out / "mvbench" / "annotations.jsonl",
                (clip for clips in each(bench, list(generate.TASKS), "benchmark") for clip in clips))


def build(out, clips=32000, questions=100, texts=40000, seed=0, patch=12, workers=None):
    """Write a world into `out`, whole or not at all. A finished one of the same settings is kept: returns False.

    Raises ValueError for settings that cannot be, FileExistsError where something else is in the way.
    """
    out = Path(out)
    settings = {"clips": clips, "questions": questions, "texts": texts, "seed": seed, "patch": patch}
    for name in ("clips", "questions", "texts", "patch"):
        if settings[name] < 1:
            raise ValueError(f"--{name} {settings[name]}: expected 1 or more")
    if UNITS % patch:
        raise ValueError(f"--patch {patch}: expected a divisor of {UNITS}, the width of the world")
    if out.exists():
        meta = out / "meta.json"
        found = json.loads(meta.read_text())["settings"] if meta.is_file() else None
        if found == settings:
            return False
        raise FileExistsError(f"{out}: holds {f'a world of other settings {found}' if found else 'something else'}; "
                              f"wanted {settings}. Choose another --out or delete it")
    part = out.with_name(out.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    # Workers leave Ctrl-C to the parent, which then throws the unfinished folder away.
    pool = Pool(workers or os.cpu_count(), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        def each(function, values, title):
            done = pool.imap(function, values, 1 if title == "benchmark" else 32)
            return tqdm(done, title, len(values), disable=not sys.stderr.isatty())

        write_world(part, settings, each)
        write_json(part / "meta.json", {"settings": settings, "frames": FRAMES, "fps": FPS, "units": UNITS,
                                        "pixels": PIXELS, "colours": COLOURS, "shapes": SHAPES,
                                        "activities": ACTIVITIES, "held_out": sorted(HELD_OUT)})
        part.rename(out)
    finally:
        pool.terminate()
        shutil.rmtree(part, ignore_errors=True)
    return True


def sheet_rows(seed=0):
    """A question of each task for the contact sheet: (title, clip, question)."""
    for task, row in generate.TASKS.items():
        rng = random.Random(f"{seed}/sheet/{task}")
        (clip, choice), = generate.benchmark(task, 1, partial(simulate, task, rng, "test"), rng, trials=1)
        yield row.name, clip, choice


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", default="data/toy", help="folder to write; it appears only when it is complete")
    parser.add_argument("--clips", type=int, default=32000,
                        help="training clips, five in eight of the tasks in turn, the others of the playground")
    parser.add_argument("--questions", type=int, default=100, help="questions of each task of the benchmark")
    parser.add_argument("--texts", type=int, default=40000, help="documents without a video, for the language model")
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same bytes")
    parser.add_argument("--patch", type=int, default=12, help="side of a teacher's patch in a world 48 wide")
    parser.add_argument("--workers", type=int, default=None, help="processes; default one for each core")
    parser.add_argument("--sheet", help="also draw one question of each task into this PNG file")
    args = vars(parser.parse_args(argv))
    sheet, started = args.pop("sheet"), time.monotonic()
    try:
        fresh = build(**args)
        if sheet:
            contact_sheet(list(sheet_rows(args["seed"])), sheet)
    except KeyboardInterrupt:
        print("\nstopped; nothing was kept", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        print(f"toyworld.py: {error}", file=sys.stderr)
        return 2
    took = f"written in {time.monotonic() - started:.0f} s"
    print(f"{args['out']}: {took if fresh else 'already there'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
