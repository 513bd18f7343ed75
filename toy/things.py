"""The vocabulary, the objects and the events of the toy world: what its scenarios share.

An object is a dict: a shape, a colour and six tracks of one value per frame, "x", "y", "size" (its diameter), "angle"
(degrees, clockwise), "look" (plain | hollow | lit | hidden) and "activity" (a class of toy/draw.py). An event says what
an object does from when to when, in seconds, as data sets do. y points down.
Not here: the scenarios (scenarios.py), drawing (draw.py), which objects a clip may have (world.py).

    pytest tests/test_world.py
"""
import math

import numpy as np

FRAMES, FPS = 16, 2
UNITS = 48    # the world is 48 x 48 units

# what there is
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
GLYPHS = ("A", "C", "H", "K", "L", "T", "X", "Z")
POSES = ("raises its arms", "spreads its arms", "kneels", "bows", "kicks", "lies down")
PLACES = ("city", "desert", "sea", "forest", "snow")
QUARTERS = ((12, 12), (36, 12), (12, 36), (36, 36))    # the middles of the four quarters of the picture

# what it does
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")  # clockwise
SIDES = ("left", "right", "up", "down")
STRAIGHT = (*DIRECTIONS, "rests")
FINE_ACTIONS = ("spins clockwise", "spins counter-clockwise", "wobbles", "bounces", "zigzags")
PLAYS = (*DIRECTIONS, "grows", "shrinks", "blinks", "jumps", "shakes", *FINE_ACTIONS, "rests")

EFFECTS = {  # what frame k of n adds to x, y and angle, multiplies size by, or replaces look with
    # a spin turns by 90 degrees every two frames, so that a frame shows no angle that an object at rest does not
    "grows": lambda k, n: {"size": 1 + 0.6 * (k + 1) / n},
    "shrinks": lambda k, n: {"size": 1 - 0.45 * (k + 1) / n},
    "spins": lambda k, n: {"angle": 90 * (k // 2 + 1)},
    "spins clockwise": lambda k, n: {"angle": 90 * (k // 2 + 1)},
    "spins counter-clockwise": lambda k, n: {"angle": -90 * (k // 2 + 1)},
    "blinks": lambda k, n: {"look": "hollow" if k % 4 < 2 else "plain"},
    "jumps": lambda k, n: {"y": -10 if k % 4 < 2 else 0},
    "shakes": lambda k, n: {"x": 6 if k % 4 < 2 else -6},
    "wobbles": lambda k, n: {"angle": 90 * (k // 2 + 1) % 180},
    "bounces": lambda k, n: {"y": 6 - 12 * abs(math.sin(math.pi * k / 4))},
    "zigzags": lambda k, n: {"x": 20 * k / (n - 1) - 10, "y": 6 * (abs(k % 4 - 2) - 1)},
}

class Object(dict):
    """An object at rest, and the ways to change its tracks; an annotation read from JSON has plain dicts instead."""

    def __init__(self, shape, colour, x, y, size=14, angle=0):
        super().__init__(shape=shape, colour=colour)
        tracks = {"x": x, "y": y, "size": size, "angle": angle, "look": "plain", "activity": "still"}
        self.update({key: [value] * FRAMES for key, value in tracks.items()})

    def set_activity(self, activity, start, end=FRAMES):
        self["activity"][start:end] = [activity] * (min(end, FRAMES) - start)

    def show_during(self, *spans):
        """Hide it outside these [start, end) spans of frames."""
        self["look"] = ["plain" if any(a <= t < b for a, b in spans) else "hidden" for t in range(FRAMES)]

    def perform(self, action, start=0, end=FRAMES):
        """Change the tracks by an action in frames start .. end - 1 -> its event. `start` may be negative."""
        first = max(start, 0)
        for t in range(first, min(end, FRAMES)):
            for key, change in EFFECTS[action](t - start, end - start).items():
                value = self[key][t]
                self[key][t] = change if key == "look" else value * change if key == "size" else value + change
        self.set_activity("spins clockwise" if action == "spins" else action, first, end)  # one movement, one class
        return new_event(action, first, end)

    def move_along(self, *keys):
        """Move in straight lines through (frame, x, y) keys; the activity is the nearest of eight directions."""
        frames, xs, ys = zip(*keys, strict=True)
        self["x"] = [float(x) for x in np.interp(range(FRAMES), frames, xs)]
        self["y"] = [float(y) for y in np.interp(range(FRAMES), frames, ys)]

        for t in range(1, FRAMES):
            dx, dy = self["x"][t] - self["x"][t - 1], self["y"][t] - self["y"][t - 1]
            octant = round(math.degrees(math.atan2(dy, dx)) / 45) % 8
            self["activity"][t] = "still" if math.hypot(dx, dy) < 1 / 3 else DIRECTIONS[octant]
        if self["activity"][1] != "still":  # frame 0 has no frame before it
            self["activity"][0] = self["activity"][1]

def new_event(action, start, end=FRAMES, obj=0, **details):
    """Object number `obj` does it from frame `start` until before frame `end`."""
    return {"object": obj, "action": action, "start": start / FPS, "end": end / FPS, **details}

def direction_vector(name, length):
    """(dx, dy) of a step in one of the eight directions."""
    angle = math.radians(45 * DIRECTIONS.index(name))
    return length * math.cos(angle), length * math.sin(angle)

def random_point(rng, radius, x=24, y=24):
    """A point around (x, y), at random because where an object is must not give away what it does."""
    return x + rng.uniform(-radius, radius), y + rng.uniform(-radius, radius)

def patch_point(rng, radius=1.5):
    """A point around the middle of one of the four inner patches, where one token covers a small object entirely."""
    return random_point(rng, radius, rng.choice((18, 30)), rng.choice((18, 30)))

def four_movers(rng, cast, count):
    """Four objects in the four quarters, of which the first `count` move to and fro over ten units."""
    spots = rng.sample(QUARTERS, 4)
    objects = [Object(*pair, *spot, size=12) for pair, spot in zip(cast(4), spots, strict=True)]
    for i, obj in enumerate(objects):
        # one that rests is at a point of the same path, so that a frame gives nothing away; wave goes from -1 to 1
        phase, (dx, dy), x, y = rng.randrange(8), rng.choice(((5, 0), (0, 5))), obj["x"][0], obj["y"][0]
        wave = [abs((phase + t * (i < count)) % 8 - 4) / 2 - 1 for t in range(FRAMES)]
        obj.move_along(*((t, x + dx * w, y + dy * w) for t, w in enumerate(wave)))
    return {"objects": objects, "events": [new_event("moves", 0, obj=i) for i in range(count)]}

def name_of(obj):
    return f"the {obj['colour']} {obj['shape']}"

def hero_slot(clip):
    """The hero is the first object; questions name it in their slot {hero}."""
    return {"hero": name_of(clip["objects"][0])}

def sorted_events(clip, *actions):
    """The clip's events by start time; with `actions`, only those."""
    events = [event for event in clip["events"] if not actions or event["action"] in actions]
    return sorted(events, key=lambda event: event["start"])
