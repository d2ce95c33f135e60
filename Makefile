# make demo | test | browser | lab | notebooks | export | readme.  Each sets up what it needs; a second run installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Another source of torch, e.g. make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test browser lab notebooks export readme clean

demo: $(STAMP)
	$(BIN)/soflow demo --out runs/demo

test: $(STAMP)
	$(BIN)/python nbs/book.py check
	$(BIN)/ruff check nbs soflow_edu tests setup.py
	$(BIN)/python -m pytest tests -n 2 --dist worksteal

# What tests/test_browser.py needs beyond Python: a Chromium (Debian's, if none is here) and playwright-core in tests/browser/node_modules.
browser:
	command -v chromium || command -v chromium-browser || command -v google-chrome || { SUDO=$$(test "$$(id -u)" = 0 || echo "sudo -n"); $$SUDO apt-get update -qq && $$SUDO apt-get install -qq -y --no-install-recommends chromium; }
	command -v npm || { echo "make browser needs Node.js with npm: install it, then run this again." >&2; exit 1; }
	test -e tests/browser/node_modules/playwright-core || npm install --silent --no-audit --no-fund --no-package-lock --prefix tests/browser

lab: $(STAMP)
	$(BIN)/jupyter lab --ServerApp.root_dir=nbs nbs/0_start/00_start.ipynb

notebooks: export
	$(BIN)/python nbs/book.py run $(NOTEBOOKS)
	$(BIN)/python nbs/book.py readme

export: $(STAMP)
	$(BIN)/python nbs/book.py export

readme: $(STAMP)
	$(BIN)/python nbs/book.py readme

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit(f"soflow_edu needs Python 3.11 or newer, and {sys.executable} is {v[0]}.{v[1]}; name another: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install -q --constraint constraints.txt --index-url $(TORCH_INDEX) torch)
	$(BIN)/python -m pip install -q --constraint constraints.txt --editable '.[course,dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
