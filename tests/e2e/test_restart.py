"""Whole runs that go on from a checkpoint: on which samples, with which losses, and when they are refused."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from torchtitan.train import Trainer

from examples.mosaic_streaming.train import main
from tests.support.jobs import SAVE, command, logged, losses, train, write_files
from tests.support.ranks import can_make_nodes, run_rank_values, run_ranks, shared, wait_until
from tests.support.recording import PAUSE, recorded, recording, steps_recorded
from tests.support.streams import write_stream
from tests.support.titan import only_0_2

Whole = tuple[Path, dict[int, float], list[list[int]]]
"""The folder of a run of 12 steps, its losses, and the samples of each step."""


def run_whole(folder: Path, name: str, *flags: str, world_size: int = 1) -> Whole:
    """Train 12 steps in one go."""
    with recording(folder / "recorded" / name):
        ranks = train(folder, *SAVE, f"--checkpoint.folder={name}", *flags, world_size=world_size)
    samples = recorded(folder / "recorded" / name)
    assert len(samples) == 12
    return folder, logged(ranks), samples


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    return write_files(module_path)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Whole:
    """On one rank, saved at each step."""
    return run_whole(folder, "whole", "--training.local_batch_size=4")


@pytest.fixture(scope="module")
def whole_on_two_ranks(folder: Path) -> Whole:
    return run_whole(folder, "whole-2", "--checkpoint.interval=6", world_size=2)


def go_on(whole: Whole, checkpoint: str, name: str, *flags: str, world_size: int = 1, nodes: int = 1) -> Whole:
    """Go on from a copy of a checkpoint."""
    folder, *_ = whole
    shutil.copytree(folder / "outputs" / checkpoint, folder / "outputs" / name / Path(checkpoint).name)
    flags = (*SAVE, "--checkpoint.interval=100", f"--checkpoint.folder={name}", *flags)
    with recording(folder / "recorded" / name):
        ranks = train(folder, *flags, world_size=world_size, nodes=nodes)
    return folder, logged(ranks), recorded(folder / "recorded" / name)


@pytest.mark.parametrize("step", [8, *(pytest.param(step, marks=pytest.mark.long) for step in (3, 9))])
def test_run_goes_on_as_if_it_had_not_stopped(whole: Whole, step: int) -> None:
    """In an epoch, at its end, and behind it."""
    _, losses, samples = go_on(whole, f"whole/step-{step}", f"from-{step}", "--training.local_batch_size=4")
    assert samples == whole[2][step:]
    assert losses == {n: loss for n, loss in whole[1].items() if n > step}


@pytest.mark.long
def test_checkpoints_that_are_written_in_the_background_are_exact(whole: Whole) -> None:
    flags = ("--training.local_batch_size=4", "--checkpoint.async_mode=async")
    run = run_whole(whole[0], "async", *flags)
    assert run == whole
    _, losses, samples = go_on(run, "async/step-5", "from-async", *flags)
    assert samples == whole[2][5:]
    assert losses == {n: loss for n, loss in whole[1].items() if n > 5}


@pytest.mark.parametrize(
    ("world_size", "nodes", "flags"),
    [
        pytest.param(*(2, 1, []), marks=pytest.mark.long),
        pytest.param(
            *(2, 1, ["--parallelism.tensor_parallel_degree=2", "--training.local_batch_size=8"]),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *(4, 1, ["--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=4"]),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *(4, 2, []),
            marks=[
                pytest.mark.long,
                pytest.mark.skipif(not can_make_nodes(), reason="no rights to namespaces for nodes"),
            ],
        ),
    ],
    ids=["fsdp-2", "tp-2", "pp-2-fsdp-2", "2-nodes-2-ranks"],
)
def test_run_goes_on_in_another_layout(
    whole: Whole, request: pytest.FixtureRequest, world_size: int, nodes: int, flags: list[str]
) -> None:
    name = request.node.callspec.id
    _, losses, samples = go_on(whole, "whole/step-5", name, *flags, world_size=world_size, nodes=nodes)
    assert samples == whole[2][5:]
    expected = {step: loss for step, loss in whole[1].items() if step > 5}
    assert losses == pytest.approx(expected, abs=1e-2 if "pp" in name else 1e-3)


@pytest.mark.long
@pytest.mark.both
@pytest.mark.parametrize("world_size", [2, 4])
def test_run_that_was_killed_goes_on_on_as_many_ranks_or_twice_as_many(
    whole_on_two_ranks: Whole, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    """12 steps in one go, against SIGKILL behind the checkpoint of step 6, and 6 more."""
    folder, losses, samples = whole_on_two_ranks
    name = f"killed-{world_size}"
    flags = [*SAVE, "--checkpoint.interval=6", f"--checkpoint.folder={name}"]
    first, second = folder / "recorded" / name, folder / "recorded" / f"{name}-2"
    before = shared()
    with monkeypatch.context() as patch, recording(first):
        patch.setenv(PAUSE, "8")
        killed = run_ranks(lambda: main(command(folder, *flags)), 2, while_running=kill_when(first, 8))
    assert [rank.code for rank in killed] == [-signal.SIGKILL] * 2
    assert os.listdir(folder / "outputs" / name) == ["step-6"]
    with recording(second):
        ranks = train(folder, *flags, world_size=world_size)
    assert shared() == before, "also what the killed ranks have left"
    assert recorded(first)[:6] + recorded(second) == samples
    expected = {step: loss for step, loss in losses.items() if step > 6}
    assert logged(ranks) == pytest.approx(expected, abs=1e-5 if world_size == 2 else 1e-3)


def kill_when(folder: Path, steps: int) -> Callable[[list[int], list[Path]], None]:
    """Kill the ranks once they have read so many steps."""

    def kill(pids: list[int], outputs: list[Path]) -> None:
        wait_until(
            lambda: all(steps_recorded(folder / f"{rank}.jsonl") == steps for rank in range(len(pids))),
            outputs[0].read_text,
        )
        for pid in pids:
            os.killpg(pid, signal.SIGKILL)

    return kill


def refused(files: Path, *flags: str, world_size: int = 2) -> str:
    """The one message of a run that stops before its first step, on all ranks, without a traceback."""
    ranks = run_ranks(lambda: main(command(files, *flags)), world_size)
    assert all(rank.code != 0 for rank in ranks)
    together = "".join(rank.output for rank in ranks)
    assert not losses(together)
    assert "Traceback" not in together
    message = ranks[0].output[ranks[0].output.index("Error: ") :]
    assert together.count(message) == 1
    return message


@pytest.mark.long
def test_run_on_changed_data_is_refused_and_can_start_the_new_data_anew(files: Path) -> None:
    flags = ["--checkpoint.enable", "--checkpoint.interval=2"]
    train(files, *flags, "--training.steps=2")
    write_stream(files / "stream_2", 120)
    loader = files / "loader.toml"
    loader.write_text(loader.read_text().replace('stream"', 'stream_2"') + "shuffle_seed = 5\n")
    message = refused(files, *flags, world_size=1)
    assert "Traceback" not in message
    settings = [line.split()[0] for line in message.splitlines()[2:-1]]
    assert settings == ["stream", "stream", "dataset.shuffle_seed", "dataset.epoch_size"]
    assert os.listdir(files / "outputs/checkpoint") == ["step-2"], "nothing is lost"
    with recording(files / "recorded/anew"):
        [anew] = train(files, *flags, "--checkpoint.exclude_from_loading=dataloader")
    assert list(losses(anew.output)) == [3, 4]
    assert "WARNING - checkpoint.exclude_from_loading has dataloader: the streams start from their begin" in anew.output
    with recording(files / "recorded/new"):
        train(files, "--training.steps=2")
    assert recorded(files / "recorded/anew") == recorded(files / "recorded/new"), "from the beginning"
    with recording(files / "recorded/further"):
        train(files, *flags, "--training.steps=5")
    of_anew = {sample for step in recorded(files / "recorded/anew") for sample in step}
    assert not of_anew & set(recorded(files / "recorded/further")[0]), "the new data goes on"


@pytest.mark.long
def test_model_only_checkpoint_is_refused_with_words(files: Path) -> None:
    flags = ["--checkpoint.enable", "--checkpoint.last_save_model_only"]
    train(files, *flags, "--training.steps=2")
    message = refused(files, *flags)
    assert message.startswith(
        "Error: The checkpoint has no 'dataloader.mosaic'. Either it is model-only, as TorchTitan"
    )
    excluded = refused(files, *flags, "--checkpoint.exclude_from_loading=dataloader")
    assert excluded.startswith("Error: The checkpoint has no 'lr_scheduler.")
    assert excluded.endswith("Or it was written by another version of torch or torchtitan.\n")
    assert "--checkpoint.initial_load_path=" in message
    [anew] = train(
        files, *flags, "--checkpoint.folder=anew", f"--checkpoint.initial_load_path={files}/outputs/checkpoint/step-2"
    )
    assert list(losses(anew.output)) == [1, 2, 3, 4], "the second way on that is told"


@only_0_2
@pytest.mark.long
def test_checkpoint_of_stock_torchtitan_is_refused_with_words_and_can_be_taken_over(files: Path) -> None:
    """Written by its own loader, on text."""
    text = files / "text"
    text.mkdir()
    (text / "a.jsonl").write_text('{"text": "def f(x): return x"}\n' * 200)
    flags = [f"--job.config_file={files}/job.toml", "--model.name=llama3", "--training.dataset=c4_test"]
    flags += [f"--training.dataset_path={text}", "--checkpoint.enable", "--training.steps=2"]

    def stock() -> None:
        from torchtitan.config import ConfigManager

        trainer = Trainer(ConfigManager().parse_args(flags))
        trainer.train()
        trainer.close()

    run_rank_values(stock)
    message = refused(files, "--checkpoint.enable")
    assert "Or it was written by another loader: keep its model and optimizer and start the streams" in message
    [taken] = train(files, "--checkpoint.enable", "--checkpoint.exclude_from_loading=dataloader")
    assert list(losses(taken.output)) == [3, 4]
