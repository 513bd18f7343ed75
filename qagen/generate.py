"""Static to dynamic: from annotations of videos to captions and to the 20 tasks' multiple-choice questions.

Is: the table of the tasks (parent spatial task, phrasings, option rule, number of options); for each task the reading
of an annotation that yields a caption and facts to ask for; filters; options drawn, shuffled and balanced.
Is not: a simulator or a renderer. It takes annotations, plain dicts of objects, events and backgrounds, from anywhere.
Source: MVBench (arXiv 2311.17005v4) section 3.2 and table 1; the task files' names are those of the official data.

    python -c "import qagen; [print(task) for task in qagen.TASKS.values()]"

An annotation: {"scenario": a key of TASKS, "duration": seconds, "background": [name per frame],
"objects": [{"shape", "colour", tracks ...}], "events": [{"object", "action", "start", "end", ...} in seconds], ...}.
"""

from collections import Counter
from dataclasses import dataclass, field

from prompt import QUESTION_PROMPT, SYSTEM, mvbench_question

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")  # clockwise
SIDES = ("left", "right", "up", "down")
ACTIONS = ("grows", "shrinks", "spins", "blinks", "jumps", "shakes")
LOCAL_ACTIONS = ("spins", "jumps", "shakes", "wobbles")
COUNTED_ACTIONS = ("jumps", "blinks")
FINE_ACTIONS = ("spins clockwise", "spins counter-clockwise", "wobbles", "bounces", "zigzags")
STRAIGHT = (*DIRECTIONS, "rests")
PLAYS = (*DIRECTIONS, "grows", "shrinks", "blinks", "jumps", "shakes", *FINE_ACTIONS, "rests")
SURPRISES = ("teleports", "passes through the wall", "stops in mid-fall", "splits in two")
ANTONYMS = {"size": ("grows", "shrinks"), "presence": ("appears", "disappears"), "height": ("rises", "falls")}
PLACES = ("city", "desert", "sea", "forest", "snow")
LETTERS = ("A", "C", "H", "K", "L", "T", "X", "Z")
POSES = ("raises its arms", "spreads its arms", "kneels", "bows", "kicks", "lies down")
MOVES = {"forward": "go forward", "left": "turn left", "right": "turn right"}  # a turn is gone on with forward


@dataclass(frozen=True)
class Task:
    """One row of the table: where its official files lie, what it asks and how its options come about."""
    name: str     # as in the published table
    parent: str   # the spatial task of image benchmarks that it makes temporal
    folder: str   # official media folder
    options: int  # how many
    rule: str     # where the wrong options come from
    ask: dict     # kind of question -> three phrasings or more
    bound: bool = False  # its entries have "start" and "end"


TASKS = {  # official name of the json file -> task, in the order of the published table
    "action_sequence": Task(
        "Action Sequence", "Action", "star/Charades_v1_480", 4, "one more that it did, two that it did not", {
            "after": ("What does {hero} do after it {anchor}?", "What happens after {hero} {anchor}?",
                      "Which action comes after {hero} {anchor}?"),
            "before": ("What does {hero} do before it {anchor}?", "What happens before {hero} {anchor}?",
                       "Which action comes before {hero} {anchor}?")}, bound=True),
    "action_prediction": Task(
        "Action Prediction", "Action", "star/Charades_v1_480", 4, "the four ways", {
            "next": ("{Hero} goes round in a fixed order. Where will it go next?",
                     "What will {hero} do next, going on in the same order?",
                     "Which way does {hero} go next in its pattern?")}, bound=True),
    "action_antonym": Task(
        "Action Antonym", "Action", "ssv2_video", 3, "the opposite and \"not sure\"", {
            "what": ("What does {hero} do?", "What happens to {hero}?", "Which of these does {hero} do?")}),
    "fine_grained_action": Task(
        "Fine-grained Action", "Action", "Moments_in_Time_Raw/videos", 4, "three look-alikes of four", {
            "how": ("How does {hero} move?", "Which movement does {hero} make?",
                    "What exactly does {hero} do in the video?")}),
    "unexpected_action": Task(
        "Unexpected Action", "Action", "FunQA_test/test", 4, "the four surprises", {
            "what": ("What unexpected thing happens to {hero}?", "What is surprising about {hero}?",
                     "Which surprising thing does {hero} do?")}),
    "object_existence": Task(
        "Object Existence", "Object", "clevrer/video_validation", 3, "yes, no, not sure", {
            "is": ("Is there {a} moving while the lamp blinks?", "While the lamp blinks, does {a} move?",
                   "Does {a} move when the lamp blinks?")}),
    "object_interaction": Task(
        "Object Interaction", "Object", "star/Charades_v1_480", 4, "the other objects of the clip", {
            "touch": ("Which object is it that {hero} touches?", "What is the thing that {hero} touches?",
                      "{Hero} touches one of the objects. Which one?"),
            "near": ("Which object is it that {hero} only approaches?",
                     "What is the thing that {hero} only approaches?",
                     "{Hero} only approaches one of the objects. Which one?")}, bound=True),
    "object_shuffle": Task(
        "Object Shuffle", "Object", "perception/videos", 3, "left, middle, right", {
            "where": ("Where is the ball at the end?", "Where is the hidden ball at the end of the video?",
                      "Under which cup is the ball when the cups have stopped?")}),
    "moving_direction": Task(
        "Moving Direction", "Position", "clevrer/video_validation", 4, "three of eight ways and \"stationary\"", {
            "way": ("In which direction does {hero} move?", "What direction is {hero} moving in?",
                    "Which way does {hero} go?")}),
    "action_localization": Task(
        "Action Localization", "Position", "sta/sta_video", 4, "beginning, middle, end, throughout", {
            "when": ("During which part of the video does it happen that {hero} {action}?",
                     "When can it be seen that {hero} {action}?", "At what time is it that {hero} {action}?"),
        }, bound=True),
    "scene_transition": Task(
        "Scene Transition", "Scene", "scene_qa/video", 4, "the reverse, another change and its reverse", {
            "change": ("How does the scene change?", "What is the change of scene in the video?",
                       "Which option describes the change of scene?")}),
    "action_count": Task(
        "Action Count", "Count", "perception/videos", 3, "two other numbers from 1 to 4", {
            "count": ("How many times is it that {hero} {action}?", "How often is it that {hero} {action}?",
                      "What is the number of times that {hero} {action}?")}),
    "moving_count": Task(
        "Moving Count", "Count", "clevrer/video_validation", 4, "1 to 4", {
            "count": ("How many objects move?", "What is the number of moving objects?",
                      "How many objects are moving in the video?")}),
    "moving_attribute": Task(
        "Moving Attribute", "Attribute", "clevrer/video_validation", 3, "of two objects that do not move", {
            "colour": ("What is the colour of the object that moves?", "Which colour does the moving object have?",
                       "What colour is the moving object?"),
            "shape": ("What is the shape of the object that moves?", "Which shape does the moving object have?",
                      "What shape is the moving object?")}),
    "state_change": Task(
        "State Change", "Attribute", "perception/videos", 3, "on, off, unchanged", {
            "state": ("How did the state of the lamp change from the start to the end?",
                      "From the first moment to the last, how did the lamp change?",
                      "Compared with the start, what is the lamp's state at the end?")}),
    "fine_grained_pose": Task(
        "Fine-grained Pose", "Pose", "nturgbd", 4, "the other poses of the clip", {
            "last": ("Which pose does the figure end in?", "What does the figure do at the end?",
                     "What is the last thing that the figure does?")}),
    "character_order": Task(
        "Character Order", "Character", "perception/videos", 3, "two other orders of the same letters", {
            "order": ("In which order are the letters shown?", "What is the order of the letters in the video?",
                      "Which order do the letters appear in?")}),
    "egocentric_navigation": Task(
        "Egocentric Navigation", "Cognition", "vlnqa", 4, "forward, left, right, stop", {
            "next": ("The agent follows this route: {route}. What is its next move?",
                     "The route is: {route}. What should the agent do next?",
                     "Route: {route}. Given the video so far, what comes next?")}),
    "episodic_reasoning": Task(
        "Episodic Reasoning", "Cognition", "tvqa/frames_fps3_hq", 5, "the others of the clip and of the world", {
            "start": ("Who has the gift at the start?", "Whose is the gift at the start?",
                      "Which person has the gift at the start?"),
            "between": ("Who has the gift in between?", "Whose is the gift in between?",
                        "Which person has the gift in between?"),
            "end": ("Who has the gift at the end?", "Whose is the gift at the end?",
                    "Which person has the gift at the end?"),
            "where_first": ("Where is the gift given first?", "In which place is the gift given first?",
                            "What is the place where the gift is given first?"),
            "where_last": ("Where is the gift given last?", "In which place is the gift given last?",
                           "What is the place where the gift is given last?")}, bound=True),
    "counterfactual_inference": Task(
        "Counterfactual Inference", "Cognition", "clevrer/video_validation", 4, "the other objects and nothing", {
            "without": ("If the block that {hero} hits were not there, what would it hit?",
                        "What would {hero} hit without the block that stops it?",
                        "Without the block that it hits, what would {hero} run into?")}),
}


PLAYGROUND = Task(  # of training alone, never of the benchmark: what everything does that can be done
    "Playground", "Action", "", 4, "what the others do, and what nobody does", {
        "does": ("What does {hero} do?", "What is {hero} doing?", "Which of these does {hero} do?")})
ROWS = TASKS | {"playground": PLAYGROUND}


@dataclass(frozen=True)
class Fact:
    """Something to ask for: the kind of question, its answer and exactly as many wrong options as the task has."""
    kind: str
    answer: str
    wrong: list
    slots: dict = field(default_factory=dict)  # for the holes in the phrasing
    cell: tuple = ()  # the benchmark holds equally many of each; where empty, of each (answer, kind)


# ---------------------------------------------------------------------------------------------------------------------
# Reading annotations. Each reader takes (clip, rng) and returns (caption, facts). A clip has one way to
# tell it: which of two the writer would choose is nothing that can be seen. What will be asked for is told first;
# behind what leads to it, it could be read off these words, and would be learned from them instead of from the video.
# A lone hero is "it": its name, which every question says, would be most of what there is to learn in a caption.


def the(one):
    return f"the {one['colour']} {one['shape']}"


def upper(text):
    """Only the first letter: str.capitalize would lower the letters of Character Order."""
    return text[:1].upper() + text[1:]


def option(text):
    return upper(text) + "."


def counted(count, noun):
    return f"{count} {noun}{'' if int(count) == 1 else 's'}"


def but(pool, *taken):
    return [entry for entry in pool if entry not in taken]


def by_place(things):
    """In the order of reading, by where they are on average: an order at random would be a guess for who sees them."""
    def place(one):
        x, y = (sum(one[key]) / len(one[key]) for key in "xy")
        return y > 24, x

    return sorted(things, key=place)


def in_order(clip, *actions):
    """The clip's events by their start, those of the given actions if any are given."""
    return sorted((e for e in clip["events"] if not actions or e["action"] in actions), key=lambda e: e["start"])


def action_sequence(clip, rng):
    first, second, third = (e["action"] for e in in_order(clip))
    hero = the(clip["objects"][0])
    unseen = but(ACTIONS, first, second, third)
    facts = [Fact(kind, f"{upper(kind)} that it {answer}.", [f"{upper(kind)} that it {a}." for a in (
        other, *rng.sample(unseen, 2))], {"hero": hero, "anchor": second})
             for kind, answer, other in (("after", third, first), ("before", first, third))]
    return f"it {second}. Before that it {first}. After that it {third}.", facts


def action_prediction(clip, rng):
    """The order is what happens until the first way comes again; the next is the one after the last."""
    hero, ways = the(clip["objects"][0]), [e["action"] for e in in_order(clip)]
    period = ways.index(ways[0], 1) if ways[0] in ways[1:] else len(ways)
    after = ways[len(ways) % period]
    return f"it goes {after} next.", [
        Fact("next", f"It goes {after}.", [f"It goes {way}." for way in but(SIDES, after)], {"hero": hero})]


def action_antonym(clip, rng):
    hero, pair = the(clip["objects"][0]), ANTONYMS[clip["asked"]]
    done = clip["events"][0]["action"] if clip["events"] else None
    answers = [*(f"It {verb}." for verb in pair), "Not sure."]
    answer = f"It {done}." if done else "Not sure."
    cell = answers.index(answer), clip["asked"]
    told = f"it {done}." if done else f"it is not sure that it {pair[0]} or {pair[1]}."
    return told, [Fact("what", answer, but(answers, answer), {"hero": hero}, cell)]


def fine_grained_action(clip, rng):
    hero, done = the(clip["objects"][0]), clip["events"][0]["action"]
    wrong = rng.sample(but(FINE_ACTIONS, done), 3)
    return f"it {done}.", [Fact("how", f"It {done}.", [f"It {w}." for w in wrong], {"hero": hero})]


def unexpected_action(clip, rng):
    hero, done = the(clip["objects"][0]), in_order(clip, *SURPRISES)[0]["action"]
    return f"it {done}.", [
        Fact("what", f"It {done}.", [f"It {w}." for w in but(SURPRISES, done)], {"hero": hero})]


def object_existence(clip, rng):
    """Cells: yes, no, not sure, whatever moves."""
    blinks, facts, told = in_order(clip, "blinks"), [], {}
    for move in in_order(clip, "moves"):
        one = the(clip["objects"][move["object"]])
        together = blinks and move["start"] < blinks[0]["end"] and blinks[0]["start"] < move["end"]
        answers = {"yes": f"{one} moves with the lamp", "no": f"{one} moves without the lamp",
                   "not sure": "the lamp never blinks"}
        verdict = "not sure" if not blinks else "yes" if together else "no"
        told[verdict] = answers[verdict]
        answer, *wrong = (f"{upper(word)}, {answers[word]}." for word in (verdict, *but(answers, verdict)))
        an = one.replace("the", "an" if one.startswith("the o") else "a", 1)
        facts.append(Fact("is", answer, wrong, {"a": an}, (verdict, answer)))
    return ", ".join(told[verdict] for verdict in sorted(told, reverse=True)) + ".", facts


def object_interaction(clip, rng):
    hero, *others = map(the, clip["objects"])
    touched, neared = (others[in_order(clip, action)[0]["target"] - 1] for action in ("touches", "approaches"))
    return f"it touches {touched} and only approaches {neared}.", [
        Fact(kind, f"It {verb} {answer}.", [f"It {verb} {other}." for other in but(others, answer)], {"hero": hero})
        for kind, verb, answer in (("touch", "touches", touched), ("near", "only approaches", neared))]


def object_shuffle(clip, rng):
    """The cups' last places come from their tracks, the cup from the event that hides the ball."""
    cups = {i: one for i, one in enumerate(clip["objects"]) if one["shape"] == "cup"}
    hidden = in_order(clip, "hides")[0]["target"]
    row = sorted(cups, key=lambda i: cups[i]["x"][-1])
    place = ("left", "middle", "right")[row.index(hidden)]
    wrong = [f"Under the {other} cup." for other in but(("left", "middle", "right"), place)]
    return f"at the end the ball is under the {place} cup.", [
        Fact("where", f"Under the {place} cup.", wrong)]


def moving_direction(clip, rng):
    hero, ways = the(clip["objects"][0]), [*(f"moves {way}" for way in DIRECTIONS), "is stationary"]
    way = f"moves {clip['events'][0]['action']}" if clip["events"] else ways[-1]
    return f"it {way}.", [
        Fact("way", f"It {way}.", [f"It {w}." for w in rng.sample(but(ways, way), 3)], {"hero": hero})]


def action_localization(clip, rng):
    """Throughout is more than half of the clip; else the third that holds the middle of the action."""
    parts = ("At the beginning.", "In the middle.", "At the end.", "Throughout the video.")
    hero, done = the(clip["objects"][0]), clip["events"][0]
    middle = (done["start"] + done["end"]) / 2 / clip["duration"]
    when = parts[3 if done["end"] - done["start"] > clip["duration"] / 2 else int(3 * middle)]
    return f"it {done['action']} {when[0].lower()}{when[1:]}", [
        Fact("when", when, but(parts, when), {"hero": hero, "action": done["action"]})]


def scene_transition(clip, rng):
    """Change, reverse, and from or to the same pivot another change with its reverse: each as likely to be right."""
    before, after = clip["background"][0], clip["background"][-1]
    pivot, third = rng.choice((before, after)), rng.choice(but(PLACES, before, after))
    wrong = [(after, before), (pivot, third), (third, pivot)]
    return f"the scene changes from {before} to {after}.", [
        Fact("change", f"It changes from {before} to {after}.", [f"It changes from {a} to {b}." for a, b in wrong])]


def action_count(clip, rng):
    hero, action, count = the(clip["objects"][0]), clip["events"][0]["action"], str(len(clip["events"]))
    return f"it {action} {counted(count, 'time')}.", [
        Fact("count", count, rng.sample(but("1234", count), 2), {"hero": hero, "action": action})]


def moving_count(clip, rng):
    count = str(len(clip["events"]))
    return f"{counted(count, 'object')} {'moves' if count == '1' else 'move'}.", [
        Fact("count", count, but("1234", count))]


def moving_attribute(clip, rng):
    mover = clip["objects"][clip["events"][0]["object"]]
    resting = [one for one in clip["objects"] if one is not mover]
    return f"{the(mover)} moves.", [
        Fact(kind, f"It is {an}{mover[kind]}.", [f"It is {an}{one[kind]}." for one in rng.sample(resting, 2)])
        for kind, an in (("colour", ""), ("shape", "a "))]


def state_change(clip, rng):
    answers = {("off", "on"): "It was turned on.", ("on", "off"): "It was turned off."}
    states = [e["action"] for e in in_order(clip)]
    answer = answers.get((states[0], states[-1]), "It did not change.")
    return answer.replace("It", "the lamp"), [
        Fact("state", answer, but((*answers.values(), "It did not change."), answer))]


def fine_grained_pose(clip, rng):
    poses = [e["action"] for e in in_order(clip)]
    others = sorted(set(poses) - {poses[-1]})
    return f"at the end the figure {poses[-1]}.", [
        Fact("last", option(f"it {poses[-1]}"), [option(f"it {pose}") for pose in others])]


def character_order(clip, rng):
    letters = [clip["objects"][e["object"]]["shape"] for e in in_order(clip)]
    a, b, c = letters
    orders = [[a, c, b], [b, a, c], [b, c, a], [c, a, b], [c, b, a]]
    told = "first {}, then {}, last {}.".format
    return f"the letters are {told(a, b, c)}", [
        Fact("order", f"They are {told(a, b, c)}", [f"They are {told(*order)}" for order in rng.sample(orders, 2)])]


def egocentric_navigation(clip, rng):
    """Of the route's numbered moves but the first, the one after those that the agent has made. Cells: its number."""
    done, route = in_order(clip), [*(MOVES[move] for move in clip["route"]), "stop"]
    moves = [f"{number} {move}" for number, move in enumerate(route, 1)]
    answer, *wrong = (f"Move {move}." for move in (moves[len(done)], *but(moves[1:], moves[len(done)])))
    return f"next is move {len(done) + 1}.", [
        Fact("next", answer, wrong, {"route": ", ".join(moves)}, (len(done), answer))]


def episodic_reasoning(clip, rng):
    """Who: the three of the clip and two who are not in it. Where: the five places of the world."""
    give, again = in_order(clip, "gives")
    a, b, c = (the(clip["objects"][i]) for i in (give["object"], give["target"], again["target"]))
    strangers = rng.sample(but([f"the {colour} person" for colour in COLOURS], a, b, c), 2)
    who = [(kind, f"{when} {{}}.", one, but([a, b, c, *strangers], one)) for kind, when, one in (
        ("start", "At the start", a), ("between", "In between", b), ("end", "At the end", c))]
    where = [(f"where_{when}", f"It is given {when} in {{}}.", e["place"], but(PLACES, e["place"]))
             for when, e in (("first", give), ("last", again))]
    told = f"at the start {a} has the gift. In between {b}. At the end {c}."
    return f"{told} It is given first in {give['place']}, last in {again['place']}.", [
        Fact(kind, said.format(answer), [said.format(w) for w in wrong]) for kind, said, answer, wrong in who + where]


def counterfactual_inference(clip, rng):
    """Cells: nothing and, in the order of their names, the three objects; so nothing is right one time in four."""
    hero, hits = the(clip["objects"][0]), clip["counterfactual"]["hits"]
    others = sorted(the(one) for one in clip["objects"][1:] if one["shape"] != "block")
    answer = "nothing" if hits is None else the(clip["objects"][hits])
    return f"without the block it hits {answer}.", [
        Fact("without", option(answer), [option(w) for w in but([*others, "nothing"], answer)], {"hero": hero},
             ([*others, "nothing"].index(answer), answer))]


def deed(play):
    return f"moves {play}" if play in DIRECTIONS else play


def playground(clip, rng):
    """What each of them does, and what the others do as wrong options."""
    def said(one, does):
        return upper(f"{one} {does}.")

    deeds = {the(clip["objects"][e["object"]]): deed(e["action"]) for e in clip["events"]}
    facts = []
    for one, does in deeds.items():
        others = but(dict.fromkeys(deeds.values()), does)
        others += rng.sample(but(map(deed, PLAYS), *deeds.values()), 3 - len(others))
        facts.append(Fact("does", said(one, does), [said(one, other) for other in others], {"hero": one}))
    return " ".join(said(the(one), deeds[the(one)]) for one in by_place(clip["objects"])), facts


READERS = {reader.__name__: reader for reader in (
    action_sequence, action_prediction, action_antonym, fine_grained_action, unexpected_action, object_existence,
    object_interaction, object_shuffle, moving_direction, action_localization, scene_transition, action_count,
    moving_count, moving_attribute, state_change, fine_grained_pose, character_order, egocentric_navigation,
    episodic_reasoning, counterfactual_inference, playground)}

# ---------------------------------------------------------------------------------------------------------------------
# Questions. The filters, the shuffling, and what stages 1 to 3 and the benchmark read.


def acceptable(clip, fact):
    """The paper's filters: clips of 5 to 35 s, options all different and of the number that the task has."""
    options = {fact.answer, *fact.wrong}
    return 5 <= clip["duration"] <= 35 and len(options) == 1 + len(fact.wrong) == ROWS[clip["scenario"]].options


def read(clip, rng):
    """An annotation -> (one caption, [facts]). Raises ValueError for a scenario without a reader."""
    if clip.get("scenario") not in READERS:
        raise ValueError(f"annotation {clip.get('id', '?')}: unknown scenario {clip.get('scenario')!r}; "
                         f"expected one of {', '.join(ROWS)}")
    text, facts = READERS[clip["scenario"]](clip, rng)
    return upper(text), [fact for fact in facts if acceptable(clip, fact)]


def caption(clip, rng):
    return read(clip, rng)[0]


def multiple_choice(clip, fact, rng, letter=None):
    """A fact -> {"question", "candidates", "answer"}; the answer is candidate number `letter`, or any."""
    ask = rng.choice(ROWS[clip["scenario"]].ask[fact.kind])
    slots = fact.slots | {"Hero": upper(fact.slots.get("hero", ""))}
    candidates = rng.sample(fact.wrong, len(fact.wrong))
    candidates.insert(rng.randrange(len(fact.wrong) + 1) if letter is None else letter, fact.answer)
    return {"question": ask.format(**slots), "candidates": candidates, "answer": fact.answer}


def as_turn(choice, worked=False, system=""):
    """A multiple-choice question as one turn {"i", "q", "a"} of a conversation, in the benchmark's own words.

    worked: behind each option stands MARKS' word for whether it is right, as in a worked example of a schoolbook.
    system: the conversation's instruction.
    """
    answer, options = choice["answer"], choice["candidates"]
    letter = "ABCDE"[options.index(answer)]
    if worked:
        options = [f"{option} {MARKS[option == answer]}" for option in options]
    return {"i": system, "q": mvbench_question(choice["question"], options) + QUESTION_PROMPT,
            "a": f"Best option:({letter}) {answer}"}


def as_open_turns(choices, rng):
    """The questions without their options, as the turns of a conversation."""
    instruction = rng.choice(OPEN)
    return [{"i": instruction, "q": choice["question"], "a": choice["answer"]} for choice in choices]


MARKS = ("no", "yes")  # in lower case they are said nowhere else


OPEN = ("Answer the question about the video in a few words.", "Watch the video and answer the question briefly.",
        "Look at the video closely and reply to what is asked.")
DESCRIBE = ("Describe the video.", "Say what happens in the video.", "Give a short description of the video.")


def told_and_asked(clip, rng, turns):
    """-> (caption, at most `turns` multiple-choice questions, each of another fact)."""
    text, facts = read(clip, rng)
    return text, [multiple_choice(clip, fact, rng) for fact in rng.sample(facts, min(turns, len(facts)))]


def conversations(clip, rng, turns=2):
    """For stage 3: a conversation of multiple-choice questions, one of the same questions without options, and for one
    clip in two the caption.

    At most `turns`, and no fact twice: the second answer could be read off the first. One in five asks as the benchmark
    does, with its long system prompt; for the others that is left out, which makes them half as long.
    """
    text, choices = told_and_asked(clip, rng, turns)
    system = SYSTEM if rng.random() < 0.2 else ""
    many = [as_turn(choice, system=system) for choice in choices]
    many[0]["q"] = system + many[0]["q"]
    talks = [many, as_open_turns(choices, rng)]
    return talks + ([[{"i": rng.choice(DESCRIBE), "q": "", "a": text}]] if rng.random() < 1 / 2 else [])


def text_document(clip, rng, turns=2):
    """For a language model that sees no video: (caption, multiple-choice turns whose answers it tells, the same open).

    Two documents in three are worked examples, with MARKS: standins.School says why.
    """
    text, choices = told_and_asked(clip, rng, turns)
    worked = rng.random() < 2 / 3
    return text, [as_turn(choice, worked) for choice in choices], as_open_turns(choices, rng)


def benchmark(task, count, draw, rng, trials=24):
    """`count` balanced questions of a task: [(clip, question)], one clip each.

    draw() gives a new annotation. For each question, of the facts of `trials` clips the one is kept whose cell has been
    asked for least: first by its first part, then as a whole. Letters go round, so that each is right equally often.
    """
    n = TASKS[task].options
    letters = rng.sample([i % n for i in range(count - count % n)], count - count % n) + rng.sample(range(n), count % n)
    asked, cells = [], Counter()
    for letter in letters:
        drawn = []
        for clip in (draw() for _ in range(trials)):
            drawn += [(clip, fact, fact.cell or (fact.answer, fact.kind)) for fact in read(clip, rng)[1]]
        clip, fact, cell = min(drawn, key=lambda row: (cells[row[2][:1]], cells[row[2]]))
        cells.update((cell[:1], cell))
        asked.append((clip, multiple_choice(clip, fact, rng, letter)))
    return asked
