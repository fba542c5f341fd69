"""The order "blend": what it costs at any size and position, and what it does with shards, next to an epoch's order."""

import functools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming.base.world import World

from examples.mosaic_streaming.config.files import LoaderFile
from examples.mosaic_streaming.config.plan import Plan, Skip, Stage
from examples.mosaic_streaming.sampling.order import ENDLESS, MAX_CANONICAL_NODES, make_blend
from examples.mosaic_streaming.sampling.placement import WorkerSamples
from examples.mosaic_streaming.upstream.sample_order import set_reader_world
from tests.benchmarks import loaders
from tests.benchmarks.data import Tokens
from tests.benchmarks.measure import Comparison, Figure
from tests.benchmarks.text import write_mds
from tests.support.ranks import run_rank_values
from tests.support.streams import SEQ_LEN, build_loader, job, sample_tokens

SIZES = (10_000_000, 100_000_000, 1_000_000_000)
SHARD = 2_000
"""Samples of a shard."""
POSITIONS = (0.0, 0.5, 0.99)
SHARES = (0.7, 0.3)
DP_RANKS, ROWS = 8, 8
TURNS = 24
"""Of each loader: they differ by little."""
STEP = 100_000_000
"""That `preview step` looks up."""
MACHINES, SHUFFLE_BLOCK, MIXED = 8, 20_000, 2_000_000
"""Machines, each with one rank; samples of a shuffle block; and samples of both streams."""


def write_index(folder: Path, samples: int, shard: int = SHARD) -> Path:
    """A stream of so many samples, without its shards."""
    write_mds(folder / "one", np.tile(sample_tokens(0), (shard, 1)))
    index = json.loads((folder / "one/index.json").read_text())
    [entry] = index["shards"]
    names = [f"shard.{number:06}.mds" for number in range(samples // shard)]
    index["shards"] = [entry | {"raw_data": entry["raw_data"] | {"basename": name}} for name in names]
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def loader_of(streams: dict[str, Path], folder: Path, **dataset: Any) -> dict[str, Any]:
    """A configuration of streams whose shards would be fetched when they are read."""
    settings = {
        name: {"remote": str(remote), "local": str(folder / name), "proportion": share}
        for (name, remote), share in zip(streams.items(), SHARES, strict=True)
    }
    dataset = {"batching_method": "blend", "shuffle": True, "streams": settings, **dataset}
    return {"name": "text", "num_workers": 0, "dataset": dataset}


def order_at_positions(samples: int) -> list[tuple[float, int]]:
    """Seconds and MiB to a rank's first samples at each position, of two streams that have so many together."""
    from tests.benchmarks.epochs import MIB, status

    class Dataset:
        """What the order asks a dataset for."""

        samples_per_shard = np.full(samples // SHARD, SHARD)
        shards_per_stream = np.array([round(share * samples / SHARD) for share in SHARES])
        shard_offset_per_stream = np.array([0, shards_per_stream[0]])
        sample_offset_per_stream = shard_offset_per_stream * SHARD
        num_canonical_nodes, shuffle, shuffle_block_size, shuffle_seed = MAX_CANONICAL_NODES, True, 1 << 18, 17

    found = []
    dataset: Any = Dataset()
    for position in POSITIONS:
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        before, begin = status("self", "VmRSS"), time.perf_counter()
        blend = make_blend(dataset, SHARES)
        first = int(position * samples) // (DP_RANKS * ROWS) * DP_RANKS * ROWS
        mine = WorkerSamples(blend.samples, [range(first, ENDLESS)], World(1, DP_RANKS, 1, 0), ROWS, 1)
        assert len(mine[0:ROWS]) == ROWS
        found.append((time.perf_counter() - begin, (status("self", "VmHWM") - before) // MIB))
    return found


def measure_positions() -> list[Figure]:
    """What it takes to begin anywhere."""
    figures = []
    for samples in SIZES:
        [found] = run_rank_values(functools.partial(order_at_positions, samples), timeout=300)
        for position, (seconds, memory) in zip(POSITIONS, found, strict=True):
            values = {"samples": f"{samples:,}", "position": f"{position:.0%}"}
            figures.append(Figure("blend", values | {"first samples, s": round(seconds, 3), "memory, MiB": memory}))
    return figures


def open_streams(config: dict[str, Any]) -> tuple[float, int]:
    """Seconds to open streams with a start's checks but for that of the first samples, and MiB of the rank then."""
    from examples.mosaic_streaming import batch
    from tests.benchmarks.epochs import MIB, status

    batch.check_first_samples = lambda *_: []  # there are no shards
    begin = time.perf_counter()
    build_loader(config, job(ROWS, seq_len=SEQ_LEN))
    return time.perf_counter() - begin, status("self", "VmHWM") // MIB


def measure_opening(folder: Path) -> Figure:
    """What it takes to open the largest mixture, and to look up one of its steps."""
    size = SIZES[-1]
    streams = {name: write_index(folder / name, round(share * size)) for name, share in zip("ab", SHARES, strict=True)}
    config = loader_of(streams, folder / "cache")
    [(seconds, memory)] = run_rank_values(functools.partial(open_streams, config), timeout=300)
    (folder / "job.toml").write_text(
        f'[job]\ndump_folder = "{folder}"\n[model]\nname = "llama3_mosaic"\nflavor = "debugmodel"\n'
        f'hf_assets_path = "tests/assets/tokenizer"\n[training]\nlocal_batch_size = {ROWS}\nseq_len = {SEQ_LEN}\n'
    )
    (folder / "loader.yaml").write_text(json.dumps({"train_loader": config}))
    begin = time.perf_counter()
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "examples.mosaic_streaming.preview",
        "step",
        str(STEP),
        "--no-text",
    ]
    command += ["--config", str(folder / "job.toml"), "--mosaic-config", str(folder / "loader.yaml")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
    values = {"shards": f"{size // SHARD:,}", "to open, s": round(seconds, 1), "memory of the rank, MiB": memory}
    return Figure("large index", values | {f"preview step {STEP:,}, s": round(time.perf_counter() - begin, 1)})


def use_of_shards(config: dict[str, Any]) -> dict[str, float]:
    """What one of several machines does with shards while all read as many samples as there are; and how well they mix.

    The last is the measure of streaming's simulator (simulation/core/shuffle_quality.py): the entropy of the
    differences between neighbours, in bits, of their ids and of their shards, in the order of all ranks.
    """
    from examples.mosaic_streaming import batch

    batch.check_first_samples = lambda *_: []  # there are no shards
    loader = build_loader(config, job(ROWS, seq_len=SEQ_LEN))
    dataset, order = loader._dataset, loader._order
    set_reader_world(dataset, World(MACHINES, MACHINES, 1, 0))
    count = min(MIXED, order.remaining(0)) // (MACHINES * ROWS) * MACHINES * ROWS
    samples = order.samples(dataset, 0, np.arange(count))
    shards = np.searchsorted(dataset.spanner.shard_bounds, samples, side="right")
    mine = shards[::MACHINES]
    first, last = np.full(shards.max() + 1, mine.size), np.full(shards.max() + 1, -1)
    np.maximum.at(last, mine, np.arange(mine.size))
    np.minimum.at(first, mine, np.arange(mine.size))
    used = last >= 0
    live = np.cumsum(
        np.bincount(first[used], minlength=mine.size + 1) - np.bincount(last[used] + 1, minlength=mine.size + 1)
    )
    begins = np.bincount(first[used] // 1000)
    return {
        "shards that a machine fetches": int(used.sum()),
        "in use at once, mean": float(live[:-1].mean()),
        "most": int(live.max()),
        "most that begin within 1,000 of its samples": int(begins[1:].max()),
        "mixing of samples, bits": entropy(samples),
        "mixing of shards, bits": entropy(shards),
    }


def entropy(ids: NDArray[np.int64]) -> float:
    """Of the differences between neighbours, in bits."""
    counts = np.bincount(np.abs(np.diff(ids)))
    shares = counts[counts > 0] / (ids.size - 1)
    return float(-(shares * np.log2(shares)).sum())


def measure_shards(folder: Path) -> list[Figure]:
    """The use of shards in this order, and in those of an epoch with the same shuffle block."""
    streams = {
        name: write_index(folder / name, round(share * MIXED), 1000) for name, share in zip("ab", SHARES, strict=True)
    }
    figures = []
    for method, algo in (("blend", None), ("random", "py1e"), ("random", "py1br")):
        settings = {"batching_method": method, "shuffle_block_size": SHUFFLE_BLOCK, "num_canonical_nodes": MACHINES}
        settings |= {"shuffle_algo": algo} if algo else {}
        config = loader_of(streams, folder / f"cache-{method}-{algo}", **settings)
        [found] = run_rank_values(functools.partial(use_of_shards, config), timeout=300)
        figures.append(Figure("shards", {"order": algo or method} | {key: round(one, 2) for key, one in found.items()}))
    return figures


def compare_rates(tokens: Tokens) -> list[Comparison]:
    """Batches a second, next to those of an epoch's order."""
    what = f"batches of {tokens.shape}, blend"
    return [
        loaders.in_turns(
            f"{what}, {workers} workers",
            "random",
            loaders.ours(tokens, workers, batching_method="blend", epoch_size=None),
            loaders.ours(tokens, workers),
            workers,
            0.98,
            TURNS,
        )
        for workers in (0, 1, 2)
    ]


def plan_of(tokens: Tokens, workers: int, from_step: int, skips: tuple[Skip, ...] = ()) -> Plan:
    """A plan of the same streams twice, which go on at a step, with another seed."""
    blends = {"batching_method": "blend", "epoch_size": None}
    first, second = (loaders.config_of(tokens, workers, **blends, shuffle_seed=seed) for seed in (1, 2))
    stages = (Stage(1, LoaderFile(first, "1.toml")), Stage(from_step, LoaderFile(second, "2.toml")))
    return Plan(stages, skips, "plan.toml")


def compare_plans(tokens: Tokens) -> list[Comparison]:
    """Batches a second with a plan, next to its loader file alone."""
    ours = functools.partial(loaders.ours, tokens, batching_method="blend", epoch_size=None, shuffle_seed=1)
    settings = job(tokens.rows, seq_len=tokens.seq_len)
    settings.training.steps = 1 << 31
    found = []
    for workers in (0, 1):
        ahead = plan_of(tokens, workers, 1 << 30, (Skip(1 << 29, 1 << 29),))
        alone = Plan((ahead.stages[0],), (), "plan.toml")
        for name, plan in (("one stage", alone), ("a stage and a skip ahead", ahead)):
            what = f"batches of {tokens.shape}, plan with {name}, {workers} workers"
            build = functools.partial(build_loader, plan, settings)
            found.append(loaders.in_turns(what, "loader file", build, ours(workers), workers, 0.98, TURNS))
    return found


def times_of_steps(plan: Plan, rows: int, seq_len: int, steps: int) -> list[float]:
    """Seconds that each of so many steps waits for its batch."""
    batches, found = iter(build_loader(plan, job(rows, seq_len=seq_len))), []
    for _ in range(steps):
        begin = time.perf_counter()
        next(batches)
        found.append(time.perf_counter() - begin)
    return found


def measure_boundary(tokens: Tokens) -> list[Figure]:
    """What the first step of a stage waits, next to the first of a start and to the others: 5 runs of each kind."""
    figures, steps = [], 60
    for workers in (0, 2):
        plan = plan_of(tokens, workers, steps // 2 + 1)
        read = functools.partial(times_of_steps, plan, tokens.rows, tokens.seq_len, steps)
        runs = np.array([run_rank_values(read, timeout=120)[0] for _ in range(5)]) * 1000
        boundary = runs[:, steps // 2]
        values: dict[str, Any] = {"workers": workers, "step, ms": round(float(np.median(runs)), 2)}
        values |= {"a start's first, ms": round(float(np.median(runs[:, 0])), 1)}
        values |= {"a stage's first, ms": round(float(np.median(boundary)), 1)}
        figures.append(Figure("boundary", values | {"spread, ms": f"{boundary.min():.1f} to {boundary.max():.1f}"}))
    return figures
