# `make demo` and `make test` work in a fresh clone with nothing but Python 3.11+ and make.
VENV ?= .venv
PYTHON ?= python3
EXTRAS ?= dev
BIN := $(VENV)/bin

.PHONY: setup demo test lint docs benchmark clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

# Any verdict (0 pass, 1 fail, 3 inconclusive) is a result of the demo; only a run that did not get there is an error.
demo: setup
	$(BIN)/guardsmith run recipes/demo.yaml --output out $(if $(wildcard out/settings.json),--resume) \
		|| { code=$$?; [ $$code -eq 1 ] || [ $$code -eq 3 ] || exit $$code; }

# In two processes; a file's tests stay together, for they share what is slow to make, and long files begin (tests/conftest.py).
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation's site, in build/site; a broken link is an error.
docs: setup
	$(BIN)/python -c 'import material, mkdocstrings' 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/generate.py
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "open build/site/index.html"

# Minutes to hours, with nothing else running; writes docs/results/benchmark.json.
benchmark: setup
	$(BIN)/python recipes/benchmark/benchmark.py

clean:
	rm -rf $(VENV) out dist build
