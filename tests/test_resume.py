"""Resuming after any interruption, to the very same weights; damaged checkpoints, full disks, numbers that are not
finite.

Run: pytest tests/test_resume.py
"""
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from infra import distributed, files
from toy import pretrain
from training import resume

ROOT = Path(__file__).resolve().parent.parent
STEPS = 8
# folder of the result, what names it on the command line
PARTS = {"vit": ("vit", "vit"), "bert": ("bert", "bert"), "llm": ("llm_fp32", "llm"),
         1: ("stage1", "--stage", "1"), 2: ("stage2", "--stage", "2"), 3: ("stage3", "--stage", "3")}

@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums differ in their last bits with the number of threads; the processes that are started have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def options(world, out, part, *more):
    return [*PARTS[part][1:], "--preset", "micro", "--data", str(world), "--out", str(out), "--steps", str(STEPS),
            "--save-every", "2", "--workers", "1", *more]

@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Every stage of the micro preset, undisturbed."""
    out = tmp_path_factory.mktemp("runs") / "micro"
    for part in PARTS:
        (pretrain if part in ("vit", "bert", "llm") else train).main(options(world, out, part))
    return out

def weights(folder):
    return files.read_tensors(Path(folder) / "model.safetensors")

def assert_same(one, other):
    once, twice = weights(one), weights(other)
    assert once.keys() == twice.keys() and [n for n in once if not torch.equal(once[n], twice[n])] == []

def begun(runs, out, part):
    """A run whose earlier stages are done."""
    names = list(PARTS)
    standins = ["init", "llm"] if isinstance(part, int) else []
    for folder in [PARTS[name][0] for name in names[:names.index(part)]] + standins:
        shutil.copytree(runs / folder, out / folder)
    return out

def command(processes, arguments):
    several = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    script = ["-m", "toy.pretrain"] if arguments[0] in ("vit", "bert", "llm") else [str(ROOT / "train.py")]
    return [sys.executable, *several, *script]

def start(*arguments, processes=1):
    """train.py, in a group of processes of its own, to be killed as a whole."""
    return subprocess.Popen([*command(processes, arguments), *arguments], stdout=subprocess.PIPE, cwd=ROOT,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})

def run(*arguments, processes=1):
    process = start(*arguments, processes=processes)
    said, _ = process.communicate()
    return process.returncode, said

def kill_after(process, line):
    """kill -9 to all its processes as soon as it has said this."""
    said = ""
    for told in process.stdout:
        said += told
        if line in told:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    out = process.args[process.args.index("--out") + 1].encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):                    # torchrun's processes are no group of its own
        with contextlib.suppress(OSError):
            if out + b"\0" in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)
    process.stdout.close()
    return said

@pytest.mark.parametrize("part", PARTS)
def test_kill_9_and_going_on_ends_with_the_same_weights(world, runs, tmp_path, part):
    """With loader workers, dropout, and a generator that draws negatives; killed twice, in mid-epoch."""
    out = begun(runs, tmp_path, part)
    for n in (3, 6):
        assert f"step {n}/{STEPS}" in kill_after(start(*options(world, out, part)), f"step {n}/{STEPS}")
    code, said = run(*options(world, out, part))
    assert code == 0 and "resuming from step" in said, said
    assert_same(runs / PARTS[part][0], out / PARTS[part][0])
    assert not list(out.rglob("*.unfinished"))

@pytest.mark.parametrize("part", [1, 3])
def test_two_processes_are_killed_and_go_on(world, runs, tmp_path, part):
    more = ("--grad-accum", "2", "--batch", "8")
    whole, out = begun(runs, tmp_path / "whole", part), begun(runs, tmp_path / "torn", part)
    assert run(*options(world, whole, part, *more), processes=2)[0] == 0
    assert "step 5/" in kill_after(start(*options(world, out, part, *more), processes=2), "step 5/")
    code, said = run(*options(world, out, part, *more), processes=2)
    assert code == 0 and "resuming from step" in said, said
    assert_same(whole / PARTS[part][0], out / PARTS[part][0])

@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves_with_its_code(world, runs, tmp_path, number, code, monkeypatch):
    out, real = begun(runs, tmp_path, 1), train.TrainLog.step

    def interrupted(self, step, *rest):
        real(self, step, *rest)
        if step == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(train.TrainLog, "step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train.main(options(world, out, 1, "--save-every", "100"))
    assert stopped.value.code == code and not (out / "stage1").exists()
    assert list(resume.saved_steps(out / "stage1.unfinished")) == [4]       # the step is finished that it came in
    monkeypatch.setattr(train.TrainLog, "step", real)
    train.main(options(world, out, 1))
    assert_same(runs / "stage1", out / "stage1")

def test_a_signal_to_all_processes_saves_too(world, runs, tmp_path):
    """Schedulers tell loader workers as well."""
    out = begun(runs, tmp_path, 1)
    process = start(*options(world, out, 1, "--workers", "2", "--save-every", "100"))
    for line in process.stdout:
        if f"step 2/{STEPS}" in line:
            break
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "resumes from step" in said, said
    train.main(options(world, out, 1))
    assert_same(runs / "stage1", out / "stage1")

def test_a_run_begun_again_and_stopped_goes_on_beside_the_old_one(world, runs, tmp_path, capsys):
    out = begun(runs, tmp_path, 2)
    shutil.copytree(runs / "stage2", out / "stage2")
    kill_after(start(*options(world, out, 2, "--restart")), f"step 5/{STEPS}")
    train.main(options(world, out, 2))
    assert "resuming from step" in capsys.readouterr().out
    assert_same(runs / "stage2", out / "stage2")

@pytest.mark.parametrize("wrong", [("--steps", "-3"), ("--epochs", "0"), ("--batch", "-4"), ("--grad-clip", "0"),
                                   ("--device", "gpu"), ("--warmup", "2"), ("--keep-checkpoints", "0"),
                                   ("--grad-checkpoint", "all"),
                                   ("--shard",), ("--dtype", "fp8")])
def test_wrong_values_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as left:
        train.parse(["--stage", "1", *wrong])
    assert left.value.code == 2 and wrong[0] in capsys.readouterr().err

@pytest.fixture
def stopped(killed, tmp_path):
    return shutil.copytree(killed, tmp_path / "stopped")

@pytest.fixture(scope="module")
def killed(world, runs, tmp_path_factory):
    """A run of stage 2 that ended after its last step and before its result was written, with steps 4 and 6 saved."""
    def die(*_):
        raise KeyboardInterrupt

    out = begun(runs, tmp_path_factory.mktemp("killed"), 2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(resume, "finish", die)
        train.main(options(world, out, 2))
    assert list(resume.saved_steps(out / "stage2.unfinished")) == [4, 6]    # the last two are kept
    return out

def cut_off(path):
    path.write_bytes(path.read_bytes()[:-10])

def altered(path):
    found = bytearray(path.read_bytes())
    found[-5] ^= 1
    path.write_bytes(found)

@pytest.mark.parametrize("harm", [cut_off, altered, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "trainer.safetensors", "trainer.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(world, runs, stopped, harm, name, capsys):
    path = stopped / "stage2.unfinished" / "000006" / name
    if harm is altered and name == "trainer.json":
        path.write_text("[1, 2]")
    else:
        harm(path)
    train.main(options(world, stopped, 2))
    said = capsys.readouterr().out
    assert f"damaged: {path}" in said and "resuming from step 4" in said
    assert_same(runs / "stage2", stopped / "stage2")

def test_an_unfinished_checkpoint_can_be_looked_at(world, stopped):
    from weights import checkpoint
    model, _, tok = checkpoint.load_checkpoint(stopped / "stage2.unfinished" / "000006")
    assert tok and model.stage == 2

def test_another_run_s_checkpoint_is_refused(world, runs, stopped):
    for more, what in ((("--batch", "2"), "batch 4 instead of 2"), (("--seed", "5"), "seed 0 instead of 5")):
        code, said = run(*options(world, stopped, 2, *more))
        assert code == 2 and what in said and "--restart" in said, said
    folder = stopped / "stage2.unfinished" / "000006"
    shutil.copy(runs / "stage1" / "model.safetensors", folder / "model.safetensors")
    state = json.loads((folder / "trainer.json").read_text())
    state["files"]["model.safetensors"] = resume.size_and_hash(folder / "model.safetensors")
    (folder / "trainer.json").write_text(json.dumps(state))
    code, said = run(*options(world, stopped, 2))
    assert code == 2 and "does not fit this model" in said, said
    train.main(options(world, stopped, 2, "--restart"))
    assert_same(runs / "stage2", stopped / "stage2")

def test_a_second_run_in_the_same_folder_is_refused(world, runs, tmp_path):
    out = begun(runs, tmp_path, 1)
    with files.lock_folder(out / "stage1.unfinished"):
        code, said = run(*options(world, out, 1))
    assert code == 2 and "another process is writing" in said and "Traceback" not in said

def test_a_full_disk_is_named_and_training_goes_on(world, runs, tmp_path, monkeypatch, capsys):
    out, real, written = begun(runs, tmp_path, 1), resume.save_tensors, []

    def full(tensors, path):
        written.append(path)
        if len(written) == 2:                                            # of step 4
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(resume, "save_tensors", full)
    train.main(options(world, out, 1))
    said = capsys.readouterr().out
    assert "000004 cannot be written" in said and "MiB are free" in said and "training continues" in said
    assert_same(runs / "stage1", out / "stage1")

def test_a_full_disk_at_the_very_end_loses_nothing(world, runs, tmp_path, monkeypatch):
    out, real = begun(runs, tmp_path, 1), resume.checkpoint.save_checkpoint

    def full(tensors, stage, cfg, folder, *rest):
        if folder.name.startswith(".stage1."):                           # not one of the steps'
            raise OSError(28, "No space left on device")
        real(tensors, stage, cfg, folder, *rest)

    monkeypatch.setattr(resume.checkpoint, "save_checkpoint", full)
    with pytest.raises(OSError, match="stage1 cannot be written .*MiB are free; make room, and the same command"):
        train.main(options(world, out, 1))
    assert list(resume.saved_steps(out / "stage1.unfinished")) == [6]
    monkeypatch.undo()
    train.main(options(world, out, 1))
    assert_same(runs / "stage1", out / "stage1")

def poisoned(monkeypatch, steps):
    """Losses of these calls are NaN, and one layer's output is."""
    real, calls = train.VideoChat2.stage1_losses, []

    def stage1_losses(self, batch, *rest, **options):
        calls.append(1)
        if len(calls) in steps:
            batch = batch | {"features": batch["features"] * float("nan")}
        return real(self, batch, *rest, **options)

    monkeypatch.setattr(train.VideoChat2, "stage1_losses", stage1_losses)

@pytest.mark.parametrize("muon", ["0", "1"])
def test_a_step_that_is_not_finite_is_left_out_and_named(world, runs, tmp_path, monkeypatch, capsys, muon):
    out = begun(runs, tmp_path, 1)
    poisoned(monkeypatch, {3, 5})        # the third step, and its repetition, which looks for the module
    train.main(options(world, out, 1, "--muon-lr-scale", muon))
    said = capsys.readouterr().out
    assert "step 3 skipped: gradient nan" in said and "first not finite: vision_layernorm" in said
    assert ".gif" in said.split("files of the step:")[1]
    assert all(t.isfinite().all() for t in weights(out / "stage1").values())

def test_too_many_such_steps_stop_the_run(world, runs, tmp_path, monkeypatch):
    out = begun(runs, tmp_path, 1)
    poisoned(monkeypatch, set(range(4, 100)))
    with pytest.raises(ValueError, match="2 steps in a row without a finite gradient"):
        train.main(options(world, out, 1, "--max-bad-steps", "2"))
    last = resume.latest(out / "stage1.unfinished")
    assert last and all(t.isfinite().all() for t in weights(last).values())

def test_fp16_looks_for_its_scale_but_not_forever(world, tmp_path):
    """Gradients overflow with finite losses: GradScaler's doing, for so many steps."""
    stage = train.Stage("x", tmp_path / "x", torch.nn.Linear(1, 1), [], None,
                        lambda batch, progress: {"lm": torch.ones(())}, None)
    cfg = train.TrainConfig(stage=1, dtype="fp16", max_bad_steps=2, out=str(tmp_path), steps=100, log_every=100)
    log = train.TrainLog(stage, cfg, distributed.Distributed(), 0)

    def tell(norm, steps):
        for step in range(steps):
            log.step(step, {"lm": torch.ones(())}, torch.tensor(norm), [{"bad": []}])

    tell(float("inf"), 20)
    tell(1.0, 1)
    with pytest.raises(ValueError, match="2 steps in a row without a finite gradient"):
        tell(float("inf"), 24 + 2 + 1)

def test_a_left_out_step_changes_nothing():
    """By hand: AdamW's moments, its count of steps and the weights."""
    from training import optim
    model = torch.nn.Linear(3, 2)
    optimizers = optim.make_optimizers(model, train.TrainConfig(lr=0.1))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for poison in (False, True):
        before = [p.detach().clone() for p in model.parameters()]
        model(torch.full((1, 3), float("nan") if poison else 1.0)).sum().backward()
        norm = optim.clip_gradients(model, optimizers, scaler, 1.0)
        optim.optimizer_step(optimizers, 0.1, scaler, norm)
        same = [torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert same == [poison, poison]
    assert {int(state["step"]) for state in optimizers[0].state.values()} == {1}

def test_saving_costs_little(world, runs, tmp_path, monkeypatch):
    """The loop goes on while a slow disk still writes."""
    real = files.save_tensors
    monkeypatch.setattr(resume, "save_tensors", lambda *args: (time.sleep(2), real(*args)))
    cfg = train.TrainConfig(stage=1, keep_checkpoints=2)
    model = torch.nn.Linear(4, 4)
    stage = train.Stage("x", tmp_path / "x", model, None, None, None, lambda folder, tensors: None)
    saver = resume.AsyncSaver(stage, cfg, distributed.Distributed())
    begun_at = time.perf_counter()
    saver.save(1, [], torch.amp.GradScaler("cpu", enabled=False))
    assert time.perf_counter() - begun_at < 1
    saver.wait()
    assert list(resume.saved_steps(stage.unfinished)) == [1] and saver.error is None

def test_random_numbers_survive(tmp_path):
    stage = train.Stage("x", tmp_path / "x", torch.nn.Linear(1, 1), None, None, None, None,
                        generator=torch.Generator().manual_seed(random.randrange(1000)))
    state = {f"random.0.{name}": t for name, t in resume.rng_state(stage).items()}
    drawn = torch.rand(3), torch.rand(3, generator=stage.generator)
    resume.load_rng_state(stage, state, 1)                               # another process's: nothing happens
    assert not torch.equal(torch.rand(3), drawn[0])
    resume.load_rng_state(stage, state, 0)
    assert torch.equal(torch.rand(3), drawn[0]) and torch.equal(torch.rand(3, generator=stage.generator), drawn[1])
