# Two commands do everything: `make demo` runs the main job, `make test` passes the tests. Both install what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers
SCALE ?= 1
RUNS ?= 1
FAULTS := $(addprefix tests/acceptance/test_,$(addsuffix .py,beat beat_faults chaos clock_steps cuts deaf fault_points garbage messages recovery \
	redis_faults stop threads time_limits two_catalogues upkeep worker_loss)) \
	$(addprefix tests/integration/test_,$(addsuffix .py,beats bounds dead_letters health life_model recovery redis_outages redis_server repeated_calls))

# Compiled once and not by each of some hundred processes; here, because some environments turn that off.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help venv demo up test faults check format bench screenshots docs clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

venv: $(STAMP) ## create .venv and install everything at the pinned versions

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[local,dev]'
	@touch $@

demo: $(STAMP) ## run the main job on real parts and verify that all is as it must be (a minute and a half)
	$(BIN)/taskplatform demo

up: $(STAMP) ## run the whole platform until Ctrl-C
	$(BIN)/taskplatform up

test: $(STAMP) ## all tests, slow fault tests included: four modules at a time, because most wait for something
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

faults: $(STAMP) ## the fault suite alone, RUNS=10 for ten times in a row
	for run in $$(seq $(RUNS)); do echo "run $$run" && $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder $(FAULTS) || exit 1; done

check: $(STAMP) ## ruff, mypy --strict, import-linter, the installed versions, and the shipped definitions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pip check --disable-pip-version-check
	$(BIN)/python -m tests.audit constraints.txt
	API_BASE_URL=https://api.example.com API_TOKEN=check $(BIN)/taskplatform tasks check

format: $(STAMP) ## let ruff format and mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(PEERS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	@touch $@

bench: $(PEERS) ## all benchmarks, one table, SCALE=0.1 for a tenth of the work; installs the task queues that they run beside
	$(BIN)/python -m bench --scale $(SCALE)

screenshots: $(STAMP) ## make docs/images anew, from what runs; needs chromium and chromium-driver
	SCREENSHOTS=docs/images CI=true $(BIN)/python -m pytest -q tests/acceptance/test_screens.py

docs: $(STAMP) ## write docs/cli.md anew from the commands, and docs/api-reference.md from the API's OpenAPI document
	$(BIN)/python -m tests.cli_reference
	$(BIN)/python -m tests.reference

clean: ## remove .venv, caches and the data of `up`
	rm -rf $(VENV) .taskplatform .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
