"""Errors that a user can put right, and how a job ends on one."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

WAIT_FOR_RANK_0 = 15.0
"""Seconds that another rank leaves rank 0 to say why the job stops. torchrun ends it as soon as rank 0 has."""


class ConfigError(ValueError):
    """A setting is wrong: the message says what was given, what was expected and where to change it."""


class DataError(RuntimeError):
    """The data is not what the settings promise: the message names the streams and the values found."""


def is_rank_0() -> bool:
    """Whether this process speaks for the job."""
    return int(os.environ.get("RANK", 0)) == 0


def stop(error: ConfigError | DataError) -> NoReturn:
    """End this rank with exit code 1; rank 0 says why, in one line and without a traceback.

    torchrun ends all ranks when the first one fails, so a rank that fails before rank 0 does would take away its
    word: the others wait. One that is still alive after the wait failed alone, and speaks for itself.

    Source: torchrun's closing report shows the "py_callstack" of the file that TORCHELASTIC_ERROR_FILE names
    (torch 2.13, distributed/elastic/multiprocessing/errors).
    """
    message = f"{type(error).__name__}: {error}"
    if not is_rank_0():
        report("Ended with rank 0.")
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
        time.sleep(WAIT_FOR_RANK_0)
        message = f"[rank {os.environ['RANK']}] {message}"
    print(message, file=sys.stderr, flush=True)
    report(message)
    sys.exit(1)


def report(message: str) -> None:
    """Leave a message for torchrun's closing report, in place of a traceback."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
