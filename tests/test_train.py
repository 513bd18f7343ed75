"""The whole way at micro size: a world, pretraining, stages 1 to 3, MVBench, chat.

Run: pytest tests/test_train.py
"""
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import chat
import mvbench
import train
from evaluation.tasks import TASKS
from infra import files
from infra.distributed import blocks_of
from model import PRESETS, VideoChat2, set_trainable
from toy import pretrain, probe
from training import optim, resume
from training.resume import is_finished
from vit_video import VisionTransformer
from weights import checkpoint

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Every stage of the micro preset, trained for four steps each."""
    out = tmp_path_factory.mktemp("runs") / "micro"
    pretrain.main(options(world, out))
    for stage in (1, 2, 3):
        train.main(options(world, out, "--stage", stage))
    return out

def options(world, out, *more):
    return list(map(str, ("--preset", "micro", "--data", world, "--out", out, *more)))

def weights(folder):
    return files.read_tensors(Path(folder) / "model.safetensors")

def test_every_stage_leaves_a_checkpoint_and_its_losses(runs):
    rows = [json.loads(line) for line in (runs / "metrics.jsonl").read_text().splitlines()]
    stages = ["stage 0 vit", "stage 0 bert", "stage 0 llm", "stage 1", "stage 2", "stage 3"]
    assert list(dict.fromkeys(row["stage"] for row in rows)) == stages
    assert {"vtc", "vtm", "vtg"} <= set(next(row for row in rows if row["stage"] == "stage 1"))
    for folder in ("vit", "bert", "llm_fp32", "init", "llm", "stage1", "stage2", "stage3"):
        assert is_finished(runs / folder) and not (runs / folder / "trainer.safetensors").exists()

def test_the_probe_asks_every_part_of_a_run(runs, world, tmp_path, capsys):
    table = probe.probe(runs, world, count=2)
    tasks = [task.file for task in TASKS]
    assert set(table) == set(probe.COLUMNS) and all(list(column) == tasks for column in table.values())
    assert all(0 <= share <= 1 for column in table.values() for share in column.values())
    for part in ("init", "llm"):
        shutil.copytree(runs / part, tmp_path / "half" / part)
    probe.main(["--run", str(tmp_path / "half"), "--data", str(world), "--clips", "1"])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 22 and len(shown[-1].split()) == 1 + 4  # mean, the ViT's three and llm_from_text

def changed(before, after):
    """Parts that both checkpoints have and that differ, whatever their dtype."""
    old, new = weights(before), weights(after)
    return {n.split(".")[0] for n in new if n in old and not torch.equal(old[n].float(), new[n].float())}

def test_each_stage_trains_what_the_paper_says_and_nothing_else(runs, world, tmp_path):
    """With the ViT's features kept, it stays frozen; without, it learns in stages 2 and 3."""
    behind_the_vit = {"vision_layernorm", "query_tokens", "qformer"}
    assert changed(runs / "init", runs / "stage1") == {"qformer"}
    assert changed(runs / "stage1", runs / "stage2") == behind_the_vit
    assert changed(runs / "stage2", runs / "stage3") == behind_the_vit | {"extra_query_tokens", "llama_proj"}
    for stage in (2, 3):
        before = runs / f"stage{stage - 1}"
        train.main(options(world, tmp_path, "--stage", stage, "--init", before, "--llm", runs / "llm",
                           "--no-cache-features"))
        assert changed(before, tmp_path / f"stage{stage}") >= behind_the_vit | {"vision_encoder"}
    text_rows = "qformer.bert.encoder.layer.0.intermediate.dense.weight"
    assert torch.equal(weights(runs / "stage1")[text_rows], weights(runs / "stage2")[text_rows])
    assert not torch.equal(weights(runs / "stage2")[text_rows], weights(runs / "stage3")[text_rows])
    lora = [t for n, t in weights(runs / "stage3").items() if "lora_B" in n]
    assert lora and all(t.abs().sum() > 0 for t in lora)                   # they start at zero

def test_no_checkpoint_holds_the_frozen_llm(runs):
    assert not [n for n in weights(runs / "stage3") if n.startswith("llama_model.") and "lora_" not in n]

def test_evaluation_and_its_control(world, runs, capsys):
    arguments = ["--ckpt", str(runs / "stage3"), "--data", str(world / "mvbench"), "--workers", "0"]
    mvbench.main(arguments)
    mvbench.main([*arguments, "--controls", "blank"])
    folder = runs / "stage3" / "mvbench"
    table = json.loads((folder / "mvbench.json").read_text())
    assert len(table) == 21 and list(table)[-1] == "Avg"
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    assert {"question", "candidates", "answer", "prediction", "letter_probabilities"} <= set(rows[0])
    blank = [json.loads(line) for line in (folder / "predictions.blank.jsonl").read_text().splitlines()]
    assert [row["media"] for row in blank] == [row["media"] for row in rows]
    assert [row["letter_probabilities"] for row in blank] != [row["letter_probabilities"] for row in rows]
    assert "chance" in capsys.readouterr().out

def test_an_unreadable_clip_is_counted_and_shown(world, runs, tmp_path, capsys):
    data = tmp_path / "mvbench"
    shutil.copytree(world / "mvbench", data)
    clip = data / "video" / "ssv2_video" / json.loads((data / "json" / "action_antonym.json").read_text())[0]["video"]
    clip.write_bytes(b"")
    mvbench.main(["--ckpt", str(runs / "stage3"), "--data", str(data), "--workers", "0", "--only", "Action Antonym",
                  "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "1 questions with unreadable media or texts, counted as wrong" in printed and clip.name in printed

def test_chat_answers_the_same_question_with_the_same_words(world, runs):
    clip = next((world / "videos").rglob("*.gif"))
    model = checkpoint.load_checkpoint(runs / "stage3")
    said = [chat.Chat(*model, clip, max_new_tokens=8).ask("What happens?") for _ in range(2)]
    assert said[0] == said[1]
    loaded = chat.Chat(*model, clip)                                       # as README shows it
    assert loaded.ask("What happens?").startswith(said[0]) and len(loaded.history) == 1
    with pytest.raises(ValueError, match="stage1 is of stage 1 and has no LLM"):
        chat.main(["--ckpt", str(runs / "stage1"), "--video", str(clip)])

def test_a_conversation_ends_quietly(world, runs, monkeypatch, capsys):
    """By an empty line, by Ctrl-D or Ctrl-C, and after answers to every question so far."""
    command = ["--ckpt", str(runs / "stage3"), "--video", str(next((world / "videos").rglob("*.gif"))),
               "--max-new-tokens", "2"]
    for end in ("", EOFError(), KeyboardInterrupt()):
        lines = iter(["What happens?", end])

        def read(_, lines=lines):
            line = next(lines)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        assert chat.main(command) is None
        assert len(capsys.readouterr().out.splitlines()) >= 2

def test_each_parameter_has_its_optimizer_and_its_rate():
    config = PRESETS["micro"]()
    config.llama.vocab_size = config.qformer.vocab_size = 50
    model = VideoChat2(config, 3)
    set_trainable(model, 3)
    adamw, muon = optim.make_optimizers(model, train.TrainConfig(stage=3, muon_lr_scale=2.0, lora_lr_scale=5.0))
    name_of = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    matrices, lora, others, layers = ([name_of.pop(id(p)) for p in group["params"]]
                                      for group in (*adamw.param_groups, *muon.param_groups))
    assert not name_of                                                     # each once
    assert all("lora_" in name for name in lora) and len(lora) == 2 * 7 * config.llama.depth
    assert all(".blocks." in name or ".layer." in name for name in layers)
    assert {"llama_proj.weight", "vision_encoder.patch_embed.proj.weight"} <= set(matrices)
    assert {"query_tokens", "llama_proj.bias", "vision_layernorm.weight"} <= set(others)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.02, 0.02, 0.0]
    optim.optimizer_step([adamw, muon], 0.1, torch.amp.GradScaler("cpu", enabled=False), torch.ones(()))
    assert [group["lr"] for group in (*adamw.param_groups, *muon.param_groups)] == [0.1, 0.5, 0.1, 0.2]
    (plain,) = optim.make_optimizers(model, train.TrainConfig(stage=3))    # without Muon
    assert sum(len(group["params"]) for group in plain.param_groups) == len(matrices + lora + others + layers)

def test_muon_moves_matrices_as_torch_s_does():
    """Which computes in bfloat16, so it differs by a hundredth of what has moved at most."""
    shapes, generator = [(32, 48), (48, 32), (32, 32), (32, 32)], torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    muon = optim.Muon(ours, lr=1e-2, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        muon.step()
        reference.step()
    for p, q, before in zip(ours, theirs, start, strict=True):
        moved = (p - before).abs().mean()
        assert moved > 5e-3 and (p - q).abs().mean() < 0.01 * moved
        assert torch.equal(muon.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"])

def test_orthogonalize_brings_singular_values_near_one():
    """Of tall and of wide matrices, of several in one batch as of each alone."""
    for shape in ((3, 8, 20), (3, 20, 8)):
        g = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        singular = torch.linalg.svdvals(optim.orthogonalize(g))            # (3, 8)
        assert 0.6 < singular.min() and singular.max() < 1.3
        alone = torch.cat([optim.orthogonalize(one[None]) for one in g])
        assert torch.allclose(optim.orthogonalize(g), alone, atol=1e-5)

def run(script, *arguments):
    result = subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], capture_output=True, text=True)
    return result.returncode, result.stderr.strip().splitlines()

def test_errors_are_one_line_with_code_2(world, runs, tmp_path):
    code, lines = run("train.py", *options(world, tmp_path / "new", "--stage", 2))
    assert code == 2 and len(lines) == 1 and "run: python train.py --stage 1" in lines[0]
    code, lines = run("train.py", "--stage", 1, "--data", tmp_path / "none", "--out", tmp_path / "new")
    assert code == 2 and "does not exist" in lines[-1] or "is missing" in lines[-1]
    code, lines = run("train.py", "--stage", 1, "--optimizer", "adam")
    assert code == 2 and "unrecognized arguments: --optimizer adam" in lines[-1]
    code, lines = run("train.py", "--stage", 1, "--preset", "toy", "--data", world, "--init", runs / "stage1",
                      "--out", tmp_path / "new")
    assert code == 2 and len(lines) == 1 and "is of preset micro, not toy" in lines[0]
    assert not (tmp_path / "new" / "stage1").exists()                      # nothing half-written

def test_damaged_checkpoints_and_missing_videos_are_one_line_too(world, runs, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(runs / "stage3", broken)
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    code, lines = run("mvbench.py", "--ckpt", broken, "--llm", runs / "llm", "--data", world / "mvbench",
                      "--out", tmp_path / "out")
    assert code == 2 and len(lines) == 1 and "model.safetensors is damaged" in lines[0]
    code, lines = run("chat.py", "--ckpt", runs / "stage3", "--video", tmp_path / "none.mp4", "--ask", "What?")
    assert code == 2 and len(lines) == 1 and "none.mp4: no such file" in lines[0]

def test_the_learning_rate_rises_holds_and_falls():
    cfg = train.TrainConfig(lr=1.0, steps=100, warmup=0.1, constant_until=0.5, lr_end=0.01)
    rates = [optim.get_lr(step, cfg) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:51] == pytest.approx([1.0] * 42)
    assert rates[75] == pytest.approx(0.505) and rates[99] < 0.012 and rates[50:] == sorted(rates[50:], reverse=True)

def test_stage_1_begins_with_captions_alone(world, runs, tmp_path):
    out = tmp_path / "captions"
    shutil.copytree(runs / "init", out / "init")
    train.main(options(world, out, "--stage", 1, "--vtg-only", 0.5, "--log-every", 1))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert ["vtc" in row for row in rows] == [False, False, True, True] and all("vtg" in row for row in rows)

def test_one_part_of_the_pretraining_alone(world, tmp_path, capsys):
    pretrain.main(["llm", *options(world, tmp_path / "part")])
    assert is_finished(tmp_path / "part/llm_fp32") and not (tmp_path / "part/init").exists()
    with pytest.raises(SystemExit):
        pretrain.main(["eye"])
    assert "choose from 'vit', 'bert', 'llm'" in capsys.readouterr().err
    for wrong, message in ((["--preset", "vicuna-7b"], "weights.convert import"), (["--flip"], "--flip is for stages")):
        with pytest.raises(ValueError, match=message):
            pretrain.main(wrong)

def test_stage_0_and_a_missing_start_name_their_command(world, tmp_path):
    expected = "train.py: --stage 0 is now a command of its own: python -m toy.pretrain"
    assert run("train.py", "--stage", 0) == (2, [expected])
    code, lines = run("train.py", *options(world, tmp_path, "--stage", 1))
    assert code == 2 and len(lines) == 1 and "run: python -m toy.pretrain --preset micro" in lines[0]

def test_options_have_their_older_spellings_too():
    argv = ("--stage 1 --clip 2 --accumulate 3 --recompute vit --hold 0.5 --keep 4 --lora-lr 5 --muon 6 "
            "--captions-first 0.7 --no-tell-seconds --restart").split()
    cfg, explicit = train.parse(argv)
    expected = dict(grad_clip=2, grad_accum=3, grad_checkpoint="vit", constant_until=0.5, keep_checkpoints=4,
                    lora_lr_scale=5, muon_lr_scale=6, vtg_only=0.7, add_timestamps=False, resume=False)
    assert {name: getattr(cfg, name) for name in expected} == expected and explicit == {"stage", *expected}

def test_a_run_of_an_older_version_resumes_or_is_refused(runs, tmp_path):
    """trainer.json had other names for two of the options that must not change."""
    folder = shutil.copytree(runs / "stage1", tmp_path / "000002")
    options = {"stage": 1, "preset": "micro", "batch": 4, "accumulate": 1, "muon": 1.0, "hold": 0.0, "changes": {}}
    (folder / "trainer.json").write_text(json.dumps({"step": 2, "done": False, "options": options}))
    config, _ = checkpoint.read_config(folder)
    stage = train.Stage("stage 1", tmp_path / "stage1", VideoChat2(config, 1), None, None, None, None)
    cfg = train.TrainConfig(stage=1, preset="micro", batch=4, muon_lr_scale=1.0)
    assert resume.load_weights(stage, cfg, folder) == 2
    with pytest.raises(ValueError, match="a run with grad_accum 1 instead of 2, muon_lr_scale 1.0 instead of 0.0"):
        resume.load_weights(stage, replace(cfg, grad_accum=2, muon_lr_scale=0.0), folder)

def test_training_the_real_thing_imports_nothing_of_the_toy(tmp_path):
    """Nor does it import the tests, the benchmark or what writes questions."""
    program = ("import sys, train\n"
               "try:\n    train.main(sys.argv[1:])\nexcept FileNotFoundError as error:\n    print(error)\n"
               "print(sorted({name.split('.')[0] for name in sys.modules} & {'toy', 'qagen', 'evaluation', 'bench'}))")
    result = subprocess.run([sys.executable, "-c", program, "--preset", "vicuna-7b", "--stage", "3", "--out",
                             str(tmp_path), "--data", str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    lines = result.stdout.splitlines()
    assert "stage 3 starts from" in lines[0] and lines[1:] == ["[]"]

@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_compute_the_same():
    vit = VisionTransformer(PRESETS["micro"]().vit)
    video = torch.randn(1, 4, 3, 64, 64)
    expected = vit(video)
    names = list(vit.state_dict())
    for block in blocks_of(vit):
        block.compile()
    torch.testing.assert_close(vit(video), expected)
    assert list(vit.state_dict()) == names and vit.blocks[0]._compiled_call_impl
