"""Whole runs of a plan: what they read and say, killed in each stage, and what preview tells of them."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from examples.mosaic_streaming.train import main
from tests.e2e.test_torchrun import TORCHRUN, ends_well, kill_tree
from tests.support.jobs import SAVE, command, logged, train, write_files
from tests.support.looking import preview, printed
from tests.support.ranks import run_ranks, wait_until
from tests.support.recording import PAUSE, recorded, recording, steps_recorded
from tests.support.streams import write_stream

CODE = 200
"""Number of the first sample of the stream `code`; those of `web` begin with 0."""

PLAN = """
[[stage]]
loader = "web.toml"

[[stage]]
from_step = 4
loader = "mixed.toml"

[[stage]]
from_step = 9
loader = "code.toml"
"""
SKIPS = """
[[skip]]
batches = "2:3"
reason = "loss spike"

[[skip]]
batches = "8:8"
"""
LOADER = """
name = "text"
num_workers = {workers}
[dataset]
shuffle = true
batching_method = "blend"
shuffle_block_size = 20
num_canonical_nodes = 4
"""
STREAMS = {
    "web": '[dataset.streams.web]\nlocal = "{folder}/stream"\n',
    "code": '[dataset.streams.code]\nlocal = "{folder}/code"\n',
}


def write_plan(folder: Path, skips: str = SKIPS, workers: int = 0) -> None:
    """Write the plan as `loader.toml`, and its stages' loaders."""
    weights = {"web": "proportion = 0.25\n", "code": "proportion = 0.75\n"}
    mixed = "".join(STREAMS[name] + weights[name] for name in STREAMS)
    for name, streams in (STREAMS | {"mixed": mixed}).items():
        text = LOADER.format(workers=workers) + streams.format(folder=folder)
        (folder / f"{name}.toml").write_text(text)
    (folder / "loader.toml").write_text(PLAN + skips)


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    folder = write_files(module_path)
    write_stream(folder / "code", 60, first=CODE)
    write_plan(folder)
    return folder


Whole = tuple[dict[int, float], list[list[int]], str]
"""The losses of a run of 12 steps, the samples of each step, and the log."""


def run(folder: Path, name: str, *flags: str, world_size: int = 1) -> Whole:
    with recording(folder / "recorded" / name):
        ranks = train(folder, *SAVE, f"--checkpoint.folder={name}", *flags, world_size=world_size)
    return logged(ranks), recorded(folder / "recorded" / name), ranks[0].output


@pytest.fixture(scope="module")
def whole(folder: Path) -> Whole:
    """In one go on one rank, saved at each step."""
    return run(folder, "whole", "--training.local_batch_size=4", "--checkpoint.keep_latest_k=0")


def looked_up(folder: Path, *flags: str, titan: tuple[str, ...] = ()) -> list[list[int]]:
    """The samples of each step, as `preview step` tells them."""
    found: dict[int, list[int]] = {}
    for sample in preview(folder, "step", "1:12", "--no-text", *flags, titan=titan)["samples"]:
        number = sample["sample_of_stream"] + CODE * (sample["stream"] == "code")
        found.setdefault(sample["step"], []).append(number)
    return [sorted(found[step]) for step in range(1, 13)]


TITAN = ("--training.steps=12", "--training.global_batch_size=8", "--training.local_batch_size=4")


def test_preview_tells_what_a_run_reads(folder: Path, whole: Whole) -> None:
    assert looked_up(folder, titan=TITAN) == whole[1]
    saved = f"--checkpoint={folder}/outputs/whole/step-6"
    assert looked_up(folder, saved, titan=TITAN) == whole[1], "before and after a checkpoint"


def test_log_says_each_change_when_it_comes(folder: Path, whole: Whole) -> None:
    streams = preview(folder, "plan", titan=TITAN)["streams"]
    [code] = [one["passes_of_run"] for one in streams if (one["stage"], one["name"]) == (2, "code")]
    lines = [line.partition("INFO - ")[2] for line in whole[2].splitlines()]
    assert " Skipped: batches 2 to 3 (loss spike), batch 8." in whole[2] and "Stage 1 ends: " in whole[2]
    changes = [number for number, line in enumerate(lines) if re.match(r"Skipped|Stage \d begins", line)]
    assert [lines[number] for number in changes] == [
        "Skipped: batches 2 to 3 (loss spike). Step 2 of the plan reads batch 4.",
        f"Stage 2 begins with step 4 of the plan, batch 6: {folder}/mixed.toml; passes so far: web 0.40, code 0.00.",
        "Skipped: batch 8. Step 6 of the plan reads batch 9.",
        f"Stage 3 begins with step 9 of the plan, batch 12: {folder}/code.toml; passes so far: code {code:.2f}.",
    ]
    steps = [next(line for line in reversed(lines[:number]) if "loss:" in line) for number in changes]
    assert [int(re.findall(r"step: +(\d+)", line)[0]) for line in steps] == [1, 3, 5, 8]


def test_ledger_and_plan_work_across_stages(folder: Path, whole: Whole, tmp_path: Path) -> None:
    ledger = preview(folder, "ledger", "--step=12", f"--plot={tmp_path}/shares.png", titan=TITAN)
    read = [sample for step in whole[1] for sample in step]
    assert {stream["stream"]: stream["samples"] for stream in ledger["streams"]} == {
        "web": sum(sample < CODE for sample in read),
        "code": sum(sample >= CODE for sample in read),
    }
    sizes, passes = {"web": 100, "code": 60}, {stream["stream"]: stream["passes"] for stream in ledger["streams"]}
    for name, size in sizes.items():
        of_stream = [sample for sample in read if (sample >= CODE) == (name == "code")]
        assert len(of_stream) == passes[name] * size
        twice = len(of_stream) - len(set(of_stream))
        assert twice <= max(0, len(of_stream) + 8 - size), "none twice before all once; 8 at most were skipped"
    asked = {stream["stream"]: stream["samples_asked"] for stream in ledger["streams"]}
    assert asked == {"web": 3 * 8 + 0.25 * 5 * 8, "code": 0.75 * 5 * 8 + 4 * 8}
    assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")
    plan = preview(folder, "plan", titan=TITAN)
    shown = [
        [stage[key] for key in ("stage", "from_step", "last_step", "first_batch", "samples")]
        for stage in plan["stages"]
    ]
    assert shown == [[1, 1, 3, 1, 24], [2, 4, 8, 6, 40], [3, 9, 12, 12, 32]]
    assert [(skip["first"], skip["last"], skip["reason"], skip["step"]) for skip in plan["skips"]] == [
        (2, 3, "loss spike", 2),
        (8, 8, "", 6),
    ]
    assert plan["run"]["samples"] == 96 and plan["run"]["tokens"] == 96 * 16
    said = printed(folder, "plan", titan=TITAN)
    assert "batches 2 to 3" in said and "mixed.toml" in said


def test_rows_of_each_stage_are_shown(folder: Path) -> None:
    rows = preview(folder, "show", "--rows=1", titan=TITAN)
    assert [row["samples"][0]["stream"] for row in rows] == ["web", "web", "code", "code"]
    [row] = preview(folder, "show", "--rows=1", "--stage=3", titan=TITAN)
    assert row["samples"][0]["stream"] == "code"
    told = "Sample 9999: the streams of stage 1 (--stage) have samples 0 to"
    assert told in printed(folder, "show", "--sample=9999", titan=TITAN, code=1)
    assert "has 3 stages." in printed(folder, "show", "--stage=4", titan=TITAN, code=1)


def test_batches_before_a_spike_come_with_a_skip_for_them(folder: Path, whole: Whole) -> None:
    report = preview(folder, "step", "--around=7", "--no-text", titan=TITAN)
    assert {sample["step"] for sample in report["samples"]} == {*range(1, 8)}
    ranges = ["6:7", "9:10"]
    assert report["around"] == [{"batches": one, "reason": "up to step 7"} for one in ranges], "without what is skipped"
    said = printed(folder, "step", "--around=7", "--no-text", titan=TITAN)
    assert (
        '\n\n[[skip]]\nbatches = "9:10"\nreason = "up to step 7"\n\nThe steps up to 3 are of an earlier stage' in said
    )
    assert said.split()[-2:] == ["--around", "3."]
    report = preview(folder, "step", "--around=3", "--no-text", titan=TITAN)
    assert [one["batches"] for one in report["around"]] == ["1:1", "4:5"] and not report["around_notes"]
    assert "Expected one of: the steps" in printed(folder, "step", titan=TITAN, code=1)


def test_skips_around_a_step_leave_out_what_was_read(folder: Path) -> None:
    old = ids_of(preview(folder, "step", "1:9", "--no-text", titan=TITAN))
    write_plan(folder, SKIPS + "".join(f'[[skip]]\nbatches = "{one}"\n' for one in ("6:7", "9:10")))
    new = ids_of(preview(folder, "step", "1:9", "--no-text", titan=TITAN))
    assert {step: new[step] for step in range(1, 5)} == {1: old[1], 2: old[2], 3: old[3], 4: old[8]}
    assert not [warning for warning in preview(folder, "plan", titan=TITAN)["warnings"] if "skip" in warning]
    write_plan(folder)


def test_skip_that_reaches_beyond_a_stage_is_warned_of(folder: Path) -> None:
    write_plan(folder, '[[skip]]\nbatches = "2:4"\n[[skip]]\nbatches = "5"\n')
    [told] = [warning for warning in preview(folder, "plan", titan=TITAN)["warnings"] if "skip" in warning]
    assert told == (
        f"The skip of batches 2 to 5 in {folder}/loader.toml is in stage 1 alone: without it, stage 2 began with batch "
        "4, with it, it begins with batch 8. Skip batches of one stage at a time, and look up those of later stages "
        "again."
    )
    write_plan(folder)


def test_plan_counts_what_stages_have_in_common_where_streams_begin_anew(folder: Path) -> None:
    web = folder / "web.toml"
    web.write_text(web.read_text().replace("blend", "random"))
    found = ids_of(preview(folder, "step", "1:12", "--no-text", titan=TITAN))
    read = [{sample for step in steps for sample in found[step]} for steps in (range(1, 4), range(4, 13))]
    number = len(read[0] & read[1])
    write_plan(folder)
    assert preview(folder, "plan", titan=TITAN)["in_common"] is None
    web.write_text(web.read_text().replace("blend", "random"))
    assert number and preview(folder, "plan", titan=TITAN)["in_common"] == {"samples": number}
    write_plan(folder)


def ids_of(report: dict[str, Any]) -> dict[int, list[tuple[str, int]]]:
    """The samples of each step, by stream."""
    found: dict[int, list[tuple[str, int]]] = {}
    for one in report["samples"]:
        found.setdefault(one["step"], []).append((one["stream"], one["sample_of_stream"]))
    return found


@pytest.mark.parametrize("step", [3, *(pytest.param(step, marks=pytest.mark.long) for step in (1, 5, 6, 8, 10))])
def test_run_goes_on_from_any_step(folder: Path, whole: Whole, step: int) -> None:
    """Also directly before a stage or a skip, on one rank, and with workers on two."""
    shutil.copytree(folder / f"outputs/whole/step-{step}", folder / f"outputs/from-{step}/step-{step}")
    losses, samples, _ = run(folder, f"from-{step}", "--training.local_batch_size=4", "--checkpoint.interval=100")
    assert (losses, samples) == ({n: loss for n, loss in whole[0].items() if n > step}, whole[1][step:])


def test_runs_agree_up_to_a_skip_and_read_the_right_batches_behind_it(folder: Path) -> None:
    found = []
    for name, skips in (("all", ""), ("some", SKIPS)):
        (folder / "loader.toml").write_text('[[stage]]\nloader = "mixed.toml"\n' + skips)
        found.append(run(folder, name, "--training.local_batch_size=4"))
    write_plan(folder)
    (losses, samples, _), (losses_of_some, some, _) = found
    assert losses[1] == losses_of_some[1] and losses[2] != losses_of_some[2]
    numbers = [1, *range(4, 8), *range(9, 13)]
    assert some[:9] == [samples[number - 1] for number in numbers]
    assert not {sample for step in some[9:] for sample in step} <= {sample for step in samples for sample in step}


def test_run_of_a_plan_is_refused_a_skip_behind_it(folder: Path, whole: Whole) -> None:
    write_plan(folder, skips=SKIPS.replace('"8:8"', '"4:8"'))
    flags = (*SAVE, "--checkpoint.folder=whole", "--training.steps=20", "--training.local_batch_size=4")
    try:
        [rank] = run_ranks(lambda: main(command(folder, *flags)))
        plan = printed(
            folder, "plan", f"--checkpoint={folder}/outputs/whole", titan=(*TITAN, "--checkpoint.enable"), code=1
        )
    finally:
        write_plan(folder)
    assert rank.code == 1 and "Traceback" not in rank.output
    told = (
        f"The skip of batches 4 to 8 in {folder}/loader.toml names batches that have been read: the checkpoint is of "
        "step 12, which read batch 15. Go back to a checkpoint of step 1 or before with --checkpoint.load_step, or "
        "change the skip."
    )
    assert told in rank.output and told in plan
    assert "order does not survive" in plan and "The next sample is" not in plan, "of no known stage"


def test_plan_of_a_resume_says_what_lies_ahead_has_changed(folder: Path, whole: Whole) -> None:
    write_plan(folder, skips=SKIPS + '[[skip]]\nbatches = "15:15"\n')
    checkpoint = f"--checkpoint={folder}/outputs/whole/step-6"
    said = printed(folder, "plan", checkpoint, titan=TITAN)
    write_plan(folder)
    assert "The plan after step 6 has changed. New: skip of batch 15." in said
    assert "Nothing has changed: the same global batches follow." in printed(folder, "plan", checkpoint, titan=TITAN)


def start(folder: Path, name: str, ranks: int) -> subprocess.Popen[str]:
    """Start the run through torchrun, saved at each step; what it prints goes to a file, its samples to a folder."""
    shutil.rmtree(folder / "recorded" / name, ignore_errors=True)
    (folder / "recorded" / name).mkdir(parents=True)
    flags = command(folder, *SAVE, "--debug.seed=1", f"--checkpoint.folder={name}")
    run = ["-m", "tests.support.recording", str(folder / "recorded" / name), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(folder / f"{name}.log", "w") as log:
        options: Any = {"stdout": log, "stderr": subprocess.STDOUT, "text": True, "env": environment}
        return subprocess.Popen([*TORCHRUN, f"--nproc_per_node={ranks}", *run], **options)


def wait_for(folder: Path, name: str, ranks: int, steps: int, saved: int) -> None:
    """Wait until all ranks have read so many steps since their start, and a step is saved."""
    files = [folder / f"recorded/{name}/{rank}.jsonl" for rank in range(ranks)]
    checkpoint, log = folder / f"outputs/{name}/step-{saved}/.metadata", folder / f"{name}.log"
    wait_until(lambda: checkpoint.exists() and all(steps_recorded(file) == steps for file in files), log.read_text)


@pytest.mark.long
@pytest.mark.both
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2])
def test_run_that_is_killed_in_each_stage_has_the_losses_of_one_in_one_go(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    name = f"killed-{ranks}"
    read: list[list[int]] = []
    losses, samples = ends_well(folder, f"one-go-{ranks}", [start(folder, f"one-go-{ranks}", ranks)])
    for steps in (2, 4, 4):  # of each start, until it waits to be killed: in stage 1, stage 2 and stage 3
        monkeypatch.setenv(PAUSE, str(steps))
        agent = start(folder, name, ranks)
        wait_for(folder, name, ranks, steps, len(read) + steps)
        kill_tree(agent.pid)
        agent.wait()
        read += recorded(folder / "recorded" / name)
    monkeypatch.delenv(PAUSE)
    found, rest = ends_well(folder, name, [start(folder, name, ranks)])
    assert read + rest == samples and len(rest) == 2
    assert found == pytest.approx({step: losses[step] for step in (11, 12)}, abs=1e-5)
