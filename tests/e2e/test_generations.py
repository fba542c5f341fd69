"""One job on both generations of TorchTitan: the same losses, and a run whose data moves from one to the other."""

import json
import subprocess
from pathlib import Path

import pytest

from examples.mosaic_streaming.train import main
from tests.support.jobs import command, logged, losses, train
from tests.support.looking import preview
from tests.support.ranks import run_ranks
from tests.support.recording import recorded, recording
from tests.support.titan import IS_0_2

OTHER = Path(".venv-titan-0.3/bin/python" if IS_0_2 else ".venv/bin/python")
"""Python with the other generation."""

RUN = """
import json, sys, warnings
from pathlib import Path
warnings.filterwarnings("ignore")
import tests.conftest
from tests.support.jobs import logged, train
from tests.support.recording import recorded, recording
files, name, *flags = sys.argv[1:]
with recording(Path(files, name)):
    ranks = train(Path(files), *flags)
print("found", json.dumps([logged(ranks), recorded(Path(files, name))]))
"""

both = pytest.mark.both
needs_other = pytest.mark.skipif(not OTHER.exists(), reason=f"no {OTHER}")


def train_in_the_other(files: Path, name: str, *flags: str) -> tuple[dict[int, float], list[list[int]]]:
    """Losses and samples of a run on one rank, with the other generation."""
    run = [str(OTHER), "-c", RUN, str(files), name, *flags]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    [found] = [line for line in ended.stdout.splitlines() if line.startswith("found ")]
    losses, samples = json.loads(found.removeprefix("found "))
    return {int(step): loss for step, loss in losses.items()}, samples


@both
@needs_other
@pytest.mark.long
def test_losses_and_samples_of_one_seed_are_the_same_on_both_generations(files: Path) -> None:
    flags = ("--training.steps=10", "--debug.seed=1")
    with recording(files / "here"):
        here = logged(train(files, *flags))
    there, samples = train_in_the_other(files, "there", *flags)
    assert recorded(files / "here") == samples
    assert len(here) == 10 and here == pytest.approx(there, abs=1e-4)


def test_new_run_goes_on_from_the_position_of_another(files: Path) -> None:
    with recording(files / "whole"):
        train(files, "--training.steps=6", "--checkpoint.enable", "--checkpoint.interval=4", "--checkpoint.folder=old")
    goes_on(files)


@both
@needs_other
@pytest.mark.long
def test_position_of_a_run_moves_from_one_generation_to_the_other(files: Path) -> None:
    save = ("--training.steps=6", "--checkpoint.enable", "--checkpoint.interval=4", "--checkpoint.folder=old")
    train_in_the_other(files, "whole", *save)
    goes_on(files)


def goes_on(files: Path) -> None:
    """Begin another run at step 4 of the old one, let it go on from a checkpoint of its own, and look at it."""
    position = ["--mosaic-position", f"{files}/outputs/old/step-4"]
    flags = ("--checkpoint.enable", "--checkpoint.interval=1", "--checkpoint.folder=new")

    def start(name: str, steps: int) -> str:
        with recording(files / name):
            [rank] = run_ranks(lambda: main([*position, *command(files, *flags, f"--training.steps={steps}")]))
        assert rank.code == 0, rank.output
        return rank.output

    said = start("new", 1)
    assert list(losses(said)) == [1] and "The streams go on from the position in" in said
    assert "16 samples were read before this start." in said
    assert recorded(files / "new") == recorded(files / "whole")[4:5]
    said = start("further", 2)
    assert list(losses(said)) == [2] and "The streams go on from the position in" not in said
    assert recorded(files / "further") == recorded(files / "whole")[5:6]
    looked = preview(files, "step", "2", "--no-text", f"--checkpoint={files}/outputs/new/step-2", titan=flags)
    assert sorted(sample["sample"] for sample in looked["samples"]) == recorded(files / "further")[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "",
            "--mosaic-position {files}/nothing is no finished checkpoint. Expected a step's folder, such as step-500.",
        ),
        ("shuffle_seed = 5\n", "dataset.shuffle_seed"),
    ],
)
def test_position_that_does_not_fit_is_refused(files: Path, change: str, message: str) -> None:
    folder = "nothing"
    if change:
        train(files, "--training.steps=1", "--checkpoint.enable")
        folder = "outputs/checkpoint/step-1"
        loader = files / "loader.toml"
        loader.write_text(loader.read_text() + change)
    [rank] = run_ranks(lambda: main(["--mosaic-position", f"{files}/{folder}", *command(files)]))
    assert rank.code == 1 and "Traceback" not in rank.output and not losses(rank.output), rank.output
    assert message.format(files=files) in rank.output
    assert "Building llama3" not in rank.output, "told before the model is built"
