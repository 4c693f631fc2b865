# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Pinned here and not in requirements/lock.txt: this is the build for machines without a GPU, and a looser range may
# fetch gigabytes of CUDA packages. On a machine with a GPU: make setup TORCH="torch".
TORCH ?= torch==2.13.0
# Another transformers than the lock's: make setup TRANSFORMERS=transformers==5.17.0, with -B where .venv stands already.
TRANSFORMERS ?=
# --no-deps, so that nothing is installed which the lock does not name; --no-build-isolation, since pip would build
# with whatever setuptools is newest that day.
LOCKED := --quiet --no-deps --no-build-isolation --require-hashes
UV ?= uv==0.13.9
# What `make lock` may change: nothing that still fits. All of it: make lock LOCK_FLAGS=--upgrade
LOCK_FLAGS ?=
TORCH_OLDEST ?= torch==2.6.0
TRANSFORMERS_OLDEST ?= transformers==5.5.0
TORCH_NEWEST ?= torch
TEST_WORKERS ?= 2
TEST_TOOLS := pytest pytest-xdist hypothesis
# What `make oldest` and `make newest` run: three minutes, and every place where torch and transformers are met.
FAST_TESTS := $(patsubst %,tests/test_%.py,offload compat cpu_tokens drafted_generate lifetime limits linear mixed \
	precision source speckv tree_pass verify)
BENCH_DIR ?= .bench
BENCH_SHAPE ?= tinyllama-1.1b
BENCH_CAP ?= 1434MiB
BENCH_KERNELS ?= 7b
# llama.cpp without AMX: -march=native defines __AMX_INT8__, so switching GGML_AMX_* off is not enough.
LLAMA_CMAKE := -DGGML_NATIVE=ON -DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF -DGGML_AMX_BF16=OFF \
	-DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__ -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF \
	-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF

COMPILE := .venv-lock/bin/uv pip compile --quiet --config-file requirements/uv.toml $(LOCK_FLAGS)
VERSIONS := import importlib.metadata as m, platform; print('python ' + platform.python_version(), \
	*(name + ' ' + m.version(name) for name in ('torch', 'transformers')), sep=', ')
# In the environment $(1): the fast tests, then one line for a table of tested versions.
FAST = set -o pipefail; $(1)/bin/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(2) $(FAST_TESTS) | \
	tee $(1)/tests.log; passed=$$?; \
	echo "$$($(1)/bin/python -c "$(VERSIONS)"): $$(tail -n 1 $(1)/tests.log)"; exit $$passed

.PHONY: setup lock demo test check oldest newest real gpu bench peers clean

setup: $(VENV)/.ready

# torch comes after the lock, which holds what it needs beside CUDA, and so brings no version of its own choice.
$(VENV)/.ready: pyproject.toml requirements/build.txt requirements/lock.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(LOCKED) -r requirements/build.txt
	$(BIN)/python -m pip install $(LOCKED) -r requirements/lock.txt
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(if $(TRANSFORMERS),$(BIN)/python -m pip install --quiet "$(TRANSFORMERS)")
	touch $@

lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet "$(UV)"
	$(COMPILE) pyproject.toml --extra dev --extra plots -o requirements/lock.txt
	for part in build peers-build peers; do $(COMPILE) -c requirements/lock.txt requirements/$$part.in \
		-o requirements/$$part.txt || exit; done

demo: setup
	$(BIN)/python examples/demo.py

test: setup
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The floor of what pyproject.toml allows.
oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet "$(TORCH_OLDEST)" "$(TRANSFORMERS_OLDEST)" $(TEST_TOOLS) -e .
	@$(call FAST,.venv-oldest)

# Whatever is newest today, without the lock. -W: that this transformers is newer than any tested is no error here.
newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager "$(TORCH_NEWEST)" \
		$(TEST_TOOLS) -e .
	@$(call FAST,.venv-newest,-W default:transformers)

peers: setup
	$(BIN)/python -m pip install $(LOCKED) -r requirements/peers-build.txt
	CMAKE_BUILD_PARALLEL_LEVEL=2 CMAKE_ARGS="$(LLAMA_CMAKE)" \
		$(BIN)/python -m pip install $(LOCKED) --no-binary llama-cpp-python --no-cache-dir -r requirements/peers.txt

# A real model, fetched once into the cache folder: what it loses in each mode, its speed, its drafters; 20 minutes.
real: peers
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.real
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.decoding

# On a machine with a card, whose own python3 has torch: no virtual environment. Results lie in .gpu/.
gpu:
	$(PYTHON) -m benchmarks.gpu

bench: peers
	$(BIN)/python -m benchmarks.kernels --kernel-shapes $(BENCH_KERNELS)
	$(BIN)/python -m benchmarks.mixed --shape $(BENCH_SHAPE) --folder $(BENCH_DIR)
	$(BIN)/python -m benchmarks.policy_cost
	$(BIN)/python -m benchmarks.round_cost
	$(BIN)/python -m benchmarks.drafters --dram 1GiB
	$(BIN)/python -m benchmarks.drafters --hbm 80MB --dram 1GiB --link-gbps 0.4 --widen 1024x2048x8 --prompts 1 \
		--plain-tokens 32 --drafter-names ngram,resident,auto --folder $(BENCH_DIR)
	$(BIN)/python -m benchmarks.drafters --cap $(BENCH_CAP) --dram 1060MiB --widen 4096x8192x14 --prompts 1 \
		--plain-tokens 24 --tokens 96 --folder $(BENCH_DIR)
	$(BIN)/python -m benchmarks --shape $(BENCH_SHAPE) --cap $(BENCH_CAP) --folder $(BENCH_DIR)
	$(BIN)/python -m benchmarks --shape llama-2-7b --precision int4 --cap 18GiB --folder $(BENCH_DIR)
	$(BIN)/python -m benchmarks --shape llama-2-7b --precision int4 --cap 2080MiB --folder $(BENCH_DIR)

clean:
	rm -rf $(VENV) .venv-* $(BENCH_DIR) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
