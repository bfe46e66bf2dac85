# Two commands: `make demo` and `make test`. `make help` lists the others.
#
# Everything is installed into .venv, at the versions of constraints.txt. `make PYTHON=python3.12 …` chooses the Python
# that makes .venv; WORKERS=N how many tests run at once.

PYTHON :=
WORKERS := 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
# quiet where there is little to do
QUIET = $(if $(wildcard $(INSTALLED)),--quiet)
PIP = $(BIN)/python -m pip --disable-pip-version-check install $(QUIET) --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest
TYPECHECK := build/typecheck

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test slow-test lint format typecheck gpu-test gpu-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED) ## make .venv with the pinned dependencies and this project in it

# The stamp is written last: an installation that was interrupted is taken up again. Torch's wheel needs CUDA's libraries
# even on a machine without a GPU, which is why this takes its time.
$(INSTALLED): pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  for python in $(PYTHONS); do \
	    if $$python -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	      >/dev/null 2>&1; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "make: needs Python 3.11, 3.12 or 3.13 with its venv module (on Debian and Ubuntu: python3-venv);" \
	      "tried $(PYTHONS); name another with make PYTHON=…" >&2; exit 1; \
	  fi; \
	  echo "making $(VENV) with $$($$found --version)"; \
	  $$found -m venv --clear $(VENV); \
	fi
	@echo "installing what $(VENV) lacks of the dependencies; all of them are 3 GB to download and 5 GB on disk"
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(INSTALLED) ## compile the shipped model for two ranks, run it under mpirun, check it against PyTorch
	@$(BIN)/python -m moecompiler.tools.demo

# one thread for mathematics in each test process: they share the cores
test: $(INSTALLED) ## run the tests that need no GPU
	OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadgroup -m "not gpu and not slow" --durations=10

slow-test: $(INSTALLED) ## run those that build or compile the whole grid of mappings, types and architectures
	OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS) --dist loadgroup -m "slow and not gpu" --durations=10

gpu-test: $(INSTALLED) ## run the tests that need a CUDA GPU, if there is one
	@if ! $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  echo "gpu-test: no CUDA GPU here, so there is nothing to run"; \
	else \
	  $(PYTEST) -m gpu; \
	fi

gpu-check: $(INSTALLED) ## all that is shown on a GPU: engines built, validated and timed; results in build/gpu
	$(BIN)/python -m moecompiler.tools.gpu_check --output_dir build/gpu

lint: $(INSTALLED) typecheck ## check style, the direction of imports, and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# passes/, plugins/ and tools/ are installed as moecompiler.passes and so on; mypy gets to see them so through links.
typecheck: $(INSTALLED)
	@rm -rf $(TYPECHECK) && mkdir -p $(TYPECHECK)/moecompiler
	@for part in moecompiler/* passes plugins tools; do \
	  case $$part in *__pycache__) ;; *) ln -s "$(CURDIR)/$$part" $(TYPECHECK)/moecompiler/ ;; esac; \
	done
	MYPYPATH=$(TYPECHECK) $(BIN)/mypy --package moecompiler

format: $(INSTALLED) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what was made here, save .venv
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
