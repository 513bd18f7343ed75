# make demo   from nothing to a model that watches videos: toy world, training, MVBench (28 min on 2 CPU cores)
# make test   ruff and the whole test suite (7 min on 2 CPU cores)
# Both set up .venv first. PYTHON=python3.12 chooses the interpreter.
SHELL = bash
.SHELLFLAGS = -o pipefail -c
PYTHON ?= python3
PY = .venv/bin/python
PIP = $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test clean

demo: .venv/runtime
	@$(PY) -c 'import shutil, sys; sys.exit(shutil.disk_usage(".").free < 2e9)' || { echo "make: less than 2 GB of disk are free here; the toy world, the ViT's features and the checkpoints need them"; exit 2; }
	@echo "VideoChat2 on the toy world, about 30 minutes on 2 CPU cores: the world 1, pretraining and stage 1 13, stage 2 3,"
	@echo "stage 3 11, MVBench 1. Ctrl-C stops it at any time; make demo then continues where it stopped."
	@$(MAKE) --no-print-directory -j2 runs/toy/stage3/mvbench/report.html
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
# age does not count), so only what is missing runs, and what does not need each other runs side by side (-j2): the LLM
# in one lane, ViT and stage 1 in the other. A lane has one thread and no progress bars, which would overwrite each
# other: a pipe is no terminal. Ctrl-C makes python save and say so, therefore cat ignores it.
LANE = OMP_NUM_THREADS=1 2>&1
PIPE = (trap "" INT; cat)

data/toy/meta.json:
	$(PY) -m toy.world --out data/toy
runs/toy/llm/config.json: | data/toy/meta.json
	$(LANE) $(PY) -m toy.pretrain llm | $(PIPE)
runs/toy/init/config.json: | data/toy/meta.json
	$(LANE) $(PY) -m toy.pretrain vit | $(PIPE)
runs/toy/stage1/config.json: | runs/toy/init/config.json
	$(LANE) $(PY) train.py --stage 1 | $(PIPE)
runs/toy/stage2/config.json: | runs/toy/stage1/config.json runs/toy/llm/config.json
	$(PY) train.py --stage 2
runs/toy/stage3/config.json: | runs/toy/stage2/config.json
	$(PY) train.py --stage 3
runs/toy/stage3/mvbench/report.html: | runs/toy/stage3/config.json
	$(PY) mvbench.py --ckpt runs/toy/stage3 --controls all

# Ctrl-C must not delete what a step has just finished
.PRECIOUS: data/toy/meta.json runs/toy/llm/config.json runs/toy/init/config.json runs/toy/stage1/config.json
.PRECIOUS: runs/toy/stage2/config.json runs/toy/stage3/config.json runs/toy/stage3/mvbench/report.html

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
