"""How long starts take: to the end of step 1, to the first batch after a resume, and to verify what is there."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from streaming import MDSWriter

from examples.mosaic_streaming.config.files import LoaderFile
from examples.mosaic_streaming.config.job import BatchShape
from examples.mosaic_streaming.config.loader import resolve
from examples.mosaic_streaming.sampling.order import MAX_CANONICAL_NODES
from examples.mosaic_streaming.shards.prepare import prepare_streams
from tests.benchmarks.data import Text, Tokens
from tests.benchmarks.measure import Comparison, Figure
from tests.benchmarks.training import CONFIGS, demo_loader
from tests.support.ranks import run_rank_values
from tests.support.streams import build_loader, job, loader_config

REPEATS = 5
LIMIT = 180.0
"""Seconds until a start hangs."""
EPOCH = 4_000_000
"""Samples of the epoch that is resumed in."""
POSITIONS = (0.01, 0.5, 0.99)
MEGABYTES, GIGABYTE = 256, 10**9
"""Of a stream that is verified, and what its cost is told for."""


def first_step(command: list[str]) -> float:
    """Seconds from the start of torchrun to the line of the first step."""
    begin = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node=1", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},  # threads wait for each other
        start_new_session=True,
        text=True,
    ) as process:
        watch = functools.partial(os.killpg, process.pid, signal.SIGKILL)
        lines = []
        try:
            signal.signal(signal.SIGALRM, lambda *_: watch())
            signal.alarm(int(LIMIT))
            assert process.stdout
            for line in process.stdout:
                lines.append(line)
                if "step:  1 " in line:
                    return time.monotonic() - begin
        finally:
            signal.alarm(0)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
    raise RuntimeError("no first step:\n" + "".join(lines[-30:]))


def compare_first_steps(folder: Path, text: Text) -> Comparison:
    """To the end of step 1 of the demo's job, through torchrun, ours next to TorchTitan's loader on the same text."""
    flags = [f"--job.dump_folder={folder}/outputs", "--training.steps=1"]
    config = ["--config", f"{CONFIGS}/mosaic_job.toml", "--mosaic-config", str(demo_loader(folder)), "--", *flags]
    ours = ["-m", "examples.mosaic_streaming.train", *config]
    stock = ["-m", "tests.benchmarks.stock", str(text.jsonl), f"--job.config_file={CONFIGS}/mosaic_job.toml", *flags]
    stock += ["--model.name=llama3"]
    times: list[list[float]] = [[], []]
    for number in range(2 * REPEATS + 2):
        which = number // 2 % 2 ^ number % 2
        took = first_step([ours, stock][which])
        if number > 1:  # the first of each warms up
            times[which].append(took)
    return Comparison(
        "torchrun to the end of step 1, the demo", "stock TorchTitan", times[0], times[1], "s", at_most=1.1
    )


def first_batch(tokens: Tokens, position: float, blend: bool = False) -> float:
    """Seconds from the building of a loader to its first batch, at a position in the epoch."""
    order = {"batching_method": "blend"} if blend else {"epoch_size": EPOCH}
    settings = {"shuffle": True, "num_canonical_nodes": MAX_CANONICAL_NODES, "validate_hash": "xxh64"}
    config = loader_config(tokens.mds, 1, **settings, **order)
    begin = time.perf_counter()
    loader = build_loader(config, job(tokens.rows, seq_len=tokens.seq_len))
    if position:
        sample = int(position * EPOCH) // tokens.rows * tokens.rows
        loader._steps = sample // loader._order.global_batch_size
        loader.load_state_dict(loader.state_dict())
    next(iter(loader))
    return time.perf_counter() - begin


def compare_resumes(tokens: Tokens, blend: bool = False) -> list[Comparison]:
    """To the first batch at several positions, next to the start of an epoch."""
    times: dict[float, list[float]] = {position: [] for position in (0.0, *POSITIONS)}
    for _ in range(REPEATS):
        for position in times:
            times[position] += run_rank_values(functools.partial(first_batch, tokens, position, blend))
    return [
        Comparison(
            f"first batch at {position:.0%} of {'' if blend else 'an epoch of '}{EPOCH:,} samples{', blend' * blend}",
            "its start",
            times[position],
            times[0.0],
            "s",
            at_most=1.1,
        )
        for position in POSITIONS
    ]


def verify(stream: Path, hash: str | None) -> float:
    """Seconds to verify a gigabyte that is there."""
    settings = {"local": str(stream), **({"validate_hash": hash} if hash else {})}
    file = LoaderFile({"name": "text", "dataset": settings}, "loader.toml")
    loader = resolve(file, BatchShape("training", 1, 2048), 1)
    size = sum(file.stat().st_size for file in stream.glob("*.mds"))
    begin = time.perf_counter()
    prepare_streams([loader])
    return (time.perf_counter() - begin) / size * GIGABYTE


def measure_verifying(folder: Path) -> Figure:
    """What a start takes to look at the files that are there."""
    stream = folder / "verify"
    with MDSWriter(out=str(stream), columns={"x": "bytes"}, size_limit=1 << 26, hashes=["sha1", "xxh64"]) as writer:
        for _ in range(MEGABYTES):
            writer.write({"x": os.urandom(1 << 20)})
    found = {}
    for hash in (None, "xxh64", "sha1"):
        [cost] = run_rank_values(lambda hash=hash: min(verify(stream, hash) for _ in range(3)))  # type: ignore[misc]
        found[f"{hash or 'sizes'}, s per GB"] = round(cost, 3)
    return Figure("a start verifies shards that are there", found)
