"""torchrun passes on the signals, and its report shows what stands in its error file."""

import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.agent.server import api as agent
from torch.distributed.elastic.multiprocessing import api as processes
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from examples.mosaic_streaming.upstream.torchelastic import SIGNALS, write_report


def test_report_shows_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    write_report("DataError: why it stops")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    told = str(ChildFailedError("train", {0: failure}))
    assert "traceback : DataError: why it stops" in told, "torchrun reads another key: see upstream/torchelastic.py"


def test_torchrun_still_passes_on_these_signals() -> None:
    names = {signal.Signals(number).name for number in SIGNALS}
    source = Path(processes.__file__).read_text() + Path(agent.__file__).read_text()
    assert all(name in source for name in names), "torchrun passes on other signals: see upstream/torchelastic.py"
