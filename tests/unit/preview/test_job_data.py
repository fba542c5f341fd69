"""A job's data without the job: each dp rank's batches, in order, against those that real loaders hand out."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from examples.mosaic_streaming.checkpoint.history import Segment
from examples.mosaic_streaming.checkpoint.state import unpack
from examples.mosaic_streaming.config.files import LoaderFile
from examples.mosaic_streaming.distributed.abort import AbortChannel
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.preview.open_data import check_ranks, open_job_data
from examples.mosaic_streaming.sampling.placement import Layout
from examples.mosaic_streaming.titan import make_job
from tests.support.looking import with_job_data
from tests.support.ranks import can_make_nodes, run_rank_values
from tests.support.reading import write_turns
from tests.support.streams import (
    FIRST_ID,
    METHODS,
    build_loader,
    history,
    job,
    loader_config,
    mixture,
    sample_tokens,
    write_stream,
)
from tests.support.titan import loaded

STEPS = 13
"""Of 8 samples: more than an epoch of 83."""
QUICK = [("random", "tp 2"), ("device_per_stream", "dp 4"), ("blend", "pp 2")]
NEEDS_NODES = pytest.mark.skipif(not can_make_nodes(), reason="nodes need namespaces, of root or of users")


def in_layout(name: str, local: int, total: int) -> tuple[Any, list[int]]:
    """The job of a layout of four ranks, and the dp rank of each."""
    config = job(local, total)
    if name == "pp 2":
        config.parallelism.pipeline_parallel_degree = 2
        return config, [0, 1, 0, 1]
    if name == "tp 2":
        config.parallelism.tensor_parallel_degree = 2
        return config, [0, 0, 1, 1]
    return config, [0, 1, 2, 3]


def read(
    config: dict[str, Any],
    job_config: Any,
    dp_ranks: list[int],
    steps: int,
    nodes: int = 1,
    state: dict[str, str] | None = None,
) -> tuple[list[list[list[list[int]]]], dict[str, str]]:
    """What real loaders hand out: samples by step, dp rank, batch; and the state in the end."""
    total, dp = job_config.training.global_batch_size, len(set(dp_ranks))
    accumulation = total // job_config.training.local_batch_size // dp

    def run() -> tuple[list[list[list[int]]], dict[str, str]]:
        loader = build_loader(config, job_config, dp_ranks)
        if state:
            loader.load_state_dict(state)
        batches = iter(loader)
        read = [
            [(next(batches)[0]["input"][:, 0] - FIRST_ID).tolist() for _ in range(accumulation)] for _ in range(steps)
        ]
        return read, loader.state_dict()

    ranks = run_rank_values(run, len(dp_ranks), nodes)
    of_dp = {dp_rank: steps for dp_rank, (steps, _) in zip(dp_ranks, ranks, strict=True)}
    return [[of_dp[dp_rank][step] for dp_rank in range(dp)] for step in range(steps)], ranks[0][1]


def looked_up(
    config: dict[str, Any], job_config: Any, steps: range, start: Segment | None = None, nodes: int = 1
) -> list[list[list[list[int]]]]:
    """The same without a job: their numbers are the samples' ids."""
    found: list[list[list[list[int]]]] = with_job_data(
        config,
        lambda opened: [
            opened.global_batch(step, start and history(opened.opened.order, start))[1].tolist() for step in steps
        ],
        job_config,
        world_size=4,
        ranks_per_node=4 // nodes,
    )
    return found


@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=[pytest.mark.long, NEEDS_NODES])])
@pytest.mark.parametrize(
    ("batching_method", "layout"),
    [
        pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.long)
        for pair in itertools.product(METHODS, ("dp 4", "pp 2", "tp 2"))
    ],
)
def test_each_dp_ranks_batches_are_those_of_a_job_also_after_an_epochs_end_and_a_resume(
    streams: dict[str, dict[str, Any]], batching_method: str, layout: str, nodes: int
) -> None:
    config = mixture(streams, batching_method=batching_method)
    job_config, dp_ranks = in_layout(layout, local=2, total=8)
    found, state = read(config, job_config, dp_ranks, STEPS, nodes)
    assert looked_up(config, job_config, range(1, STEPS + 1), nodes=nodes) == found
    other, other_ranks = in_layout("pp 2" if layout == "dp 4" else "dp 4", local=2, total=8)
    found, _ = read(config, other, other_ranks, STEPS, state=state)
    epoch, sample, *_ = unpack(state)
    assert looked_up(config, other, range(STEPS + 1, 2 * STEPS + 1), Segment(STEPS, epoch, sample, 8)) == found
    assert looked_up(config, other, range(STEPS + 1, 2 * STEPS + 1)) == found, "with no checkpoint at hand"


def test_after_a_resume_with_another_global_batch_the_checkpoint_tells_the_steps(
    streams: dict[str, dict[str, Any]],
) -> None:
    config = mixture(streams)
    job_config, dp_ranks = in_layout("dp 4", local=2, total=8)
    _, state = read(config, job_config, dp_ranks, 4)
    wider, dp_ranks = in_layout("dp 4", local=3, total=12)
    found, _ = read(config, wider, dp_ranks, STEPS, state=state)
    assert looked_up(config, wider, range(5, 5 + STEPS), Segment(4, 0, 32, 12)) == found


def test_a_packed_batch_is_made_of_the_samples_that_a_job_packs(tmp_path: Path) -> None:
    """Four samples, in two rows: they are known by their first tokens, wherever they lie."""
    write_turns(tmp_path / "turns", 60)
    dataset = {"remote": str(tmp_path / "turns"), "local": str(tmp_path / "cache"), "shuffle": True}
    dataset |= {"packing_ratio": 2, "num_canonical_nodes": 4}
    config = {"name": "finetuning", "num_workers": 0, "dataset": dataset}
    job_config, dp_ranks = in_layout("dp 4", local=2, total=8)
    job_config.training.seq_len = 64

    begins = {sample: str(sample_tokens(sample)[:8].tolist())[1:-1] for sample in range(60)}

    def run() -> list[list[int]]:
        batches = iter(build_loader(config, job_config, dp_ranks))
        rows = [str(next(batches)[0]["input"].tolist()) for _ in range(6)]
        return [[sample for sample, begin in begins.items() if begin in row] for row in rows]

    found = run_rank_values(run, 4)
    looked = looked_up(config, job_config, range(1, 7))
    assert [[[sorted(batch) for batch in dp_rank] for dp_rank in step] for step in looked] == [
        [[found[dp_rank][step]] for dp_rank in range(4)] for step in range(6)
    ]


def test_streams_of_one_job_after_another_are_opened_in_a_process(streams: dict[str, dict[str, Any]]) -> None:
    def run() -> list[tuple[int, list[str]]]:
        found, job_config = [], job()
        for names in (["a"], ["b"], ["a", "b"]):
            file = LoaderFile(mixture({name: streams[name] for name in names}), "loader.toml")
            with open_job_data(loaded(job_config, file), 1, None, AbortChannel()) as data:
                found.append((data.opened.dataset.num_samples, data.opened.names))
        return found

    assert run_rank_values(run) == [[(50, ["a"]), (33, ["b"]), (83, ["a", "b"])]]


@pytest.mark.parametrize(
    ("world_size", "ranks_per_node", "message"),
    [
        (6, 4, "--world-size 6 with --ranks-per-node 4: expected a multiple of the second."),
        (0, None, "--world-size 0 with"),
        (3, None, "on 3 ranks: Invalid parallel dims: "),
    ],
)
def test_layout_that_does_not_fit_is_refused(world_size: int, ranks_per_node: int | None, message: str) -> None:
    config = job()
    config.parallelism.tensor_parallel_degree = 2
    with pytest.raises(ConfigError, match=message):
        make_job(loaded(config, LoaderFile({}, "")), world_size, check_ranks(world_size, ranks_per_node))


def test_machines_have_eight_ranks_unless_that_does_not_go() -> None:
    assert [check_ranks(size, None) for size in (1, 6, 8, 12, 64)] == [1, 6, 8, 4, 8]
    layout = Layout(16, 8, {"pp": 2, "dp_replicate": 1, "dp_shard": 2, "cp": 1, "tp": 4})
    assert (layout.dp_world_size, layout.nodes) == (2, 2)
    assert layout.readers() == [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]


def test_timeout_of_a_jobs_workers_is_none_of_a_reader_without(tmp_path: Path) -> None:
    config = loader_config(write_stream(tmp_path / "stream", 8), num_workers=2) | {"timeout": 30}
    given, own = with_job_data(config, lambda data: (data.config.config["timeout"], data.opened.loader.timeout))
    assert (given, own) == (30, 0)


@pytest.mark.parametrize("shuffle_algo", ["py1e", "py1br"])
@pytest.mark.parametrize("batching_method", ["per_stream", "stratified", "device_per_stream"])
def test_shuffle_block_that_has_nothing_of_a_stream_is_refused(
    streams: dict[str, dict[str, Any]], batching_method: str, shuffle_algo: str
) -> None:
    """With 4, the second of streams of 50 and 33 samples has int(4 x 33 / 83) = 1 of a block; with 6 it has 2."""

    def with_block(size: int) -> dict[str, Any]:
        settings = {"batching_method": batching_method, "shuffle_algo": shuffle_algo, "shuffle_block_size": size}
        return mixture(streams, 0, **settings)

    assert with_job_data(with_block(6), lambda opened: opened.global_batch(1)[1].size) > 0
    with pytest.raises(AssertionError, match=r"shuffle_block_size = 4 in loader\.toml leaves stream b a block of less"):
        with_job_data(with_block(4), lambda opened: None)
