# Two commands matter: `make demo` and `make test`. Both set up .venv on first use; `make help` lists
# the others.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out

.DEFAULT_GOAL := demo
.PHONY: help demo test notebooks batch_tpu docs bench lint clean python
.DELETE_ON_ERROR:

$(VENV)/.installed: pyproject.toml | python
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# An unsupported Python, and an environment of another Python than the one that make was given.
python:
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "jaxrel needs Python 3.11 or newer; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.13" \
	  % sys.version_info[:2])'
ifneq ($(origin PYTHON),file)
	@test ! -x $(BIN)/python || test "`$(PYTHON) -V`" = "`$(BIN)/python -V`" || { \
	  echo "$(VENV) is of `$(BIN)/python -V`, and $(PYTHON) is `$(PYTHON) -V`:"; \
	  echo "remove it with make clean, or name another with make VENV=.venv-new"; exit 1; }
endif

help:
	@echo 'make demo        explain the five sample images; the result is in OUT (out)'
	@echo 'make test        run the tests but those that train models (pytest -m recipes)'
	@echo 'make notebooks   run the notebooks of colab/; the executed copies are in OUT'
	@echo 'make docs        build the site in OUT/docs, with the notebooks as executed in OUT'
	@echo 'make bench       measure time and memory on this machine, beside the peers of extra bench'
	@echo 'make lint        check style and format'
	@echo 'make clean       remove the environment and what was built'
	@echo 'PYTHON=python3.13 VENV=.venv-313 use another Python, OUT=folder another folder'

SAMPLES := blue-square cyan-triangle orange-cross red-circle red-star

demo: $(VENV)/.installed
	$(BIN)/jaxrel explain $(SAMPLES:%=train/data/samples/%.png) \
	  --text "a blue square" --text "a cyan triangle" --text "an orange cross" \
	  --text "a red circle" --text "a red star" --method weighted,equal --out $(OUT)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadfile -m 'not zoo and not recipes'

# Errors in a cell fail; the executed copies, with their images, go to $(OUT).
EXECUTE = $(BIN)/jupyter execute --timeout=600 --output='$(abspath $(OUT))/{notebook_name}'
NOTEBOOKS := $(filter-out colab/batch_tpu.ipynb,$(wildcard colab/*.ipynb))

notebooks: batch_tpu $(VENV)/.photographs
	$(EXECUTE) $(NOTEBOOKS)

# The one that shares its work among devices has eight of them.
batch_tpu: $(VENV)/.installed
	mkdir -p $(OUT)
	XLA_FLAGS=--xla_force_host_platform_device_count=8 $(EXECUTE) colab/batch_tpu.ipynb

# One explains a published network on photographs.
$(VENV)/.photographs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[photographs]'
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

# All pages are gathered in $(OUT)/pages, and the built site is $(OUT)/docs; warnings are errors.
docs: $(VENV)/.docs
	$(BIN)/python .docs/gather.py '$(abspath $(OUT))'
	PAGES='$(abspath $(OUT))/pages' SOURCE='$(abspath $(OUT))/source' SITE='$(abspath $(OUT))/docs' \
	  $(BIN)/mkdocs build --strict --config-file .mkdocs.yml
	@echo 'wrote $(OUT)/docs/index.html'

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

bench: $(VENV)/.bench
	$(BIN)/python -m tests.benchmarks
	$(BIN)/python -m tests.benchmarks.side_by_side

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist out *.egg-info
