# `make demo` and `make test` are all that a fresh machine needs; both install what they use into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
DEMO := runs/demo

.PHONY: demo demo-seeds test sanity faults check format lock audit clean

# requirements.lock pins the versions that were tested together; pyproject.toml says which ranges are allowed
$(VENV)/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[cpu,demo,dev]'
	touch $@

demo: $(VENV)/installed ## the whole pipeline on the embedded emoji, one seed
	$(RUN) -m jobs.demo --output $(DEMO)

demo-seeds: $(VENV)/installed ## the same with three seeds
	$(RUN) -m jobs.demo --output $(DEMO) --seeds 0 1 2

test: $(VENV)/installed
	$(RUN) -m pytest

sanity: $(VENV)/installed ## gates and ablations of the models on a synthetic world; some minutes
	$(RUN) -m tests.sanity.run

faults: $(VENV)/installed ## the demo, killed at random times, ends with the digests of an unbroken one
	$(RUN) -m tests.faults.kill_demo runs/faults

check: $(VENV)/installed audit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy zsr jobs tests benchmarks
	$(BIN)/lint-imports

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

audit: $(VENV)/installed ## known vulnerabilities of the locked versions; lists what the registry has no advisories for
	$(BIN)/pip-audit --requirement requirements.lock --no-deps --disable-pip --progress-spinner off

lock: ## write requirements.lock anew from what pip resolves today
	rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet '.[cpu,demo,dev]'
	$(VENV)-lock/bin/pip freeze --exclude zsr | sed 's/+cpu$$//' > requirements.lock
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
