# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -q
STAMP := $(VENV)/.made

.PHONY: demo test check bench clean

# torch comes first and alone: pinned, so that pip does not bring another build (with CUDA) for a dependency.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install torch -c constraints.txt
	$(PIP) install -e '.[test]' -c constraints.txt
	touch $@

demo: $(STAMP)
	$(VENV)/bin/python -m fixtures.demo

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: check
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

bench: $(STAMP)
	$(VENV)/bin/python benchmarks/info.py
	$(VENV)/bin/python benchmarks/convert.py
	$(VENV)/bin/python benchmarks/resize.py
	$(VENV)/bin/python benchmarks/merge.py
	$(VENV)/bin/python benchmarks/bake.py

clean:
	rm -rf $(VENV) demo-out
