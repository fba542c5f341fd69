"""Tripwires for torch's dataloader iterator (2.13, utils/data/dataloader.py), which has no public way to end workers.

When one fails, adapt upstream/workers.py, or `lost_workers` in batch/iterator.py, which reads `_workers`.
"""

import inspect
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from tests.support.ranks import run_rank_values


def test_iterator_can_shut_its_workers_down() -> None:
    method = getattr(_MultiProcessingDataLoaderIter, "_shutdown_workers", None)
    assert method, "torch's iterator has no `_shutdown_workers` any more: `shut_down_workers` would do nothing"
    assert list(inspect.signature(method).parameters) == ["self"]


def test_shut_down_workers_have_ended() -> None:
    def end() -> list[int | None]:
        loader: Any = DataLoader([torch.zeros(1)] * 4, num_workers=2, persistent_workers=True)  # type: ignore[arg-type]
        batches = iter(loader)
        next(batches)
        workers = batches._workers
        batches._shutdown_workers()
        batches._shutdown_workers()  # a second call does nothing
        return [worker.exitcode for worker in workers]

    assert run_rank_values(end) == [[0, 0]]
