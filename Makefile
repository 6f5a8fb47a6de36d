# Everything runs in .venv, which the first target that needs it creates. `make demo` and `make test` need nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Those of contrib/ that are Python alone are installed like plugins/; contrib/sim is compiled.
PLUGINS := $(wildcard plugins/*) $(filter-out contrib/sim,$(patsubst %/pyproject.toml,%,$(wildcard contrib/*/pyproject.toml)))
MEMBERS := pyproject.toml core/pyproject.toml $(PLUGINS:%=%/pyproject.toml) requirements-dev.txt

# What Python has compiled is kept, so that none of the many processes has to do it again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo sim ready-to-test test test-all test-core test-examples test-trackers test-xla lint matrix bench sizes docs clean

$(READY): $(MEMBERS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e core $(PLUGINS:%=-e %)
	@touch $@

demo: $(READY)
	@rm -rf demo-run
	@$(BIN)/torchport launch --num-processes 2 docs/examples/digits.py --output-dir demo-run

lint: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# The simulated accelerator: compiled for the environment's PyTorch, which takes about a minute; only tests need it.
SIM := $(VENV)/.sim
$(SIM): $(READY) contrib/sim/pyproject.toml contrib/sim/setup.py $(wildcard contrib/sim/csrc/*)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e contrib/sim
	@touch $@

sim: $(SIM)

# Types are checked on one core while the other compiles.
ready-to-test: $(READY)
	@$(MAKE) --no-print-directory --jobs 2 lint $(SIM)

# Tests of time limits, and those that fork, run by themselves; then the others, two files at a time.
TESTS = $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m
test: ready-to-test
	@$(BIN)/python -m pytest -m alone
	@$(TESTS) "not alone and not long"

# With those that repeat at length what others check in short: 200 kills, all of the matrix in two processes, …
test-all: ready-to-test
	@$(BIN)/python -m pytest -m alone
	@$(TESTS) "not alone"

# Every tracker with its service's real package, offline, in an environment of its own: some are large.
TRACKERS := .venv-trackers
$(TRACKERS)/.ready: $(READY) requirements-trackers.txt
	$(PYTHON) -m venv $(TRACKERS)
	@$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" > $$($(TRACKERS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/development.pth
	$(TRACKERS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-trackers.txt
	@touch $@

test-trackers: $(TRACKERS)/.ready
	@TRACKERS_OF_ALL_SERVICES=1 $(TRACKERS)/bin/python -m pytest plugins/trackers/tests --timeout 600

# The example with a real checkpoint, which is in a package of its own: 90 MB, and Transformers.
EXAMPLES := .venv-examples
$(EXAMPLES)/.ready: $(READY) requirements-examples.txt
	$(PYTHON) -m venv $(EXAMPLES)
	@$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" > $$($(EXAMPLES)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/development.pth
	$(EXAMPLES)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-examples.txt
	@touch $@

test-examples: $(EXAMPLES)/.ready
	@EXAMPLES_WITH_CHECKPOINTS=1 $(EXAMPLES)/bin/python -m pytest tests/training/test_checkpoint_example.py --timeout 1200

# The core's tests where no plugin but the one for processors is installed.
test-core: $(READY)
	@$(BIN)/python tests/packaging/core_alone.py tests/unit tests/training tests/integration

# torch_xla on PJRT's CPU, with the PyTorch that it goes with; and what torch_tpu says on a machine without a TPU.
XLA := .venv-xla
TPU := .venv-tpu
$(XLA)/.ready: requirements-xla.txt core/pyproject.toml plugins/cpu/pyproject.toml plugins/tpu/pyproject.toml
	$(PYTHON) -m venv $(XLA)
	$(XLA)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-xla.txt
	$(XLA)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e core -e plugins/cpu -e plugins/tpu
	@touch $@

$(TPU)/.ready: $(READY) requirements-tpu.txt
	$(PYTHON) -m venv $(TPU)
	@$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" > $$($(TPU)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/development.pth
	$(TPU)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-tpu.txt
	@touch $@

test-xla: $(XLA)/.ready $(TPU)/.ready
	@PJRT_DEVICE=CPU $(XLA)/bin/python -m pytest plugins/tpu/tests/on_torch_xla --timeout 600
	@TORCHPORT_BACKEND=cpu $(XLA)/bin/python -m pytest tests/training/test_one_process.py --timeout 600
	@$(TPU)/bin/python -m pytest plugins/tpu/tests/on_torch_tpu --timeout 600

# Every strategy with every precision, accumulation and number of processes, as a table; writes docs/matrix.md.
matrix: $(READY)
	@$(BIN)/python tests/matrix/run.py

bench: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	@$(BIN)/python tests/benchmarks/run.py

# The lines of each backend.
sizes: $(READY)
	@$(BIN)/python tests/support/sizes.py

docs: $(READY)
	@$(BIN)/python docs/build.py

clean:
	rm -rf $(VENV) $(TRACKERS) $(EXAMPLES) $(XLA) $(TPU) demo-run .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
