"""Options from a dataclass, exit codes. Run: pytest tests/test_cli.py"""
import argparse
from dataclasses import dataclass, field

import pytest

from infra import cli

@dataclass
class Options:
    steps: int = cli.option(10, "optimizer steps")
    grad_accum: int = cli.option(1, "parts of a batch", group="memory", aliases=("--accumulate",))
    shard: bool = cli.option(False, "FSDP2", group="memory")
    dtype: str = cli.option("fp32", "numbers", choices=("fp32", "bf16"))
    changes: dict = field(default_factory=dict)                            # no option

def read(*argv):
    parser = argparse.ArgumentParser()
    cli.add_options(parser, Options)
    return cli.read_options(parser, Options, argv)

def test_what_is_not_typed_has_its_default_and_what_is_typed_is_known():
    assert read() == (Options(), set())
    assert read("--steps", "10") == (Options(), {"steps"})

def test_old_spellings_and_both_ways_of_a_bool():
    assert read("--accumulate", "4", "--shard") == (Options(grad_accum=4, shard=True), {"grad_accum", "shard"})
    assert read("--no-shard") == (Options(), {"shard"})

def test_help_has_groups_and_defaults(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "memory:" in shown and "optimizer steps (default 10)" in shown and "--accumulate" in shown

@pytest.mark.parametrize("argv, message", [(["--dtype", "fp8"], "choose from"), (["--steps", "two"], "invalid int")])
def test_a_wrong_value_is_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        read(*argv)
    assert message in capsys.readouterr().err

@pytest.mark.parametrize("error, code, line", [
    (ValueError("clip.mp4: torn"), 2, "train.py: clip.mp4: torn"), (OSError("disk full"), 2, "train.py: disk full"),
    (KeyboardInterrupt(), 130, "stopped; resume it")])
def test_errors_are_one_line_with_the_usual_exit_code(error, code, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        cli.run(main, "train.py", "stopped; resume it")
    assert left.value.code == code and capsys.readouterr().err.strip() == line
