PYTHON ?= python3

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-zoo lint gpu sanitize clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

setup: .venv/stamp  ## create .venv with the pinned dependencies and tribn itself

.venv/stamp: pyproject.toml
	@$(PYTHON) -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' \
	  2>/dev/null || { echo "tribn: PYTHON=$(PYTHON) must be Python 3.10 to 3.14 with the venv module" \
	  "(on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "Setting up .venv; downloading PyTorch and Triton may take minutes"
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: .venv/stamp  ## see what tribn does on this machine
	.venv/bin/python -m perf demo

# One thread per worker: pytest-xdist already fills the cores.
test: export OMP_NUM_THREADS := 1
test: .venv/stamp  ## run the tests: on this device, then every kernel in Triton's interpreter
	.venv/bin/python -m pytest -n auto
	TRITON_INTERPRET=1 .venv/bin/python -m pytest -n auto

test-zoo: export OMP_NUM_THREADS := 1
test-zoo: .venv/stamp  ## train models of other libraries as they are and converted
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,zoo]'
	.venv/bin/python -m pytest -n auto tests/zoo.py

lint: .venv/stamp  ## check style and types
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

# No venv: a GPU machine's own python3 has the PyTorch that matches its driver, and may have a plugin,
# pytest-benchmark, that does not go with pytest-xdist. Kernels are compiled on the host, which tests and
# benchmark do on all its processors. What the tests find does not keep the benchmark, which has a
# correctness gate of its own, from leaving its results.
gpu: export OUT := $(or $(OUT),perf/results)
gpu:  ## test and benchmark on a GPU with the packages of PYTHON; results go to OUT
	@$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("no CUDA device here")'
	@mkdir -p "$$OUT"
	@echo "Running the tests; their output goes to $$OUT/tests.log"
	@status=0; OMP_NUM_THREADS=1 timeout --signal INT --kill-after 20 300 \
	  $(PYTHON) -m pytest -n auto -p no:benchmark >"$$OUT/tests.log" 2>&1 || status=$$?; \
	  grep -E '^(FAILED|ERROR)|(passed|failed|errors?).* in ' "$$OUT/tests.log"; \
	  echo "tests: exit code $$status (124: not done in 300 s)"; \
	  $(PYTHON) -m perf bench --jobs "$$(nproc)" --out "$$OUT" && \
	  $(PYTHON) -m perf plot --out "$$OUT" "$$OUT"/bench-*.json && exit $$status

sanitize: export PYTHONPATH := $(CURDIR)
sanitize:  ## run tribn's kernels under compute-sanitizer on a GPU with the packages of PYTHON
	@for tool in memcheck racecheck synccheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) tests/sanitize.py || exit 1; done

clean:  ## remove .venv, caches and build outputs
	rm -rf .venv build dist .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find tribn tests perf -name __pycache__ -prune -exec rm -rf {} +
