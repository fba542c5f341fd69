"""Errors that a user can put right, and how a job ends on one."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

WAIT_FOR_RANK_0 = 15.0
"""Seconds that another rank leaves rank 0 to say why the job stops. torchrun ends it as soon as rank 0 has."""


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Those that torchrun passes on to its ranks' process groups."""


class ConfigError(ValueError):
    """A setting is wrong: the message says what was given, what was expected and where to change it."""


class DataError(RuntimeError):
    """The data is not what the settings promise: the message names the streams and the values found."""


class Line:
    """How a rank makes rank 0 say why the job stops; before ranks have met, each has to find out by itself."""

    def tell(self, message: str) -> bool:
        """Tell rank 0; return whether it has spoken."""
        if not is_rank_0():
            time.sleep(WAIT_FOR_RANK_0 * (1 if os.environ.get("LOCAL_RANK") == "0" else 2))
        return False

    def is_used(self) -> bool:
        """Whether a rank has told why it stops."""
        return False

    def close(self) -> None:
        """The job ends well: there is nothing more to tell."""


line = Line()


def is_rank_0() -> bool:
    """Whether this process speaks for the job."""
    return int(os.environ.get("RANK", 0)) == 0


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """Within it, a user's error ends the job in one line; what it makes of other ranks is left unsaid."""
    try:
        yield
    except (ConfigError, DataError) as error:
        stop(error)
    except Exception:
        if not line.is_used():
            raise
        report("Ended with the rank that says why.")  # a collective has lost it
        sys.exit(1)


def stop(error: ConfigError | DataError) -> NoReturn:
    """End this rank with exit code 1; rank 0 says why, in one line and without a traceback.

    torchrun ends all ranks when the first one fails, so a rank that fails before rank 0 does would take away its
    word: the others wait. One that is still alive after the wait failed alone, and speaks for itself.
    """
    message = f"{type(error).__name__}: {error}"
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    if not is_rank_0():
        report("Ended with rank 0.")
    if not line.tell(message):
        say(message if is_rank_0() else f"[rank {os.environ['RANK']}] {message}")
    sys.exit(1)


def say(message: str) -> None:
    """Print why the job stops, and leave it for torchrun's closing report."""
    print(message, file=sys.stderr, flush=True)
    report(message)


def report(message: str) -> None:
    """Leave a message for torchrun's closing report, in place of a traceback.

    Source: the report shows the "py_callstack" of the file that TORCHELASTIC_ERROR_FILE names (torch 2.13,
    distributed/elastic/multiprocessing/errors).
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
