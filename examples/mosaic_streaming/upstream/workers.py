"""Lets dataloader workers end when they can't send a batch, and keeps them quiet when the reader stops.

Python 3.12 and torch 2.13; a queue that reports such an error to its reader makes most of it needless.
"""

import os
import signal
import sys
from multiprocessing import process, queues
from types import TracebackType
from typing import Any, NoReturn

from examples.mosaic_streaming.upstream.patch import replace
from examples.mosaic_streaming.upstream.torchelastic import SAVING


def prepare_worker(number: int = 0) -> None:
    """Set up this process as a dataloader worker."""
    replace(queues.Queue, "_on_queue_feeder_error", staticmethod(end_worker))
    sys.excepthook = ignore_lost_reader


def end_worker(e: Exception, obj: object) -> NoReturn:
    """End a worker that can't send a batch (`obj`); Python would drop it, and the reader would wait forever.

    This happens when shared memory is full, or the temporary folder's path is too long for a socket.

    Source: Python 3.12, multiprocessing/queues.py.
    """
    print(f"A dataloader worker (pid {os.getpid()}) can't hand on a batch: {type(e).__name__}: {e}.", file=sys.stderr)
    os._exit(1)


def ignore_lost_reader(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print nothing for a batch that nobody receives: the reader reports why it stops.

    In a worker, only the thread that shares tensors raises this (Python 3.12, multiprocessing/resource_sharer.py).
    """
    if not isinstance(error, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def shut_down_workers(batches: Any) -> None:
    """End the workers of a loader's iterator, if it has any.

    Source: torch has no public way to do this (torch 2.13, utils/data/dataloader.py).
    """
    if shutdown := getattr(batches, "_shutdown_workers", None):
        shutdown()


def let_processes_outlive_signals() -> None:
    """Let the processes that this one starts live until it ends them, also when a signal lets it save a checkpoint.

    torchrun sends signals to whole process groups, but workers are needed until the last step, and torch's process that
    writes checkpoints until it has. They inherit blocked signals, so they are ended by SIGKILL where Python and torch
    send SIGTERM (Python 3.12, multiprocessing/process.py, util.py). Python's resource tracker has to run by then: its
    start unblocks them.
    """
    start = process.BaseProcess.start

    def start_deaf(self: Any) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SAVING)
        try:
            start(self)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._popen.terminate = self._popen.kill

    replace(process.BaseProcess, "start", start_deaf)
