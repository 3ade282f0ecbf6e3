# Each target sets up what it needs: `make demo` and `make test` start from a bare Python 3.11 or newer.
.PHONY: setup demo test lint types bench ui clean

export DO_NOT_TRACK := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export GX_ANALYTICS_ENABLED := false
export DVC_NO_ANALYTICS := 1
export PREFECT_HOME := $(CURDIR)/.prefect
export MLFLOW_BACKEND_STORE_URI := sqlite:///mlruns/mlflow.db
export PATH := $(CURDIR)/.venv/bin:$(PATH)

READY := .venv/.ready

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@found=; for candidate in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	  if $$candidate -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    found=$$candidate; break; fi; done; \
	if [ -z "$$found" ]; then \
	  echo "gemst needs Python 3.11 or newer with its venv module; found: $$(python3 --version 2>&1 || true)." \
	    "Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; fi; \
	echo "Setting up .venv with $$found (a few minutes, once)"; \
	[ -x .venv/bin/python ] || $$found -m venv .venv
	@.venv/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	@.venv/bin/python -m flows.pipeline

# Two processes share the tests, a core each; `.venv/bin/pytest tests/x.py` runs some in one.
test: setup
	@OMP_NUM_THREADS=1 POLARS_MAX_THREADS=1 .venv/bin/pytest -n 2 --no-loadscope-reorder

lint: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

types: setup
	@.venv/bin/mypy

bench: setup
	@.venv/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev,bench]'
	@for script in $$(ls benchmarks/*.py | grep -v _worker); do echo "== $$script"; .venv/bin/python $$script || exit 1; done

ui: setup
	@mkdir -p mlruns
	@echo "MLflow: http://127.0.0.1:5000 (Ctrl-C ends it)"
	@.venv/bin/mlflow ui --host 127.0.0.1 --port 5000

clean:
	rm -rf artifacts .pytest_cache .ruff_cache .mypy_cache .hypothesis
