"""The house: which file may import which, and how large files and functions may grow. Run: pytest tests/test_layout.py

    top level    twelve files to read; the parts (PARTS) import nothing of ours, the others what MAY_IMPORT lists
    rooms        seven folders behind them; nobody imports toy, bench or tests

Everything is read from the syntax trees, so imports inside functions count too and nothing runs.
"""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"vit_video", "qformer", "llama", "lora", "tokenizer", "prompt", "video"}
TOP = PARTS | {"model", "data", "train", "mvbench", "chat"}
ROOMS = {"infra", "weights", "training", "evaluation", "qagen", "toy", "bench"}
MAY_IMPORT = {  # a room, or a file of the top level -> what of ours it may import besides itself
    **{part: set() for part in PARTS},
    "video": {"infra"},         # infra/media.py reads files: containers, time stamps, image formats
    "infra": set(),
    "model": PARTS,
    "weights": PARTS | {"model", "infra"},
    "training": PARTS | {"weights", "infra"},
    "evaluation": PARTS | {"weights", "model", "infra"},
    "data": PARTS | {"training", "infra"},
    "mvbench": PARTS | {"evaluation", "weights", "model", "infra"},
    "chat": PARTS | {"weights", "model", "infra"},
    "qagen": {"evaluation", "prompt", "infra"},
    "train": PARTS | {"data", "training", "weights", "model", "infra"},
    "toy": TOP | ROOMS - {"toy", "bench"},
    "bench": TOP | ROOMS - {"toy", "bench"},
}
LINES = {"toy/scenarios.py": 560}       # of one file, where it is not 400: twenty tasks, a class for each
LONGEST_FILE, TOP_LEVEL, EVERYTHING = 400, 3_000, 10_200
LONGEST_FUNCTION, PARAGRAPH = 50, 15
FORBIDDEN = {  # names that a reader cannot look up: use the field's terms
    "told", "said", "seen", "look", "asked", "found", "own", "some", "keep", "kept", "hold", "spread", "whole",
    "thrice", "begun", "goes_on", "wanted", "given", "mine", "who", "here", "mark"}

def sources():
    """Every .py file that is not a test, as a path from the project's root."""
    files = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    return sorted(path.relative_to(ROOT).as_posix() for path in files)

def lines_of(name):
    return (ROOT / name).read_text(encoding="utf-8").splitlines()

def tree_of(name):
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)

def room_of(name):
    """llama.py -> llama; weights/int8.py -> weights."""
    return name.split("/")[0].removesuffix(".py")

def imports_of(name):
    """(line, module) of every import in a file, also of those inside functions."""
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")

def functions_of(name):
    return [node for node in ast.walk(tree_of(name)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]

def names_bound_in(name):
    """(line, identifier) of every variable, parameter and function that a file names."""
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name

def fail_if(faults, hint=""):
    """Fails with one fault a line, and no traceback."""
    if faults:
        pytest.fail("\n  ".join([f"{len(faults)} to mend", *faults]) + f"\n{hint}", pytrace=False)

# ---- who imports whom ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sources())
def test_imports_follow_the_rule(name):
    room = room_of(name)
    may = MAY_IMPORT[room] | {room}
    refused = (TOP | ROOMS | {"tests", ""}) - may              # "" is what a relative import begins with
    faults = [f"{name}:{line} imports {module}" for line, module in imports_of(name) if module.split(".")[0] in refused]
    fail_if(faults, f"{room} may import: {', '.join(sorted(may - {room})) or 'nothing of ours'}")

def test_the_rule_has_no_circle():
    """In some order of the rooms each imports only what comes before it; toy and bench are imported by none."""
    left = dict(MAY_IMPORT)
    while free := [room for room, may in left.items() if not may & set(left)]:
        left = {room: may for room, may in left.items() if room not in free}
    assert not left, f"{', '.join(left)} wait for each other"
    assert all(not may & {"toy", "bench"} for may in MAY_IMPORT.values())

# ---- what lies where -------------------------------------------------------------------------------------------------

def test_twelve_files_at_top_level():
    present = {path.stem for path in ROOT.glob("*.py")}
    assert present == TOP, f"to move: {sorted(present - TOP)}; missing: {sorted(TOP - present)}"

def test_code_lies_in_the_seven_rooms():
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests"}
    assert folders == ROOMS, f"not a room: {sorted(folders - ROOMS)}; missing: {sorted(ROOMS - folders)}"

@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_says_what_it_is_for_and_who_may_enter(room):
    tree = tree_of(f"{room}/__init__.py")
    assert ast.get_docstring(tree) and len(tree.body) == 1, f"{room}/__init__.py must hold a docstring and nothing else"

@pytest.mark.parametrize("name", sources())
def test_a_file_opens_with_a_docstring(name):
    assert ast.get_docstring(tree_of(name)), f"{name} does not say what it is"

# ---- how large -------------------------------------------------------------------------------------------------------

def test_files_keep_to_their_size():
    faults = [f"{name}: {len(lines_of(name))} lines; the limit is {LINES.get(name, LONGEST_FILE)}" for name in sources()
              if len(lines_of(name)) > LINES.get(name, LONGEST_FILE)]
    fail_if(faults)

@pytest.mark.parametrize("what, limit", [("top level", TOP_LEVEL), ("everything", EVERYTHING)])
def test_the_house_keeps_to_its_size(what, limit):
    size = {name: len(lines_of(name)) for name in sources() if what == "everything" or "/" not in name}
    largest = sorted(size.items(), key=lambda item: -item[1])[:5]
    assert sum(size.values()) <= limit, (
        f"{sum(size.values()):,} lines, {sum(size.values()) - limit:,} over the limit of {limit:,}; the largest: "
        + ", ".join(f"{name} {lines}" for name, lines in largest))

@pytest.mark.parametrize("name", sources())
def test_functions_are_short_or_have_paragraphs(name):
    lines, faults = lines_of(name), []
    for node in functions_of(name):
        size, place = node.end_lineno - node.lineno + 1, f"{name}:{node.lineno} {node.name}"
        body = [line.strip() for line in lines[node.lineno + 1:node.end_lineno]]
        if size > LONGEST_FUNCTION:
            faults.append(f"{place}: {size} lines; the limit is {LONGEST_FUNCTION}")
        if size > PARAGRAPH and not any(not line or line.startswith("#") for line in body):
            faults.append(f"{place}: {size} lines without a paragraph: a blank line, and a comment that says why")
    fail_if(faults)

# ---- names -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sources())
def test_names_can_be_searched_for(name):
    faults = [f"{name}:{line} {identifier}" for line, identifier in names_bound_in(name) if identifier in FORBIDDEN]
    fail_if(faults)
