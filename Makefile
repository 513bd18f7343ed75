# make demo   from nothing to a model that watches videos: world, stages 0-3, MVBench (at most 30 min on 2 CPU cores)
# make test   ruff and the whole test suite (at most 8 min on 2 CPU cores)
# Both set up .venv first. PYTHON=python3.12 chooses the interpreter.
PYTHON ?= python3
PY = .venv/bin/python
PIP = $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test clean

demo: .venv/runtime
	@$(PY) -m toy.demo

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
