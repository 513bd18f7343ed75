"""README and docs tell the truth: commands, options, line counts, links, names of functions, quirks, examples.

    pytest tests/test_docs.py
    python tests/test_docs.py --fix        # writes the true line counts into README's table
"""
import ast
import contextlib
import io
import re
import runpy
import sys
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES["README.md"]
EVERY_PAGE = PAGES | {f"{folder}/README.md": (ROOT / folder / "README.md").read_text(encoding="utf-8")
                      for folder in ("results", "assets")}
MAX_LINES, MAX_BYTES = 130, 9 * 1024

FILE_ROW = re.compile(r"^\| \[([\w/.]+)\]\(\1\) \| (.+) \| ([\d,]+) \|$", re.M)     # | [lora.py](lora.py) | ... | 90 |
CODE = re.compile(r"^(?: {4}(.+)|\s*\$ (.+))$|`([^`\n]+)`", re.M)                   # a line of code, or a code span
COMMAND = re.compile(r"(?:\w+=\S+ )*"                                               # OMP_NUM_THREADS=1
                     r"(?:(?:\S*/)?python (-m (?!pytest)[\w.]+|[\w/]+\.py)|torchrun (?:--\w+ \S+ )*([\w/]+\.py))"
                     r"((?:\s.*)?)$")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
STOP = re.compile(r"`([\w/]+\.py):([A-Za-z_][\w.]*)`")                              # `llama.py:Llama.forward`
QUIRK = re.compile(r"QUIRK (?!of )(\S+\.ipynb \w+|\S+?\.py:[\d-]+|\S+)")

# ---- what the pages claim --------------------------------------------------------------------------------------------

def code_in(text):
    """Every line of code and every code span, without its comment."""
    return [(a or b or c).split("  #")[0].strip() for a, b, c in CODE.findall(text)]

def commands():
    """(page, script or "-m module", subcommand, options) of every python and torchrun command."""
    for page, text in PAGES.items():
        for code in code_in(text):
            if match := COMMAND.match(code):
                arguments = re.sub(r'"[^"]*"', "", match[3])                        # quoted text is a value
                first = re.match(r"\s+([a-z]+)(?=\s|$)", arguments)
                yield page, match[1] or match[2], first[1] if first else "", options_in(arguments)

def options_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))

def lines_of(name):
    """Lines of a file, or of all Python files in a folder."""
    files = [ROOT / name] if name.endswith(".py") else sorted((ROOT / name).glob("*.py"))
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)

def with_true_counts(text):
    """README with the line counts of its table put right."""
    return FILE_ROW.sub(lambda row: f"| [{row[1]}]({row[1]}) | {row[2]} | {lines_of(row[1]):,} |", text)

# ---- what is true ----------------------------------------------------------------------------------------------------

def file_of(script):
    """model.py, -m toy.world -> its path."""
    return ROOT / (script[3:].replace(".", "/") + ".py" if script.startswith("-m ") else script)

@cache
def help_of(script, subcommand=""):
    """What `python script subcommand --help` prints; "" for a script without options, which would run instead."""
    path = file_of(script)
    assert path.is_file(), f"{script} does not exist"
    if not re.search(r"argparse|infra\.cli|infra import cli", path.read_text(encoding="utf-8")):
        return ""
    argv, printed = sys.argv, io.StringIO()
    sys.argv = [path.name, *([subcommand] if subcommand else []), "--help"]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), pytest.raises(SystemExit) as end:
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = argv
    assert not end.value.code, f"python {script} {subcommand} --help fails: {printed.getvalue()}"
    return printed.getvalue()

def defined_in(name):
    """{"Llama", "Llama.forward", "sample", ...}: classes, their methods, and functions of a file."""
    names = set()
    for node in ast.parse((ROOT / name).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names

def headings_of(text):
    """GitHub's anchors of a page."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

def quirks_in_code():
    files = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if path.parent.name != "tests"]
    return {tag for path in files for tag in QUIRK.findall(path.read_text(encoding="utf-8"))}

# ---- commands --------------------------------------------------------------------------------------------------------

def test_there_are_commands_to_check():
    assert len(list(commands())) > 30

@pytest.mark.parametrize("page, script, subcommand, options", [
    pytest.param(*command, id=" ".join([command[0], command[1], command[2], *sorted(command[3])]).strip())
    for command in sorted({(p, s, c, tuple(sorted(o))) for p, s, c, o in commands()})])
def test_a_command_names_a_script_and_options_that_exist(page, script, subcommand, options):
    unknown = set(options) - options_in(help_of(script, subcommand)) - {"--help", "--fix"}
    assert not unknown, f"{page}: python {script} {subcommand} has no {', '.join(sorted(unknown))}"

@pytest.mark.parametrize("page", PAGES)
def test_an_option_named_alone_belongs_to_a_command(page):
    scripts = {(script, subcommand) for _, script, subcommand, _ in commands() if file_of(script).is_file()}
    known = set().union({"--help"}, *(options_in(help_of(*script)) for script in scripts))
    alone = set().union(*(options_in(code) for code in code_in(PAGES[page]) if code.startswith("--")))
    assert alone <= known, f"{page} names {sorted(alone - known)}, which no command has"

def test_make_targets_exist():
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    lines = [code for text in PAGES.values() for code in code_in(text)]
    named = {match[1] for code in lines if (match := re.match(r"make ([\w./-]+)", code))}
    assert {"demo", "test"} <= named <= targets, f"the Makefile has no {sorted(named - targets)}"

def test_the_demo_runs_what_the_toy_page_lists():
    """The Makefile's rules are the steps by hand of docs/toy.md, so that either gives the same model."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    steps = {step.strip() for step in re.findall(r"\$\(PY\) ((?:-m toy\.|train\.py|mvbench\.py)[^\n;&|]*)", makefile)}
    by_hand = {code.removeprefix("python ") for code in code_in(PAGES["docs/toy.md"])}
    assert len(steps) >= 6 and steps <= by_hand, f"docs/toy.md lacks {sorted(steps - by_hand)}"

# ---- README ----------------------------------------------------------------------------------------------------------

def test_readme_is_short():
    assert len(README.splitlines()) <= MAX_LINES and len(README.encode()) <= MAX_BYTES

def test_the_table_names_the_twelve_files_and_the_rooms_once():
    rooms = {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")}
    named = [name for name, *_ in FILE_ROW.findall(README)]
    assert sorted(named) == sorted({path.name for path in ROOT.glob("*.py")} | rooms)

def test_the_line_counts_are_true():
    claimed = {name: int(count.replace(",", "")) for name, _, count in FILE_ROW.findall(README)}
    assert claimed == {name: lines_of(name) for name in claimed}, "mend it by: python tests/test_docs.py --fix"

def test_the_python_example_runs(ckpt, tmp_path, monkeypatch, capsys):
    """As it stands in README, with a tiny checkpoint and a made clip in the places that it names."""
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    (folder,), (clip, *_) = re.findall(r'"(runs/[^"]+)"', block), re.findall(r'"(data/[^"]+\.gif)"', block)
    (tmp_path / folder).parent.mkdir(parents=True)
    (tmp_path / folder).symlink_to(ckpt)
    (tmp_path / clip).parent.mkdir(parents=True)
    frames = [Image.new("RGB", (64, 64), (16 * i, 0, 0)) for i in range(8)]
    frames[0].save(tmp_path / clip, save_all=True, append_images=frames[1:], duration=500)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= block.count("print(")

# ---- every page ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("page", EVERY_PAGE)
def test_links_pictures_and_headings_exist(page):
    for target, anchor in LINK.findall(EVERY_PAGE[page]):
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert path.exists(), f"{page} links to {target}, which does not exist"
        limit = {".md": 1e9, ".html": 1e6}.get(path.suffix, 3e5)
        assert path.is_dir() or path.stat().st_size < limit, f"{target} is too large to show"
        if anchor:
            assert anchor in headings_of(path.read_text(encoding="utf-8")), f"{page}: {target} has no #{anchor}"

@pytest.mark.parametrize("page", PAGES)
def test_functions_that_are_named_exist(page):
    missing = [f"{name}:{function}" for name, function in STOP.findall(PAGES[page])
               if not (ROOT / name).is_file() or function not in defined_in(name)]
    assert not missing, f"{page} names {', '.join(missing)}"

@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    """weights/int8.py in a code span or a command, and the like in every folder of ours."""
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("data", "runs"))
    named = re.findall(rf"(?<![\w/.-])(?:{folders})/[\w/.]*\w\.\w+", "\n".join(code_in(PAGES[page])))
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing, f"{page} names {', '.join(missing)}"

@pytest.mark.parametrize("page", EVERY_PAGE)
def test_no_place_of_one_machine(page):
    assert not re.search(r"(?<![\w.])/(?:work|home|root|tmp|Users|mnt)/", EVERY_PAGE[page])

def test_the_walkthrough_has_three_trips_and_exercises():
    page = PAGES["docs/walkthrough.md"]
    trips = re.split(r"^## ", page, flags=re.M)[1:]
    assert sum(len(STOP.findall(trip)) >= 8 for trip in trips) >= 3 and "exercises" in headings_of(page)

# ---- quirks ----------------------------------------------------------------------------------------------------------

def test_every_quirk_is_listed_and_none_that_is_gone():
    assert set(re.findall(r"^\| `([^`]+)` \|", PAGES["docs/quirks.md"], re.M)) == quirks_in_code()

def test_every_quirk_says_how_to_turn_it_off():
    """By an option of train.py or mvbench.py, by a field of a Config, or not at all."""
    rows = re.findall(r"^\| `[^`]+` \|.*\| (.+) \|$", PAGES["docs/quirks.md"], re.M)
    assert rows and all(re.match(r"`--[a-z-]+|field `\w+|no option", row) for row in rows)

if __name__ == "__main__":
    if sys.argv[1:] != ["--fix"]:
        sys.exit("usage: python tests/test_docs.py --fix    writes the true line counts into README.md")
    (ROOT / "README.md").write_text(with_true_counts(README), encoding="utf-8")
