# make demo   the whole road on the embedded model: train, export, load into a stock pipeline, before/after picture
# make test   lint, types, tests
# make soak   hours of killing and breaking: all of tests/reliability, then its table in docs/reliability.md. Broken off,
#             it goes on; remove build/soak.jsonl to begin anew
# They make .venv on the first call and install nothing on the next ones.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-input -c constraints.txt

.PHONY: demo test soak clean

demo: $(VENV)/.installed
	@test ! -d demo/regularization || rm -rf demo # an earlier demo's own output
	$(BIN)/lorakit demo --out demo

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadfile

soak: $(VENV)/.installed-test
	@mkdir -p build
	LORAKIT_FIGURES=$(CURDIR)/build/soak.jsonl nice $(BIN)/pytest -m 'soak or not soak' tests/reliability || \
		{ code=$$?; test $$code = 1 -o $$code = 5; } # a failure is in the table; 5: nothing was left to do
	$(BIN)/python scripts/reliability_table.py build/soak.jsonl

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11: name another with make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
