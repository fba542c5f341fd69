"""torchrun's dealings with its ranks: the signals that it forwards, and the error report that it prints."""

import json
import os
import signal
import time
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
"""The signals that end a run. torchrun forwards them to its ranks' process groups, the last one only if it is told to
(`--signals-to-handle`)."""
SAVING = (signal.SIGTERM, signal.SIGUSR1)
"""Those after which a run saves a checkpoint first."""


def write_report(message: str) -> None:
    """Write a message for torchrun's final report, in place of a traceback.

    `Trainer.train` writes any exception that leaves it there, on rank 0 perhaps one that only follows from another
    rank's end. So the reason has to be written last. The report shows the "py_callstack" of the file that
    TORCHELASTIC_ERROR_FILE names.

    Source: torch 2.13, distributed/elastic/multiprocessing/errors. A public way to set the message makes it needless.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
