# `make` alone lists what there is. Everything runs in .venv, which is built once and again when its inputs change.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint format typecheck audit benchmarks constraints clean

help:
	@echo "make demo        optimise macro-F1 of the embedded model on the embedded reviews, offline, and show the result"
	@echo "make test        the whole test suite              one file: make test ARGS=tests/test_data.py"
	@echo "make lint        ruff: rules and formatting        make format repairs what can be repaired"
	@echo "make typecheck   mypy over zorl, zorl.rewards and zorl.apps"
	@echo "make audit       known vulnerabilities of the pinned packages, by pip-audit (asks the package index)"
	@echo "make benchmarks  those that need no model and no data: demo, overhead, soak, speed (long; the others say at their top"
	@echo "                 how they are run: benchmarks/NAME.py)"
	@echo "make constraints resolve the newest versions that pyproject.toml allows into constraints.txt"
	@echo "make clean       remove .venv and everything that was built"
	@echo
	@echo "The first of these builds .venv with $(PYTHON) (3.11 or newer, or say make PYTHON=python3.12 …)."

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(sys.version_info < (3, 11) and "zorl needs Python 3.11 or newer, and $(PYTHON) is " + v + "; name another one: make PYTHON=python3.12 …")'
	@echo "Building .venv (once; a few minutes where the packages have to be downloaded) …"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,quantize]"
	@touch $@

demo: $(READY)
	@$(BIN)/python -m zorl.apps.optimize_f1 $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(READY)
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

# mypy cannot follow package-dir, so it gets a tree of links in the installed shape.
typecheck: $(READY)
	@rm -rf build/typecheck && mkdir -p build/typecheck/zorl
	@ln -s "$(CURDIR)"/zorl/* "$(CURDIR)/rewards" "$(CURDIR)/apps" build/typecheck/zorl/
	@cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache --package zorl

# In an environment of its own: what looks for holes in the dependencies is none of them.
audit:
	@test -x build/audit/bin/pip-audit || { $(PYTHON) -m venv build/audit && build/audit/bin/pip install --quiet pip-audit; }
	@build/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

benchmarks: $(READY)
	$(BIN)/python benchmarks/demo.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/soak.py
	$(BIN)/python benchmarks/speed.py --write

constraints:
	@rm -rf build/resolve && $(PYTHON) -m venv build/resolve
	@build/resolve/bin/python -m pip install --quiet --editable ".[dev,quantize]"
	@sed -n '/^#/p' constraints.txt > build/constraints.txt
	@build/resolve/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' >> build/constraints.txt
	@mv build/constraints.txt constraints.txt && rm -rf build/resolve

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
