# Two commands set everything up: `make train` and `make test`. Repeating one installs nothing again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
FOLDER ?= runs/faces

.PHONY: train test check coverage clean help

help:
	@echo "make train   train the default SOS-VAE and a β-VAE, write the figures ($(FOLDER))"
	@echo "make test    run the tests"
	@echo "make check   lint and type-check; changes nothing"

train: $(VENV)/.train
	$(BIN)/sosvae compare --folder $(FOLDER)

test: $(VENV)/.test
	$(BIN)/python -m pytest --cov --cov-report=term

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A stamp per extra: newer than the files that say what is installed.
$(VENV)/.train: setup.py constraints.txt | $(VENV)/pyvenv.cfg
	$(INSTALL) -e '.[train]'
	@touch $@

$(VENV)/.test: setup.py constraints.txt | $(VENV)/pyvenv.cfg
	$(INSTALL) -e '.[train,test]'
	@touch $@

$(VENV)/pyvenv.cfg:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info .coverage .mypy_cache .ruff_cache .pytest_cache
