"""Whole runs that write down the samples of every batch they hand to the trainer.

Under torchrun: `-m tests.support.recording FOLDER` and the flags of `examples.mosaic_streaming.train`.
"""

import contextlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from examples.mosaic_streaming.upstream import cpu

cpu.prepare_torchtitan()

from examples.mosaic_streaming.batch.titan_batch import TitanBatch
from examples.mosaic_streaming.dataloader import MosaicDataLoader
from examples.mosaic_streaming.train import main
from tests.support.streams import FIRST_ID

PAUSE = "RECORDING_PAUSES_AFTER"
"""Environment variable: the number of steps after which a rank waits to be killed."""


@contextlib.contextmanager
def recording(folder: Path) -> Iterator[None]:
    """Within it, loaders write a line for each batch into a file of their rank in `folder`."""
    read_batches = MosaicDataLoader.__iter__

    def read_and_record(self: MosaicDataLoader) -> Iterator[TitanBatch]:
        with open(folder / f"{os.environ['RANK']}.jsonl", "w", buffering=1) as file:
            for number, batch in enumerate(read_batches(self)):
                step = number // (self._accumulation * self._job.microbatches)
                if step == int(os.environ.get(PAUSE, -1)):
                    time.sleep(600)
                samples = (batch[0]["input"][:, 0] - FIRST_ID).tolist()
                file.write(json.dumps({"step": step, "dp_rank": self._dp_rank, "samples": samples}) + "\n")
                yield batch

    folder.mkdir(parents=True, exist_ok=True)
    MosaicDataLoader.__iter__ = read_and_record  # type: ignore[method-assign]
    try:
        yield
    finally:
        MosaicDataLoader.__iter__ = read_batches  # type: ignore[method-assign]


def recorded(folder: Path) -> list[list[int]]:
    """The samples of each global batch that was read after the start, sorted; peers have to have read the same."""
    steps: dict[int, dict[int, list[int]]] = defaultdict(dict)
    for file in folder.glob("*.jsonl"):
        mine: dict[int, list[int]] = defaultdict(list)
        for line in file.read_text().splitlines():
            batch = json.loads(line)
            mine[batch["step"]] += batch["samples"]
        for step, samples in mine.items():
            assert steps[step].setdefault(batch["dp_rank"], samples) == samples
    return [sorted(sample for samples in steps[step].values() for sample in samples) for step in sorted(steps)]


if __name__ == "__main__":
    with recording(Path(sys.argv[1])):
        main(sys.argv[2:])


def steps_recorded(file: Path) -> int:
    """Steps that a rank has recorded."""
    lines = file.read_text().splitlines() if file.exists() else []
    return int(json.loads(lines[-1])["step"]) + 1 if lines else 0
