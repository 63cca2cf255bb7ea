# Two commands matter: `make demo` and `make test`. Each does all the set-up it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
WORKERS ?= 2
# Two threads per process suit small machines; more only make the operators of small networks wait for each other.
export OMP_NUM_THREADS ?= 2

.PHONY: demo test lint format bench clean

demo: $(VENV)/.runtime
	$(BIN)/python tools/compress.py configs/demo/chex_maskrcnn.py --work-dir work_dirs/demo

# Two workers with one thread each: operators of tiny networks gain nothing from more.
test: $(VENV)/.tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/.tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.tests
	$(BIN)/python benchmarks/channel_pruning.py
	$(BIN)/python benchmarks/grouped_conv.py
	$(BIN)/python benchmarks/block_sparse.py
	$(BIN)/python benchmarks/group_assignment.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "prune_mm needs Python 3.10 or newer; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel

$(VENV)/.runtime: requirements/runtime.txt pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet -r requirements/runtime.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.tests: requirements/tests.txt $(VENV)/.runtime
	$(BIN)/pip install --quiet -r requirements/tests.txt
	touch $@

clean:
	rm -rf $(VENV) work_dirs data .pytest_cache .ruff_cache
