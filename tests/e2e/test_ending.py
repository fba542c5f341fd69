"""How a run ends: once its end has begun, no signal breaks it, and every process and all shared memory is gone."""

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.train import Trainer

from examples.mosaic_streaming import dataloader
from examples.mosaic_streaming.batch.reading import Batches
from examples.mosaic_streaming.config import LoaderFile
from examples.mosaic_streaming.distributed.abort import AbortChannel
from examples.mosaic_streaming.distributed.store import Listener
from examples.mosaic_streaming.errors import DataError
from examples.mosaic_streaming.preview import __main__ as preview
from examples.mosaic_streaming.preview.open_data import PREFIX
from examples.mosaic_streaming.titan.checkpoints import next_start
from examples.mosaic_streaming.train import main
from tests.support.jobs import command, losses, tell_when_closed, train, write_loader
from tests.support.ranks import nothing_is_left, run_ranks
from tests.support.titan import job_config, loaded

CLOSING = [
    *((Batches, name) for name in ("close", "lost_workers")),
    *((dataloader.MosaicDataLoader, "close"), (Trainer, "close"), (CheckpointManager, "close")),
    *((AbortChannel, name) for name in ("close", "_tell", "print_reason")),
    *((Listener, name) for name in ("close", "send")),
    (dist, "destroy_process_group"),
]
"""What runs at one end or another."""

STEPS = ("--training.steps=3", "--checkpoint.enable", "--checkpoint.interval=2")


def send(number: signal.Signals) -> None:
    """Send a signal to this rank and its workers, as torchrun does."""
    os.killpg(0, number)


def interrupted(
    function: Callable[..., Any], number: signal.Signals, steps: Sequence[int] = (1,)
) -> Callable[..., Any]:
    """A function of a closing in which a signal comes before it has begun to work, and another when it has.

    Before the first step it is left alone: a start, too, closes what has read the first samples.
    """

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if not steps:
            return function(*args, **options)
        print(f"closing: {function.__qualname__}")
        send(number)
        try:
            return function(*args, **options)
        finally:
            send(number)

    return call


def at_each_step(monkeypatch: pytest.MonkeyPatch, call: Callable[[int], object]) -> None:
    """Call a function at the beginning of each training step."""
    train_step = Trainer.train_step

    def call_and_train(self: Trainer, batches: Any) -> None:
        call(self.step)
        train_step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", call_and_train)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("fault", "code", "told"),
    [
        (None, 0, "Process group destroyed"),
        pytest.param(*(RuntimeError("nobody's"), 1, "RuntimeError: nobody's"), marks=pytest.mark.long),
        pytest.param(*(DataError("the user's"), 1, "DataError: the user's"), marks=pytest.mark.long),
        (signal.SIGHUP, 128 + signal.SIGHUP, "Stopped by SIGHUP after step 1; no checkpoint is finished: the same "),
    ],
    ids=["success", "exception", "user's error", "signal"],
)
def test_no_signal_breaks_an_end_that_has_begun(
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Exception | signal.Signals | None,
    code: int,
    told: str,
    number: signal.Signals,
) -> None:
    steps: list[int] = []

    def fail_at_step_2(step: int) -> None:
        steps.append(step)
        if step == 2 and isinstance(fault, Exception):
            raise fault
        if step == 2 and isinstance(fault, signal.Signals):
            send(fault)

    def run() -> None:
        atexit.register(send, number)  # the last of all
        main(command(files, *STEPS))

    write_loader(files, files / "stream", num_workers=2)
    at_each_step(monkeypatch, fail_at_step_2)
    tell_when_closed(monkeypatch)
    for owner, name in CLOSING:
        monkeypatch.setattr(owner, name, interrupted(getattr(owner, name), number, steps))
    ranks = run_ranks(run, 2, timeout=60)
    output = "".join(rank.output for rank in ranks)
    assert [rank.code for rank in ranks] == [code] * 2, output
    assert told in ranks[0].output and output.count("Stopped by") == (code > 1), output
    assert all("closed, 0 workers" in rank.output for rank in ranks), output
    assert output.count("Traceback") == 2 * (type(fault) is RuntimeError) and "ignored in" not in output, output
    assert output.count("DataError") == isinstance(fault, DataError), output
    nothing_is_left(ranks)


class Interrupting:
    """When it goes, a signal comes: what a destructor raises is lost."""

    def __del__(self) -> None:
        send(signal.SIGHUP)


def interrupt_in_a_destructor(monkeypatch: pytest.MonkeyPatch) -> None:
    at_each_step(monkeypatch, lambda step: Interrupting() and None if step == 3 else None)


def interrupt_while_saving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileSystemWriter, "write_data", interrupted(FileSystemWriter.write_data, signal.SIGHUP))


@pytest.mark.parametrize(
    ("interrupt", "told"),
    [
        (interrupt_in_a_destructor, "Stopped by SIGHUP after step 2; the same command goes on from the checkpoint of"),
        (interrupt_while_saving, "Stopped by SIGHUP after step 2; no checkpoint is finished: the same command begins"),
    ],
)
def test_signal_whose_exit_is_lost_in_other_code_ends_the_run(
    files: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[pytest.MonkeyPatch], None], told: str
) -> None:
    tell_when_closed(monkeypatch)
    interrupt(monkeypatch)
    [rank] = run_ranks(lambda: main(command(files, *STEPS, "--training.steps=6")))
    assert rank.code == 128 + signal.SIGHUP, rank.output
    assert told in rank.output and "closed, 0 workers" in rank.output, rank.output
    assert "Traceback (most recent call last)" not in rank.output.partition("closed")[2], rank.output
    nothing_is_left([rank])


def test_worker_that_ends_at_the_moment_of_a_signal_leaves_no_traceback(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send_both() -> None:
        for number in (signal.SIGCHLD, signal.SIGTERM):
            os.kill(os.getpid(), number)

    def compute(step: int) -> None:
        if step == 2:
            threading.Timer(0.1, send_both).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)  # Python looks for signals when it is over

    write_loader(files, files / "stream", num_workers=1)
    at_each_step(monkeypatch, compute)
    [rank] = run_ranks(lambda: main(command(files)))
    assert rank.code == 128 + signal.SIGTERM
    assert "Traceback" not in rank.output and "OSError" not in rank.output, rank.output


@pytest.mark.long
def test_run_that_a_signal_ends_says_where_the_same_command_goes_on(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a checkpoint that is still being written in the background."""
    write = FileSystemWriter.write_data

    def write_slowly(*args: Any, **options: Any) -> Any:
        time.sleep(1)
        return write(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", write_slowly)
        at_each_step(patch, lambda step: send(signal.SIGHUP) if step == 4 else None)
        flags = [*STEPS, "--training.steps=5", "--checkpoint.async_mode=async"]
        [stopped] = run_ranks(lambda: main(command(files, *flags)))
    [line] = [line for line in stopped.output.splitlines() if "Stopped" in line]
    assert line.endswith("Stopped by SIGHUP after step 3; the same command goes on from the checkpoint of step 2.")
    [rest] = train(files, *flags)
    assert list(losses(rest.output)) == [3, 4, 5]


@pytest.mark.parametrize(
    ("settings", "finished", "step", "told"),
    [
        ({"enable": False}, [], 3, "without checkpoints (checkpoint.enable), the same command begins anew"),
        ({"enable": True}, [], 3, "no checkpoint is finished: the same command begins anew"),
        ({"enable": True}, [2, 10], 14, "the same command goes on from the checkpoint of step 10"),
        ({"enable": True}, [2, 10], 20, "that was the last"),
        (
            {"enable": True, "load_step": 2},
            [2, 10],
            14,
            "the same command goes on from the checkpoint of step 2 again, and without checkpoint.load_step from that "
            "of step 10",
        ),
        (
            {"enable": True, "exclude_from_loading": ["dataloader"]},
            [10],
            14,
            "the same command goes on from the checkpoint of step 10, with the streams from their beginning again "
            "unless checkpoint.exclude_from_loading lets go of dataloader",
        ),
    ],
)
def test_next_start_is_what_torchtitan_would_load(
    tmp_path: Path, settings: dict[str, Any], finished: list[int], step: int, told: str
) -> None:
    config = job_config(job__dump_folder=str(tmp_path), training__steps=20)
    config.checkpoint = dataclasses.replace(config.checkpoint, **settings)
    for number in finished:
        (tmp_path / f"checkpoint/step-{number}").mkdir(parents=True)
        (tmp_path / f"checkpoint/step-{number}/.metadata").touch()
    (tmp_path / "checkpoint/step-12").mkdir(parents=True)  # isn't finished
    assert next_start(loaded(config, LoaderFile({}, "loader.toml")), step) == told


@pytest.mark.parametrize(
    ("is_told", "is_own"),
    [
        (True, False),
        *(pytest.param(*case, marks=pytest.mark.long) for case in ((False, True), (False, False), (True, True))),
    ],
)
def test_only_errors_that_follow_another_ranks_end_are_left_unsaid(
    files: Path, monkeypatch: pytest.MonkeyPatch, is_told: bool, is_own: bool
) -> None:
    """Rank 0 ends, with a word or without; then a collective of the other fails, or something of its own."""

    def fail(step: int) -> None:
        if step < 2:
            return
        if dist.get_rank() == 0 and is_told:
            raise DataError("the user's")
        if dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # on another machine, no torchrun sends it now
        if is_own:
            with contextlib.suppress(RuntimeError):
                dist.all_reduce(torch.zeros(1))
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        try:
            dist.all_reduce(torch.zeros(1))
        except RuntimeError as error:
            raise RuntimeError("A pipeline's stage failed.") from error  # as torch has it

    def run() -> None:
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # each on a machine of its own
        main(command(files))

    at_each_step(monkeypatch, fail)
    first, second = run_ranks(run, 2)
    assert (first.code, second.code) == (1 if is_told else -signal.SIGKILL, 1), second.output
    assert ("RuntimeError: CUDA error: an illegal memory access was encountered\n" in second.output) == is_own
    assert ("Traceback (most recent" in second.output) == is_own
    assert ("Rank 0's store is gone, and with it the reason: A pipe" in second.output) == (not is_told and not is_own)
    assert first.output.count("DataError: the user's") == is_told and "DataError" not in second.output


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_no_signal_breaks_the_end_of_a_preview(files: Path, number: signal.Signals) -> None:
    shared = set(os.listdir("/dev/shm"))

    def look() -> list[str]:
        remove = shutil.rmtree

        def remove_interrupted(folder: str, **options: Any) -> None:
            (interrupted(remove, number) if Path(folder).name.startswith(PREFIX) else remove)(folder, **options)

        shutil.rmtree = remove_interrupted  # type: ignore[assignment]  # in this process alone
        preview.main(["show", *command(files)])
        return os.listdir(tempfile.gettempdir())

    [rank] = run_ranks(look)
    assert rank.code == 0, rank.output
    assert "closing: rmtree" in rank.output and "Traceback" not in rank.output
    assert not [name for name in rank.value if name.startswith(PREFIX)]
    assert set(os.listdir("/dev/shm")) <= shared
