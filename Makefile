# `make demo` and `make test` are all that a fresh machine needs; both install what they use into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
DEMO := runs/demo
BASE ?= main
STEPPED := sem-pcyc cvae caae doodle2search sketch-gcn lcale cfsa contrastive classifier

.PHONY: demo demo-seeds test tests-on-ray tests-without-ray sanity faults faults-tests faults-nightly stages loss-compare check format lock audit clean

# requirements.lock pins the versions that were tested together; pyproject.toml says which ranges are allowed
$(VENV)/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[cpu,demo,dev]'
	touch $@

demo: $(VENV)/installed ## the whole pipeline on the embedded emoji, one seed
	$(RUN) -m zsr demo --output $(DEMO)

demo-seeds: $(VENV)/installed ## the same with three seeds
	$(RUN) -m zsr demo --output $(DEMO) --seeds 0 1 2

test: $(VENV)/installed
	$(MAKE) --jobs 2 --keep-going --output-sync=line tests-on-ray tests-without-ray
	$(BIN)/coverage combine --quiet .coverage.ray .coverage.plain
	$(BIN)/coverage report --skip-covered --fail-under 85

tests-on-ray:
	COVERAGE_FILE=.coverage.ray $(RUN) -m pytest -m "ray and not faults" --cov zsr --cov-report=

tests-without-ray:
	COVERAGE_FILE=.coverage.plain $(RUN) -m pytest -m "not ray and not faults" --cov zsr --cov-report=

sanity: $(VENV)/installed ## gates and ablations of the models on a synthetic world; some minutes
	$(RUN) -m tests.sanity.run

faults-tests: $(VENV)/installed ## the tests of kills, lost nodes and clusters of several nodes
	$(RUN) -m pytest -m faults

# workers are to be killed, too, however small the work is
faults faults-nightly: export ZSR_EXECUTOR = ray

faults: $(VENV)/installed ## the demo and prepare, killed at random times, end with the digests of unbroken ones
	$(MAKE) faults-tests
	$(RUN) -m tests.faults.kill_demo runs/faults
	$(RUN) -m tests.faults.kill_prepare runs/faults/prepare
	$(RUN) -m tests.faults.kill_gallery runs/faults/gallery $(GALLERY_FAULTS)
	$(RUN) -m tests.faults.cluster runs/faults/cluster
	$(RUN) -m tests.faults.sharded
	$(RUN) -m tests.faults.kill_train runs/faults/train $(TRAINING_FAULTS)
	$(RUN) -m tests.faults.loss_compare $(BASE) --models sem-pcyc lcale

faults-nightly: ## the same with training killed as often as the bar asks for each night
	$(MAKE) faults TRAINING_FAULTS="--kills 20 --nodes 10 --drivers 10 --models $(STEPPED)" \
		GALLERY_FAULTS="--kills 200 --disks 200"
	$(MAKE) loss-compare

stages: $(VENV)/installed ## every model: ZeRO stages, ranks and pieces of a batch train the same weights; some minutes
	$(RUN) -m tests.training.stages

loss-compare: $(VENV)/installed ## 50 steps of every model end with the bits that the code of BASE ends with
	$(RUN) -m tests.faults.loss_compare $(BASE)

check: $(VENV)/installed audit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy zsr jobs cluster tests benchmarks
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
