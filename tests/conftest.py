"""Imports everything once, so that ranks forked from here start at once."""

import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # CUDA doesn't survive a fork: tests run on the CPU everywhere
os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads doesn't survive a fork
# torch's stores ask DNS for the name of ::ffff:127.0.0.1: a lost answer would cost a rank 5 s (glibc, resolv.conf(5)).
os.environ["RES_OPTIONS"] = "timeout:1"

warnings.filterwarnings("ignore", "pkg_resources is deprecated")

from examples.mosaic_streaming.titan import versions
from examples.mosaic_streaming.upstream import cpu
from examples.mosaic_streaming.upstream import lazy_imports as imports

if newer := os.environ.get("CANARY"):  # a pre-release, of which `make canary` finds out what breaks
    versions.SUPPORTED[newer] = "v0_3"
cpu.prepare_torchtitan()
imports.import_llm_foundry()

import pytest
import torch
import torch._dynamo
import torchtitan.models.llama3
import torchtitan.train  # noqa: F401

import examples.mosaic_streaming.dataloader
import examples.mosaic_streaming.preview.commands
import examples.mosaic_streaming.tokenizer
import examples.mosaic_streaming.train  # noqa: F401
from tests.support.jobs import write_files
from tests.support.streams import write_stream
from tests.support.titan import IS_0_2, load_config

torch.set_num_threads(1)
load_config("examples/mosaic_streaming/configs/mosaic_job.toml")  # tyro keeps what takes it 0.3 s to read

ONLY_0_2 = ["upstream/test_train_specs.py", "unit/titan/test_spec.py", "unit/batch/test_documents.py",
            "unit/test_one_token.py", "benchmarks"]  # fmt: skip
collect_ignore = [] if IS_0_2 else ONLY_0_2
"""Tests of what only TorchTitan 0.2 has."""

# The import of composer 0.32.1 sets handlers that raise SystemExit, which is lost in the first moments after a fork.
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with `job.toml`, `loader.toml` and their stream of 100 samples."""
    return write_files(tmp_path)


@pytest.fixture(scope="session")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Two streams, of 50 and 33 samples; the second's numbers follow the first's."""
    folder = tmp_path_factory.mktemp("streams")
    write_stream(folder / "a", 50)
    write_stream(folder / "b", 33, first=50)
    return {name: {"local": str(folder / name)} for name in ("a", "b")}


@pytest.fixture(scope="module")
def module_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A temporary folder for the tests of a module. It goes when they end: a checkpoint takes 70 MB."""
    folder = tmp_path_factory.mktemp("module")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _remove_checkpoints(request: pytest.FixtureRequest) -> Iterator[None]:
    """Remove the checkpoints that a test has written to the folder of its module."""
    if "module_path" not in request.fixturenames:
        yield
        return
    outputs = request.getfixturevalue("module_path") / "outputs"
    before = set(outputs.glob("*"))
    yield
    for folder in set(outputs.glob("*")) - before:
        shutil.rmtree(folder)
