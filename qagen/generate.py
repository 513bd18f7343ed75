"""Static to dynamic: annotations of videos become captions and multiple-choice questions (MVBench, section 3.2).

    annotation --describe--> caption, facts --filter--> --phrase, shuffle--> question, options, answer

Subclass QATask to read one kind of annotation for one task, as the classes of toy/scenarios.py do (MovingCount is the
shortest): a reader of CLEVRER, STAR or Perception Test fills in the same row and writes the same `describe`. Functions
take an instance. Not here: the tasks' names and media folders (evaluation/tasks.py), simulation and drawing (toy/).

    pytest tests/test_qagen.py
"""
from collections import Counter
from dataclasses import dataclass, field

from evaluation.tasks import LETTERS
from prompt import QUESTION_PROMPT, SYSTEM, mvbench_question

OPEN = ("Answer the question about the video in a few words.", "Watch the video and answer the question briefly.",
        "Look at the video closely and reply to what is asked.")
DESCRIBE = ("Describe the video.", "Say what happens in the video.", "Give a short description of the video.")
OPTION_HINTS = ("no", "yes")  # wrong, right; no other text has these words in lower case

def capitalize(text):
    """The first letter alone: str.capitalize would lower the letters of Character Order."""
    return text[:1].upper() + text[1:]

def excluding(pool, *taken):
    return [entry for entry in pool if entry not in taken]

@dataclass(frozen=True)
class Fact:
    """Something to ask about: the kind of question, the answer, and the wrong options, n_options - 1 of them."""
    kind: str
    answer: str
    wrong: list
    slots: dict = field(default_factory=dict)   # fill the {holes} of the phrasing
    cell: tuple = ()    # a benchmark asks equally often about every cell; if empty, about every (answer, kind)

    @classmethod
    def from_template(cls, kind, template, answer, wrong, slots=None):
        """Every option from one template: "It {}." and "spins" -> "It spins."."""
        return cls(kind, template.format(answer), [template.format(option) for option in wrong], slots or {})

class QATask:
    """One task, asked about one kind of annotation: a row of the paper's table 1, and how to read an annotation."""
    key = ""        # json/{key}.json of the benchmark
    parent = ""     # the spatial task of image benchmarks that it makes temporal
    n_options = 4
    rule = ""       # where the wrong options come from, in words
    phrasings = {}  # kind of question -> three ways or more to ask it, with {slots}

    def describe(self, clip, rng):
        """An annotation, a dict with at least "duration" in seconds -> (caption, list of Fact).

        Stages 1 and 2 learn from captions, so a caption contains every answer. It says what is asked before what
        leads to it: otherwise a language model infers the answer from those words and ignores the video. There is one
        wording per clip, and a lone object is "it": a model cannot see which of two wordings the writer chose."""
        raise NotImplementedError

def caption_and_facts(task, clip, rng):
    """-> (caption, the facts that pass the paper's filters: 5 to 35 seconds, n_options options that all differ)."""
    caption, facts = task.describe(clip, rng)
    facts = [fact for fact in facts if 5 <= clip["duration"] <= 35
             and len({fact.answer, *fact.wrong}) == 1 + len(fact.wrong) == task.n_options]
    return capitalize(caption), facts

def multiple_choice(task, fact, rng, position=None):
    """A fact -> {"question", "candidates", "answer"}; the answer is candidate number `position`, by default any."""
    phrasing = rng.choice(task.phrasings[fact.kind])
    slots = fact.slots | {"Hero": capitalize(fact.slots.get("hero", ""))}
    candidates = rng.sample(fact.wrong, len(fact.wrong))
    candidates.insert(rng.randrange(len(fact.wrong) + 1) if position is None else position, fact.answer)
    return {"question": phrasing.format(**slots), "candidates": candidates, "answer": fact.answer}

def caption_and_questions(task, clip, rng):
    """-> (caption, at most two questions). No fact is asked twice: the first answer would give away the second."""
    caption, facts = caption_and_facts(task, clip, rng)
    return caption, [multiple_choice(task, fact, rng) for fact in rng.sample(facts, min(2, len(facts)))]

def as_turn(choice, worked=False, system=""):
    """A question as a turn {"i", "q", "a"} in the benchmark's words. worked: options end in their hint, no or yes."""
    answer, options = choice["answer"], choice["candidates"]
    letter = LETTERS[options.index(answer)]
    if worked:
        options = [f"{option} {OPTION_HINTS[option == answer]}" for option in options]
    return {"i": system, "q": mvbench_question(choice["question"], options) + QUESTION_PROMPT,
            "a": f"Best option:({letter}) {answer}"}

def as_open_turns(choices, rng):
    """The questions without their options, as the turns of a conversation."""
    instruction = rng.choice(OPEN)
    return [{"i": instruction, "q": choice["question"], "a": choice["answer"]} for choice in choices]

def conversations(task, clip, rng):
    """For stage 3: questions with options, the same without and, for one clip in two, the caption; [] if no facts."""
    caption, choices = caption_and_questions(task, clip, rng)
    if not choices:
        return []

    # one conversation in five has the benchmark's long system prompt; without it the others are half as long
    system = SYSTEM if rng.random() < 0.2 else ""
    with_options = [as_turn(choice, system=system) for choice in choices]
    with_options[0]["q"] = system + with_options[0]["q"]
    result = [with_options, as_open_turns(choices, rng)]
    return result + ([[{"i": rng.choice(DESCRIBE), "q": "", "a": caption}]] if rng.random() < 1 / 2 else [])

def text_document(task, clip, rng):
    """For an LLM without video: (caption, turns whose answers are in the caption, the same without options).

    Two documents in three are worked examples (toy/pretrain.py says why)."""
    caption, choices = caption_and_questions(task, clip, rng)
    worked = rng.random() < 2 / 3
    return caption, [as_turn(choice, worked) for choice in choices], as_open_turns(choices, rng)

def benchmark(task, count, draw_clip, rng, trials=24):
    """-> `count` balanced questions of a task, [(annotation, question)]; draw_clip() returns a new annotation."""
    # every letter is the right one equally often, in random order
    n = task.n_options
    full_rounds = count - count % n
    positions = rng.sample([i % n for i in range(full_rounds)], full_rounds) + rng.sample(range(n), count % n)

    # for each question: of the facts of `trials` new clips, the one whose cell has been asked about least,
    # first by the cell's first part, then by the whole cell
    questions, n_asked = [], Counter()
    for position in positions:
        facts = []
        for clip in (draw_clip() for _ in range(trials)):
            facts += [(clip, fact, fact.cell or (fact.answer, fact.kind))
                      for fact in caption_and_facts(task, clip, rng)[1]]
        clip, fact, cell = min(facts, key=lambda row: (n_asked[row[2][:1]], n_asked[row[2]]))
        n_asked.update((cell[:1], cell))
        questions.append((clip, multiple_choice(task, fact, rng, position)))
    return questions
