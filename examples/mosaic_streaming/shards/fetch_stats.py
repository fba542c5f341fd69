"""Counts what the processes of a node fetch, in a file in shared memory to which all of them append."""

import contextlib
import os
import struct
from typing import NamedTuple

import numpy as np

RECORD = struct.Struct("<q")
"""An entry of the file: the bytes of a fetched shard, or RETRY."""

RETRY = -1


class FetchCounts(NamedTuple):
    """What has been fetched: files of shards, their bytes as the remote has them, and further attempts."""

    shards: int = 0
    bytes: int = 0
    retries: int = 0

    def __str__(self) -> str:
        shards = f"{self.shards:,} shard{'s' * (self.shards != 1)}, {self.bytes / 1e9:.3f} GB"
        return shards + (f", retries: {self.retries:,}" if self.retries else "")


class FetchStats:
    """Reads what a node has fetched, each time from where it stopped before. The file may not exist."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._end = 0
        self._fetched = FetchCounts()

    def read(self) -> FetchCounts:
        """Count what all processes have fetched since the start."""
        with contextlib.suppress(FileNotFoundError), open(self._path, "rb") as file:
            file.seek(self._end)
            records = np.frombuffer(file.read(), np.int64)
            self._end += records.nbytes
            shards = records[records != RETRY]
            more = (shards.size, int(shards.sum()), records.size - shards.size)
            self._fetched = FetchCounts(*np.add(self._fetched, more).tolist())
        return self._fetched


def fetch_stats_file(number: int) -> str:
    """The file of a node, by the number of a dataset's shared memory. It is removed with that memory."""
    return f"/dev/shm/{number:06}_fetched"


def count_fetched(path: str, record: int) -> None:
    """Append a record. Small appends of several processes don't mix. If memory is full, nothing is counted."""
    with contextlib.suppress(OSError):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, RECORD.pack(record))
        finally:
            os.close(file)
