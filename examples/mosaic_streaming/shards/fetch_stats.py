"""Counts what the processes of a node have fetched, in a shared-memory file that they all append to."""

import contextlib
import functools
import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

RETRY = -1  # the record of a retry; the others are the bytes of a fetched shard file, and each is an int64


class FetchCounts(NamedTuple):
    """Shard files fetched, their bytes as the remote stores them, and retries."""

    shards: int = 0
    bytes: int = 0
    retries: int = 0

    def __str__(self) -> str:
        shards = f"{self.shards:,} shard{'s' * (self.shards != 1)}, {self.bytes / 1e9:.3f} GB"
        return shards + (f", retries: {self.retries:,}" if self.retries else "")


class FetchStats:
    """Reads a node's fetch counts incrementally; a file is missing until something is fetched."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._ends = dict.fromkeys(paths, 0)
        self._fetched = self._last = FetchCounts()

    def read(self) -> FetchCounts:
        """What all processes of the node have fetched since the start."""
        for path, end in self._ends.items():
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                file.seek(end)
                records = np.frombuffer(file.read(), np.int64)
                self._ends[path] += records.nbytes
                shards = records[records != RETRY]
                more = (shards.size, int(shards.sum()), records.size - shards.size)
                self._fetched = FetchCounts(*np.add(self._fetched, more).tolist())
        return self._fetched

    def since_last(self) -> FetchCounts:
        """What they have fetched since the last call."""
        before, self._last = self._last, self.read()
        return FetchCounts(*np.subtract(self._last, before).tolist())


def fetch_stats_file(number: int) -> str:
    """Path of a dataset's file on this node, which is removed with the dataset's other shared memory."""
    return f"/dev/shm/{number:06}_fetched"


def count_fetched(path: str | None, record: int) -> None:
    """Append a record to a file, if there is one; small appends are atomic. If it can't be stored, it isn't counted."""
    if not path:
        return
    opener = functools.partial(os.open, mode=0o600)
    with contextlib.suppress(OSError), open(path, "ab", buffering=0, opener=opener) as file:
        file.write(np.int64(record).tobytes())
