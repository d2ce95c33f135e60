# make demo | test | test-all | lowest | campaign | docs | slides | browser | lab | teach |
# notebooks | export | readme.
# Each sets up what it needs; a second run installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Another source of torch:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# Python compiles what it imports, a small part of what is installed; pip would spend a
# minute or two on the rest.
INSTALL = $(BIN)/python -m pip install -q --no-compile --constraint constraints.txt
CODE := soflow_edu nbs tests docs setup.py
PYTEST := -n 2 --dist worksteal
STAMP := $(VENV)/.installed
SITE := $(VENV)/.site
# Where this is set, each new process would compile torch again, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS ?= 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

LOWEST := .venv-lowest

.PHONY: demo check test test-all lowest campaign docs slides browser lab teach notebooks export readme clean

demo: $(STAMP)
	$(BIN)/soflow demo --out runs/demo

# Is the package what the notebooks export, and do lines, imports and types hold?
check: $(STAMP)
	$(BIN)/python nbs/book.py check
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check -q $(CODE)
	$(BIN)/pyright

# A few minutes: everything but long trainings and the notebooks whose stored outputs are
# known to be those of this code.
test: check
	$(BIN)/python -m pytest -m "not slow" $(PYTEST)

# Everything.
test-all: check
	$(BIN)/python -m pytest $(PYTEST)

# The lowest versions that settings.ini allows, in an environment of their own, and the
# tests of the package in it. Torch is that of constraints.txt.
lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(PYTHON) tests/lowest.py > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install -q --no-compile --constraint $(LOWEST)/lowest.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[latents]' pytest
	PATH=$(CURDIR)/$(LOWEST)/bin:$$PATH $(LOWEST)/bin/python -m pytest -m "not slow" -p no:cacheprovider $$($(PYTHON) tests/lowest.py --tests)

# Faults put in on purpose, many of each kind: tests/campaign.md is made anew. An hour.
campaign: $(STAMP)
	$(BIN)/python tests/campaign.py

# The site, in docs/_build/site: all chapters as they were executed, with warnings as
# errors. Needs Node.js with npm for the scripts that it carries.
docs: $(SITE) docs/node_modules/.installed
	$(BIN)/python docs/pages.py docs/_build/pages
	rm -rf docs/_build/site
	$(BIN)/sphinx-build -W --keep-going -q -b html -c docs -d docs/_build/pages/.doctrees docs/_build/pages docs/_build/site
	@echo "The site is in docs/_build/site: open docs/_build/site/index.html."

# One deck for each week of the unit in nbs/assignments/instructors.md, in
# docs/_build/slides, with all that they load beside them. Press s for the spoken notes.
DECKS := docs/_build/slides

slides: $(STAMP) docs/node_modules/.installed
	rm -rf $(DECKS)
	mkdir -p $(DECKS)/mathjax $(DECKS)/reveal.js/plugin
	cp docs/node_modules/mathjax/es5/tex-svg.js $(DECKS)/mathjax
	cp -r docs/node_modules/reveal.js/dist $(DECKS)/reveal.js
	cp -r docs/node_modules/reveal.js/plugin/notes $(DECKS)/reveal.js/plugin
	cd nbs/slides && $(abspath $(BIN))/jupyter nbconvert --log-level WARN --config deck.json --to slides --output-dir $(abspath $(DECKS)) week_*.ipynb
	@echo "The slides are in $(DECKS): open $(DECKS)/week_1.slides.html."

$(SITE): $(STAMP)
	$(INSTALL) --editable '.[site,play]'
	touch $@

docs/node_modules/.installed: docs/package.json
	command -v npm || { echo "Node.js with npm is needed: install it, then run this again." >&2; exit 1; }
	npm install --silent --no-audit --no-fund --no-package-lock --prefix docs
	touch $@

# What the tests in a browser need beyond Python: a Chromium (Debian's, if none is here),
# playwright-core in tests/browser/node_modules, and the runtime of chapter play.
browser: docs/node_modules/.installed
	command -v chromium || command -v chromium-browser || command -v google-chrome || { SUDO=$$(test "$$(id -u)" = 0 || echo "sudo -n"); $$SUDO apt-get update -qq && $$SUDO apt-get install -qq -y --no-install-recommends chromium; }
	test -e tests/browser/node_modules/playwright-core || npm install --silent --no-audit --no-fund --no-package-lock --prefix tests/browser

# The course in JupyterLab. `lab` is for a learner: docs/lab turns off the news and the
# menus of nbgrader, for this server only. `teach` has them.
LAB = $(BIN)/jupyter lab --ServerApp.root_dir=nbs nbs/0_start/00_start.ipynb

lab: $(STAMP)
	JUPYTER_CONFIG_PATH="$(CURDIR)/docs/lab$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" $(LAB)

teach: $(STAMP)
	$(LAB)

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
	$(if $(TORCH_INDEX),$(INSTALL) --index-url $(TORCH_INDEX) torch)
	$(INSTALL) --editable '.[course,dev]'
	touch $@

clean:
	rm -rf .venv-lowest docs/_build build dist *.egg-info .pytest_cache .ruff_cache
