"""Errors that a user can put right, and how a job ends on one."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import NoReturn

WAIT_FOR_RANK_0 = 15.0
"""Seconds that another rank leaves rank 0 to say why the job stops. torchrun ends it as soon as rank 0 has."""


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Those that torchrun passes on to its ranks' process groups."""

POLL = 0.1
"""Seconds between two looks for a signal."""

stopped_by: signal.Signals | None = None
"""The signal that ends this process; whatever fails afterwards is its doing."""

hurried = False
"""Whether a signal has come since the end began."""

said: str | None = None
"""Why the job stops, if this process is the one that has printed it."""


class ConfigError(ValueError):
    """A setting is wrong: the message says what was given, what was expected and where to change it."""


class DataError(RuntimeError):
    """The data is not what the settings promise: the message names the streams and the values found."""


class Line:
    """How a rank makes rank 0 say why the job stops; before ranks have met, each has to find out by itself."""

    def tell(self, message: str) -> bool:
        """Tell rank 0; return whether it has spoken: torchrun ends the others once it has."""
        patience = WAIT_FOR_RANK_0 * (1 if os.environ.get("LOCAL_RANK") == "0" else 2)
        end = time.monotonic() + patience
        while not (is_rank_0() or hurried) and time.monotonic() < end:
            time.sleep(POLL)
        return hurried and not is_rank_0()

    def explain(self, error: BaseException) -> str | None:
        """How another rank's end has caused an exception here; none for a fault of this rank's own."""
        return None

    def close(self) -> None:
        """Neither speak for others nor end with them any more."""


line = Line()


def is_rank_0() -> bool:
    """Whether this process speaks for the job."""
    return int(os.environ.get("RANK", 0)) == 0


def handle_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    """Have one handler for all signals that end a run."""
    for number in SIGNALS:
        signal.signal(number, handler)


def close_on_signals() -> None:
    """Turn signals into exits from here on.

    Python's process that removes forgotten shared memory has to outlive them, too, or the next one that is started says
    with a traceback that it has never heard of ours. It inherits what is blocked here, and itself ignores SIGTERM and
    SIGINT alone (Python 3.12, multiprocessing/resource_tracker.py).
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    resource_tracker.ensure_running()
    handle_signals(exit_on_signal)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    """Turn a signal into an exit, so that what is ended from outside closes everything, too."""
    global stopped_by
    begin_end()
    stopped_by = signal.Signals(number)
    sys.exit(128 + number)


def exit_if_stopped() -> None:
    """Exit if a signal has come whose exit has been lost: some code takes any exception for its own.

    Source: that of torch which saves checkpoints (torch 2.13, distributed/checkpoint/utils.py), and destructors.
    """
    if stopped_by is not None:
        sys.exit(128 + stopped_by)


def begin_end() -> None:
    """Let nothing interrupt the closing from here on: neither a signal nor the end of workers that got it as well.

    Source: torch's SIGCHLD handler raises when a worker ends early (torch 2.13, utils/data/_utils/signal_handling.py);
    of a signal that has come already, Python prints a traceback if it has no handler any more (3.12, signalmodule.c).
    """
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    handle_signals(hurry)


def hurry(number: int, frame: FrameType | None) -> None:
    """Wait no longer for rank 0."""
    global hurried
    hurried = True


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """Within it, a user's error ends the job in one line; what it makes of other ranks is left unsaid."""
    try:
        yield
    except BaseException as error:  # also what torch raises of checkpoints
        begin_end()
        exit_if_stopped()
        if isinstance(error, ConfigError | DataError):
            stop(error)
        reason = line.explain(error)
        if reason is None:
            raise
        report(said or reason)
        sys.exit(1)


def stop(error: ConfigError | DataError) -> NoReturn:
    """End this rank with exit code 1; rank 0 says why, in one line and without a traceback.

    torchrun ends all ranks when the first one fails, so a rank that fails before rank 0 does would take away its
    word: the others wait. One that is still alive after the wait failed alone, and speaks for itself.
    """
    message = f"{type(error).__name__}: {error}"
    if not is_rank_0():
        report("Ended with rank 0.")
    if not line.tell(message):
        say(message if is_rank_0() else f"[rank {os.environ['RANK']}] {message}")
    elif said:  # for another rank
        report(said)
    sys.exit(1)


def say(message: str) -> None:
    """Print why the job stops, and leave it for torchrun's closing report."""
    global said
    said = message
    print(message, file=sys.stderr, flush=True)
    report(message)


def report(message: str) -> None:
    """Leave a message for torchrun's closing report, in place of a traceback.

    The reason is left last. torch leaves there any exception that comes out of `Trainer.train`, and on rank 0 that may
    be one that only follows from another rank's end, after the listener has left the reason.

    Source: the report shows the "py_callstack" of the file that TORCHELASTIC_ERROR_FILE names (torch 2.13,
    distributed/elastic/multiprocessing/errors).
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
