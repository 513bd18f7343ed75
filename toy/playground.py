"""The playground: clips without a task, in which all objects do something all the time.

A ViT learns from them what movement looks like (toy/pretrain.py); the benchmark never has them. The class has the
interface of the scenarios in toy/scenarios.py.

    pytest tests/test_qagen.py
"""
from qagen.generate import Fact, QATask, capitalize, excluding
from toy import things
from toy.things import Object, direction_vector, name_of, new_event, random_point

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
        events = []
        for i, obj in enumerate(objects):
            action = rng.choice(plays)
            if action in things.DIRECTIONS:
                (x, y), (dx, dy) = (obj["x"][0], obj["y"][0]), direction_vector(action, 9)
                obj.move_along((0, x - dx, y - dy), (15, x + dx, y + dy))
            elif action != "rests":
                obj.perform(action)
            events.append(new_event(action, 0, obj=i))
        return {"objects": objects, "events": events}

    def describe(self, clip, rng):
        def moves(action):
            return f"moves {action}" if action in things.DIRECTIONS else action

        actions, facts = {name_of(clip["objects"][e["object"]]): moves(e["action"]) for e in clip["events"]}, []
        for name, action in actions.items():
            wrong = excluding(dict.fromkeys(actions.values()), action)  # what the others do, each once
            wrong += rng.sample(excluding(map(moves, things.PLAYS), *actions.values()), 3 - len(wrong))
            facts.append(Fact.from_template("does", capitalize(name) + " {}.", action, wrong, {"hero": name}))

        # in reading order of their mean place; in random order a model could not know which comes next
        x, y = ({name_of(obj): sum(obj[key]) / len(obj[key]) for obj in clip["objects"]} for key in "xy")
        names = sorted(x, key=lambda name: (y[name] > 24, x[name]))
        return " ".join(f"{capitalize(name)} {actions[name]}." for name in names), facts
