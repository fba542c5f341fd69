"""Hands batches from dataloader workers to the training process: they lie in shared memory, and a pipe says where.

By itself, torch 2.15 makes a file of each tensor, which takes 0.3 ms in both processes. An array would be pickled into
the pipe, which holds 64 KiB: worker and reader wait for each other in the middle of a batch. And Python's queues have a
thread that writes, for which the interpreter has to be handed over twice a batch (Python 3.12, multiprocessing).
"""

import mmap
import os
import queue
import struct
import sys
from collections.abc import Iterator, Mapping
from multiprocessing.context import BaseContext, ForkContext
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from examples.mosaic_streaming.errors import DataError

SHARED_BYTES = 1 << 28
"""Of all slots of a loader together. The system gives memory only to slots that are written to."""

ALIGNMENT = 64
"""Bytes: where an array in a slot begins is a multiple of it. The first so many have the batch's number."""

NUMBER = struct.Struct("<Q")

LOCK_SECONDS = 5.0
"""How long the training process waits to write to the workers' pipe: one that was killed may have locked it forever."""


class Handed(NamedTuple):
    """What a worker sends for a batch that lies in a slot."""

    number: int  # of the worker's batches
    begin: int  # of the slot, in bytes
    arrays: dict[str, tuple[str, tuple[int, ...]]]  # the type and shape of each
    rest: dict[str, Any]  # what is no tensor, or of a type that numpy doesn't have


class Slots:
    """Memory that a loader shares with its workers, which are forked later. It has no name, and ends with them.

    Each worker writes its batches into its own slots, in turn. It never reaches a slot whose batch isn't read yet: in
    all, torch asks for `prefetch_factor * num_workers` batches ahead, and there is one slot more for the batch that is
    being read (torch 2.15, utils/data/dataloader.py, `_try_put_index`). Each batch has a number, by which the reader
    would find out.
    """

    def __init__(self, workers: int, prefetch_factor: int) -> None:
        self._count = prefetch_factor * workers + 1  # of each worker
        self._size = SHARED_BYTES // (workers * self._count) // ALIGNMENT * ALIGNMENT
        self._memory = mmap.mmap(-1, workers * self._count * self._size)
        self._written = 0  # batches, in a worker

    def write(self, worker: int, batch: Mapping[str, Any]) -> Handed | None:
        """Write a batch into this worker's next slot, and return what to send; None if it is too large."""
        tensors = {key: array for key, value in batch.items() if (array := array_of(value)) is not None}
        if sum(value.nbytes + ALIGNMENT for value in tensors.values()) + ALIGNMENT > self._size:
            return None
        begin = (worker * self._count + self._written % self._count) * self._size
        self._written += 1
        NUMBER.pack_into(self._memory, begin, self._written)
        arrays = {key: (value.dtype.str, value.shape) for key, value in tensors.items()}
        handed = Handed(self._written, begin, arrays, {key: batch[key] for key in batch.keys() - tensors.keys()})
        for key, place in self._places(handed):
            place[...] = tensors[key]
        return handed

    def read(self, handed: Handed) -> dict[str, Any]:
        """Copy a batch out of its slot, before torch is asked for another. DataError if it isn't there any more."""
        batch = {key: torch.from_numpy(place.copy()) for key, place in self._places(handed)}
        if NUMBER.unpack_from(self._memory, handed.begin) != (handed.number,):
            raise DataError("A dataloader worker has overwritten a batch that was not read yet. This is a bug.")
        return batch | handed.rest

    def _places(self, handed: Handed) -> Iterator[tuple[str, NDArray[Any]]]:
        """Each array of a batch, in the slot."""
        at = handed.begin + ALIGNMENT
        for key, (dtype, shape) in handed.arrays.items():
            place: NDArray[Any] = np.ndarray(shape, dtype, self._memory, at)
            yield key, place
            at += -(-place.nbytes // ALIGNMENT) * ALIGNMENT


def array_of(value: Any) -> NDArray[Any] | None:
    """A tensor as an array; None for anything else, and for a tensor that numpy can't read, as of bfloat16."""
    try:
        return value.numpy() if isinstance(value, torch.Tensor) else None
    except (TypeError, RuntimeError):
        return None


class WorkerQueue:
    """A queue without a thread, which has what torch asks of one."""

    def __init__(self, context: BaseContext) -> None:
        self._reader, self._writer = context.Pipe(duplex=False)
        self._reading, self._writing = context.Lock(), context.Lock()

    def get(self, timeout: float) -> Any:
        """Return the next object; queue.Empty if none comes within so many seconds."""
        with self._reading:
            if not self._reader.poll(timeout):
                raise queue.Empty
            return self._reader.recv()

    def put(self, obj: Any) -> None:
        """Send an object. A worker that can't do so ends: its reader would wait forever.

        It can't if shared memory is full, or if the temporary folder's path is too long for a socket, by which torch
        sends what is in no slot. The training process only sends small messages: after `LOCK_SECONDS` it leaves out the
        one by which torch wakes the thread that pins memory, which wakes anyway.
        """
        in_worker = get_worker_info() is not None
        if in_worker:
            self._reader.close()  # with it open, a worker would not learn that the reader is gone
        try:
            message = ForkingPickler.dumps(obj)  # without the lock: a worker may be killed meanwhile
            if self._writing.acquire(timeout=None if in_worker else LOCK_SECONDS):
                try:
                    self._writer.send_bytes(message)
                finally:
                    self._writing.release()
        except Exception as error:
            if not in_worker:
                raise
            if isinstance(error, ConnectionError):  # the reader is gone, and says why; torch takes 1 for a failure
                os._exit(0)
            print(
                f"A dataloader worker (pid {os.getpid()}) can't hand on a batch: {type(error).__name__}: {error}.",
                file=sys.stderr,
            )
            os._exit(1)

    def close(self) -> None:
        self._reader.close()
        self._writer.close()

    def cancel_join_thread(self) -> None:
        """Do nothing: there is no thread."""

    join_thread = cancel_join_thread


class WorkerContext(ForkContext):
    """What a DataLoader takes as `multiprocessing_context`, to have its workers send through a `WorkerQueue`."""

    def Queue(self, maxsize: int = 0) -> Any:  # noqa: N802  # Python's name
        return WorkerQueue(self)
