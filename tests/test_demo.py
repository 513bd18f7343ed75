"""How the demo runs its commands. Run: pytest tests/test_demo.py"""
from toy import demo


def command(tmp_path, name, body):
    (tmp_path / name).write_text(f"import os, sys, time\n{body}\n")
    return str(tmp_path / name)


def test_lanes_run_side_by_side_and_their_commands_in_turn(tmp_path, capfd):
    """Each of two lanes waits for the other's file, so that neither ends unless both run."""
    def wait(mine, other):
        return (f"open(r'{tmp_path / mine}', 'w').close()\nend = time.time() + 30\n"
                f"while not os.path.exists(r'{tmp_path / other}') and time.time() < end: time.sleep(0.05)\n"
                f"sys.exit(not os.path.exists(r'{tmp_path / other}'))")

    first, second = command(tmp_path, "a.py", wait("a", "b")), command(tmp_path, "b.py", wait("b", "a"))
    third = command(tmp_path, "c.py", "print('threads', os.environ['OMP_NUM_THREADS'])")
    assert demo.run([[first], [second, third]]) == 0
    told = capfd.readouterr().out
    assert told.index("b.py") < told.index("c.py") and f"threads {max(1, (demo.os.cpu_count() or 1) // 2)}" in told


def test_a_lane_stops_at_the_first_failure_and_the_step_tells(tmp_path, monkeypatch):
    bad, never = command(tmp_path, "bad.py", "sys.exit(3)"), command(tmp_path, "never.py", "open('x', 'w')")
    monkeypatch.chdir(tmp_path)
    assert demo.run([[bad, never]]) == 3 and not (tmp_path / "x").exists()
