PYTHON ?= python3

.PHONY: demo test test-full lint bench

demo: .venv/installed          ## the whole pipeline on the embedded miniature, and a page of results
	.venv/bin/python demo.py

test: .venv/installed          ## every property, on CPU, in minutes
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest

test-full: .venv/installed     ## the full-size U-Net takes a training step on CPU (minutes, 16 GB)
	.venv/bin/python -m pytest -m full_size

lint: .venv/installed
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

BENCHMARKS = read_warm read_cold full_size_cache token_encodings

# --no-deps: with its own dependencies mosaicml-streaming would downgrade numpy and transformers.
bench: .venv/installed         ## our cache against other formats, into benchmarks/results (10 min, 6 GB; encoders: BENCHMARKS=write)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	@for name in $(BENCHMARKS); do OMP_NUM_THREADS=1 .venv/bin/python benchmarks/$$name.py || exit 1; done

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@
