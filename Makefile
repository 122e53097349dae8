# quatro_ray: `make demo` and `make test` do their own set-up; see README.md
PYTHON ?= python3.11
VENV := .venv
LOCK := locks/cpu.txt
# the set-up is done again when the lock or the package's metadata changes, and only then
STAMP := $(VENV)/.ready-$(shell cat $(LOCK) pyproject.toml 2>/dev/null | cksum | cut -d' ' -f1)
TORCH := torch==2.13.0+cpu
BIN := $(abspath $(VENV)/bin)
# two workers; each file of tests stays with one of them, in the order of tests/conftest.py
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder
# the tools of the documentation have a virtual environment of their own: `make setup` does not need them
DOCS_VENV := .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.ready-$(shell cksum 2>/dev/null < locks/docs.txt | cut -d' ' -f1)
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check unit soak test-deploy dist docs setup lock clean

demo: setup ## asynchronous RL of a tiny model, end to end
	@$(BIN)/quatro-ray train configs/demo.yaml

test: setup check unit ## everything CI runs
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m real tests/real

check: setup ## style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

unit: setup ## the tests that start no engine
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "fast or process"

soak: setup ## the long tests: faults, the whole demo, a lost node; docs/development.md says when
	@$(BIN)/python -m pytest -m soak

dist: setup ## the wheel, into dist/
	@rm -rf dist build/lib build/bdist.* && $(BIN)/pip wheel -qq --no-deps --no-build-isolation --wheel-dir dist .
	@echo "wheel: $$(ls dist/*.whl)"

# WITHOUT="images gpu-wheels" leaves out what this machine cannot do; docs/development.md lists the parts
test-deploy: dist ## the wheel in an empty environment; the images, built and run as a cluster
	@WITHOUT="$(WITHOUT)" $(BIN)/python -m pytest -m deploy tests/deploy

docs: $(DOCS_STAMP) ## the documentation, into site/; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
	@echo "documentation: site/index.html"

setup: $(STAMP)

define NEEDS_PYTHON
	@command -v $(PYTHON) >/dev/null || { echo "missing: $(PYTHON) (Python 3.11); install it or run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "missing: Python 3.11; $(PYTHON) is $$($(PYTHON) -V)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "missing: the venv module of $(PYTHON) (Debian: apt install python3.11-venv)"; exit 1; }
endef

$(STAMP):
	$(NEEDS_PYTHON)
	@command -v c++ >/dev/null || command -v g++ >/dev/null || { echo "missing: a C++ compiler (Debian: apt install g++)"; exit 1; }
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null || { echo "missing: libnuma.so.1 (Debian: apt install libnuma1)"; exit 1; }
	@echo "setting up $(VENV) from $(LOCK): a few minutes, once"
	@rm -rf $(VENV) && $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --no-deps "$(TORCH)" 2>$(VENV)/torch.log \
	  || $(BIN)/pip install -qq --no-deps --index-url https://download.pytorch.org/whl/cpu "$(TORCH)" \
	  || { cat $(VENV)/torch.log; exit 1; }
	@$(BIN)/pip install -qq --no-deps --require-hashes --requirement $(LOCK)
	@$(BIN)/pip install -qq --no-deps --no-build-isolation --editable .
	@touch $@

$(DOCS_STAMP):
	$(NEEDS_PYTHON)
	@echo "setting up $(DOCS_VENV) from locks/docs.txt: once"
	@rm -rf $(DOCS_VENV) && $(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/pip install -qq --no-deps --require-hashes --requirement locks/docs.txt
	@touch $@

lock: ## resolve all locks again; needs uv
	uv pip compile pyproject.toml locks/build.in --extra cpu --extra dev --override locks/overrides.txt --generate-hashes \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --no-header -o locks/cpu.txt
	uv pip compile pyproject.toml locks/build.in --extra gpu --extra dev --generate-hashes \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --no-header -o locks/cuda.txt
	uv pip compile locks/docs.in --generate-hashes \
	  --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --no-header -o locks/docs.txt

clean:
	rm -rf $(VENV) $(DOCS_VENV) runs build dist site *.egg-info
