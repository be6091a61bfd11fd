# Everything runs in a virtual environment of its own. Needed: Linux, Python >= 3.10, pip >= 22.3.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# The release that belongs to TORCH. Only installed where torch did not bring one (its CPU build):
# the kernel tests run in Triton's interpreter there.
TRITON ?= triton==3.7.1
DEMO_ARGS ?=
# One thread for each test process: two that fight over the cores take several times as long.
JOBS ?= 2
GPU_JOBS ?= 8
PYTEST_ARGS ?=
# Pages are looked at in a browser where there is one.
MARKS := $(if $(shell command -v chromium),not gpu,not gpu and not browser)

BIN := $(VENV)/bin
PIP := $(PYTHON) -m pip --python $(BIN)/python --disable-pip-version-check
STAMP := $(VENV)/.installed

.PHONY: demo test test-gpu sanitize lint format clean

# Threads that wait sleep: spinning ones take minutes longer where something else wants a core.
demo: $(STAMP)
	OMP_WAIT_POLICY=passive $(BIN)/cef-compile demo $(DEMO_ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadscope \
		-m "$(MARKS)" $(PYTEST_ARGS)

# Most of a GPU test's time is compiling kernels, which several processes do at once.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -q -m gpu -n $(GPU_JOBS) $(PYTEST_ARGS)

sanitize: $(STAMP)
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python tests/gpu/sanitize.py
	$(BIN)/python tests/gpu/races.py
	$(BIN)/python tests/gpu/races.py triton

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist demo-out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made without pip, which the outer one stands in for: Debian's python3 has venv but no ensurepip.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PIP) install "$(TORCH)"
	$(BIN)/python -c "import triton" 2>/dev/null || $(PIP) install --no-deps "$(TRITON)"
	$(PIP) install -e ".[test,dev]"
	touch $(STAMP)
