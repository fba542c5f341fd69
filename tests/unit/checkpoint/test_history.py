"""A run's history: which samples it has read and will read in which step, against real runs that change on the way."""

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.mosaic_streaming import checkpoint
from examples.mosaic_streaming.checkpoint.history import Position, Segment, append_segment
from examples.mosaic_streaming.checkpoint.state import State, pack, unpack
from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.preview.__main__ import main
from examples.mosaic_streaming.sampling.order import Order
from tests.support.jobs import command, train, write_files, write_loader
from tests.support.looking import by_dp_rank, recorded_by_dp_rank
from tests.support.ranks import run_rank_values
from tests.support.recording import recording
from tests.support.streams import history, write_stream

SAVE = ("--checkpoint.enable", "--checkpoint.interval=100")
WIDER = ("--training.global_batch_size=8",)
ANEW = ("--checkpoint.exclude_from_loading=dataloader",)

Samples = dict[tuple[int, int], list[int]]


def go(files: Path, first: int, last: int, *flags: str) -> Samples:
    """Train up to a step, which is saved; the samples of each step since the start, whose first is given."""
    with recording(files / f"{first}-{last}"):
        train(files, *SAVE, f"--training.steps={last}", *flags)
    found = recorded_by_dp_rank(files / f"{first}-{last}", first)
    assert {step for step, _ in found} == {*range(first, last + 1)}
    return found


def saved(files: Path, step: int) -> str:
    """The flag that names a checkpoint."""
    return f"--checkpoint={files}/outputs/checkpoint/step-{step}"


@dataclass(frozen=True)
class Look:
    """A command of the preview, flags of TorchTitan's, and the exit code."""

    flags: tuple[str, ...]
    titan: tuple[str, ...] = ()
    code: int = 0

    def run(self, files: Path) -> Any:
        """What it says in the present process: with `--json`, its report."""
        with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
            code: Any = 0
            try:
                main([*self.flags, *command(files, *self.titan)])
            except SystemExit as exit:
                code = exit.code
        said = output.getvalue() + errors.getvalue()
        assert code == self.code and "Traceback" not in said, f"{self}: {code}\n{said}"
        return json.loads(output.getvalue()) if "--json" in self.flags else said


def look(files: Path, *looks: Look) -> list[Any]:
    """What commands say, one after another, in one process."""
    [found] = run_rank_values(lambda: [one.run(files) for one in looks])
    return list(found)


def says(*flags: str, titan: tuple[str, ...] = (), code: int = 0) -> Look:
    """A look at what a command prints."""
    return Look(flags, titan, code)


def report(*flags: str, titan: tuple[str, ...] = ()) -> Look:
    """A look at the report of a command."""
    return Look((*flags, "--json"), titan)


def samples_of(steps: str, *flags: str, titan: tuple[str, ...] = ()) -> Look:
    """A look at the samples of steps, for `found_in`."""
    return report("step", steps, "--no-text", *flags, titan=titan)


def found_in(report: Any) -> Samples:
    """The samples in the report of a `step`."""
    return by_dp_rank(report["samples"])


def first_repeat(read: Samples) -> int:
    """The first step that has read a sample again."""
    seen: set[int] = set()
    for (step, _), samples in sorted(read.items()):
        if seen & set(samples):
            return step
        seen |= set(samples)
    raise AssertionError("none does")


@pytest.fixture(scope="module")
def wider(module_path: Path) -> tuple[Path, Samples]:
    """A run of 12 steps, the last 6 with twice the global batch: of 64 samples of an epoch, 24 and 40, and 8 more."""
    files = write_files(module_path / "wider")
    return files, go(files, 1, 6) | go(files, 7, 12, *WIDER)


@pytest.mark.long
def test_run_that_goes_on_with_twice_the_global_batch_is_known_before_it_does_and_afterwards(
    wider: tuple[Path, Samples],
) -> None:
    files, read = wider
    assert [len(read[step, 0]) for step in (6, 7)] == [4, 8]
    for step in (6, 12):
        found, ledger, *plans = look(
            files,
            samples_of("1:12", saved(files, step), titan=WIDER),
            report("ledger", "--step=9", saved(files, step), titan=WIDER),
            *(report("plan", saved(files, step), titan=(*WIDER, f"--training.steps={last}")) for last in (11, 12)),
        )
        assert found_in(found) == read
        assert ledger["streams"][0]["samples"] == 48
        for steps, run in zip((11, 12), (plan["run"] for plan in plans), strict=True):
            assert run["samples"] == sum(len(samples) for (at, _), samples in read.items() if at <= steps)
            assert (run["first_repeat_step"], run["fits"]) == (first_repeat(read), steps == 11)
            assert (run["first_repeat_samples"], run["epochs"]) == (64, run["samples"] / 64)
    ledger, refused, said = look(
        files,
        report("ledger", saved(files, 12)),
        says("step", "6", saved(files, 6), "--world-size=4", titan=WIDER, code=1),
        says("step", "6:7", saved(files, 12)),
    )
    assert ledger["streams"][0]["samples"] == ledger["samples_by_checkpoint"] == 72
    assert (ledger["epoch"], ledger["sample_in_epoch"], ledger["global_batch_size"]) == (1, 8, 8)
    assert "Step 6 has a global batch of 4 samples, which 4 dp ranks with batches of 2 can't share." in refused
    assert "From step 1 on, global batches of 4 samples, from sample 0 of epoch 0." in said
    assert "From step 7 on, global batches of 8 samples, from sample 24 of epoch 0." in said


@pytest.mark.long
def test_checkpoint_is_the_one_that_a_start_loads(wider: tuple[Path, Samples]) -> None:
    files, read = wider
    folder, loads = f"--checkpoint={files}/outputs/checkpoint", (*SAVE, "--checkpoint.load_step=6", *WIDER)
    ways: list[list[str]] = [[folder], [], [saved(files, 6)]]
    *found, other, none = look(
        files,
        *(samples_of("7:12", *flags, titan=loads) for flags in ways),
        *(report("plan", *flags, titan=(*loads, "--training.steps=12")) for flags in ways),
        says("step", "7", saved(files, 12), titan=loads, code=1),
        says("step", "7", folder, titan=("--checkpoint.load_step=5",), code=1),
    )
    for samples, plan in zip(found[:3], found[3:], strict=True):
        assert found_in(samples) == {key: read[key] for key in read if key[0] > 6}
        resume = plan["resume"]
        assert (resume["step"], resume["steps_left"], resume["sample_in_epoch"]) == (6, 6, 24)
    assert "step-12 is of step 12, but a start loads checkpoint.load_step = 6." in other
    assert "checkpoint.load_step = 5, but " in none and "has finished steps: 6, 12." in none


def test_report_of_a_run_that_begins_says_so_where_the_job_has_checkpoints(wider: tuple[Path, Samples]) -> None:
    files, _ = wider
    commands = (["step", "1", "--no-text"], ["ledger"], ["plan"])
    for flags, told in (((), False), (SAVE, True)):
        for found in look(files, *(report(*words, titan=flags) for words in commands)):
            assert any("has checkpoints" in text for text in found["warnings"]) == told


@pytest.fixture(scope="module")
def anew(module_path: Path) -> tuple[Path, Samples]:
    """A run whose streams begin anew after step 4 and after step 7, and that goes on wider after step 9."""
    files = write_files(module_path / "anew")
    read = go(files, 1, 4) | go(files, 5, 7, *ANEW) | go(files, 8, 9, *ANEW) | go(files, 10, 11, *WIDER)
    assert read[1, 0] == read[5, 0] == read[8, 0], "the first batch of the streams"
    return files, read


@pytest.mark.long
def test_steps_go_on_where_the_streams_begin_anew(anew: tuple[Path, Samples]) -> None:
    files, read = anew
    cases: list[tuple[int, int, int, tuple[str, ...]]] = [
        (1, 7, 4, ANEW),
        (5, 7, 7, ()),
        (5, 9, 7, ANEW),
        (8, 11, 9, WIDER),
        (8, 11, 11, WIDER),
    ]
    looks = [samples_of(f"{first}:{last}", saved(files, step), titan=flags) for first, last, step, flags in cases]
    *found, own = look(files, *looks, samples_of("12", titan=(*SAVE, *ANEW)))
    for (first, last, *_), samples in zip(cases, found, strict=True):
        assert found_in(samples) == {key: read[key] for key in read if first <= key[0] <= last}
    assert found_in(own) == {(12, 0): read[1, 0]}, "the job's own last checkpoint"
    before = ((4, 7), (7, 9), (7, 11))
    refused = look(files, *(says("step", str(step), saved(files, at), code=1) for step, at in before))
    for (step, _), said in zip(before, refused, strict=True):
        assert f"ConfigError: Step {step} was read before step {step + 1}, and the streams began anew there" in said


@pytest.mark.long
def test_ledger_and_plan_count_since_the_streams_began_anew(anew: tuple[Path, Samples]) -> None:
    files, read = anew
    steps = "--training.steps=7"
    ledger, printed, whole, plan_of_all, plan, printed_plan = look(
        files,
        report("ledger", saved(files, 7)),
        says("ledger", saved(files, 7)),
        report("ledger", saved(files, 4), "--step=7", titan=ANEW),
        report("plan", saved(files, 4), titan=(*ANEW, steps)),
        report("plan", saved(files, 7), titan=(steps,)),
        says("plan", saved(files, 7), titan=(steps,)),
    )
    assert (ledger["step"], ledger["since_step"], ledger["sample_in_epoch"]) == (7, 4, 12)
    assert ledger["streams"][0]["samples"] == ledger["samples_by_checkpoint"] == 12
    assert "All is counted since the streams began anew after step 4." in printed
    assert (whole["since_step"], whole["streams"][0]["samples"]) == (0, 28), "where all is known"
    run = plan_of_all["run"]
    assert (run["samples"], run["first_repeat_step"], run["fits"]) == (28, first_repeat(read), False)
    run = plan["run"]
    assert (run["since_step"], run["samples"], run["fits"]) == (4, 12, True)
    assert "Samples, tokens and repeats since the streams began anew after step 4." in printed_plan


def test_steps_that_are_counted_from_1_again_read_on(wider: tuple[Path, Samples]) -> None:
    files, read = wider
    flags = ("--checkpoint.exclude_from_loading=train_state", "--training.steps=3")
    later = {(step - 6, dp_rank): samples for (step, dp_rank), samples in read.items() if 6 < step < 10}
    found, plan = look(
        files,
        samples_of("1:3", saved(files, 6), titan=(*flags, *WIDER)),
        report("plan", saved(files, 6), titan=flags),
    )
    assert found_in(found) == later
    resume = plan["resume"]
    assert (resume["step"], resume["steps_left"], resume["sample_in_epoch"]) == (6, 3, 24)


def pack_without_segments(state: State) -> dict[str, str]:
    """As states were saved before they had segments."""
    text = json.loads(pack(state)["mosaic"])
    del text["steps"], text["segments"]
    return {"mosaic": json.dumps(text)}


@pytest.mark.long
def test_run_from_before_its_history_was_saved_is_known_from_there_on(files: Path) -> None:
    with mock.patch.object(checkpoint, "pack", pack_without_segments):
        go(files, 1, 6)
    read = go(files, 7, 12, *WIDER)
    for step in (6, 12):
        found, said, plan = look(
            files,
            samples_of("7:12", saved(files, step), titan=WIDER),
            says("step", "6", saved(files, step), code=1),
            report("plan", saved(files, step), titan=("--training.steps=12", *WIDER)),
        )
        assert found_in(found) == read
        assert "Step 6 was read before step 7, and the checkpoint, of an earlier version of this code, doesn't" in said
        run = plan["run"]
        assert (run["samples"], run["first_repeat_step"], run["fits"]) == (72, None, None)
    said, ledger = look(files, says("plan", saved(files, 12)), report("ledger", saved(files, 12)))
    assert "doesn't say what was read in which step" in said
    assert ledger["streams"][0]["samples"] == ledger["samples_by_checkpoint"] == 72, "it was still in epoch 0"


@pytest.mark.long
def test_earlier_epochs_of_a_run_from_before_its_history_was_saved_are_not_counted(files: Path) -> None:
    with mock.patch.object(checkpoint, "pack", pack_without_segments):
        go(files, 1, 17)
    said, plan = look(
        files,
        says("ledger", saved(files, 17), code=1),
        report("plan", saved(files, 17), titan=("--training.steps=20",)),
    )
    assert "ConfigError: What was read before epoch 1 is not known" in said
    assert plan["run"]["samples"] == 80


def test_start_that_would_be_refused_has_no_run(wider: tuple[Path, Samples], tmp_path: Path) -> None:
    """Here on fewer samples than it has read."""
    files, _ = wider
    shutil.copy(files / "job.toml", tmp_path)
    write_loader(tmp_path, write_stream(tmp_path / "stream", 20))
    loader = tmp_path / "loader.toml"
    loader.write_text(loader.read_text().replace("num_canonical_nodes = 64", "num_canonical_nodes = 1"))
    said, new, first = look(
        tmp_path,
        says("plan", saved(files, 6), titan=SAVE, code=1),
        samples_of("7", saved(files, 6), titan=ANEW),
        samples_of("1"),
    )
    assert "Not known, as a start would be refused." in said
    assert "A start would be refused, with the reason at the end." in said
    assert "ConfigError: The checkpoint was written on other data." in said
    assert found_in(new)[7, 0] == found_in(first)[1, 0], "the first batch of the new data"


@st.composite
def runs(draw: st.DrawFn) -> tuple[Order, list[tuple[int, int]]]:
    """An order, and parts of a run: steps, and their global batch."""
    samples = draw(st.integers(12, 60))
    parts = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4)
    return Order("random", 1, 1, samples), draw(parts)


def simulate(samples: int, parts: list[tuple[int, int]]) -> Iterator[tuple[Segment, list[list[tuple[int, int]]]]]:
    """Each part of a run: where it begins, and its steps' samples, by epoch and number, as a loader goes on."""
    step = epoch = at = 0
    for steps, batch in parts:
        if at + batch > samples:
            epoch, at = epoch + 1, 0
        begin, read = Segment(step, epoch, at, batch), []
        for _ in range(steps):
            read.append([(epoch, number) for number in range(at, at + batch)])
            at += batch
            if at + batch > samples:
                epoch, at = epoch + 1, 0
        step += steps
        yield begin, read


@given(runs())
def test_history_walks_as_a_loader_does(run: tuple[Order, list[tuple[int, int]]]) -> None:
    order, parts = run
    found = [*simulate(order.epoch_samples, parts)]
    segments: tuple[Segment, ...] = ()
    for segment, _ in found:
        segments = append_segment(segments, segment)
    known, steps = history(order, *segments), [samples for _, read in found for samples in read]
    for number, samples in enumerate(steps, start=1):
        part = known.slice(number)
        assert [(part.epoch, sample) for sample in range(part.begin, part.end)] == samples
    for after, until in ((0, len(steps)), (len(steps) // 2, len(steps)), (0, len(steps) // 2)):
        slices = [*known.slices(after, until)]
        read = [(part.epoch, sample) for part in slices for sample in range(part.begin, part.end)]
        assert read == [sample for samples in steps[after:until] for sample in samples]
        assert all((part.end - part.begin) % part.global_batch_size == 0 for part in slices)
    assert known.samples(len(steps)) == sum(map(len, steps))
    assert known.position(0) == Position(0, 0, 0, 0)


def test_what_was_read_before_steps_are_counted_from_1_again_is_known() -> None:
    known = dataclasses.replace(history(Order("random", 4, 4, 64), Segment(0, 0, 0, 4)), steps_before=-6)
    assert known.samples(2) == 8 * 4
    assert [(part.step, part.begin, part.end) for part in known.slices(until=2)] == [(-6, 0, 32)]
    assert known.slice(1)[3:6] == (0, 24, 28)


def test_step_before_those_that_are_known_is_refused() -> None:
    known = history(Order("random", 4, 4, 64), Segment(5, 0, 0, 4))
    assert known.slice(6).begin == 0
    with pytest.raises(ConfigError, match=r"Step 5 was read before step 6, and the streams began anew there"):
        known.slice(5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"segments": []},
        {"segments": [[1, 0, 0, 4]]},
        {"segments": [[0, 0, 0, 4], [0, 0, 0, 8]]},
        {"segments": [[0, 0, 0, 0]]},
        {"segments": [[0, 0, 4]]},
        {"segments": [[0, 0, 0, 4], [9, 0, 0, 8]]},
        {"segments": 5},
        {"steps": -1},
        {"steps": None},
    ],
)
def test_damaged_segments_are_refused_with_words(wrong: dict[str, Any]) -> None:
    state = State(0, 8, 4, {}, None, 2, (Segment(0, 0, 0, 4),))
    text = json.loads(pack(state)["mosaic"])
    assert unpack({"mosaic": json.dumps(text)}) == state
    with pytest.raises(DataError, match="state is damaged"):
        unpack({"mosaic": json.dumps(text | wrong)})
