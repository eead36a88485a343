# make demo     train the quickstart model without and with token fusion, and compare
# make test     the fast tests: every operator, script and public class
# make test-all all tests that need no GPU: also those that start processes, export, or visit a page
# make bench    time and memory beside DeiT, on this machine's CPU
# make quality  check style and types; make style mends style
# make code     copy modeling_fambav/ into the checkpoints under model_cards/, after it was changed
#
# The environment is made on first use, in .venv. PYTHON chooses the interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

CHECKPOINTS := $(dir $(wildcard model_cards/*/model.safetensors))

.PHONY: bench code demo test test-all quality style

demo: $(INSTALLED)
	$(BIN)/python training/demo.py

# A worker for every core; what one file prepares is prepared once.
test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow and not gpu" --numprocesses auto --dist loadfile

# The slow tests have processes of their own, and some measure time.
test-all: test
	$(BIN)/python -m pytest -m "slow and not gpu"

bench: $(INSTALLED)
	$(BIN)/python training/benchmark.py

code:
	for folder in $(CHECKPOINTS); do rm -f $$folder*.py; cp modeling_fambav/[!_]*.py $$folder; done

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[train,app,test]"
	touch $(INSTALLED)
