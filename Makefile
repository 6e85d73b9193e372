# `make demo` and `make test` need Python 3.11 or newer and nothing else; both set up .venv on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo check test test-gpu gpu test-oldest test-middle faults fuzz audit package lint docs notebooks bench bench-op bench-finetune clean

demo: .venv/.installed
	$(BIN)/python demo.py

# before every commit: all but the slow tests, within a minute
check: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not slow"

# two processes with a thread each: as fast as it gets on two cores
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

test-gpu: .venv/.installed
	$(BIN)/python -c "import torch; torch.cuda.is_available() or exit('make test-gpu: torch finds no CUDA device')"
	$(BIN)/pytest -m gpu -W default

# everything that a GPU is needed for, in at most twelve minutes, with a Python that has torch already: nothing is installed
gpu:
	$(PYTHON) -m benchmarks.gpu --output gpu-results

# with the oldest versions that pyproject.toml admits, and with some in between, in environments of their own; they warn
# of what has come since
test-oldest test-middle: test-%: .venv-%/.installed
	OMP_NUM_THREADS=1 .venv-$*/bin/pytest -n 2 --dist worksteal -W ignore::DeprecationWarning

# kills processes and breaks disks, some ten minutes; the tests run a sample
faults: .venv/.installed
	$(BIN)/python -m tests.faults

# known vulnerabilities of what is installed; asks a server
audit: .venv/.audit
	$(BIN)/pip-audit --local --skip-editable --strict

# builds wheel and sdist, and uses each in a clean environment
package:
	PYTHON=$(PYTHON) .ci/package

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# into site/; the variable stops a notice of mkdocs-material's that is not about these pages
docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# runs them with their full settings and keeps the outputs: some ten minutes
notebooks: .venv/.installed
	cd notebooks && for name in *.ipynb; do \
	  ../$(BIN)/jupyter-execute --inplace --NotebookClient.record_timing=False $$name || exit 1; done

# once, over all readers; `python -m tests.fuzz --atheris SECONDS TARGET` guides one by coverage
fuzz: .venv/.installed
	$(BIN)/python -m tests.fuzz --inputs 50000

bench: .venv/.benchmarks
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.calibration
	$(BIN)/python -m benchmarks.insert_command
	$(BIN)/python -m benchmarks.folded

# some fifteen minutes, on a machine that does nothing else
bench-op: .venv/.installed
	$(BIN)/python -m benchmarks.kernel_resources
	$(BIN)/python -m benchmarks.host
	$(BIN)/python -m benchmarks.norm --threads 1 2 --busy
	$(BIN)/python -m benchmarks.train_step --busy
	$(BIN)/python -m benchmarks.memory

bench-finetune: .venv/.installed
	$(BIN)/python -m benchmarks.finetune_loop
	$(BIN)/python -m benchmarks.compare_tasks

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

.venv/.benchmarks: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	touch $@

.venv/.audit: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	touch $@

.venv-%/.installed: constraints-%.txt pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check \
	  --editable '.[dev]' --constraint $<
	touch $@

clean:
	rm -rf demo-results site .venv .venv-oldest .venv-middle build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
