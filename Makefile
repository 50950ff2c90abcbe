# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv first. `make fuzz` attacks for long.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -q
STAMP := $(VENV)/.made

# Cases of each fuzz test, and seconds of each coverage-guided run.
FUZZ_CASES ?= 5000
FUZZ_SECONDS ?= 120
FUZZED := header pickles config index recipes

# Every line and branch of these is run: what reads headers and pickles, and what writes.
COVERED := header kinds look safetensors archive unpickle torch_names torch_tensors flatten strided pickles \
	atomic stream ahead bundle
comma := ,
empty :=
space := $(empty) $(empty)
COVERED_FILES := $(subst $(space),$(comma),$(COVERED:%=loratool/files/%.py))

.PHONY: demo test check bench fuzz coverage clean

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
	$(VENV)/bin/python benchmarks/detect.py
	$(VENV)/bin/python benchmarks/convert.py
	$(VENV)/bin/python benchmarks/resize.py
	$(VENV)/bin/python benchmarks/merge.py
	$(VENV)/bin/python benchmarks/bake.py

# atheris has no build for every Python and system: without it, the first half is all.
fuzz: $(STAMP)
	LORATOOL_FUZZ=$(FUZZ_CASES) $(VENV)/bin/python -m pytest tests/fuzz
	-$(PIP) install atheris
	if $(VENV)/bin/python -c "import atheris"; then for target in $(FUZZED); do \
		$(VENV)/bin/python -m tests.fuzz.guided $$target -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 || exit 1; \
	done; fi

coverage: $(STAMP)
	$(VENV)/bin/python -m coverage run --branch --include='loratool/files/*' -m pytest tests/files tests/fuzz
	$(VENV)/bin/python -m coverage report -m --fail-under=100 --include='$(COVERED_FILES)'

clean:
	rm -rf $(VENV) demo-out .fuzz .coverage
