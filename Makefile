# make demo: see it work · make convert-demo: a pretrained model learns to remember · make golf-demo: a small model in a small file, scored · make test: all tests · make check: format, lint, types · make bench: CPU timings
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONPATH :=

.PHONY: setup demo convert-demo golf-demo test check format bench clean

setup: .venv/.installed

.venv/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, {sys.executable} is {v.major}.{v.minor}. Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

demo: setup
	$(BIN)/fastweight demo --out demo

convert-demo: setup
	$(BIN)/fastweight convert-demo --out convert-demo

golf-demo: setup
	$(BIN)/fastweight golf demo --out golf-demo

test: setup
	$(BIN)/python -m pytest -n 2

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest tests/test_imports.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python -m benchmarks.ops --json benchmarks/results/ops-cpu.json

clean:
	rm -rf .venv demo convert-demo golf-demo build dist *.egg-info
