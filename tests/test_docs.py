"""README tells the truth: files, line counts, commands, options, links, quirks. Run: pytest tests/test_docs.py

    python tests/test_docs.py --fix        # writes the true line counts into README's table of files
"""
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILE_ROW = re.compile(r"^\| \[(\w+\.py)\]\(\1\) \| (.+) \| ([\d,]+) \|$", re.M)
COMMAND = re.compile(r"^ {4}(?:\S+=\S+ )*(?:\S*/)?python (\w+\.py)(.*)$|`(?:\S*/)?python (\w+\.py)([^`]*)`", re.M)
MAKE = re.compile(r"^ {4}make (\S+)|`make (\S+)`", re.M)
QUIRK = re.compile(r"QUIRK (?!of )(\S+\.ipynb \w+|\S+?\.py:[\d-]+|\S+)")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def lines_of(name):
    return len((ROOT / name).read_text(encoding="utf-8").splitlines())


def with_true_counts(text):
    """README with the line counts of its table of files put right."""
    return FILE_ROW.sub(lambda row: f"| [{row[1]}]({row[1]}) | {row[2]} | {lines_of(row[1])} |", text)


def commands():
    """(script, arguments) of every python command in README."""
    return [(a or c, b or d) for a, b, c, d in COMMAND.findall(README)]


def quirks():
    return {tag for path in ROOT.glob("*.py") for tag in QUIRK.findall(path.read_text(encoding="utf-8"))}


@cache
def help_of(script):
    """What --help prints; of a script without options, which would run instead, nothing."""
    if not re.search("ArgumentParser|import parse\n", (ROOT / script).read_text(encoding="utf-8")):
        return ""
    shown = run_help(script)
    parts = re.search(r"^usage:.*? (\w+(?:\|\w+)+) ", shown, re.S)         # commands within a command
    return shown + "".join(run_help(script, part) for part in (parts[1].split("|") if parts else []))


def run_help(*command):
    result = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:], "--help"], capture_output=True,
                            text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_table_names_every_file_once():
    assert sorted(name for name, *_ in FILE_ROW.findall(README)) == sorted(p.name for p in ROOT.glob("*.py"))


def test_the_line_counts_are_true():
    claimed = {name: int(count.replace(",", "")) for name, _, count in FILE_ROW.findall(README)}
    true = {name: lines_of(name) for name in claimed if (ROOT / name).is_file()}
    assert claimed == true, "mend it by: python tests/test_docs.py --fix"


@pytest.mark.parametrize("script", sorted({script for script, _ in commands()}))
def test_every_command_names_a_script_and_options_that_exist(script):
    assert (ROOT / script).is_file(), f"README runs {script}, which does not exist"
    known = set(re.findall(r"--[a-z][a-z-]*", help_of(script)))
    for name, arguments in commands():
        if name == script:
            plain = re.sub(r'"[^"]*"', "", arguments.split("#")[0])        # what stands in quotes is a value
            unknown = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", plain)) - known - {"--help"}
            assert not unknown, f"python {name} has no {unknown}"


@pytest.mark.parametrize("option", re.findall(r"`(--[a-z-]+)(?: [a-z]+)?`", README))
def test_an_option_named_alone_belongs_to_a_command_of_readme(option):
    assert option == "--help" or any(re.search(rf"{option}\b", help_of(script)) for script, _ in commands())


def test_the_steps_of_the_demo_are_the_steps_by_hand():
    written = {f"{script}{arguments.split('#')[0].rstrip()}" for script, arguments in commands()}
    steps = re.findall(r'"((?:toyworld|train|mvbench)\.py [^"]*)"', (ROOT / "demo.py").read_text(encoding="utf-8"))
    parts = re.compile(" --only (vit|llm)")                               # stage 0's, side by side in the demo
    assert len(steps) >= 7 and {parts.sub("", step) for step in steps} <= written


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = {a or b for a, b in MAKE.findall(README)}
    assert {"demo", "test"} <= named <= targets


@pytest.mark.parametrize("target", sorted(set(LINK.findall(README))))
def test_links_and_pictures_exist(target):
    assert (ROOT / target).is_file(), f"README links to {target}, which does not exist"
    most = {".md": 1e9, ".html": 1e6}.get(Path(target).suffix, 3e5)
    assert (ROOT / target).stat().st_size < most


def test_links_within_readme_have_their_heading():
    headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", README, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings


def test_every_quirk_is_listed_and_none_that_is_gone():
    listed = (ROOT / "docs" / "quirks.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([^`]+)` \|", listed, re.M)) == quirks()


def test_readme_is_short_and_names_no_place_of_one_machine():
    assert len(README.splitlines()) < 200
    assert not re.search(r"(?<![\w.])/(?:work|home|root|tmp)/", README)


if __name__ == "__main__":
    if sys.argv[1:] != ["--fix"]:
        sys.exit("usage: python tests/test_docs.py --fix    writes the true line counts into README.md")
    (ROOT / "README.md").write_text(with_true_counts(README), encoding="utf-8")
