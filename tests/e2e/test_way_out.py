"""SIGTERM and SIGUSR1 in training: all ranks end after one step with a checkpoint of it, and the rest follows."""

import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.train import Trainer

from examples.mosaic_streaming import dataloader
from examples.mosaic_streaming.distributed import abort
from examples.mosaic_streaming.errors import DataError
from examples.mosaic_streaming.titan.checkpoints import WayOut
from examples.mosaic_streaming.titan.validator import MeanOverTokens
from examples.mosaic_streaming.train import main
from tests.e2e.test_torchrun import children, cmdline, end_of, ends_well, start
from tests.support.jobs import LAYOUTS, SAVE, command, logged, losses, tell_when_closed, write_files, write_loader
from tests.support.ranks import Rank, nothing_is_left, run_ranks, wait_until
from tests.support.recording import recorded, recording, steps_recorded
from tests.support.streams import SEQ_LEN

STEPS = (*SAVE, "--checkpoint.interval=4")
TERM, USR1 = signal.SIGTERM, signal.SIGUSR1
CODES = {TERM: 128 + TERM, USR1: 0}
LINE = re.compile(r"Stopped by (\w+) (after step (\d+)|before the first step); (.*)\.$", re.MULTILINE)

Whole = tuple[dict[int, float], list[list[int]]]
"""The losses and the samples of a run in one go."""


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    return write_files(module_path)


def run(
    folder: Path, name: str, ranks: int, flags: Sequence[str], files: Sequence[str] = (), **options: Any
) -> tuple[list[Rank], list[list[int]]]:
    """Train in a checkpoint folder of this name; the samples of each step, too."""
    notes, flags = folder / "recorded" / f"{name}-{time.monotonic_ns()}", [f"--checkpoint.folder={name}", *flags]
    with recording(notes):
        done = run_ranks(lambda: main([*files, *command(folder, *STEPS, *flags)]), ranks, **options)
    return done, recorded(notes)


def whole(folder: Path, layout: str, made: dict[str, Whole] = {}) -> Whole:  # noqa: B006  # kept, once for each layout
    """A run in one go."""
    if layout not in made:
        ranks, flags = LAYOUTS[layout]
        done, samples = run(folder, f"whole {layout}", ranks, flags)
        assert [rank.code for rank in done] == [0] * ranks and len(samples) == 12, done[0].output
        made[layout] = logged(done), samples
    return made[layout]


def in_step(step: int, call: Callable[[], object], patch: pytest.MonkeyPatch, ranks: Sequence[int]) -> None:
    """Call a function before a step of some ranks."""
    train_step = Trainer.train_step

    def call_and_train(self: Trainer, batches: Any) -> None:
        if self.step == step and dist.get_rank() in ranks:
            call()
        train_step(self, batches)

    patch.setattr(Trainer, "train_step", call_and_train)


def send(number: signal.Signals) -> None:
    """Send a signal to this rank and to what it has started, as torchrun does."""
    os.killpg(0, number)


def in_steps(step: int, number: signal.Signals, *ranks: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Send some ranks a signal in a step."""
    return lambda patch: in_step(step, lambda: send(number), patch, ranks)


def stops_and_goes_on(
    folder: Path,
    name: str,
    number: signal.Signals,
    interrupt: Callable[[pytest.MonkeyPatch], None],
    layout: str = "FSDP 2",
    flags: Sequence[str] = (),
    files: Sequence[str] = (),
    **options: Any,
) -> tuple[int, list[Rank]]:
    """A run that a signal ends names its last step and has it in a checkpoint; the same command reads the rest."""
    ranks, degrees = LAYOUTS[layout]
    flags = (*degrees, *flags)
    expected, expected_samples = whole(folder, layout)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch)
        stopped, samples = run(folder, name, ranks, flags, files, **options)
    output = "\n".join(rank.output for rank in stopped)
    assert [rank.code for rank in stopped] == [CODES[number]] * ranks, output
    [(told, _, step, where)] = LINE.findall(output)
    assert told == number.name and where == f"the same command goes on from the checkpoint of step {step}", output
    assert LINE.search(stopped[0].output) and "Traceback" not in output and "DataError" not in output, output
    assert (folder / f"outputs/{name}/step-{step}/.metadata").exists()
    assert logged(stopped) == {n: loss for n, loss in expected.items() if n <= int(step)}
    assert samples[: int(step)] == expected_samples[: int(step)]
    nothing_is_left(stopped)
    rest, others = run(folder, name, ranks, flags, files)
    assert [rank.code for rank in rest] == [0] * ranks, rest[0].output
    assert logged(rest) == {n: loss for n, loss in expected.items() if n > int(step)}
    assert samples[: int(step)] + others == expected_samples
    return int(step), stopped


@pytest.mark.parametrize("number", [TERM, USR1])
def test_run_that_all_ranks_are_told_to_stop_goes_on_exactly(folder: Path, number: signal.Signals) -> None:
    """With dataloader workers, and a last checkpoint that would hold the model alone."""

    def interrupt(patch: pytest.MonkeyPatch) -> None:
        in_steps(6, number, 0, 1)(patch)
        tell_when_closed(patch)
        write_loader(folder, folder / "stream", num_workers=2)

    flags = ["--checkpoint.last_save_model_only=true"]
    step, ranks = stops_and_goes_on(folder, number.name, number, interrupt, flags=flags)
    write_loader(folder, folder / "stream")
    assert step == 6 and all("closed, 0 workers" in rank.output for rank in ranks)
    assert sorted(os.listdir(folder / f"outputs/{number.name}")) == ["step-12", "step-4", "step-6", "step-8"]


@pytest.mark.long
@pytest.mark.both
@pytest.mark.parametrize("one", [0, 1])
@pytest.mark.parametrize("layout", ["FSDP 2", "TP 2", "PP 2"])
def test_rank_that_alone_is_told_to_stop_stops_all(folder: Path, layout: str, one: int) -> None:
    step, _ = stops_and_goes_on(folder, f"{layout} {one}", TERM, in_steps(6, TERM, one), layout, notice=5.0)
    assert step in (6, 7)


@pytest.mark.long
@pytest.mark.both
def test_ranks_that_are_told_different_things_agree(folder: Path) -> None:
    def interrupt(patch: pytest.MonkeyPatch) -> None:
        in_steps(5, USR1, 0)(patch)
        in_steps(7, TERM, 1)(patch)

    step, _ = stops_and_goes_on(folder, "different", USR1, interrupt)
    assert step in (5, 6)


@pytest.mark.long
@pytest.mark.both
def test_step_that_has_just_been_saved_is_not_saved_again(folder: Path) -> None:
    step, ranks = stops_and_goes_on(folder, "saved", USR1, in_steps(8, USR1, 0, 1))
    assert step == 8
    assert ranks[0].output.count("Saving the checkpoint") == 2 and "at last step" not in ranks[0].output


@pytest.mark.long
@pytest.mark.both
@pytest.mark.parametrize(
    ("loaded", "told"),
    [
        (0, "before the first step; no checkpoint is finished: the same command begins anew."),
        (6, "after step 6; the same command goes on from the checkpoint of step 6."),
    ],
)
def test_run_that_has_not_begun_a_step_ends_at_once_and_saves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, loaded: int, told: str
) -> None:
    """At its beginning, and when it has loaded a checkpoint that isn't one of the interval."""
    name, load = f"none {loaded}", CheckpointManager.load
    if loaded:
        with monkeypatch.context() as patch:
            in_steps(loaded, TERM, 0)(patch)
            run(folder, name, 1, [])
    before = {file: file.stat().st_mtime_ns for file in folder.glob(f"outputs/{name}/*/*")}

    def load_interrupted(*args: Any, **options: Any) -> None:
        load(*args, **options)
        send(USR1)

    monkeypatch.setattr(CheckpointManager, "load", load_interrupted)
    [rank], samples = run(folder, name, 1, [])
    assert rank.code == 128 + USR1 and not samples, rank.output
    assert f"Stopped by SIGUSR1 {told}" in rank.output
    assert {file: file.stat().st_mtime_ns for file in folder.glob(f"outputs/{name}/*/*")} == before


@pytest.mark.long
@pytest.mark.both
def test_checkpoint_that_is_being_written_is_finished_first(folder: Path) -> None:
    write = FileSystemWriter.write_data

    def write_slowly(*args: Any, **options: Any) -> Any:
        time.sleep(1)
        return write(*args, **options)

    def interrupt(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(FileSystemWriter, "write_data", write_slowly)
        in_steps(5, TERM, 0, 1)(patch)

    step, _ = stops_and_goes_on(folder, "async", TERM, interrupt, flags=["--checkpoint.async_mode=async"])
    assert step == 5
    assert (folder / "outputs/async/step-4/.metadata").exists()


class Stager:
    """What stages a checkpoint where there is no accelerator, with the interface of torch's `DefaultStager`."""

    def __init__(self, *options: Any) -> None:
        pass

    def stage(self, state_dict: dict[str, Any]) -> Future[dict[str, Any]]:
        from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict

        staged: Future[dict[str, Any]] = Future()
        staged.set_result(_copy_state_dict(state_dict, _create_cpu_state_dict(state_dict, share_memory=True)))
        return staged

    def close(self) -> None:
        pass


@pytest.mark.long
@pytest.mark.both
def test_process_that_writes_checkpoints_lives_until_it_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds to start, so it gets the signal while it has the checkpoint of step 4 to write."""
    with monkeypatch.context() as patch:
        patch.setattr(f"{CheckpointManager.__module__}.DefaultStager", Stager)
        in_steps(5, TERM, 0, 1)(patch)
        flags = ["--checkpoint.async_mode=async_with_pinned_mem"]
        ranks, _ = run(folder, "pinned", 2, [*LAYOUTS["FSDP 2"][1], *flags])
    assert [rank.code for rank in ranks] == [CODES[TERM]] * 2, ranks[0].output
    assert "Stopped by SIGTERM after step 5; the same command goes on from the checkpoint of step 5." in ranks[0].output
    assert all((folder / f"outputs/pinned/step-{step}/.metadata").exists() for step in (4, 5))
    assert [rank.left for rank in ranks] == [[], []]


@pytest.mark.long
@pytest.mark.both
@pytest.mark.parametrize("layout", ["FSDP 2", "PP 2 x FSDP 2"])
def test_round_of_validation_is_finished_first(folder: Path, layout: str) -> None:
    """After which FSDP has the root's parameters whole, as no optimizer step and no other save finds them."""
    validate = MeanOverTokens.validate

    def validate_interrupted(self: Any, model_parts: Any, step: int) -> None:
        if step == 6:
            send(TERM)
        validate(self, model_parts, step)

    flags = ["--validation.enable", "--validation.freq=3", "--validation.steps=2", f"--validation.seq_len={SEQ_LEN}"]
    flags += [f"--validation.local_batch_size={LAYOUTS[layout][1][0].rpartition('=')[2]}"]
    step, ranks = stops_and_goes_on(
        folder,
        f"validation {layout}",
        TERM,
        lambda patch: patch.setattr(MeanOverTokens, "validate", validate_interrupted),
        layout,
        flags,
        ["--mosaic-validation-config", f"{folder}/loader.toml"],
    )
    assert step == 6 and any(re.search(r"validate step: +6 ", rank.output) for rank in ranks)


@pytest.mark.parametrize("number", [TERM, pytest.param(USR1, marks=pytest.mark.long)])
def test_run_that_is_still_being_built_ends_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    build = dataloader.open_loader

    def build_interrupted(*args: Any) -> dataloader.OpenLoader:
        dist.barrier()
        send(number)
        return build(*args)

    monkeypatch.setattr(dataloader, "open_loader", build_interrupted)
    ranks, samples = run(folder, f"built {number.name}", 2, [])
    assert [rank.code for rank in ranks] == [128 + number] * 2 and not samples
    assert "Training starts" not in ranks[0].output and not (folder / f"outputs/built {number.name}").exists()


@pytest.mark.long
@pytest.mark.both
@pytest.mark.parametrize("flags", [["--checkpoint.enable=false"], ["--checkpoint.load_only"]])
@pytest.mark.parametrize("number", [TERM, USR1])
def test_run_that_saves_no_checkpoints_ends_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, flags: list[str]
) -> None:
    in_steps(3, number, 0, 1)(monkeypatch)
    ranks, _ = run(folder, f"no {number.name} {len(flags[0])}", 2, flags)
    assert [rank.code for rank in ranks] == [128 + number] * 2
    assert list(losses(ranks[0].output)) == [1, 2]
    assert f"Stopped by {number.name} after step 2; " in ranks[0].output


@pytest.mark.parametrize(
    ("first", "second"),
    [(TERM, TERM), *(pytest.param(*case, marks=pytest.mark.long) for case in ((USR1, TERM), (TERM, signal.SIGINT)))],
)
def test_second_signal_ends_the_run_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, first: signal.Signals, second: signal.Signals
) -> None:
    """In the step in which the first one has come, which would have been the last."""
    name = f"second {first.name} {second.name}"

    def send_both() -> None:
        send(first)
        time.sleep(0.1)
        send(second)

    monkeypatch.setattr(abort, "REPEAT_SECONDS", 0)
    in_step(6, send_both, monkeypatch, [0, 1])
    ranks, _ = run(folder, name, 2, [])
    assert [rank.code for rank in ranks] == [128 + second] * 2, ranks[0].output
    assert f"Stopped by {second.name} after step 5; the same command goes on from the checkpoint of step 4." in (
        ranks[0].output
    )
    assert not (folder / f"outputs/{name}/step-6").exists()


@pytest.mark.long
@pytest.mark.both
def test_signal_that_comes_by_two_ways_is_one(folder: Path) -> None:
    """As where each process of a job is sent it, and torchrun passes it on."""

    def send_twice() -> None:
        send(TERM)
        time.sleep(0.1)
        send(TERM)

    step, _ = stops_and_goes_on(folder, "twice", TERM, lambda patch: in_step(6, send_twice, patch, [0, 1]))
    assert step == 6


@pytest.mark.long
@pytest.mark.both
def test_run_whose_time_is_up_while_it_saves_has_its_last_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = FileSystemWriter.write_data

    def write_up_to_step_4(self: FileSystemWriter, *args: Any) -> Any:
        if "step-4" not in str(self.path):
            time.sleep(600)
        return write(self, *args)

    def wait_and_kill(pids: list[int], outputs: list[Path]) -> None:
        wait_until(lambda: "at last step" in outputs[0].read_text(), outputs[0].read_text)
        for pid in pids:
            os.killpg(pid, signal.SIGKILL)

    expected, expected_samples = whole(folder, "FSDP 2")
    flags = LAYOUTS["FSDP 2"][1]
    with monkeypatch.context() as patch:
        in_steps(6, TERM, 0, 1)(patch)
        patch.setattr(FileSystemWriter, "write_data", write_up_to_step_4)
        killed, _ = run(folder, "late", 2, flags, while_running=wait_and_kill)
    assert [rank.code for rank in killed] == [-signal.SIGKILL] * 2
    assert not (folder / "outputs/late/step-6/.metadata").exists()
    rest, samples = run(folder, "late", 2, flags)
    assert logged(rest) == {step: loss for step, loss in expected.items() if step > 4}
    assert samples == expected_samples[4:]


@pytest.mark.long
@pytest.mark.both
@pytest.mark.parametrize("while_saving", [False, True])
def test_error_of_a_rank_that_is_to_stop_is_still_told_by_rank_0(
    folder: Path, monkeypatch: pytest.MonkeyPatch, while_saving: bool
) -> None:
    """In the step in which the signal comes, and when all ranks have agreed."""

    def fail(*args: Any) -> None:
        raise DataError("the user's")

    def send_and_fail() -> None:
        send(TERM)
        if not while_saving and dist.get_rank() == 1:
            fail()

    in_step(6, send_and_fail, monkeypatch, [0, 1])
    if while_saving:
        save = WayOut._save
        monkeypatch.setattr(WayOut, "_save", lambda self: save(self) if dist.get_rank() == 0 else fail())
    ranks, _ = run(folder, f"error {while_saving}", 2, LAYOUTS["FSDP 2"][1])
    output = "".join(rank.output for rank in ranks)
    assert ranks[1].code == 1 and ranks[0].code in (1, 128 + TERM), output
    assert ranks[0].output.count("DataError: the user's") == 1 and output.count("DataError") == 1, output
    assert "Stopped by" not in output and "Traceback" not in output


FORWARD = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
LONGER = ("--checkpoint.interval=100", "--training.steps=40", "--debug.seed=1", "--training.local_batch_size=2")


@pytest.mark.long
@pytest.mark.both
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("number", "to_rank", "code"),
    [(TERM, False, 1), (USR1, False, 1), (USR1, True, 0), (TERM, True, 0)],
    ids=["SIGTERM to torchrun", "SIGUSR1 to torchrun", "SIGUSR1 to a rank", "SIGTERM to a rank"],
)
def test_torchrun_passes_the_signal_on_and_starts_no_rank_again_that_has_ended_well(
    tmp_path: Path, number: signal.Signals, to_rank: bool, code: int
) -> None:
    """With --max-restarts. Ranks that end with 143 are started again, if it isn't torchrun that was told to stop."""
    folder = write_files(tmp_path)
    done, expected_samples = run(folder, "whole", 2, LONGER)
    expected = logged(done)
    torchrun, flags = ["--nproc_per_node=2", "--max-restarts=2", FORWARD], [*LONGER, "--checkpoint.folder=run"]
    agent = start(folder, "first", torchrun, *flags)
    wait_until(lambda: all(steps_recorded(folder / f"recorded/first/{rank}.jsonl") > 3 for rank in range(2)))
    victims = [child for child in children(agent.pid) if "tests.support.recording" in cmdline(child)]
    os.kill(victims[1] if to_rank else agent.pid, number)
    assert end_of([agent]) == [code], (folder / "first.log").read_text()
    log = (folder / "first.log").read_text()
    [(told, _, step, _)] = LINE.findall(log)
    assert told == number.name and f"the same command goes on from the checkpoint of step {step}." in log
    is_restarted = to_rank and number == TERM
    assert log.count("Training starts at step") == 1 + is_restarted, log
    found, samples = losses(log), recorded(folder / "recorded/first")
    if not is_restarted:
        rest, others = ends_well(folder, "second", [start(folder, "second", torchrun, *flags)])
        found |= rest
        assert samples[: int(step)] + others == expected_samples
    assert found == pytest.approx(expected, abs=1e-5) and list(found) == list(range(1, 41))
