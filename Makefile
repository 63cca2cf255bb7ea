# Two commands matter: `make demo` and `make test`. Each does all the set-up it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
WORKERS ?= 2
# Two threads per process suit small machines; more only make the operators of small networks wait for each other.
export OMP_NUM_THREADS ?= 2

.PHONY: demo test test-upstream lint format bench evidence clean

demo: $(VENV)/.runtime
	$(BIN)/python tools/compress.py configs/demo/chex_maskrcnn.py --work-dir work_dirs/demo

# Two workers with one thread each: operators of tiny networks gain nothing from more.
test: $(VENV)/.tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Many more random deaths and hostile files than in the tests: ROUNDS each.
ROUNDS ?= 20
STRESS := tests/engine/test_faults.py tests/engine/test_reading.py tests/export/test_hostile.py tests/export/test_torch_file.py tests/structures/test_plan_fuzz.py tests/pruners/test_group_config_hostile.py
stress: $(VENV)/.tests
	PRUNE_MM_STRESS=$(ROUNDS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist load $(STRESS)

# The same package beside the OpenMMLab packages under their original names, in an environment of its own.
UPSTREAM := .venv-upstream
UPSTREAM_TESTS := tests/compat tests/graph/test_mmdet_backbones.py tests/graph/test_rules.py tests/graph/test_opaque.py \
	tests/structures/test_law.py tests/engine/test_attach.py tests/engine/test_training.py tests/engine/test_resume.py tests/engine/test_ema.py \
	tests/engine/test_distributed.py tests/export/test_artifact.py tests/tools/test_compress.py tests/test_configs.py
test-upstream: $(UPSTREAM)/.tests
	OMP_NUM_THREADS=1 $(UPSTREAM)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(UPSTREAM_TESTS)

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
	$(BIN)/python benchmarks/imagenet_loading.py

# What the methods keep: a matrix of trainings, hours on two cores. Stop it at any time; it goes on where it was.
# EVIDENCE='--only digits_resnet20 --budget-minutes 30' for a part; --latency afterwards, on a quiet machine.
evidence: $(VENV)/.evidence
	$(BIN)/python tools/evidence.py $(EVIDENCE)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "prune_mm needs Python 3.10 or newer; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel

$(VENV)/.runtime: requirements/runtime.txt pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet -r requirements/runtime.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.evidence: requirements/evidence.txt $(VENV)/.runtime
	$(BIN)/pip install --quiet -r requirements/evidence.txt
	touch $@

$(VENV)/.tests: requirements/tests.txt requirements/evidence.txt $(VENV)/.runtime
	$(BIN)/pip install --quiet -r requirements/tests.txt
	touch $@

$(UPSTREAM)/.tests: requirements/upstream.txt pyproject.toml
	$(PYTHON) -m venv $(UPSTREAM)
	$(UPSTREAM)/bin/pip install --quiet --upgrade pip wheel
	$(UPSTREAM)/bin/pip install --quiet -r requirements/upstream.txt
	$(UPSTREAM)/bin/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) $(UPSTREAM) work_dirs data .pytest_cache .ruff_cache
