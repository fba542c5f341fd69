"""Iterates loaders: errors become DataErrors, and workers are ended."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from examples.mosaic_streaming.batch.collate import Collator, to_tensors
from examples.mosaic_streaming.errors import DataError
from examples.mosaic_streaming.shards import Failure
from examples.mosaic_streaming.upstream.torchelastic import SIGNALS
from examples.mosaic_streaming.upstream.workers import prepare_worker, shut_down_workers

WORKER_EXIT_SECONDS = 1.0
"""How long to wait for the exit code of a dying worker."""


class Batches:
    """Yields the batches of a loader, epoch by epoch.

    Args:
        loader: llm-foundry's loader, with a `Collator`.
        source: the streams and the rank, for messages.
        path: the file that configures the loader, for messages.
    """

    def __init__(self, loader: DataLoader[Any], source: str, path: str) -> None:
        self._loader = loader
        self._source = source
        self._path = path
        self._batches: Iterator[Any] | None = None

    def begin(self) -> None:
        """Start an epoch at the dataset's position. Persistent workers live on."""
        self._batches = iter(self._loader)

    def take(self, count: int) -> list[Mapping[str, Any]]:
        """Return the next batches; fewer at the end of the epoch.

        Raises:
            DataError: a sample can't be read, a batch can't be made, or a worker has ended.
        """
        assert self._batches is not None
        try:
            return [to_tensors(batch) for batch in itertools.islice(self._batches, count)]
        except Exception as error:
            raise DataError(self.lost_workers() or f"{Failure.of(error).reason} {self._source}") from error

    def lost_workers(self) -> str:
        """Say which dataloader workers have ended with an error. Signals that end the whole job don't count."""
        workers = getattr(self._batches, "_workers", [])
        with contextlib.suppress(RuntimeError):  # torch's handler of SIGCHLD says less
            ended = connection.wait([worker.sentinel for worker in workers], WORKER_EXIT_SECONDS)
            for worker in workers:
                if worker.sentinel in ended:
                    worker.join()  # its connections close before it has an exit code
        lost = [
            f"Dataloader worker {number} (pid {worker.pid}) ended with exit code {worker.exitcode}."
            for number, worker in enumerate(workers)
            if worker.exitcode not in (None, 0, *(sign for number in SIGNALS for sign in (-number, 128 + number)))
        ]
        if lost:
            lost.append("-9 is mostly for want of memory: lower num_workers, prefetch_factor or dataset.predownload in")
            lost.append(f"{self._path}.")
        return " ".join(lost)

    def close(self) -> None:
        """End the dataloader workers."""
        batches, self._batches = self._batches, None
        shut_down_workers(batches)


class Items(Dataset[Any]):
    """A dataset of what a function returns for each of some items. The function is called in a worker."""

    def __init__(self, read: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self._read, self._items = read, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, number: int) -> Any:
        try:
            return self._read(self._items[number])
        except Exception as error:
            return Failure.of(error)


def read_in_workers(
    items: Items, batch_size: int | None, collate: Collator, workers: int, source: str, path: str
) -> Iterator[Mapping[str, Any]]:
    """Read items once, in other processes: a process that has fetched shards must not be forked later.

    Args:
        items: the items.
        batch_size: items of a batch; with None, each item is a batch.
        collate: makes a batch of items.
        workers: processes, at least 1.
        source: the streams, for messages.
        path: the file that configures the loader, for messages.

    Raises:
        DataError: an item can't be read.
    """
    # A generator of its own: torch's default one, which rank 0 alone would draw from, also makes the model's weights.
    loader: DataLoader[Any] = DataLoader(
        items,
        batch_size,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=prepare_worker,
        generator=torch.Generator(),
    )
    batches = Batches(loader, source, path)
    batches.begin()
    try:
        while batch := batches.take(1):
            yield batch[0]
    finally:
        batches.close()
