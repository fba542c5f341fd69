"""Ends dataloader workers for which the reader would wait for ever, and keeps those quiet that are ended."""

import os
import sys
from multiprocessing import queues
from types import TracebackType
from typing import Any, NoReturn

from examples.mosaic_streaming.upstream.patch import replace


def prepare_worker(number: int = 0) -> None:
    """Prepare a dataloader worker, of any number: it ends where its reader would wait, and doesn't print when ended."""
    replace(queues.Queue, "_on_queue_feeder_error", staticmethod(end_worker))
    sys.excepthook = ignore_lost_reader


def end_worker(e: Exception, obj: object) -> NoReturn:
    """End a worker that can't hand on a batch. Python would drop the batch, and the reader would wait for ever.

    It happens where shared memory is full, or where the path of the temporary folder is too long for a socket.

    Args:
        e: why it can't.
        obj: the batch.

    Source: Python 3.12, multiprocessing/queues.py.
    """
    print(f"A dataloader worker (pid {os.getpid()}) can't hand on a batch: {type(e).__name__}: {e}.", file=sys.stderr)
    os._exit(1)


def ignore_lost_reader(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print nothing of a batch that nobody takes any more. The reader says why it stops.

    In a worker, only the thread that hands on tensors asks for this (Python 3.12, multiprocessing/resource_sharer.py).
    """
    if not isinstance(error, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def shut_down_workers(batches: Any) -> None:
    """End the workers of a loader's iterator, if it has any.

    Source: torch has no public way to do it (torch 2.13, utils/data/dataloader.py).
    """
    if shutdown := getattr(batches, "_shutdown_workers", None):
        shutdown()
