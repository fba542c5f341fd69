"""What it costs to look for faults where there are none: python -m tests.benchmarks.hardening

Two loaders on the same stream read in turns, in one process, one of them with llm-foundry's dataset as it is. Then: how
long loaders take to build, and how long it takes to verify a cache.
"""

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from streaming import MDSWriter

from tests import conftest  # noqa: F401  # first: imports everything once

# isort: split
from examples.mosaic_streaming import build
from examples.mosaic_streaming.node import prepare_streams
from tests.ranks import run_rank_values
from tests.streams import COLUMNS, build_loader, job, loader_config, write_stream

SEQ_LEN, ROWS, SAMPLES = 2048, 8, 8192
ROUNDS, TURNS, BATCHES = 16, 10, 40
"""Processes, times that each loader has its turn in one, and batches that it then reads."""
STARTS = 10
GIGABYTE = 10**9


def write(folder: Path) -> Path:
    """A stream of 16.8 million tokens, in one shard for 512 samples."""
    with MDSWriter(out=str(folder), columns=COLUMNS, size_limit=1 << 22, hashes=["xxh64"]) as writer:
        random = np.random.default_rng(0)
        for _ in range(SAMPLES):
            writer.write({"tokens": random.integers(16, 2048, SEQ_LEN + 1, dtype=np.int32)})
    return folder


def as_it_is() -> contextlib.AbstractContextManager[Any]:
    """Within it, a loader's dataset is the one that llm-foundry makes."""
    return mock.patch.object(build, "check_dataset", lambda dataset, labels: None)


def unprepared() -> contextlib.AbstractContextManager[Any]:
    """Within it, nothing is prepared or checked before a dataset is made."""
    return mock.patch.object(build, "on_each_node", lambda number, prepare: None)


def seconds(function: Callable[[], Any]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def read_in_turns(stream: Path, num_workers: int) -> float:
    """Batches a second with the checks, divided by those without."""
    config = loader_config(stream, num_workers, shuffle=True)
    training = job(ROWS, seq_len=SEQ_LEN)
    loaders: list[Any] = [iter(build_loader(config, training))]
    with as_it_is():
        loaders.append(iter(build_loader(config, training)))
    times = [0.0, 0.0]
    for turn in range(TURNS + 1):
        for number in (0, 1) if turn % 2 else (1, 0):
            took = seconds(lambda number=number: [next(loaders[number]) for _ in range(BATCHES)])  # type: ignore[misc]
            times[number] += took * bool(turn)  # the first warms up
    return times[1] / times[0]


def build_in_turns(stream: Path) -> list[float]:
    """By how many seconds a loader takes longer to build with the checks, without hashes."""
    config, training = loader_config(stream), job(ROWS, seq_len=SEQ_LEN)
    build_loader(config, training)
    more = []
    for _ in range(STARTS):
        checked = seconds(lambda: build_loader(config, training))
        with as_it_is(), unprepared():
            more.append(checked - seconds(lambda: build_loader(config, training)))
    return more


def verify(stream: Path, hash: str | None) -> float:
    """Seconds to verify a gigabyte."""
    config = {"dataset": {"local": str(stream), **({"validate_hash": hash} if hash else {})}}
    size = sum(file.stat().st_size for file in stream.glob("*.mds"))
    return min(seconds(lambda: prepare_streams(config, "loader.toml")) for _ in range(3)) / size * GIGABYTE


def write_bytes(folder: Path) -> Path:
    """A stream of a gigabyte, in shards of 64 MB."""
    with MDSWriter(out=str(folder), columns={"x": "bytes"}, size_limit=1 << 26, hashes=["sha1", "xxh64"]) as writer:
        random = np.random.default_rng(0)
        for _ in range(GIGABYTE // (1 << 20)):
            writer.write({"x": random.bytes(1 << 20)})
    return folder


def main() -> None:
    """Measure, and print a table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stream = write(folder / "stream")
        many = write_stream(folder / "many", 10_000)
        for num_workers in (0, 2):
            ratios = [run_rank_values(partial(read_in_turns, stream, num_workers))[0] for _ in range(ROUNDS)]
            low, middle, high = np.percentile(ratios, [25, 50, 75])
            print(f"throughput with / without, {num_workers} workers: {middle:.3f} (half: {low:.3f} to {high:.3f})")
        for place in (stream, many):
            [more] = run_rank_values(partial(build_in_turns, place))
            shards = len(list(place.glob("shard.*")))
            print(f"start, {shards} shards: {statistics.median(more):+.3f} s ({min(more):+.3f} to {max(more):+.3f} s)")
        gigabyte = write_bytes(folder / "gigabyte")
        for hash in (None, "xxh64", "sha1"):
            [cost] = run_rank_values(partial(verify, gigabyte, hash))
            print(f"verify, {hash or 'sizes'}: {cost:.3f} s per GB")


if __name__ == "__main__":
    main()
