"""Packing: the same rows on any ranks and after any restart; what is left out is counted; the rest is refused."""

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from streaming import MDSWriter
from torchtitan.tools.logging import init_logger, logger

from examples.mosaic_streaming.batch import workers
from examples.mosaic_streaming.distributed.abort import AbortChannel
from examples.mosaic_streaming.errors import ConfigError
from tests.support.ranks import run_rank_values, run_ranks
from tests.support.reading import TURN
from tests.support.streams import FIRST_ID, build_loader, job, resolved
from tests.support.titan import IS_0_2, masking

SEQ_LEN = 256
ROWS = 8
"""Of a global batch."""
SAMPLES = 200
RATIO = 2.6


def length(sample: int) -> int:
    """Tokens of a sample: 20 to 219."""
    return 20 + int(np.random.default_rng(sample).integers(200))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream of samples of different lengths, each of which is made of one token, its own number."""
    place = tmp_path_factory.mktemp("packing") / "stream"
    with MDSWriter(out=str(place), columns=dict.fromkeys(TURN, "ndarray:int32"), size_limit=1 << 14) as writer:
        for sample in range(SAMPLES):
            tokens = np.full(length(sample), FIRST_ID + sample, np.int32)
            writer.write({"input_ids": tokens[:5], "labels": tokens[5:]})
    return place


def configuration(folder: Path, num_workers: int = 0, **dataset: Any) -> dict[str, Any]:
    """A loader's configuration with packing, shuffled."""
    settings = {"remote": str(folder), "local": str(folder), "num_canonical_nodes": 4, "shuffle": True}
    return {
        "name": "finetuning",
        "num_workers": num_workers,
        "dataset": settings | {"packing_ratio": RATIO} | dataset,
    }


def read(
    folder: Path, steps: int, world_size: int = 1, num_workers: int = 0, state: dict[str, str] | None = None
) -> tuple[list[list[list[int]]], list[dict[str, str]]]:
    """The rows of each global batch, sorted, from a state on, and the states after each."""
    local = 2
    accumulation = ROWS // local // world_size

    def read_rank() -> tuple[list[list[list[int]]], list[dict[str, str]]]:
        loader = build_loader(configuration(folder, num_workers), job(local, ROWS, SEQ_LEN))
        if state:
            loader.load_state_dict(state)
        batches, rows, states = iter(loader), [], []
        for _ in range(steps):
            rows.append([row for _ in range(accumulation) for row in next(batches)[0]["input"].tolist()])
            states.append(loader.state_dict())
        return rows, states

    ranks = run_rank_values(read_rank, world_size)
    assert all(states == ranks[0][1] for _, states in ranks)
    return [sorted(row for rows, _ in ranks for row in rows[step]) for step in range(steps)], ranks[0][1]


STEPS = 12
"""More than an epoch: 200 samples are 10 batches of 20."""


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> tuple[list[list[list[int]]], list[dict[str, str]]]:
    """Rows and states of one rank."""
    return read(folder, STEPS)


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (2, 0), (4, 2)])
def test_rows_are_the_same_on_any_ranks(
    folder: Path,
    uninterrupted: tuple[list[list[list[int]]], list[dict[str, str]]],
    world_size: int,
    num_workers: int,
) -> None:
    assert read(folder, STEPS, world_size, num_workers) == uninterrupted


@pytest.mark.long
def test_resume_after_each_step_reads_what_follows(
    folder: Path, uninterrupted: tuple[list[list[list[int]]], list[dict[str, str]]]
) -> None:
    rows, states = uninterrupted
    for step in range(STEPS - 1):
        world_size, num_workers = [(1, 0), (2, 2), (4, 0)][step % 3]
        left = min(3, STEPS - 1 - step)
        found = read(folder, left, world_size, num_workers, states[step])
        assert found == (rows[step + 1 : step + 1 + left], states[step + 1 : step + 1 + left])


def test_a_step_takes_samples_not_rows_and_counts_what_it_leaves_out(folder: Path) -> None:
    def run() -> list[list[int]]:
        init_logger()
        loader = build_loader(configuration(folder), job(2, ROWS, SEQ_LEN))
        batches = iter(loader)
        rows = [row for _ in range(10 * 4) for row in next(batches)[0]["input"].tolist()]
        state = loader.state_dict()["mosaic"]
        assert '"epoch": 1, "sample_in_epoch": 0, "global_batch_size": 20' in state, state
        loader.close()
        return rows

    [rank] = run_ranks(run)
    assert rank.code == 0, rank.output
    read_samples = [sample for row in rank.value for sample in set(row) if sample >= FIRST_ID]
    assert len(read_samples) == len(set(read_samples)) <= SAMPLES, "no sample is read twice"
    missing = set(range(SAMPLES)) - {sample - FIRST_ID for sample in read_samples}
    *_, told = re.finditer(r"Packing has left out ([\d,]+) of ([\d,]+) tokens", rank.output)
    # With the EOS that llm-foundry puts behind each response.
    assert int(told[1].replace(",", "")) == sum(length(sample) + 1 for sample in missing) > 0
    assert int(told[2].replace(",", "")) == sum(length(sample) + 1 for sample in range(SAMPLES))


def read_epoch(folder: Path, ratio: Any, world_size: int) -> tuple[float, int, str]:
    """Packing ratio, tokens that an epoch leaves out on all ranks, and rank 0's log."""
    local = ROWS // world_size

    def run() -> tuple[Any, int]:
        init_logger()
        loader = build_loader(configuration(folder, packing_ratio=ratio), job(local, ROWS, SEQ_LEN))
        batches = iter(loader)
        for _ in range(loader._order.epoch_samples // loader._order.global_batch_size):
            next(batches)
        return loader._opened.fingerprint["dataset.packing_ratio"], loader._packing.dropped

    ranks = run_ranks(run, world_size)
    assert [rank.code for rank in ranks] == [0] * world_size, ranks[0].output
    [found] = {rank.value[0] for rank in ranks}
    return float(found), sum(rank.value[1] for rank in ranks), ranks[0].output


@pytest.mark.parametrize("world_size", [1, 2])
def test_auto_is_the_largest_ratio_that_leaves_nothing_out(folder: Path, world_size: int) -> None:
    ratio, left_out, log = read_epoch(folder, "auto", world_size)
    assert log.count('packing_ratio = "auto"') == 1
    assert 1 < ratio < RATIO
    assert left_out == 0
    assert read_epoch(folder, round(ratio + 0.1, 1), world_size)[1] > 0


def test_auto_is_the_same_on_any_ranks_and_after_a_restart(folder: Path) -> None:
    def run() -> tuple[dict[str, str], list[int]]:
        loader = build_loader(configuration(folder, packing_ratio="auto"), job(2, ROWS, SEQ_LEN))
        batches = iter(loader)
        for _ in range(ROWS // 2 // dist.get_world_size()):
            next(batches)
        return loader.state_dict(), []

    def go_on() -> tuple[dict[str, str], list[int]]:
        loader = build_loader(configuration(folder, packing_ratio="auto"), job(2, ROWS, SEQ_LEN))
        loader.load_state_dict(state)
        return loader.state_dict(), next(iter(loader))[0]["input"].flatten().tolist()

    (state, _), *others = run_rank_values(run) + run_rank_values(run, 2)
    assert all(other == (state, []) for other in others)
    (again, rows), (same, _) = run_rank_values(go_on)[0], run_rank_values(go_on, 2)[0]
    assert again == same
    assert len(rows) == 2 * SEQ_LEN


def test_example_that_auto_cant_read_stops_all_ranks_with_its_reason(tmp_path: Path) -> None:
    """Its prompt fills the row: there is nothing to learn."""
    with MDSWriter(out=str(tmp_path / "stream"), columns=dict.fromkeys(TURN, "ndarray:int32")) as writer:
        for prompt in (20, SEQ_LEN + 20):
            writer.write({"input_ids": np.full(prompt, 30, np.int32), "labels": np.full(8, 31, np.int32)})

    def run() -> None:
        channel = AbortChannel()
        with channel.report_errors_once():
            config = configuration(tmp_path / "stream", packing_ratio="auto", num_canonical_nodes=1)
            build_loader(config, job(1, 2), channel=channel)

    ranks = run_ranks(run, 2)
    assert ranks[0].code == 1 and ranks[1].code not in (0, None)
    told = [line for rank in ranks for line in rank.output.splitlines() if "DataError: " in line]
    assert len(told) == 1 and told[0] in ranks[0].output
    assert str(tmp_path) in told[0] and "loader.toml" in told[0]
    assert not any("Traceback" in rank.output for rank in ranks)


def test_what_is_left_out_is_told_soon(folder: Path) -> None:
    def run() -> None:
        init_logger()
        batches = iter(build_loader(configuration(folder), job(ROWS, ROWS, SEQ_LEN)))
        for _ in range(10):
            next(batches)
        logger.info("Ten steps are read.")

    [rank] = run_ranks(run)
    assert rank.output.split("Ten steps are read.")[0].count("Packing has left out") == 2, "after 1 and 10 steps"


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"packing_ratio": 0.5}, "dataset.packing_ratio = 0.5 in loader.toml, expected"),
        ({"packing_ratio": "max"}, "dataset.packing_ratio = 'max' in loader.toml, expected"),
        ({"max_leftover_bins_to_keep": 3}, "dataset.max_leftover_bins_to_keep = 3 in loader.toml: what workers keep"),
        (
            {"packing_ratio": "auto", "batching_method": "per_stream"},
            "dataset.packing_ratio = \"auto\" with dataset.batching_method = 'per_stream' in loader.toml",
        ),
    ],
)
def test_packing_that_no_resume_could_repeat_is_refused(folder: Path, dataset: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolved(configuration(folder, **dataset), 2)


def test_auto_stops_where_its_worker_cannot_hand_on_samples(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here too many for a slot, for a temporary folder whose path is too long for a socket."""
    monkeypatch.setattr(workers, "SHARED_BYTES", 1024)
    long = tmp_path / ("x" * 100)
    long.mkdir()

    def run() -> None:
        tempfile.tempdir = str(long)
        build_loader(configuration(folder, packing_ratio="auto"), job(2, ROWS, SEQ_LEN))

    ranks = run_ranks(run, 2)
    assert ranks[0].code == 1 and ranks[1].code not in (0, None)
    assert "DataError: Dataloader worker 0 (pid" in ranks[0].output


def test_another_ratio_or_batch_is_another_run(folder: Path) -> None:
    def run() -> None:
        state = build_loader(configuration(folder), job(2, ROWS, SEQ_LEN)).state_dict()
        build_loader(configuration(folder, packing_ratio=2.0), job(4, ROWS, SEQ_LEN)).load_state_dict(state)

    [rank] = run_ranks(run)
    assert rank.code == 1
    assert "samples packed into a batch" in rank.output and "dataset.packing_ratio" in rank.output


@pytest.mark.parametrize("warns", [True, False])
def test_model_that_doesnt_mask_is_warned_of_once(folder: Path, warns: bool) -> None:
    config = job(2, ROWS, SEQ_LEN)
    config = config if warns else masking(config)

    def run() -> set[str]:
        init_logger()
        return set(next(iter(build_loader(configuration(folder), config)))[0])

    ranks = run_ranks(run, 2)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].output
    told = sum(rank.output.count("does not keep attention within them") for rank in ranks)
    assert told == int(warns)
    of_documents = {"sequence_id", "positions"} if IS_0_2 else {"positions"}
    assert ranks[0].value == {"input"} | (set() if warns and IS_0_2 else of_documents)
