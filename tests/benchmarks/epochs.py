"""What it takes to put an epoch in order, and what reading leaves in memory."""

import functools
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
from streaming.base.shuffle import algos

from examples.mosaic_streaming.sampling.order import MAX_CANONICAL_NODES
from tests.benchmarks.data import Tokens
from tests.benchmarks.measure import Figure
from tests.benchmarks.text import write_mds
from tests.support.ranks import run_rank_values
from tests.support.streams import SEQ_LEN, build_loader, job, loader_config, sample_tokens

SIZES = (1_000_000, 10_000_000, 100_000_000)
NONE = "none"
SHARD = 10_000
"""Samples of a shard."""
EARLY, LATE = 100, 10_000
"""Batches after which memory is looked at."""
MIB = 1024
"""KiB, as Linux counts."""


def write_index(folder: Path, samples: int) -> Path:
    """A stream of so many samples, whose shards are one file under many names."""
    write_mds(folder, np.tile(sample_tokens(0), (SHARD, 1)))
    index = json.loads((folder / "index.json").read_text())
    [shard] = index["shards"]
    file = folder / shard["raw_data"]["basename"]
    names = [f"shard.{number:05}.mds" for number in range(samples // SHARD)]
    index["shards"] = [shard | {"raw_data": shard["raw_data"] | {"basename": name}} for name in names]
    for name in set(names) - {file.name}:
        os.link(file, folder / name)
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def status(pid: int | str, key: str) -> int:
    """KiB that a process has of something."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def begin_epoch(stream: Path, algo: str) -> tuple[float, float, int]:
    """Seconds to open a stream, seconds from there to the first batch, and the most MiB that it took."""
    shuffle: dict[str, Any] = {"shuffle": False} if algo == NONE else {"shuffle": True, "shuffle_algo": algo}
    config = loader_config(stream, num_canonical_nodes=MAX_CANONICAL_NODES, **shuffle)
    begin = time.perf_counter()
    loader = build_loader(config, job(8, seq_len=SEQ_LEN))
    opened = time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = status("self", "VmRSS")
    next(iter(loader))
    return opened - begin, time.perf_counter() - opened, (status("self", "VmHWM") - before) // MIB


def measure_epochs(folder: Path) -> list[Figure]:
    """Seconds and memory to put an epoch in order, by its size and the way to shuffle."""
    figures = []
    for samples in SIZES:
        stream = write_index(folder / str(samples), samples)
        for algo in (NONE, *sorted(algos)):
            [(opened, ordered, memory)] = run_rank_values(functools.partial(begin_epoch, stream, algo), timeout=300)
            figures.append(
                Figure(
                    "an epoch in order",
                    {
                        "samples": f"{samples:,}",
                        "shuffle_algo": algo,
                        "open, s": round(opened, 2),
                        "order, s": round(ordered, 2),
                        "memory, MiB": memory,
                    },
                )
            )
    return figures


def grow(tokens: Tokens, workers: int) -> dict[str, tuple[int, int]]:
    """KiB of its own that the rank, and each worker, has early and late."""
    config = loader_config(tokens.mds, workers, shuffle=True, num_canonical_nodes=MAX_CANONICAL_NODES)
    loader = build_loader(config, job(tokens.rows, seq_len=tokens.seq_len))
    batches, found = iter(loader), []
    for count in (EARLY, LATE - EARLY):
        for _ in range(count):
            next(batches)
        pids = {"rank": os.getpid()}
        pids |= {
            f"worker {n}": worker.pid for n, worker in enumerate(getattr(loader._batches._batches, "_workers", []))
        }
        found.append({name: status(pid, "RssAnon") for name, pid in pids.items()})
    return {name: (found[0][name], found[1][name]) for name in found[0]}


def measure_growth(tokens: Tokens) -> list[Figure]:
    """Memory of a rank and of its workers early and late; what they have from the process that they were forked from
    is in both."""
    figures = []
    for workers in (0, 2):
        [found] = run_rank_values(functools.partial(grow, tokens, workers), timeout=300)
        for name, (early, late) in found.items():
            values = {"num_workers": workers, "process": name, f"MiB after {EARLY} batches": round(early / MIB, 1)}
            values |= {f"after {LATE:,}": round(late / MIB, 1), "growth, MiB": round((late - early) / MIB, 1)}
            figures.append(Figure("memory", values))
    return figures
