# make demo: the main job.  make test: the tests.  make matrix: the slow ones.  All install what they need into .venv first.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test matrix check docs docs-serve bench wheel clean

demo: .venv/installed
	$(BIN)/gaf demo

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow' tests

matrix: .venv/installed
	$(BIN)/python -m pytest -m slow tests

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -p no:cacheprovider --doctest-modules src/gaf

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/site

docs-serve: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

bench: .venv/installed
	$(BIN)/gaf bench accumulate --rounds 40 --out benchmarks/accumulate.jsonl
	$(BIN)/gaf bench ddp --b 100 --k 2 4 --out benchmarks/ddp.jsonl
	$(BIN)/gaf bench ddp --b 32 --k 2 4 8 --rounds 12 --out benchmarks/ddp-b32.jsonl
	$(BIN)/gaf bench train $(if $(DATA),--data $(DATA)) --workers 0 2 --out benchmarks/train.jsonl
	$(BIN)/gaf bench cpu --out benchmarks/cpu.jsonl
	$(BIN)/python benchmarks/threads.py --rounds 3 --out benchmarks/threads.jsonl

wheel: .venv/installed
	$(BIN)/python -m build --wheel

# The tested versions; torch first and by name, so that no other package fetches another build of it.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist runs
