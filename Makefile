# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Pinned here and not in the library's requirements: this is the build for machines without a GPU, and a looser
# range may fetch gigabytes of CUDA packages. On a machine with a GPU: make setup TORCH="torch".
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers
TEST_WORKERS ?= 2
BENCH_DIR ?= .bench
BENCH_SHAPE ?= tinyllama-1.1b
BENCH_CAP ?= 1434MiB
BENCH_KERNELS ?= 7b
# llama.cpp without AMX: -march=native defines __AMX_INT8__, so switching GGML_AMX_* off is not enough.
LLAMA_CMAKE := -DGGML_NATIVE=ON -DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF -DGGML_AMX_BF16=OFF \
	-DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__ -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF \
	-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF

.PHONY: setup demo test check bench peers clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "$(TRANSFORMERS)" -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/python examples/demo.py

test: setup
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

peers: setup
	$(BIN)/python -m pip install --quiet "accelerate>=1.10" "gguf>=0.17"
	$(BIN)/python -c "import llama_cpp" 2>/dev/null || CMAKE_BUILD_PARALLEL_LEVEL=2 CMAKE_ARGS="$(LLAMA_CMAKE)" \
		$(BIN)/python -m pip install --quiet --no-binary llama-cpp-python --no-cache-dir "llama-cpp-python>=0.3.36"

bench: peers
	$(BIN)/tiercache bench --kernels --kernel-shapes $(BENCH_KERNELS)
	$(BIN)/python -m tiercache.bench.mixed --shape $(BENCH_SHAPE) --folder $(BENCH_DIR)
	$(BIN)/python -m profiler.policy_cost
	$(BIN)/tiercache bench --drafters --dram 1GiB
	$(BIN)/tiercache bench --drafters --hbm 80MB --dram 1GiB --link-gbps 0.4 --widen 1024x2048x8 --prompts 1 \
		--plain-tokens 32 --drafter-names ngram,resident,auto --folder $(BENCH_DIR)
	$(BIN)/tiercache bench --drafters --cap $(BENCH_CAP) --dram 1060MiB --widen 4096x8192x14 --prompts 1 \
		--plain-tokens 24 --tokens 96 --folder $(BENCH_DIR)
	$(BIN)/python -m tiercache.bench --shape $(BENCH_SHAPE) --cap $(BENCH_CAP) --folder $(BENCH_DIR)
	$(BIN)/python -m tiercache.bench --shape llama-2-7b --precision int4 --cap 18GiB --folder $(BENCH_DIR)
	$(BIN)/python -m tiercache.bench --shape llama-2-7b --precision int4 --cap 2080MiB --folder $(BENCH_DIR)

clean:
	rm -rf $(VENV) $(BENCH_DIR) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
