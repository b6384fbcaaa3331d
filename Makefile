# `make` alone lists the targets.
PYTHON ?= python3
UV := 0.13.9
BIN := .venv/bin
READY := .venv/.ready
READY_CLUSTER := .venv-cluster/.ready
READY_UI := .venv/.ready-ui
PORT ?= 5000
OUTPUTS ?= $(CURDIR)/outputs
TESTS := -q -p no:cacheprovider --numprocesses 2 --dist worksteal --ignore=tests/faults --ignore=tests/cluster --ignore=tests/ui
# a machine with a GPU has torch, and maybe no network: wheels/ brings the rest
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_SETUP = if ls wheels/*.whl >/dev/null 2>&1; then $(GPU_PYTHON) -m pip install --quiet --disable-pip-version-check \
	--no-index --no-deps --upgrade --target wheels/site wheels/*.whl; fi; PYTHONPATH=wheels/site
export MLFLOW_DISABLE_TELEMETRY := true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION := false
# in .venv it may be written: every process would compile torch and MLflow anew, for up to 15 s
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup train sweep report sync test test-full test-portable test-faults test-cluster test-ui test-gpu bench-gpu gpu-wheels check format ui serve bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## install everything into .venv; the other targets do this by themselves

$(READY): requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) here; give another: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; give another: make PYTHON=python3.12"; exit 2; }
	@echo "setting up .venv (about 6 GB)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement requirements.txt
	@touch $@

train: $(READY) ## train one network with BatchNorm on MNIST and measure its gap
	@$(BIN)/python src/train.py model.bn=true

sweep: $(READY) ## BatchNorm x dropout x initializer x 6 seeds on MNIST, under 10 minutes on 2 cores
	@$(BIN)/python src/train.py -m experiment=baseline trainer.max_epochs=10 figures=false hydra/launcher=joblib \
		model.bn=false,true model.dropout=0,0.5 model.init=xavier_uniform,kaiming_normal,orthogonal 'seed=range(6)'

report: $(READY) ## tables, figures and verdicts of the newest sweep
	@$(BIN)/python src/report.py

sync: $(READY) ## send to MLflow what it does not have yet
	@$(BIN)/python src/sync.py

test: $(READY) ## run the tests on two cores, without the slow ones
	@$(BIN)/python -m pytest $(TESTS) -m "not full"

test-full: $(READY) ## the same, and the slow ones; run it before a release
	@$(BIN)/python -m pytest $(TESTS)

test-portable: $(READY) ## the same as on other CPUs, with 2 threads and with other seeds; for an hour (VARIANTS=… for some)
	@$(BIN)/python tests/portable.py $(VARIANTS)

test-faults: $(READY) ## kills, full disks, broken servers, hostile files, generated commands; as root, for half an hour or more
	@$(BIN)/python -m pytest -q -s -p no:cacheprovider tests/faults

test-cluster: $(READY_CLUSTER) ## several devices, two hosts, a real Slurm and a local Ray; as root on Debian, for 40 minutes
	@command -v sbatch >/dev/null && command -v munged >/dev/null || DEBIAN_FRONTEND=noninteractive \
		apt-get install --quiet --yes --no-install-recommends slurm-wlm munge
	@.venv-cluster/bin/python -m pytest -q -s -p no:cacheprovider tests/cluster

test-ui: $(READY_UI) ## the dashboard in a real Chromium; as root on Debian, for 5 minutes (SCREENSHOTS=docs/dashboard keeps its pages)
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || DEBIAN_FRONTEND=noninteractive \
		apt-get install --quiet --yes --no-install-recommends chromium chromium-driver
	@GAPLAB_SCREENSHOTS=$(SCREENSHOTS) $(BIN)/python -m pytest -q -s -p no:cacheprovider tests/ui

test-gpu: ## what gaplab does on a GPU, in 4 minutes; needs no .venv, see tests/gpu/kit.py
	@$(GPU_SETUP) $(GPU_PYTHON) tests/gpu/kit.py

bench-gpu: ## what a GPU makes of gaplab, in 6 minutes, into docs/benchmarks.md; needs no .venv
	@$(GPU_SETUP) $(GPU_PYTHON) benchmarks/gpu.py

gpu-wheels: $(READY) ## collect in wheels/ what test-gpu needs beside torch, torchvision, lightning and torchmetrics
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir wheels --constraint requirements.txt \
		hydra-core omegaconf antlr4-python3-runtime joblib cloudpickle rich markdown-it-py mdurl pygments

$(READY_UI): pyproject.toml $(READY)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --requirement pyproject.toml --extra ui --constraint requirements.txt
	@touch $@

$(READY_CLUSTER): requirements.txt pyproject.toml $(READY)
	@echo "setting up .venv-cluster: what .venv has, and Ray"
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-cluster
	@$(BIN)/uv pip install --quiet --python .venv-cluster/bin/python --requirement requirements.txt
	@$(BIN)/uv pip install --quiet --python .venv-cluster/bin/python --requirement pyproject.toml --extra ray \
		--constraint requirements.txt
	@touch $@

check: $(READY) ## lint, format, types and the floors between the packages
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@PYTHONPATH=src $(BIN)/lint-imports --no-cache

format: $(READY) ## put the code into its one format
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

ui: $(READY) ## the MLflow UI on http://127.0.0.1:5000 (PORT=…), for this machine alone
	@exec $(BIN)/python src/ui.py "port=$(PORT)" "paths.outputs=$(OUTPUTS)"

serve: $(READY) ## the champion of the registry behind HTTP on http://127.0.0.1:5001, for this machine alone; see docs/serving.md
	@exec $(BIN)/python src/serve.py paths.outputs=$(OUTPUTS)

bench: $(READY) ## measure speed, start-up, scale and a sweep into docs/benchmarks.md; 40 minutes on an idle machine
	@$(BIN)/python benchmarks/startup.py
	@$(BIN)/python benchmarks/training.py
	@$(BIN)/python benchmarks/where.py
	@$(BIN)/python benchmarks/scale.py
	@$(BIN)/python benchmarks/sweeps.py
	@$(BIN)/python benchmarks/page.py
	@$(BIN)/python benchmarks/serving.py

clean: ## remove .venv and caches; data and outputs stay
	rm -rf .venv .venv-cluster .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
