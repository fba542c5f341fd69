"""Whole runs that go on from a checkpoint: on which samples, with which losses, and when they are refused."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torchtitan.config import ConfigManager
from torchtitan.train import Trainer

from examples.mosaic_streaming.train import main
from tests.jobs import command, logged, losses, train
from tests.ranks import Rank, can_make_nodes, run_rank_values, run_ranks
from tests.recording import PAUSE, recorded, recording
from tests.streams import write_stream

SAVE = ("--checkpoint.enable", "--training.steps=12", "--checkpoint.interval=1", "--training.global_batch_size=8")
"""64 of the stream's 100 samples are an epoch, of 8 steps."""


def go_on(files: Path, checkpoint: Path, *flags: str, world_size: int = 1, nodes: int = 1) -> tuple[list[Rank], Path]:
    """Go on from a copy of a checkpoint; where the samples are recorded comes back, too."""
    name = f"from-{checkpoint.name}-{world_size}x{nodes}"
    shutil.copytree(checkpoint, files / "outputs" / name / checkpoint.name)
    with recording(files / "recorded" / name):
        ranks = train(files, *SAVE, f"--checkpoint.folder={name}", *flags, world_size=world_size, nodes=nodes)
    return ranks, files / "recorded" / name


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_run_goes_on_from_any_step_as_if_it_had_not_stopped(files: Path, async_mode: str) -> None:
    """Also where its checkpoints were written in the background while it trained on."""
    mode = f"--checkpoint.async_mode={async_mode}"
    with recording(files / "recorded/whole"):
        whole = train(files, *SAVE, mode, "--training.local_batch_size=4")
    samples = recorded(files / "recorded/whole")
    assert len(samples) == 12
    for step in (3, 8, 9):
        again, folder = go_on(files, files / f"outputs/checkpoint/step-{step}", mode, "--training.local_batch_size=4")
        assert recorded(folder) == samples[step:]
        assert losses(again[0].output) == {n: loss for n, loss in losses(whole[0].output).items() if n > step}


@pytest.mark.parametrize(
    ("world_size", "nodes", "flags"),
    [
        (2, 1, []),
        (2, 1, ["--parallelism.tensor_parallel_degree=2", "--training.local_batch_size=8"]),
        (4, 1, ["--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=4"]),
        pytest.param(
            *(4, 2, []), marks=pytest.mark.skipif(not can_make_nodes(), reason="no rights to namespaces for nodes")
        ),
    ],
    ids=["2 ranks", "tp 2", "pp 2 x dp 2", "2 nodes x 2 ranks"],
)
def test_run_goes_on_in_another_layout(files: Path, world_size: int, nodes: int, flags: list[str]) -> None:
    with recording(files / "recorded/whole"):
        whole = train(files, *SAVE)
    again, folder = go_on(files, files / "outputs/checkpoint/step-5", *flags, world_size=world_size, nodes=nodes)
    assert recorded(folder) == recorded(files / "recorded/whole")[5:]
    expected = {step: loss for step, loss in logged(whole).items() if step > 5}
    assert logged(again) == pytest.approx(expected, abs=1e-2 if "pipe" in str(flags) else 1e-3)


@pytest.mark.parametrize("world_size", [2, 4])
def test_run_that_was_killed_goes_on_on_as_many_ranks_or_twice_as_many(
    files: Path, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    """12 steps in one go, against SIGKILL behind the checkpoint of step 6, and 6 more."""
    flags = [*SAVE, "--checkpoint.interval=6"]
    with recording(files / "recorded/whole"):
        whole = train(files, *flags, "--checkpoint.folder=whole", world_size=2)
    monkeypatch.setenv(PAUSE, "8")
    before = set(os.listdir("/dev/shm"))
    with recording(files / "recorded/first"):
        killed = run_ranks(
            lambda: main(command(files, *flags)), 2, while_running=kill_when(files / "recorded/first", steps=8)
        )
    monkeypatch.delenv(PAUSE)
    assert [rank.code for rank in killed] == [-signal.SIGKILL] * 2
    assert sorted(os.listdir(files / "outputs/checkpoint")) == ["step-6"]
    with recording(files / "recorded/second"):
        second = train(files, *flags, world_size=world_size)
    for segment in set(os.listdir("/dev/shm")) - before:
        Path("/dev/shm", segment).unlink()
    samples = recorded(files / "recorded/first")[:6] + recorded(files / "recorded/second")
    assert samples == recorded(files / "recorded/whole")
    expected = {step: loss for step, loss in logged(whole).items() if step > 6}
    assert logged(second) == pytest.approx(expected, abs=1e-5 if world_size == 2 else 1e-3)


def kill_when(folder: Path, steps: int) -> Callable[[list[int], list[Path]], None]:
    """Kill the ranks once they have read so many steps."""

    def kill(pids: list[int], outputs: list[Path]) -> None:
        deadline = time.monotonic() + 60
        while not all(read_steps(folder / f"{rank}.jsonl") == steps for rank in range(len(pids))):
            assert time.monotonic() < deadline, outputs[0].read_text()
            time.sleep(0.05)
        for pid in pids:
            os.killpg(pid, signal.SIGKILL)

    return kill


def read_steps(file: Path) -> int:
    """Steps that a rank has recorded."""
    lines = file.read_text().splitlines() if file.exists() else []
    return int(json.loads(lines[-1])["step"]) + 1 if lines else 0


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


def test_run_on_changed_data_is_refused_and_can_start_the_new_data_anew(files: Path) -> None:
    flags = ["--checkpoint.enable", "--checkpoint.interval=2"]
    train(files, *flags, "--training.steps=2")
    write_stream(files / "stream_2", 120)
    loader = files / "loader.toml"
    loader.write_text(loader.read_text().replace('stream"', 'stream_2"') + "shuffle_seed = 5\n")
    message = refused(files, *flags, world_size=1)
    assert "Traceback" not in message
    assert [line.split()[0] for line in message.splitlines()[2:-1]] == [
        *["stream"] * 2,
        *["dataset.shuffle_seed"],
        "dataset.epoch_size",
    ]
    assert os.listdir(files / "outputs/checkpoint") == ["step-2"], "nothing is lost"
    with recording(files / "recorded/anew"):
        [anew] = train(files, *flags, "--checkpoint.exclude_from_loading=dataloader")
    assert list(losses(anew.output)) == [3, 4]
    with recording(files / "recorded/new"):
        train(files, "--training.steps=2")
    assert recorded(files / "recorded/anew") == recorded(files / "recorded/new"), "from the beginning"
    with recording(files / "recorded/further"):
        train(files, *flags, "--training.steps=5")
    assert not set(recorded(files / "recorded/further")[0]) & set(sum(recorded(files / "recorded/anew"), [])), "goes on"


def test_model_only_checkpoint_is_refused_with_words(files: Path) -> None:
    flags = ["--checkpoint.enable", "--checkpoint.last_save_model_only"]
    train(files, *flags, "--training.steps=2")
    message = refused(files, *flags)
    assert "it is model-only, as TorchTitan writes a run's last one unless" in message
    assert "--checkpoint.initial_load_path=" in message
    [anew] = train(
        files, *flags, "--checkpoint.folder=anew", f"--checkpoint.initial_load_path={files}/outputs/checkpoint/step-2"
    )
    assert list(losses(anew.output)) == [1, 2, 3, 4], "the second way on that is told"


def test_checkpoint_of_stock_torchtitan_is_refused_with_words_and_can_be_taken_over(files: Path) -> None:
    """Written by its own loader, on text."""
    text = files / "text"
    text.mkdir()
    (text / "a.jsonl").write_text('{"text": "def f(x): return x"}\n' * 200)
    flags = [f"--job.config_file={files}/job.toml", "--model.name=llama3", "--training.dataset=c4_test"]
    flags += [f"--training.dataset_path={text}", "--checkpoint.enable", "--training.steps=2"]

    def stock() -> None:
        trainer = Trainer(ConfigManager().parse_args(flags))
        trainer.train()
        trainer.close()

    run_rank_values(stock)
    message = refused(files, "--checkpoint.enable")
    assert "The checkpoint has no 'dataloader.mosaic': another loader wrote it" in message
    [taken] = train(files, "--checkpoint.enable", "--checkpoint.exclude_from_loading=dataloader")
    assert list(losses(taken.output)) == [3, 4]
