"""torchrun prints what a rank leaves in its error file, and forwards the known signals."""

import inspect
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torchtitan.train import Trainer

from examples.mosaic_streaming.upstream.torchelastic import SIGNALS, write_report


def test_torchruns_report_has_the_message_of_the_error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    write_report("DataError: the shard is damaged.")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    report = str(ChildFailedError("train.py", {0: failure}))
    expected = "traceback : DataError: the shard is damaged."
    assert expected in report, "torchrun reads its error file in another way: adapt upstream/torchelastic.py"


def test_trainer_leaves_its_own_exception_in_that_file() -> None:
    assert hasattr(Trainer.train, "__wrapped__"), "train isn't recorded any more: write_report need not be last"


def test_torchrun_forwards_these_signals() -> None:
    names = ",".join(signal.name for signal in SIGNALS)
    assert f'"{names}"' in inspect.getsource(PContext.start), "set SIGNALS in upstream/torchelastic.py"
