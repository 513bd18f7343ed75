# make demo                from ready-made stand-ins to a model that watches videos: world, three stages, MVBench (15 min)
# make demo-from-nothing   trains the stand-ins first, as assets/toy/ was made (hours)
# make test                ruff and the whole test suite (8 min); all on 2 CPU cores
# Each sets up .venv first. PYTHON=python3.12 chooses the interpreter.
SHELL = bash
.SHELLFLAGS = -o pipefail -c
PYTHON ?= python3
PY = .venv/bin/python
PIP = $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: demo demo-from-nothing test clean

demo: .venv/runtime
	@$(PY) -c 'import shutil, sys; sys.exit(shutil.disk_usage(".").free < 2e9)' || { echo "make: less than 2 GB of disk are free here; the toy world, the ViT's features and the checkpoints need them"; exit 2; }
	@echo "VideoChat2 on the toy world, about 15 minutes on 2 CPU cores: the world 1, stage 1 5, stage 2 2, stage 3 6,"
	@echo "MVBench 1. Ctrl-C stops it at any time; make demo then continues where it stopped."
	@$(MAKE) --no-print-directory runs/toy/stage3/mvbench/report.html
	@echo
	@echo "Where things are"
	@echo "  data/toy                           the world: videos, captions, instructions, benchmark"
	@echo "  runs/toy/stage3                    the model"
	@echo "  runs/toy/stage3/mvbench            every answer, and report.html with what they mean: open it in a browser"
	@echo "  runs/toy/metrics.jsonl             the losses of every stage"
	@echo "What to try next"
	@echo "  .venv/bin/python chat.py --ckpt runs/toy/stage3 --video $$(find data/toy/videos -name '*.gif' | sort | head -n 1)"
	@echo "  .venv/bin/python mvbench.py --ckpt runs/toy/stage2"
	@echo "  .venv/bin/python -m toy.probe                 # which part understands what"
	@echo "  .venv/bin/python train.py --help"

# The steps of the demo, by the file that each of them writes last. A step is done if its file exists (| says that its
# age does not count), so only what is missing runs.
data/toy/meta.json:
	$(PY) -m toy.world --out data/toy
runs/toy/stage1/config.json: | data/toy/meta.json
	$(PY) train.py --stage 1
runs/toy/stage2/config.json: | runs/toy/stage1/config.json
	$(PY) train.py --stage 2
runs/toy/stage3/config.json: | runs/toy/stage2/config.json
	$(PY) train.py --stage 3
runs/toy/stage3/mvbench/report.html: | runs/toy/stage3/config.json
	$(PY) mvbench.py --ckpt runs/toy/stage3 --controls all

# The stand-ins, anew: a world of their own, then the LLM in one lane, ViT and BERT in the other. A lane has one thread
# and no progress bars, which would overwrite each other: a pipe is no terminal. Ctrl-C makes python save and say so,
# therefore cat ignores it. Stage 1 takes runs/toy/init where there is one.
demo-from-nothing: .venv/runtime
	@$(MAKE) --no-print-directory -j2 runs/toy/init/config.json
	@$(MAKE) --no-print-directory demo

LANE = OMP_NUM_THREADS=1 2>&1
PIPE = (trap "" INT; cat)
PRETRAIN = -m toy.pretrain --data data/pretraining

data/pretraining/meta.json:
	$(PY) -m toy.world --out data/pretraining --clips 96000 --texts 120000 --seed 1000
runs/toy/llm_fp32/config.json: | data/pretraining/meta.json
	$(LANE) $(PY) $(PRETRAIN) llm | $(PIPE)
runs/toy/vit/config.json: | data/pretraining/meta.json
	$(LANE) $(PY) $(PRETRAIN) vit | $(PIPE)
runs/toy/bert/config.json: | runs/toy/vit/config.json
	$(LANE) $(PY) $(PRETRAIN) bert | $(PIPE)
runs/toy/init/config.json: | runs/toy/bert/config.json runs/toy/llm_fp32/config.json
	$(PY) $(PRETRAIN)

# Ctrl-C must not delete what a step has just finished
.PRECIOUS: data/toy/meta.json runs/toy/stage1/config.json runs/toy/stage2/config.json runs/toy/stage3/config.json
.PRECIOUS: data/pretraining/meta.json runs/toy/vit/config.json runs/toy/bert/config.json runs/toy/llm_fp32/config.json
.PRECIOUS: runs/toy/init/config.json runs/toy/stage3/mvbench/report.html

test: .venv/dev
	@$(PY) -m ruff check .
	@$(PY) -m pytest

.venv/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: there is no $(PYTHON); install Python 3.10 or newer, or name one: make $(MAKECMDGOALS) PYTHON=..."; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $(PYTHON) is older than Python 3.10; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "make: $(PYTHON) lacks the venv module; on Debian and Ubuntu: apt install python3-venv"; exit 2; }
	@$(PYTHON) -c 'import shutil, sys; sys.exit(shutil.disk_usage(".").free < 4e9)' || { echo "make: less than 4 GB of disk are free here; packages and toy world need about 3 GB"; exit 2; }
	@echo "setting up .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/runtime: .venv/python requirements.txt
	@echo "installing requirements.txt (PyTorch is large; a minute or two)"
	@$(PIP) -r requirements.txt || { echo "make: pip could not install requirements.txt; is there a network?"; exit 2; }
	@touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	@echo "installing requirements-dev.txt"
	@$(PIP) -r requirements-dev.txt || { echo "make: pip could not install requirements-dev.txt; is there a network?"; exit 2; }
	@touch $@

clean:
	rm -rf .venv data runs
