"""torchrun prints what a rank leaves in its error file, and forwards the known signals."""

import contextlib
import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import config_from_args, get_args_parser
from torchtitan.train import Trainer

from examples.mosaic_streaming.upstream.torchelastic import SIGNALS, write_report
from tests.support.ranks import wait_until

ALL = ",".join(number.name for number in SIGNALS)
SLEEP = "for i in {1..600}; do sleep 0.1; done\n"


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
    names = ",".join(number.name for number in SIGNALS[:-1])
    assert f'"{names}"' in inspect.getsource(PContext.start), "set SIGNALS in upstream/torchelastic.py"


def test_torchrun_dies_of_sigusr1_unless_it_is_told_to_pass_it_on(tmp_path: Path) -> None:
    """Its ranks live on without it, as docs/faults.md says."""
    rank = tmp_path / "rank.sh"
    rank.write_text(f"#!/bin/bash\ntrap 'echo told > {tmp_path}/told; exit' USR1\necho $$ > {tmp_path}/pid\n" + SLEEP)
    rank.chmod(0o755)
    for variables, code, is_told in (({}, -signal.SIGUSR1, False), ({"PET_SIGNALS_TO_HANDLE": ALL}, 1, True)):
        agent = subprocess.Popen([str(Path(sys.executable).with_name("torchrun")), "--no-python", str(rank)],
                                 env={**os.environ, **variables}, stderr=subprocess.DEVNULL)  # fmt: skip
        try:
            wait_until(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()))
            agent.send_signal(signal.SIGUSR1)
            assert agent.wait(timeout=60) == code, "adapt docs/faults.md"
            assert (tmp_path / "told").exists() == is_told
        finally:
            agent.kill()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int((tmp_path / "pid").read_text()), signal.SIGKILL)
            (tmp_path / "pid").unlink()


@pytest.mark.parametrize(
    ("variables", "seconds"), [({}, 30), ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240"}, 240)], ids=["default", "variable"]
)
def test_torchrun_leaves_ranks_so_much_time(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], seconds: int
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for flags, expected in (([], seconds), (["--shutdown-timeout=99"], 99)):
        config, *_ = config_from_args(get_args_parser().parse_args([*flags, "script.py"]))
        assert config.shutdown_timeout == expected, "adapt docs/faults.md and docs/recipes.md"
