# Two commands on a fresh machine: `make demo` and `make test`. Both are idempotent.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENGINES ?= engines
OUTPUTS ?= outputs
PARALLEL = -n 2 --dist loadfile --no-loadscope-reorder

# Without an NVIDIA driver, torch comes from PyTorch's index for CPUs: 200 MB instead of 3 GB.
NVIDIA ?= $(wildcard /proc/driver/nvidia/version)
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH = "torch>=2.11,<2.14" $(if $(NVIDIA),,$$($(BIN)/python deploy/reachable.py $(CPU_INDEX)))

.PHONY: demo test slow fast lint docs clean

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nsp needs Python 3.11 or newer; run: make PYTHON=python3.11 ...")'
	test -x $(BIN)/pip || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); } || { rm -rf $(VENV); \
	    echo "no virtual environment: install the venv module (Debian, Ubuntu: python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[all]"
	touch $@

demo: $(VENV)/.ready
	$(BIN)/nsp export --fp16 --target auto --target tensorrt-rtx --engine-dir $(ENGINES)
	$(BIN)/nsp generate --engine-dir $(ENGINES) --output-dir $(OUTPUTS) \
	    --prompt "grinning face" --prompt "woman firefighter medium-dark skin tone" \
	    --prompt "man cook light skin tone" --prompt "woman student light skin tone" \
	    --prompt "Santa Claus light skin tone" --prompt "red circle"
	$(BIN)/nsp bench --quick --engine-dir $(ENGINES) --output-dir $(OUTPUTS)/bench
	@echo "images: $(OUTPUTS)/contact_sheet.png"
	@echo "report: $(OUTPUTS)/bench/bench.md"

# make test T=tests/pipeline runs those tests alone, without the linters.
test: $(VENV)/.ready $(if $(T),,lint)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(if $(T),$(T),-m "not slow" $(PARALLEL))

# The tests of minutes, which `make test` leaves to continuous integration.
slow: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow $(PARALLEL)

# What a change most often breaks, in a minute and a half; `make test` is the proof.
fast: $(VENV)/.ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests/stage tests/layers tests/pipeline \
	    tests/testing/test_broken.py tests/test_floors.py tests/test_rooms.py tests/test_language.py \
	    tests/test_family_names.py tests/test_plugins.py -k "not fails and not typo"

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages of docs/ and of the docstrings, in outputs/site; a warning is an error.
docs: $(VENV)/.ready
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist *.egg-info
