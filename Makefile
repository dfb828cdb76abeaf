# Two commands are enough on a fresh machine: `make run` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# auto-gptq has no wheel for Python 3.12 and later; without its CUDA extension it builds as pure Python.
export BUILD_CUDA_EXT := 0

.PHONY: run test check unit lab book bench notebooks outputs links external-links doctor clean

run: $(VENV)/.ready
	$(BIN)/python -m helpers run

# Two at a time, but for the execution of all notebooks, which keeps both cores busy itself. That part runs also where the first fails.
NOTEBOOKS := tests/notebooks/test_notebooks.py
test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore $(NOTEBOOKS); first=$$?; \
	$(BIN)/python -m pytest $(NOTEBOOKS) && exit $$first

# Style, imports, types and declared dependencies; nothing is executed.
check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/deptry helpers

# What needs no model, no process, no server and no network. Target: under a minute on two idle cores.
unit: $(VENV)/.ready
	$(BIN)/python -m pytest -m "not integration and not notebook and not slow" tests/unit

lab: $(VENV)/.ready
	$(BIN)/jupyter lab notebooks/00_start_here.ipynb

# A static site of the executed notebooks: build/site/index.html.
book: $(VENV)/.ready
	$(BIN)/python -m helpers book

# Speed is measured here and never asserted in tests: run it on an idle machine.
bench: $(VENV)/.ready
	$(BIN)/python tests/bench.py

# For authors: notebooks/source/*.py are what one edits; this makes the notebooks from them and keeps the outputs of unchanged cells.
notebooks: $(VENV)/.ready
	$(BIN)/python -m helpers notebooks

# For authors: execute every notebook from an empty cache and store outputs and cost cards in notebooks/.
outputs: $(VENV)/.ready
	$(BIN)/python -m helpers run --in-place

links: $(VENV)/.ready
	$(BIN)/python -m helpers links

# Do the links that lead out of the course still lead somewhere? It needs internet; the weekly run does it.
external-links: $(VENV)/.ready
	$(BIN)/python tests/external_links.py

doctor: $(VENV)/.ready
	$(BIN)/python -m helpers doctor

# The stamp is written last: an interrupted installation is taken up again.
$(VENV)/.ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "Python 3.11, 3.12 or 3.13 is needed; set PYTHON=... to one (found: $$($(PYTHON) --version))"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

clean:
	rm -rf build $(VENV)
