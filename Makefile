# Two commands set everything up: `make train` and `make test`. Repeating one installs nothing again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
FOLDER ?= runs/faces
JOBS ?= 2

PAGE := sosvae/editor/page

.PHONY: help train test sanitize check docs page page-check bench bench-compare clean

help:
	@echo "make train   train a β-VAE, the global-local head on it and the paper's recipe; figures and numbers ($(FOLDER))"
	@echo "make test    run the tests (COVERAGE=1: and say which lines they reach)"
	@echo "make sanitize  the compiled CPU backend under sanitizers (needs GCC)"
	@echo "make check   lint and type-check; changes nothing"
	@echo "make docs    build the site from docs/ into build/docs; a warning is an error"
	@echo "make page    build the editor's page from its sources (needs Node 20)"
	@echo "make bench   measure against torch, linear_operator and NumPyro; write tables and plots"
	@echo "make bench-compare BASE=ref   this checkout against another version, in alternation (QUICK=1: five cases)"

train: $(VENV)/.train
	$(BIN)/sosvae compare --folder $(FOLDER)

# With COVERAGE=1 it fails below the share of lines in pyproject.toml, and takes half as long again: the kernels'
# interpreter is traced too. A file of tests is one process's, and a process has one thread: two that compute with two
# threads each on two cores are ten times slower.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(if $(COVERAGE),--cov --cov-report=term)

sanitize:
	.ci/sanitize

check: $(VENV)/.test page-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo "build/docs/index.html"

page:
	cd $(PAGE) && npm ci --ignore-scripts --no-audit --no-fund --silent && npm run --silent format && npm run --silent build

# Format and types of the page's sources, and that what is shipped is what they make.
page-check:
	@if command -v npm > /dev/null; then \
		cd $(PAGE) && npm ci --ignore-scripts --no-audit --no-fund --silent && npm run --silent check; \
	elif [ -n "$$CI" ]; then echo "no npm: the editor's page cannot be checked"; exit 1; \
	else echo "no npm: the editor's page is not checked"; fi

bench: $(VENV)/.bench
	$(BIN)/python -m pytest --benchmark; status=$$?; $(BIN)/python -m bench.report && exit $$status

bench-compare: $(VENV)/.bench
	@test -n "$(BASE)" || { echo "say which version: make bench-compare BASE=<git ref>"; exit 2; }
	$(BIN)/python -m bench.compare $(BASE) $(if $(QUICK),--quick)

# What the compiled CPU backend is made of.
NATIVE := $(wildcard kernels/lowrank_mvn/device/csrc/* kernels/lowrank_mvn/*/*/cpu/*.cpp kernels/lowrank_mvn/*/*/cpu/*.h)

# A stamp per extra: newer than the files that say what is installed, and what is compiled along.
$(VENV)/.train: setup.py constraints.txt $(NATIVE) | $(VENV)/pyvenv.cfg
	$(INSTALL) -e '.[train]'
	@touch $@

$(VENV)/.test: setup.py constraints.txt $(NATIVE) | $(VENV)/pyvenv.cfg
	$(INSTALL) -e '.[train,test]'
	@touch $@

$(VENV)/.docs: setup.py constraints.txt | $(VENV)/pyvenv.cfg
	$(INSTALL) -e '.[docs]'
	@touch $@

$(VENV)/.bench: setup.py constraints.txt $(NATIVE) | $(VENV)/pyvenv.cfg
	$(INSTALL) -e '.[train,test,bench]'
	@touch $@

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist kernels/lowrank_mvn/_cpu.* *.egg-info .coverage .mypy_cache .ruff_cache .pytest_cache
