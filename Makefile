# Everything runs in .venv, which is made on first use. The CPU build of PyTorch is pinned in constraints-cpu.txt.
PYTHON ?= python3

.PHONY: demo test slow check clean

demo: .venv/installed
	.venv/bin/splitwatch demo

test: .venv/installed
	.venv/bin/python -m pytest -m "not slow and not gpu"

slow: .venv/installed
	.venv/bin/python -m pytest -m "slow and not gpu"

check: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python

.venv/installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints-cpu.txt torch==2.13.0
	.venv/bin/pip install --quiet --constraint constraints-cpu.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv runs lightning_logs
