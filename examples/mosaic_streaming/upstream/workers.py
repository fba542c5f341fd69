"""Ends dataloader workers, lets them outlive signals, and keeps them quiet when the reader stops.

Python 3.12 and torch 2.15.
"""

import signal
import sys
from multiprocessing import process
from types import TracebackType
from typing import Any

from examples.mosaic_streaming.upstream.patch import replace
from examples.mosaic_streaming.upstream.torchelastic import SAVING


def prepare_worker(number: int = 0) -> None:
    """Set up this process as a dataloader worker."""
    sys.excepthook = ignore_lost_reader


def ignore_lost_reader(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print nothing for a batch that nobody receives: the reader reports why it stops.

    In a worker, only the thread that shares tensors raises this (Python 3.12, multiprocessing/resource_sharer.py).
    """
    if not isinstance(error, EOFError | ConnectionError):
        sys.__excepthook__(kind, error, trace)


def shut_down_workers(batches: Any, close_pipe: bool) -> None:
    """End the workers of a loader's iterator, if it has any.

    `close_pipe` ends a worker that waits for its batch to be read, too: torch would wait for it, but with pinned memory
    closes the pipe itself. Source: torch has no public way to do this (torch 2.13, utils/data/dataloader.py).
    """
    pipe = getattr(batches, "_worker_result_queue", None)
    if pipe and close_pipe and not hasattr(batches, "_pin_memory_thread"):
        pipe.close()
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
