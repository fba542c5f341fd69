"""Training with the streams, next to the same Trainer fed from memory: blocks of steps in turns, in one process."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from examples.mosaic_streaming.batch.titan_batch import TitanBatch
from examples.mosaic_streaming.dataloader import MosaicDataLoader
from examples.mosaic_streaming.make_demo_data import make_demo_data
from examples.mosaic_streaming.train import main
from tests.benchmarks.measure import Comparison, Figure
from tests.support.jobs import write_loader
from tests.support.ranks import run_rank_values

CONFIGS = "examples/mosaic_streaming/configs"
STEPS, PAIRS = 2, 28
"""Of a block, and blocks fed either way; the first pair warms up and doesn't count. Steps of a shared machine differ by
some percent: so many pairs of neighbours have a median that is right to half a percent."""


def demo_loader(folder: Path) -> Path:
    """The configuration of a loader over the demo's data, which is made unless it is there."""
    make_demo_data(folder / "demo")
    write_loader(folder, folder / "demo/train", num_workers=1)
    return folder / "loader.toml"


def train(folder: Path, loader: Path) -> list[tuple[float, float]]:
    """Train the demo's model and return when each step has asked for its batch, and when it has got it."""
    torch.set_num_threads(1)
    times: list[tuple[float, float]] = []
    read = MosaicDataLoader.__iter__

    def read_in_turns(self: MosaicDataLoader) -> Iterator[TitanBatch]:
        streams = read(self)
        memory = itertools.cycle([next(streams) for _ in range(STEPS)])
        for step in itertools.count():
            asked = time.perf_counter()
            batch = next(memory if step // STEPS % 2 else streams)
            times.append((asked, time.perf_counter()))
            yield batch

    flags = [f"--job.dump_folder={folder}/outputs", f"--training.steps={2 * STEPS * PAIRS + 1}"]
    with mock.patch.object(MosaicDataLoader, "__iter__", read_in_turns):
        main(["--config", f"{CONFIGS}/mosaic_job.toml", "--mosaic-config", str(loader), "--", *flags])
    return times


def compare(folder: Path) -> tuple[Comparison, Figure]:
    """Tokens a second either way, and the share of the time that training waits for the streams."""
    loader = demo_loader(folder)
    [times] = run_rank_values(lambda: train(folder, loader), timeout=600)
    waits = [got - asked for asked, got in times]
    takes = [after - before for (before, _), (after, _) in itertools.pairwise(times)]
    blocks = [slice(STEPS * number, STEPS * (number + 1)) for number in range(2, 2 * PAIRS)]
    tokens = 8 * 256 * STEPS  # of the demo's configuration
    ours, memory = ([tokens / sum(takes[block]) for block in blocks[first::2]] for first in (0, 1))
    waited = sum(sum(waits[block]) for block in blocks[::2]) / sum(sum(takes[block]) for block in blocks[::2])
    what = "training, the demo's model, 1 worker"
    return (
        Comparison(what, "fed from memory", ours, memory, "tokens/s", at_least=0.99),
        Figure(f"{what}: waiting for data", {"share of the time": f"{waited:.3%}", "aim": "under 1 %"}),
    )
