"""Stops a job: rank 0 prints the reason once, and every rank exits with a code that isn't 0."""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import resource_tracker
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from examples.mosaic_streaming.errors import ConfigError, DataError, is_rank_0
from examples.mosaic_streaming.upstream.torchelastic import SIGNALS, write_report

if TYPE_CHECKING:
    import torch.distributed as dist

RANK_0_SECONDS = 15.0
"""How long the other ranks wait for rank 0 to print the reason. torchrun ends them once rank 0 has exited."""

EXIT_SECONDS = 20.0
"""How long a rank may live on after another has failed. Then it is killed: a collective may hold it."""

JOIN_SECONDS = 5.0
"""How long closing waits for the listener's thread."""

UNLIMITED = timedelta(days=20)
"""A wait without end. A store counts milliseconds in 32 bits, and logs a warning when a wait times out."""

REASON_KEY, PRINTED_KEY = "reason", "printed"
"""Keys of the store: why the job stops, and whether rank 0 has printed it."""


def handle_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    """Set one handler for all signals that end a run."""
    for number in SIGNALS:
        signal.signal(number, handler)


class AbortChannel:
    """Tells all ranks why a job stops, and ends this rank.

    A program makes one channel and hands it to everything that needs it. Before `connect`, ranks can't tell each other
    anything: each rank finds the error by itself, and all but rank 0 keep quiet.

    Attributes:
        stopped_by: the signal that ends this process. Whatever fails afterwards is its consequence.
        reason: why the job stops, if this process has printed it.
    """

    def __init__(self) -> None:
        self.stopped_by: signal.Signals | None = None
        self.reason: str | None = None
        self._is_hurried = False
        self._listener: Listener | None = None

    @contextlib.contextmanager
    def report_errors_once(self) -> Iterator[None]:
        """Run the body of a program, and let rank 0 print a ConfigError or DataError in one line.

        Errors that only follow from another rank's end are not printed. All other errors keep their traceback.
        """
        try:
            yield
        except BaseException as error:  # DCP's CheckpointException is no Exception
            self.begin_shutdown()
            self.exit_if_signalled()
            if isinstance(error, ConfigError | DataError):
                self._fail(error)
            reason = self._reason_elsewhere(error)
            if reason is None:
                raise
            write_report(self.reason or reason)
            sys.exit(1)

    def connect(self, job_id: int) -> None:
        """Let this rank hear why any rank stops. All ranks call it, with the same job ID, once they have met."""
        if self._listener is None:
            self._listener = Listener(job_id, self.print_reason)
            atexit.register(self.close)  # a thread inside of `Store.wait` when Python ends would abort the process

    def count(self, key: str) -> int:
        """Add 1 to a counter that all ranks share, and return its value. Call `connect` before."""
        assert self._listener
        return self._listener.count(key)

    def close(self) -> None:
        """From here on, neither tell other ranks anything nor end with them."""
        if self._listener:
            self._listener.close()

    def exit_on_signals(self) -> None:
        """Turn signals into SystemExit, so that everything is closed.

        multiprocessing's resource tracker has to survive the signals, or its successor prints a traceback about shared
        memory that it doesn't know. So it inherits blocked signals: by itself, it ignores only SIGTERM and SIGINT
        (Python 3.12, multiprocessing/resource_tracker.py).
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        resource_tracker.ensure_running()
        handle_signals(self._exit)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def exit_if_signalled(self) -> None:
        """Exit if a signal has come and its SystemExit was lost.

        Source: DCP catches it while it saves (torch 2.13, distributed/checkpoint/utils.py), as destructors do.
        """
        if self.stopped_by is not None:
            sys.exit(128 + self.stopped_by)

    def begin_shutdown(self) -> None:
        """Let nothing interrupt the shutdown: neither further signals, nor the end of dataloader workers.

        Source: torch's SIGCHLD handler raises when a worker ends early (torch 2.13, utils/data/_utils/
        signal_handling.py). A handler has to stay: CPython prints a traceback for a signal that came before it was
        removed (3.12, signalmodule.c).
        """
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        handle_signals(self._hurry)

    def print_reason(self, message: str) -> None:
        """Print why the job stops, and leave it for torchrun's report."""
        self.reason = message
        print(message, file=sys.stderr, flush=True)
        write_report(message)

    def _exit(self, number: int, frame: FrameType | None) -> NoReturn:
        self.begin_shutdown()
        self.stopped_by = signal.Signals(number)
        sys.exit(128 + number)

    def _hurry(self, number: int, frame: FrameType | None) -> None:
        self._is_hurried = True

    def _fail(self, error: ConfigError | DataError) -> NoReturn:
        """End this rank with exit code 1, after rank 0 has printed the reason.

        torchrun ends all ranks when the first one exits. If that weren't rank 0, nothing would be printed, so the other
        ranks wait. A rank that still lives after the wait has failed alone, and prints the reason itself.
        """
        message = f"{type(error).__name__}: {error}"
        if not is_rank_0():
            write_report("Ended with rank 0.")
        if not (self._listener.send(message) if self._listener else self._wait_for_rank_0()):
            self.print_reason(message if is_rank_0() else f"[rank {os.environ['RANK']}] {message}")
        elif self.reason:  # that of another rank
            write_report(self.reason)
        sys.exit(1)

    def _wait_for_rank_0(self) -> bool:
        """Wait for torchrun to end this rank, as it does once rank 0 has exited. Return whether it has."""
        patience = RANK_0_SECONDS * (1 if os.environ.get("LOCAL_RANK") == "0" else 2)
        end = time.monotonic() + patience
        while not (is_rank_0() or self._is_hurried) and time.monotonic() < end:
            time.sleep(0.1)
        return self._is_hurried and not is_rank_0()

    def _reason_elsewhere(self, error: BaseException) -> str | None:
        """Say which other rank's end has caused an exception here; None if the fault is this rank's own."""
        if not (self._listener and is_of_a_connection(error)):
            return None
        try:
            return "Ended with the rank that says why." if self._listener.has_heard() else None
        except Exception:
            reason = f"Rank 0's store is gone, and with it the reason: {str(error).splitlines()[0]}"
            if os.environ["LOCAL_RANK"] == "0":
                self.print_reason(reason)
            return reason


class Listener:
    """A thread that waits until any rank of the job fails. On rank 0, it then calls `print_reason`.

    Each rank waits for a key of its own, which the failing rank sets. Until then, no request goes to the store.
    """

    def __init__(self, job_id: int, print_reason: Callable[[str], None]) -> None:
        import torch.distributed as dist

        from examples.mosaic_streaming.distributed.store import open_store

        self._store, self._key = open_store(job_id), wake_up_key(dist.get_rank())
        self._print_reason = print_reason
        self._is_closed, self._has_printed = threading.Event(), threading.Event()
        self._is_woken = False
        self._thread = threading.Thread(target=self._listen, args=[open_store(job_id)], daemon=True)
        self._thread.start()

    def _listen(self, store: "dist.Store") -> None:
        """Wait until a rank fails. Then, if nothing else ends this process, end it after a while."""
        import torch.distributed as dist

        with contextlib.suppress(Exception):  # the store ends with the job
            while not (self._is_woken or self._is_closed.is_set()):
                with contextlib.suppress(dist.DistStoreError):  # the time is up
                    store.wait([self._key], UNLIMITED)
                    self._is_woken = not self._is_closed.is_set()
            if self._is_woken and is_rank_0():
                self._print_reason(store.get(REASON_KEY).decode())
                self._has_printed.set()
                store.set(PRINTED_KEY, "")
            if not self._is_closed.wait(EXIT_SECONDS):
                os._exit(1)

    def close(self) -> None:
        """End the thread."""
        self._is_closed.set()
        if self._thread.is_alive():  # it may have ended with the store
            with contextlib.suppress(Exception):
                self._store.set(self._key, "")
            self._thread.join(JOIN_SECONDS)

    def send(self, message: str) -> bool:
        """Tell all ranks why the job stops; return whether rank 0 prints it."""
        import torch.distributed as dist

        from examples.mosaic_streaming.distributed.store import wait_for

        with contextlib.suppress(Exception):
            self._store.compare_set(REASON_KEY, "", message)
            keys = [wake_up_key(rank) for rank in range(dist.get_world_size())]
            self._store.multi_set(keys, [""] * len(keys))  # type: ignore[attr-defined]  # not in torch 2.13's stub
            return wait_for(self._store, PRINTED_KEY, RANK_0_SECONDS) is not None
        return self._is_woken  # and so is rank 0, whose end may be that of the store

    def count(self, key: str) -> int:
        """Add 1 to a key of the store, and return its value."""
        return int(self._store.add(key, 1))

    def has_heard(self) -> bool:
        """Whether a rank has failed and said why. On rank 0, the reason is printed by then.

        Raises:
            dist.DistError: the store is gone.
        """
        if not (self._is_woken or self._store.check([REASON_KEY])):
            return False
        if is_rank_0():  # the thread has just been woken, or is about to be
            self._has_printed.wait(RANK_0_SECONDS)
        return True


def wake_up_key(rank: int) -> str:
    """The key that a rank's listener waits for."""
    return f"wake up {rank}"


def is_of_a_connection(error: BaseException) -> bool:
    """Whether an exception comes from a collective or the store, so that another rank's end may be its cause.

    Source: gloo's errors have no class of their own, but name its source files (torch 2.13).
    """
    import torch.distributed as dist

    if isinstance(error, dist.DistError) or (type(error) is RuntimeError and "/gloo/" in str(error)):
        return True
    return error.__cause__ is not None and is_of_a_connection(error.__cause__)
