# Needs Python 3.10 or newer and nothing else; everything it installs lands in .venv and .venv-oldest.
# `make PYTHON=python3.12 demo` picks the interpreter a venv is made from.

PYTHON ?= python3
# Tests start many processes; what each imports is compiled once and kept, also where containers
# tell Python to keep nothing.
export PYTHONDONTWRITEBYTECODE =
PYTEST = -m pytest --durations=5
# Two processes of one thread each; a file's tests stay together, for what they share is made once.
TESTS = OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -n 2 --dist loadfile

# Of soak, fuzz and sanitize: how long, and the seed that shows a failure again.
SECONDS = 3600
SEED := $(shell date +%s)
FAULTS = $(BIN)/python tests/faults

BIN = .venv/bin
OLDEST = .venv-oldest/bin

# A stamp is newer than pyproject.toml while its venv holds what pyproject.toml asks for.
TRAIN = .venv/train.stamp
DEV = .venv/dev.stamp
OLDEST_STAMP = .venv-oldest/installed.stamp
NATIVE = $(wildcard kernels/fastdml_kernels/cpu_*.[ch])

.NOTPARALLEL:
.PHONY: help demo test test-slow test-browser test-docs test-gpu test-oldest soak fuzz sanitize smoke lint bench docs site universal clean distclean

help:
	@echo "make demo         train two peers on real handwritten digits, mutually and independently"
	@echo "make test         the default tests"
	@echo "make test-slow    the tests of more than 20 seconds"
	@echo "make test-browser the tests that drive Chromium"
	@echo "make test-docs    run what README and docs/ show, and build the site"
	@echo "make test-gpu     the tests that need a CUDA device; what they give goes to gpu-results"
	@echo "make test-oldest  the kernel, loss and engine tests on the oldest supported torch and triton"
	@echo "make soak         kill runs and compare, for SECONDS=3600 from SEED (printed)"
	@echo "make fuzz         feed every parser odd inputs, for SECONDS=3600 from SEED (printed)"
	@echo "make sanitize     the CPU's native code under sanitizers, for SECONDS=120 from SEED (printed)"
	@echo "make smoke        install wheel and sdist into empty environments of PYTHONS and try them there"
	@echo "make lint         ruff: rules and formatting; mypy: types"
	@echo "make bench        the benchmarks this machine can run"
	@echo "make docs         write the generated parts of README and docs/"
	@echo "make site         the documentation as a site, in build/site"
	@echo "make universal    fastdml_kernels as Hugging Face's kernels loads it, in build/universal"
	@echo "make clean        remove what was built and every cache; the venvs stay"
	@echo "make distclean    remove both venvs too"

demo: $(TRAIN)
	$(BIN)/fastdml train digits --independent

test: $(DEV)
	$(TESTS)

test-slow: $(DEV)
	$(TESTS) -m slow

test-browser: $(DEV)
	$(TESTS) -m browser

test-docs: $(DEV)
	$(TESTS) -m docs

test-gpu: $(DEV)
	PYTHON=$(BIN)/python bash bench/gpu-tests.sh gpu-results

test-oldest: $(OLDEST_STAMP)
	PYTHONPATH=.:kernels OMP_NUM_THREADS=1 $(OLDEST)/python $(PYTEST) -n 2 --dist loadfile \
	  tests/kernels tests/engine tests/bench tests/test_torch_private.py tests/test_loss.py \
	  tests/test_linear_loss.py tests/test_loss_routes.py tests/test_mutual_losses.py

soak: $(DEV)
	$(FAULTS)/soak.py --seconds $(SECONDS) --seed $(SEED)

fuzz: $(DEV)
	$(FAULTS)/fuzzing.py --seconds $(SECONDS) --seed $(SEED)

sanitize: SECONDS = 120
sanitize: $(DEV)
	$(FAULTS)/sanitize.py --seconds $(SECONDS) --seed $(SEED)

smoke: PYTHONS = 3.10 3.11 3.12 3.13
smoke: $(DEV)
	$(BIN)/python -m pip install --quiet uv
	PATH=$(BIN):$$PATH $(BIN)/python tests/package_smoke.py --pythons $(PYTHONS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(DEV)
	$(BIN)/python $(PYTEST) bench

docs: $(DEV)
	$(BIN)/python -m docs.generate

site: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir build/site

universal:
	$(PYTHON) kernels/build_universal.py build/universal

# The native code and the editable install's *.egg-info are the venvs': they go with them.
clean:
	rm -rf build dist gpu-results .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find fastdml kernels tests bench docs examples -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-oldest *.egg-info kernels/*.egg-info
	rm -f kernels/fastdml_kernels/*.so

$(TRAIN): pyproject.toml setup.py $(NATIVE)
	$(call venv,.venv)
	$(BIN)/python -m pip install --quiet -e '.[train]'
	@touch $@

$(DEV): pyproject.toml setup.py $(NATIVE)
	$(call venv,.venv)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $(TRAIN) $@

$(OLDEST_STAMP): pyproject.toml Makefile
	$(call venv,.venv-oldest)
	$(OLDEST)/python -m pip install --quiet torch==2.11.0 triton==3.6.0 'numpy<2.4' \
	  pytest pytest-xdist pytest-benchmark hypothesis safetensors pyyaml scikit-learn
	@touch $@

# Makes the venv $(1) unless a working one is there; says what to do where Python cannot.
define venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "fastdml needs Python 3.10 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
	    "name one that is: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(1) || { \
	  echo "$(PYTHON) cannot make a venv (on Debian and Ubuntu: apt install python3-venv)" >&2; \
	  exit 1; }
	@echo "installing into $(1): torch is several GB the first time"
endef
