# `make demo` trains on demo data, `make test` runs the tests; both first make .venv from requirements.lock.
# PYTHON=3.12 chooses another Python for a new .venv. TITAN=0.3 takes TorchTitan 0.3, in .venv-titan-0.3, instead of 0.2.

PYTHON ?= >=3.11,<3.13
UV_VERSION := 0.13.9
UV := $(or $(shell command -v uv 2>/dev/null),.tools/bin/uv)
TITAN ?= 0.2
ifeq ($(TITAN),0.2)
VENV := .venv
DUMP_FOLDER := --job.dump_folder
else ifeq ($(TITAN),0.3)
VENV := .venv-titan-0.3
DUMP_FOLDER := --dump_folder
else
$(error TITAN=$(TITAN): expected 0.2 or 0.3)
endif
BIN := $(VENV)/bin
EXAMPLE := examples/mosaic_streaming
SOURCES := examples tests docs

.PHONY: demo test test-all test-titan soak bench bench-gpu pictures format lint typecheck check lock canary clean

demo: $(VENV)/.synced
	rm -rf outputs/demo
	$(BIN)/python -W ignore -m examples.mosaic_streaming.make_demo_data
	$(BIN)/torchrun --nproc_per_node=1 -m examples.mosaic_streaming.train \
	  --config $(EXAMPLE)/configs/mosaic_job.toml \
	  --mosaic-config $(EXAMPLE)/configs/mosaic_dataloader.toml -- \
	  $(DUMP_FOLDER)=outputs/demo --training.steps=20 --checkpoint.enable=true --metrics.enable_tensorboard=true
	@echo
	@echo "TensorBoard logs: outputs/demo/tb (look at them with $(BIN)/tensorboard --logdir outputs/demo/tb)"
	@echo "Checkpoints:      outputs/demo/checkpoint"
	@echo "Next, go on from step 20 to step 30:"
	@echo
	@echo "  $(BIN)/torchrun --nproc_per_node=1 -m examples.mosaic_streaming.train \\"
	@echo "    --config $(EXAMPLE)/configs/mosaic_job.toml \\"
	@echo "    --mosaic-config $(EXAMPLE)/configs/mosaic_dataloader.toml -- \\"
	@echo "    $(DUMP_FOLDER)=outputs/demo --training.steps=30 --checkpoint.enable=true --metrics.enable_tensorboard=true"

test: $(VENV)/.synced
	$(BIN)/pytest

# The long ones, too: resume in each way to read, and restarts through torchrun, also on two machines.
test-all: $(VENV)/.synced
	$(BIN)/pytest -m ""

# What depends on TorchTitan: the adapter, whole runs, layouts, restarts, preview, patches.
test-titan: $(VENV)/.synced
	$(BIN)/pytest -m "not long or both" $(addprefix tests/,e2e unit/titan unit/preview unit/test_metrics.py unit/test_validator.py upstream)

# At least 200 faults, 20 kills and 40 signals to stop, in at most 20 minutes.
soak: $(VENV)/.synced
	$(BIN)/python -W ignore -m tests.soak

# What data costs, next to what a user would pick instead: under 15 minutes on two cores.
bench: .venv/.bench
	$(BIN)/python -W ignore -m tests.benchmarks

# Training on this machine's GPUs, against TorchTitan's own loader; 10 minutes at most. GPUS=8 takes eight of them, and
# ONLY=1B one part: "1B debugmodel attention" are all.
bench-gpu: $(VENV)/.synced
	$(BIN)/python -W ignore -m tests.benchmarks.gpu --nproc-per-node $(or $(GPUS),1) $(if $(ONLY),--only $(ONLY))

# Those of docs/, from a run of the code as it is.
pictures: $(VENV)/.synced
	$(BIN)/python -W ignore -m examples.mosaic_streaming.make_demo_data
	$(BIN)/python docs/make_pictures.py

format: $(VENV)/.synced
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

lint: $(VENV)/.synced
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/lint-imports

typecheck: $(VENV)/.synced
	$(BIN)/mypy $(SOURCES)

check: lint typecheck test

# Python 3.11 and 3.12, any platform: each entry has its hashes, and no registry is named.
lock: $(UV)
	for titan in 0-2:requirements.lock 0-3:requirements-titan-0.3.lock; do \
	  $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --group dev --group titan-$${titan%%:*} \
	    --custom-compile-command "make lock" pyproject.toml --output-file $${titan##*:} || exit 1; \
	done
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-deps --group pyproject.toml:bench \
	  --custom-compile-command "make lock" --constraints requirements.lock --output-file requirements-bench.lock

# TorchTitan's newest pre-release, if there is one, with our code: what breaks is printed. Not a promise, and not in CI.
canary: .venv-titan-0.3/.synced
	.venv-titan-0.3/bin/python tests/canary.py $(UV)

# uv is no prerequisite: with all of it installed, nothing has to install uv. Bytecode is compiled once, here: where
# Python can't or mustn't write it, each process would compile thousands of modules anew.
.venv/.synced: requirements.lock
.venv-titan-0.3/.synced: requirements-titan-0.3.lock
.venv/.synced .venv-titan-0.3/.synced:
	test -x $(UV) || $(MAKE) $(UV)
	test -x $(@D)/bin/python || $(UV) venv --quiet --python '$(PYTHON)' $(@D)
	@echo "Installing $< into $(@D): about 3 GB to download the first time."
	$(UV) pip sync --python $(@D) --require-hashes --compile-bytecode $<
	touch $@

.venv/.bench: requirements-bench.lock .venv/.synced
	test -x $(UV) || $(MAKE) $(UV)
	$(UV) pip install --quiet --python .venv --no-deps --require-hashes -r requirements-bench.lock
	touch $@

.tools/bin/uv:
	python3 -m venv .tools
	.tools/bin/pip install --quiet uv==$(UV_VERSION)

clean:
	rm -rf .venv .venv-* .tools data outputs .hypothesis .pytest_cache .ruff_cache .mypy_cache
