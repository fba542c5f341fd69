"""How a job stops: rank 0 prints the reason once, and every rank exits with a code that says so."""

import atexit
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from examples.mosaic_streaming.errors import ConfigError, DataError, is_rank_0
from examples.mosaic_streaming.upstream.torchelastic import SAVING, SIGNALS, write_report

if TYPE_CHECKING:
    from examples.mosaic_streaming.distributed.store import Listener

REPEAT_SECONDS = 3.0
"""A signal that comes again within it is the same one: torchrun passes on what all processes of a job may be sent."""
RANK_0_SECONDS = 15.0
"""How long another rank waits for rank 0 to print the reason. torchrun ends it as soon as rank 0 has exited."""


def handle_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    """Set one handler for all signals that end a run."""
    for signum in SIGNALS:
        signal.signal(signum, handler)


class AbortChannel:
    """Tells all ranks why a job stops, and ends this one.

    A program makes one channel and hands it to whatever needs it. Before `connect`, ranks can't tell each other
    anything: each finds the error by itself, and rank 0 alone prints it.
    """

    def __init__(self) -> None:
        self.stopped_by: signal.Signals | None = None  # ends this process; what fails afterwards is its consequence
        self.reason: str | None = None  # why the job stops, if this process has printed it
        self.is_saved = False  # whether the signal could wait for a checkpoint of the last step
        self._is_hurried = False
        self._first_signal: tuple[int, float] | None = None  # and when it came
        self._listener: Listener | None = None

    @contextlib.contextmanager
    def report_errors_once(self) -> Iterator[None]:
        """Run a program's body: rank 0 prints a ConfigError or DataError, in one line.

        Errors that only follow from another rank's end are not printed. All others keep their traceback.
        """
        try:
            yield
        except BaseException as error:  # DCP's CheckpointException is no Exception
            self.begin_shutdown()
            self.exit_if_signalled()
            if isinstance(error, ConfigError | DataError):
                self._tell(error)
                report = "Ended with rank 0."
            elif not (report := self._reason_elsewhere(error)):
                raise
            write_report(self.reason or report)
            sys.exit(1)

    def connect(self, number: int) -> None:
        """Let all ranks hear why any of them stops; all ranks call it, with one number, once their group exists."""
        from examples.mosaic_streaming.distributed.store import Listener

        if self._listener is None:
            self._listener = Listener(number, self.print_reason)
            atexit.register(self.close)  # Python would abort at its end if a thread were still in `Store.wait`

    def count(self, key: str) -> int:
        """Add 1 to a counter that all ranks share, and return its value. Call `connect` before."""
        assert self._listener
        return int(self._listener.store.add(key, 1))

    def close(self) -> None:
        """Stop telling other ranks anything, and stop ending with them."""
        if self._listener:
            self._listener.close()

    def begin_step(self, step: int, save: Callable[[], None]) -> None:
        """Let a step begin. If all ranks stop before it, save a checkpoint instead, and end this process."""
        assert self._listener
        if not self._listener.may_begin(step):
            save()
            self.is_saved = True
            self._exit(self._listener.signum)

    def exit_on_signals(self) -> None:
        """Turn signals into SystemExit, so that everything is closed.

        In training with checkpoints, the first of `SAVING` lets all ranks stop after a step instead.

        multiprocessing's resource tracker has to survive them, or its successor prints a traceback about shared memory
        that it doesn't know. It inherits blocked signals, and ignores only SIGTERM and SIGINT by itself (Python 3.12,
        multiprocessing/resource_tracker.py).
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        resource_tracker.ensure_running()
        handle_signals(self._on_signal)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def exit_if_signalled(self) -> None:
        """Exit if a signal came and its SystemExit was lost.

        Source: DCP catches it while it saves (torch 2.13, distributed/checkpoint/utils.py), as destructors do.
        """
        if self.stopped_by is not None:
            sys.exit(0 if self.is_saved and self.stopped_by == signal.SIGUSR1 else 128 + self.stopped_by)

    def begin_shutdown(self) -> None:
        """Let nothing interrupt the shutdown: neither further signals, nor the end of dataloader workers.

        Source: torch's SIGCHLD handler raises when a worker ends early (torch 2.13, utils/data/_utils/
        signal_handling.py). Some handler has to stay: CPython prints a traceback for a signal that came before its
        handler was removed (3.12, signalmodule.c).
        """
        signal.signal(signal.SIGCHLD, lambda signum, frame: None)
        handle_signals(self._hurry)

    def print_reason(self, message: str) -> None:
        """Print why the job stops, and leave it for torchrun's report."""
        self.reason = message
        print(message, file=sys.stderr, flush=True)
        write_report(message)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        number, since = self._first_signal = self._first_signal or (signum, now)
        is_first = signum == number and now <= since + REPEAT_SECONDS
        if not (is_first and signum in SAVING and self._listener and self._listener.ask_to_stop(signum)):
            self._exit(signum)

    def _exit(self, signum: int) -> NoReturn:
        self.begin_shutdown()
        self.stopped_by = signal.Signals(signum)
        sys.exit(128 + signum)

    def _hurry(self, signum: int, frame: FrameType | None) -> None:
        self._is_hurried = True

    def _tell(self, error: ConfigError | DataError) -> None:
        """Let rank 0 print an error, and wait until it has.

        torchrun ends all ranks when the first one exits; if that were another than rank 0, nothing would be printed. A
        rank that outlives its wait has failed alone, and prints the reason itself.
        """
        message = f"{type(error).__name__}: {error}"
        is_printed = self._listener.send(message) if self._listener else self._wait_for_rank_0()
        if not is_printed:
            self.print_reason(message if is_rank_0() else f"[rank {os.environ['RANK']}] {message}")

    def _wait_for_rank_0(self) -> bool:
        """Wait for torchrun to end this rank, as it does once rank 0 has exited; return whether it has."""
        # On each machine, the local rank 0 loses patience first, and its end ends the others.
        end = time.monotonic() + RANK_0_SECONDS * (1 if os.environ.get("LOCAL_RANK") == "0" else 2)
        while not (is_rank_0() or self._is_hurried) and time.monotonic() < end:
            time.sleep(0.1)
        return self._is_hurried and not is_rank_0()

    def _reason_elsewhere(self, error: BaseException) -> str:
        """Say which other rank's end caused an exception here; nothing if the fault is this rank's own."""
        try:
            is_explained = self._listener is not None and self._listener.explains(error)
            return "Ended with the rank that says why." if is_explained else ""
        except Exception:
            reason = f"Rank 0's store is gone, and with it the reason: {str(error).splitlines()[0]}"
            if os.environ["LOCAL_RANK"] == "0":
                self.print_reason(reason)
            return reason
