# `make demo` trains on demo data, `make test` runs the tests; both first make .venv from requirements.lock.
# PYTHON=3.12 chooses another Python for a new .venv.

PYTHON ?= >=3.11,<3.13
UV_VERSION := 0.13.9
UV := $(or $(shell command -v uv 2>/dev/null),.tools/bin/uv)
BIN := .venv/bin
EXAMPLE := examples/mosaic_streaming
SOURCES := examples tests docs

.PHONY: demo test test-all soak bench bench-gpu pictures format lint typecheck check lock clean

demo: .venv/.synced
	rm -rf outputs/demo
	$(BIN)/python -W ignore -m examples.mosaic_streaming.make_demo_data
	$(BIN)/torchrun --nproc_per_node=1 -m examples.mosaic_streaming.train \
	  --config $(EXAMPLE)/configs/mosaic_job.toml \
	  --mosaic-config $(EXAMPLE)/configs/mosaic_dataloader.toml -- \
	  --job.dump_folder=outputs/demo --training.steps=20 --checkpoint.enable=true --metrics.enable_tensorboard=true
	@echo
	@echo "TensorBoard logs: outputs/demo/tb (look at them with $(BIN)/tensorboard --logdir outputs/demo/tb)"
	@echo "Checkpoints:      outputs/demo/checkpoint"
	@echo "Next, go on from step 20 to step 30:"
	@echo
	@echo "  $(BIN)/torchrun --nproc_per_node=1 -m examples.mosaic_streaming.train \\"
	@echo "    --config $(EXAMPLE)/configs/mosaic_job.toml \\"
	@echo "    --mosaic-config $(EXAMPLE)/configs/mosaic_dataloader.toml -- \\"
	@echo "    --job.dump_folder=outputs/demo --training.steps=30 --checkpoint.enable=true --metrics.enable_tensorboard=true"

test: .venv/.synced
	$(BIN)/pytest

# The long ones, too: resume in each way to read, and restarts through torchrun, also on two machines.
test-all: .venv/.synced
	$(BIN)/pytest -m ""

# At least 200 faults and 20 kills, in at most 20 minutes.
soak: .venv/.synced
	$(BIN)/python -W ignore -m tests.soak

# What data costs, next to what a user would pick instead: under 15 minutes on two cores.
bench: .venv/.bench
	$(BIN)/python -W ignore -m tests.benchmarks

# Training on this machine's GPUs, against TorchTitan's own loader; 25 minutes at most. GPUS=8 takes eight of them.
bench-gpu: .venv/.synced
	$(BIN)/python -W ignore -m tests.benchmarks.gpu --nproc-per-node $(or $(GPUS),1)

# Those of docs/, from a run of the code as it is.
pictures: .venv/.synced
	$(BIN)/python -W ignore -m examples.mosaic_streaming.make_demo_data
	$(BIN)/python docs/make_pictures.py

format: .venv/.synced
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

lint: .venv/.synced
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/lint-imports

typecheck: .venv/.synced
	$(BIN)/mypy $(SOURCES)

check: lint typecheck test

# Python 3.11 and 3.12, any platform: each entry has its hashes, and no registry is named.
lock: $(UV)
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --group dev \
	  --custom-compile-command "make lock" pyproject.toml --output-file requirements.lock
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-deps --group pyproject.toml:bench \
	  --custom-compile-command "make lock" --constraints requirements.lock --output-file requirements-bench.lock

# uv is no prerequisite: with all of it installed, nothing has to install uv. Bytecode is compiled once, here: where
# Python can't or mustn't write it, each process would compile thousands of modules anew.
.venv/.synced: requirements.lock
	test -x $(UV) || $(MAKE) $(UV)
	test -x $(BIN)/python || $(UV) venv --quiet --python '$(PYTHON)' .venv
	@echo "Installing requirements.lock into .venv: about 3 GB to download the first time."
	$(UV) pip sync --python .venv --require-hashes --compile-bytecode requirements.lock
	touch $@

.venv/.bench: requirements-bench.lock .venv/.synced
	test -x $(UV) || $(MAKE) $(UV)
	$(UV) pip install --quiet --python .venv --no-deps --require-hashes -r requirements-bench.lock
	touch $@

.tools/bin/uv:
	python3 -m venv .tools
	.tools/bin/pip install --quiet uv==$(UV_VERSION)

clean:
	rm -rf .venv .tools data outputs .hypothesis .pytest_cache .ruff_cache .mypy_cache
