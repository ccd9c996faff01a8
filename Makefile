# Needs Python 3.10 or newer (with pip and venv) and make; every target makes its own .venv the first time.
# Another interpreter: `make test PYTHON=python3.12`. Arguments for pytest and the scripts: `make test ARGS="-k diversity -x"`.

PYTHON ?= python3
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/installed
RIVALS := $(VENV)/rivals-installed
# One thread for each process; a file's tests stay together, since runs of two processes are shared by them.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile

OLDEST := $(VENV)/oldest-lightning
CORE := tests/batching tests/callbacks \
	tests/test_ddp.py tests/test_in_band_ddp.py tests/test_integrations.py tests/test_metric.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-conformance test-lightning coverage lint format bench bench-overhead bench-growth bench-race paper clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## train on handwritten digits and watch the batch grow
	$(RUN) examples/digits.py $(ARGS)

test: $(STAMP) ## run the fast tests
	$(PYTEST) $(ARGS)

test-slow: $(STAMP) ## run the tests that are slow or need the network
	$(PYTEST) -m "slow or network" $(ARGS)

test-conformance: $(STAMP) ## hold per-example gradients against every layer of torch and hundreds of odd models
	$(PYTEST) --dist load tests/conformance -m conformance $(ARGS)

# Only Lightning's two packages and torchmetrics differ: they lie in a folder of their own, which comes first on the path.
test-lightning: $(STAMP) $(OLDEST)/installed ## run the core against the oldest and the newest supported Lightning
	PYTHONPATH=$(OLDEST) $(PYTEST) $(CORE) $(ARGS)
	$(PYTEST) $(CORE) $(ARGS)

coverage: $(STAMP) ## run the fast tests and list the lines that none of them reaches
	$(PYTEST) --cov $(ARGS)

lint: $(STAMP) ## check format, style and types; changes nothing
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

format: $(STAMP) ## put format and style right where a tool can
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

bench: $(STAMP) ## run the benchmark that the README quotes
	$(RUN) benchmarks/digits.py $(ARGS)

bench-overhead: $(RIVALS) ## measure what measuring costs, beside other libraries
	$(RUN) benchmarks/overhead.py $(ARGS)
	$(RUN) benchmarks/performance.py

bench-growth: $(STAMP) ## measure what a growth costs
	$(RUN) benchmarks/growth.py $(ARGS)

bench-race: $(STAMP) ## race other ways to choose a batch to a fixed accuracy: an hour or two; ARGS=--quick three minutes
	$(RUN) benchmarks/race.py $(ARGS)
	$(RUN) benchmarks/race_report.py

paper: $(STAMP) ## run the paper's experiments in their quick form: tables and pictures in outputs/paper
	$(RUN) experiments/paper/lower_bound.py --quick $(ARGS)
	$(RUN) experiments/paper/theory_check.py --quick $(ARGS)
	$(RUN) experiments/paper/replication.py --quick $(ARGS)
	$(RUN) experiments/paper/stability.py --quick $(ARGS)
	$(RUN) experiments/paper/speedup.py --quick $(ARGS)
	$(RUN) experiments/paper/dropconnect.py --quick $(ARGS)

clean: ## remove what runs left behind; keeps .venv
	rm -rf .mypy_cache .pytest_cache .ruff_cache .coverage htmlcov build dist *.egg-info
	rm -rf lightning_logs checkpoints outputs
	find . -name .git -prune -o -path ./$(VENV) -prune -o -name __pycache__ -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)

# The stamp appears only after a complete install; an install that was interrupted is begun again from nothing.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@if [ -e $(VENV)/unfinished ]; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(VENV)/unfinished
	@echo "installing into $(VENV) (a minute or so; only when setup.cfg, pyproject.toml or constraints.txt changed)"
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip --disable-pip-version-check install --quiet -c constraints.txt -e ".[dev]"
	@mv $(VENV)/unfinished $@

$(OLDEST)/installed: $(STAMP)
	@rm -rf $(OLDEST)
	@$(RUN) -m pip --disable-pip-version-check install --quiet --no-deps --target $(OLDEST) \
		lightning==2.5.0 pytorch_lightning==2.5.0 torchmetrics==1.6.0
	@touch $@

# BackPACK asks for torchvision, which only its examples use, and which does not import beside another build of torch.
$(RIVALS): $(STAMP)
	@$(RUN) -m pip --disable-pip-version-check install --quiet -c constraints.txt -e ".[bench]"
	@$(RUN) -c "import torchvision" 2>/dev/null || $(RUN) -m pip uninstall --quiet --yes torchvision
	@touch $@
