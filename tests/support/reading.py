"""Jobs that only read: in lockstep as in training, noting the samples and the state of each step."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from streaming import MDSWriter
from torchtitan.tools.logging import init_logger

from examples.mosaic_streaming.distributed.abort import AbortChannel
from examples.mosaic_streaming.errors import DataError
from tests.support.ranks import Rank, run_ranks
from tests.support.streams import FIRST_ID, build_loader, job, sample_tokens

TURN = ("input_ids", "labels")


@dataclass
class Read:
    """How a job that reads has ended.

    Attributes:
        ranks: how its ranks have ended.
        steps: the samples of each global batch that all ranks have read, sorted.
        state: of the loader after those.
    """

    ranks: list[Rank]
    steps: list[list[int]]
    state: dict[str, str] | None

    @property
    def message(self) -> str:
        """Why the job stopped: all ranks did, and rank 0 alone said it, once and without a traceback."""
        outputs = [rank.output for rank in self.ranks]
        assert all(rank.code not in (0, None) for rank in self.ranks), outputs
        told = [line for output in outputs for line in output.splitlines() if line.startswith(("DataError", "Config"))]
        assert len(told) == 1 and told[0] in outputs[0], outputs
        assert not any("Traceback" in output for output in outputs), outputs
        assert not any(rank.left for rank in self.ranks)
        return told[0]


def read_job(
    config: dict[str, Any],
    folder: Path,
    world_size: int = 1,
    *,
    steps: int,
    total: int = 8,
    state: dict[str, str] | None = None,
    environment: dict[str, str] | None = None,
    at_step: Callable[[int], None] = lambda step: None,
    timeout: float = 60.0,
) -> Read:
    """Read global batches in ranks of their own, in lockstep.

    Args:
        config: the loader's.
        folder: where ranks note what they have read.
        world_size: dp ranks.
        steps: global batches to read.
        total: sequences of a global batch.
        state: where to go on.
        environment: variables of the ranks.
        at_step: called on rank 0 before each step.
        timeout: seconds until the test fails.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def read() -> None:
        os.environ |= environment or {}
        init_logger()
        channel = AbortChannel()
        with channel.report_errors_once(), open(folder / f"{os.environ['RANK']}.jsonl", "w", buffering=1) as file:
            loader = build_loader(config, job(total // world_size, total), channel=channel)
            if state:
                loader.load_state_dict(state)
            batches = iter(loader)
            try:
                for step in range(steps):
                    if dist.get_rank() == 0:
                        at_step(step)
                    samples = (next(batches)[0]["input"][:, 0] - FIRST_ID).tolist()
                    dist.all_reduce(torch.zeros(1))  # as training does: no rank is ahead of another
                    file.write(json.dumps([samples, loader.state_dict()]) + "\n")
            except RuntimeError as error:  # as `train.run`
                if isinstance(error, DataError) or not (lost := loader.lost_workers()):
                    raise
                raise DataError(lost) from error
            loader.close()
            channel.close()

    ranks = run_ranks(read, world_size, timeout=timeout)
    notes = [(folder / f"{rank}.jsonl").read_text().splitlines() for rank in range(world_size)]
    read_by_all = [[json.loads(line) for line in lines] for lines in zip(*notes, strict=False)]
    merged = [sorted(sample for samples, _ in step for sample in samples) for step in read_by_all]
    return Read(ranks, merged, read_by_all[-1][0][1] if read_by_all else None)


def write_turns(folder: Path, samples: int) -> Path:
    """Write a stream for instruction tuning whose samples are those of `write_stream`, prompt and response."""
    columns = dict.fromkeys(TURN, "ndarray:int32")
    with MDSWriter(out=str(folder), columns=columns, size_limit=1024, hashes=["xxh64"]) as writer:
        for sample in range(samples):
            tokens = sample_tokens(sample)
            writer.write({"input_ids": tokens[:4], "labels": tokens[4:]})
    return folder
