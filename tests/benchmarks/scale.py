"""Several loader ranks on one machine, from one cache and from a store."""

import functools
import os
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from tests.benchmarks.data import Tokens
from tests.benchmarks.measure import Figure
from tests.support.ranks import run_rank_values
from tests.support.store import running_store
from tests.support.streams import build_loader, job, loader_config

RANKS = (1, 2, 4, 8)


def read_epoch(tokens: Tokens, remote: str, cache: Path) -> tuple[float, float]:
    """Seconds from all ranks' start to the first batch and to the end of an epoch; the slowest rank's."""
    config = loader_config(cache, 1, remote=remote, shuffle=True, num_canonical_nodes=8, predownload=256)
    loader = build_loader(config, job(tokens.rows, seq_len=tokens.seq_len))
    dist.barrier()
    begin = time.perf_counter()
    batches = iter(loader)
    next(batches)
    first = time.perf_counter()
    while loader._order.remaining(loader._sample_in_epoch):
        next(batches)
    times = torch.tensor([first - begin, time.perf_counter() - begin])
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return float(times[0]), float(times[1])


def measure(tokens: Tokens, folder: Path) -> list[Figure]:
    """Batches a second of all ranks together, by their number, with and without the shards in the cache."""
    samples = len(np.load(tokens.array, mmap_mode="r"))
    figures = []
    with running_store() as store, mock.patch.dict(os.environ, store.environment()):
        remote = store.upload(tokens.mds, "tokens")
        for ranks in RANKS:
            cache = folder / f"cache-{ranks}"
            values: dict[str, str] = {"loader ranks": str(ranks)}
            for source in ("S3 server", "cache"):
                read = functools.partial(read_epoch, tokens, remote, cache)
                first, end = run_rank_values(read, ranks, timeout=300)[0]
                rate = (samples // tokens.rows) / end
                values |= {f"{source}: first batch, s": f"{first:.2f}", f"{source}: batches/s": f"{rate:,.0f}"}
            figures.append(Figure("ranks of one machine", values))
    return figures
