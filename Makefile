# The two commands of the README are `make train` and `make test`; both set up .venv once.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: train test lint format lock clean

train: $(READY)
	$(PY) train.py configs/debug.yaml

test: $(READY)
	$(PY) -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(READY)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"flexrattn needs Python 3.11 or newer, $(PYTHON) is {sys.version.split()[0]}: run `make PYTHON=/path/to/python3.11`")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --requirement requirements.txt
	@touch $@

# Resolve requirements.in in an environment of its own and pin what came out.
lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet --requirement requirements.in
	(echo '# Pinned by `make lock` from requirements.in; Python 3.11 to 3.13, Linux x86-64.'; $(VENV)-lock/bin/python -m pip freeze) > requirements.txt
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) outputs .pytest_cache .mypy_cache .ruff_cache
