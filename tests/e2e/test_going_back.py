"""A start from an earlier step than the last: later ones are named, can be moved away, and cost no new checkpoint."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from examples.mosaic_streaming.titan import checkpoints, checks
from examples.mosaic_streaming.train import main
from tests.support.jobs import SAVE, command, losses, train
from tests.support.ranks import run_ranks

EVERY_2 = (*SAVE, "--checkpoint.interval=2")
BACK = ("--checkpoint.load_step=4", "--training.steps=5")


def steps_in(folder: Path) -> list[int]:
    """The steps that a folder has checkpoints of."""
    return sorted(int(name.removeprefix("step-")) for name in os.listdir(folder) if name.startswith("step-"))


def move_away(log: str) -> None:
    """Run the command that a message has."""
    [told] = re.findall(r"To move them away: (.*)", log)
    subprocess.run(["bash", "-c", told], check=True, timeout=20)


@pytest.mark.parametrize(
    ("removed", "listed"), [((), "{6..12..2}"), pytest.param((8,), "{6,10,12}", marks=pytest.mark.long)]
)
def test_later_steps_are_moved_away_by_the_command_of_the_warning(
    files: Path, removed: tuple[int, ...], listed: str
) -> None:
    flags, folder = (*EVERY_2, f"--job.dump_folder={files}/it's 2"), files / "it's 2/checkpoint"
    train(files, *flags)
    for step in removed:
        shutil.rmtree(folder / f"step-{step}")
    (folder / "abandoned-1").mkdir()
    [first] = train(files, *flags, *BACK)
    assert list(losses(first.output)) == [5] and first.output.count("goes back,") == 1
    assert f"/step-{listed} " in first.output
    move_away(first.output)
    assert steps_in(folder) == [2, 4, 5]
    assert steps_in(folder / "abandoned-2") == [step for step in (6, 8, 10, 12) if step not in removed]
    [second] = train(files, *flags)
    assert list(losses(second.output)) == list(range(6, 13)) and "goes back" not in second.output


def test_start_whose_checkpoints_torchtitan_would_delete_is_refused(files: Path) -> None:
    train(files, *EVERY_2)
    flags, folder = (*EVERY_2, *BACK, "--checkpoint.keep_latest_k=4"), files / "outputs/checkpoint"
    [refused] = run_ranks(lambda: main(command(files, *flags)))
    assert refused.code == 1 and refused.output.count("ConfigError") == 1
    assert "With checkpoint.keep_latest_k = 4, each new checkpoint would be deleted. " in refused.output
    move_away(refused.output)
    train(files, *flags)
    assert steps_in(folder) == [2, 4, 5] and steps_in(folder / "abandoned-1") == [6, 8, 10, 12]


def test_torchtitan_deletes_what_it_saves_below_later_steps(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why that is refused. Where this fails, the refusal may go (titan/checkpoints.py)."""
    train(files, *EVERY_2)
    for module in (checkpoints, checks):
        monkeypatch.setattr(module, "going_back", lambda *given: [])
    flags = (*SAVE, "--checkpoint.load_step=4", "--checkpoint.interval=5", "--checkpoint.keep_latest_k=4")
    [rank] = run_ranks(lambda: main(command(files, *flags, "--training.steps=6")))
    assert rank.code == 0, rank.output
    assert "Finished saving the checkpoint" in rank.output, "of step 5"
    assert steps_in(files / "outputs/checkpoint") == [6, 8, 10, 12]
