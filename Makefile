# Two commands matter: `make demo` and `make test`. Both set up .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out

.PHONY: demo test notebooks bench lint clean
.DELETE_ON_ERROR:

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxrel needs Python 3.11 or newer; name one with make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

SAMPLES := blue-square cyan-triangle orange-cross red-circle red-star

demo: $(VENV)/.installed
	$(BIN)/jaxrel explain $(SAMPLES:%=train/data/samples/%.png) \
	  --text "a blue square" --text "a cyan triangle" --text "an orange cross" \
	  --text "a red circle" --text "a red star" --method weighted,equal --out $(OUT)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto --dist loadfile

# Errors in a cell fail; the executed copies, with their pictures, go to $(OUT).
notebooks: $(VENV)/.installed
	mkdir -p $(OUT)
	$(BIN)/jupyter execute colab/*.ipynb --timeout=600 --output='$(abspath $(OUT))/{notebook_name}'

bench: $(VENV)/.installed
	$(BIN)/python -m tests.benchmarks

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist out *.egg-info
