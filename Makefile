# Two commands do everything on a machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint smoke clean

demo: .venv/core
	.venv/bin/accelerate launch recipes/lofit.py

test: .venv/dev
	.venv/bin/python -m pytest --numprocesses 2 --dist loadfile

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# Every recipe's smoke preset, as a user would start it.
smoke: .venv/core
	for recipe in recipes/*.py; do .venv/bin/accelerate launch $$recipe --preset smoke || exit 1; done

clean:
	rm -rf .venv build dist *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache

# The stamps are written last, so an interrupted installation is taken up again. torch comes first and pinned: left to
# the dependencies of the others, pip may choose a build of several gigabytes.
.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "steerbook needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable .
	touch $@

.venv/dev: .venv/core
	$(PIP) --editable '.[dev]'
	touch $@
