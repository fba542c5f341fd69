"""What torchrun does with its ranks: the signals that it passes on, and the report of an error that it prints."""

import json
import os
import signal
import time
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""The signals that torchrun passes on to its ranks' process groups."""


def write_report(message: str) -> None:
    """Leave a message for torchrun's closing report, in place of a traceback.

    `Trainer.train` leaves any exception there that comes out of it. On rank 0 that may be one which only follows from
    another rank's end. So the reason has to be written last.

    Source: the report shows the "py_callstack" of the file that TORCHELASTIC_ERROR_FILE names (torch 2.13,
    distributed/elastic/multiprocessing/errors).
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
