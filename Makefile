# One command each, from a bare clone: `make demo`, `make test`. Both make .venv when it is missing or stale.
#   PYTHON=<command>    the Python to build .venv with (3.11 to 3.13); for `make gpu`, the Python to run
#   WORKERS=<n>         test processes
#   GPU_SECONDS=<n>     time of `make gpu`, tests and benchmarks together
#   PYTEST_ARGS=<...>   more arguments for pytest, say PYTEST_ARGS="-k transposable"

WORKERS ?= 2
GPU_SECONDS ?= 590
PYTEST_ARGS ?=

# -P keeps the checkout's root off sys.path, where kernels/ and passes/ would shadow other packages.
venv_python := .venv/bin/python -P

# Inductor hashes its precompiled C++ header with the openssl command, and fails where there is none.
ifeq ($(shell command -v openssl 2>/dev/null),)
export TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS := 0
endif

.PHONY: help demo test lint bench gpu clean venv compiler

help:
	@echo "make demo    train on digits, dense and sparse side by side (about 4 minutes)"
	@echo "make test    every test that needs no GPU"
	@echo "make lint    ruff, format check, mypy"
	@echo "make bench   the CPU benchmark"
	@echo "make gpu     kernel tests and benchmarks on a CUDA device, 10 minutes, with the Python that has its torch"
	@echo "make clean   remove what builds and tests leave (.venv stays)"

demo: compiler venv
	$(venv_python) examples/quickstart.py

test: compiler venv
	OMP_NUM_THREADS=1 $(venv_python) -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: venv
	$(venv_python) -m ruff check .
	$(venv_python) -m ruff format --check .
	$(venv_python) -m mypy

bench: compiler venv
	$(venv_python) benchmarks/linear.py

# Where a kernel's test fails, only the rows whose own tests pass are timed, and the target fails.
# No .venv and no network: a GPU machine brings its own torch, built for its driver.
gpu_python = $(or $(PYTHON),$(shell command -v python || echo python3))
gpu:
	@$(gpu_python) -c "import torch; raise SystemExit(not torch.cuda.is_available())" 2>/dev/null || \
	  { echo "sparsefx: make gpu needs a CUDA device, and $(gpu_python) has no torch that sees one." >&2; exit 1; }
	@start=$$(date +%s); export PYTHONPATH=$(CURDIR) TRITON_DEFAULT_FP_FUSION=1; tested=--tested; \
	$(gpu_python) -m pytest tests/kernels --continue-on-collection-errors $(PYTEST_ARGS) || tested=; \
	$(gpu_python) benchmarks/run.py all --device cuda $$tested \
	  --seconds $$(( $(GPU_SECONDS) - $$(date +%s) + start )) && test -n "$$tested"

venv:
	@PYTHON="$(PYTHON)" .ci/venv

# The compiler that Inductor itself takes: CXX, or the platform's usual one.
cxx := $(or $(shell printenv CXX),$(if $(filter Darwin,$(shell uname -s)),clang++,g++))
compiler:
	@printf '#include <vector>\nint main() {}\n' | $(cxx) -x c++ -fsyntax-only - 2>/dev/null || \
	  { echo "sparsefx: a C++ compiler is needed and $(cxx) does not work; install it (on Debian or Ubuntu: apt install g++) or name another: CXX=..." >&2; exit 1; }

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis torch_compile_debug .out
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
