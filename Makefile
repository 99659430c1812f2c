PYTHON ?= python3

.PHONY: demo test test-full lint

demo: .venv/installed          ## the whole pipeline on the embedded miniature, and a page of results
	.venv/bin/python demo.py

test: .venv/installed          ## every property, on CPU, in minutes
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest

test-full: .venv/installed     ## the full-size U-Net takes a training step on CPU (minutes, 16 GB)
	.venv/bin/python -m pytest -m full_size

lint: .venv/installed
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@
