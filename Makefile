# make demo: the demo.  make test: the tests.  make matrix: the slow tests.
# Each target first installs what it needs into .venv: the lab for demo and bench, everything for
# the others.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test matrix check docs docs-serve bench wheel clean

demo: .venv/installed-lab
	$(BIN)/gaf demo

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow' tests

matrix: .venv/installed-dev
	$(BIN)/python -m pytest -m slow tests

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -p no:cacheprovider --doctest-modules src/gaf

docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/site

docs-serve: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

bench: .venv/installed-lab
	$(BIN)/gaf bench accumulate --rounds 40 --out benchmarks/accumulate.jsonl
	OMP_NUM_THREADS=1 $(BIN)/gaf bench accumulate --model mlp --k 8 --b 20 100 --hidden 512 64 \
		--rounds 100 --out benchmarks/accumulate-mlp.jsonl
	$(BIN)/gaf bench ddp --b 100 --k 2 4 --out benchmarks/ddp.jsonl
	$(BIN)/gaf bench ddp --b 32 --k 2 4 8 --rounds 12 --out benchmarks/ddp-b32.jsonl
	$(BIN)/gaf bench hsdp --rounds 20 --out benchmarks/hsdp.jsonl
	$(BIN)/gaf bench train $(if $(DATA),--data $(DATA)) --workers 0 2 --out benchmarks/train.jsonl
	$(BIN)/gaf bench samples --out benchmarks/samples.jsonl
	$(BIN)/gaf bench guard --clean 2000 --out benchmarks/guard.jsonl
	$(BIN)/gaf bench guard --b 8 --after 400 --out benchmarks/guard-b8.jsonl
	$(BIN)/gaf bench cpu --out benchmarks/cpu.jsonl
	$(BIN)/python benchmarks/threads.py --rounds 3 --out benchmarks/threads.jsonl

wheel: .venv/installed-dev
	$(BIN)/python -m build --wheel

# Installs the tested versions. torch comes first and by name, so that no other package fetches
# another build of it.
.venv/installed-lab: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lab]'
	touch $@

.venv/installed-dev: .venv/installed-lab
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist runs
