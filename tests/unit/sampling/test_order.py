"""The order of samples: global batch k holds the same ones whoever reads it, and an epoch holds none twice.

With real streams in real ranks, for each batching method and shuffle algorithm of streaming.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming.base.batching import batching_methods
from streaming.base.shuffle import algos as shuffle_algos
from streaming.base.world import World

from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.sampling.order import round_down, samples_of_epoch
from tests.support.ranks import dp_ranks_of, run_rank_values
from tests.support.streams import (
    BATCHING,
    SHUFFLE,
    build_loader,
    job,
    mixture,
    read_samples,
    read_steps,
    sample_tokens,
    write_stream,
)

STEPS = 12
"""Of 8 sequences: more than an epoch."""


def test_the_tables_of_streaming_hold_no_other_methods() -> None:
    """Else a method would be untested."""
    assert set(BATCHING) <= set(batching_methods)
    assert set(SHUFFLE) == set(shuffle_algos)


@pytest.mark.parametrize("shuffle_algo", SHUFFLE)
@pytest.mark.parametrize("batching_method", BATCHING)
def test_global_batches_are_the_same_for_any_ranks_workers_and_accumulation(
    streams: dict[str, dict[str, Any]], batching_method: str, shuffle_algo: str
) -> None:
    settings: dict[str, Any] = {"batching_method": batching_method, "shuffle_algo": shuffle_algo}
    one = read_steps(mixture(streams, **settings), STEPS, local=2)
    wide = read_steps(mixture(streams, num_workers=2, **settings), STEPS, dp_ranks=range(4), local=2)
    assert wide == one
    if batching_method != "device_per_stream":  # there the batch of a device is part of the order
        assert read_steps(mixture(streams, **settings), STEPS, dp_ranks=range(2), local=4).samples == one.samples


@pytest.mark.parametrize("batching_method", BATCHING)
@pytest.mark.parametrize(
    "weights",
    [
        [{}, {}],
        [{"proportion": 0.25}, {"proportion": 0.75}],
        [{"repeat": 1.5}, {"repeat": 0.5}],
        [{"choose": 61}, {"choose": 20}],
    ],
    ids=["unweighted", "proportion", "repeat", "choose"],
)
@pytest.mark.parametrize("num_canonical_nodes", [1, 4])
def test_epoch_is_as_long_as_reckoned_and_repeats_what_is_asked_alone(
    streams: dict[str, dict[str, Any]], batching_method: str, weights: list[dict[str, float]], num_canonical_nodes: int
) -> None:
    weighted = {name: stream | weight for (name, stream), weight in zip(streams.items(), weights, strict=True)}
    config = mixture(weighted, batching_method=batching_method, num_canonical_nodes=num_canonical_nodes)

    def read() -> tuple[int, int, list[int], list[list[int]]]:
        loader = build_loader(config, job(2, 8))
        dataset, order = loader._dataset, loader._order
        samples = read_samples(loader, order.remaining(0) // 2)
        given = batching_methods[order.batching_method](dataset, World(1, 1, 1, 0), 0, 0)
        assert int((given >= 0).sum()) == order.epoch_samples
        return order.remaining(0), order.epoch_samples, [int(stream.choose) for stream in dataset.streams], samples

    [(length, given, choose, samples)] = run_rank_values(read)
    assert given - 8 < length <= given
    read_once = np.ravel(samples).tolist()
    assert len(read_once) == length
    for (first, size), chosen in zip([(0, 50), (50, 33)], choose, strict=True):
        times = [read_once.count(sample) for sample in range(first, first + size)]
        assert max(times) <= -(-chosen // size), "no sample more often than its stream's passes"
        assert sum(times) <= chosen


@pytest.mark.parametrize("batching_method", ["random", "per_stream", "stratified"])
def test_epochs_differ_and_each_starts_anew(streams: dict[str, dict[str, Any]], batching_method: str) -> None:
    reading = read_steps(mixture(streams, batching_method=batching_method), 20)
    epochs: dict[int, list[list[int]]] = {}
    previous = 0
    for state, samples in zip(reading.states, reading.samples, strict=True):
        epochs.setdefault(previous, []).append(samples)
        previous = int(state["mosaic"].split('"epoch": ')[1].split(",")[0])
    assert len(epochs) >= 2
    assert epochs[0] != epochs[1]


@pytest.mark.long
def test_sixteen_ranks_of_all_parallelisms_get_their_dp_ranks_tokens(streams: dict[str, dict[str, Any]]) -> None:
    """Pp 2 x dp 2 x cp 2 x tp 2: peers get equal tokens, dp ranks together each global batch."""
    dp_ranks = dp_ranks_of({"pp": 2, "dp_replicate": 1, "dp_shard": 2, "cp": 2, "tp": 2})
    assert dp_ranks == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4

    def read() -> tuple[list[list[list[int]]], list[list[list[int]]], tuple[int, int, bool]]:
        loader = build_loader(mixture(streams), job(4, 8), dp_ranks)
        batches = [batch for batch, _ in zip(loader, range(STEPS), strict=False)]
        world = loader._dataset._unique_rank_world
        machine = (world.rank, world.num_nodes, world.is_local_leader)
        return [b["input"].tolist() for b, _ in batches], [labels.tolist() for _, labels in batches], machine

    ranks = run_rank_values(read, 16)
    assert [machine for *_, machine in ranks] == [(rank, 1, rank == 0) for rank in range(16)], "the machine's facts"
    by_dp_rank = {dp_rank: ranks[dp_ranks.index(dp_rank)][:2] for dp_rank in (0, 1)}
    assert all(rank[:2] == by_dp_rank[dp_rank] for rank, dp_rank in zip(ranks, dp_ranks, strict=True))
    one = read_steps(mixture(streams), STEPS)
    for step in range(STEPS):
        rows = [row for dp_rank in (0, 1) for row in by_dp_rank[dp_rank][0][step]]
        assert sorted(row[0] - 16 for row in rows) == one.samples[step]
        assert all(row == sample_tokens(row[0] - 16)[:-1].tolist() for row in rows)


def test_without_num_canonical_nodes_there_are_64_on_any_ranks(tmp_path: Path) -> None:
    config = {"name": "text", "dataset": {"local": str(write_stream(tmp_path, 200)), "shuffle": True}}
    explicit = {"name": "text", "dataset": {**config["dataset"], "num_canonical_nodes": 64}}  # type: ignore[dict-item]
    one = read_steps(config, 30)
    assert one == read_steps(explicit, 30)
    assert one == read_steps(config, 30, dp_ranks=range(4), local=2)
    assert len({sample for step in one.samples[:24] for sample in step}) == 192, "200 samples: 3 turns of 64"


def test_three_nodes_of_samples_need_no_multiple_of_canonical_nodes(streams: dict[str, dict[str, Any]]) -> None:
    """streaming alone refuses 4 canonical nodes on 3 machines."""
    assert (
        read_steps(mixture(streams), 8, dp_ranks=range(3), total=6).samples
        == read_steps(mixture(streams), 8, total=6).samples
    )


@pytest.mark.parametrize(
    ("batching_method", "samples", "total"),
    [
        ("random", (40, 9), 50),
        ("per_stream", (80, 6), 8),
        ("device_per_stream", (80, 3), 8),
        ("stratified", (80, 3), 8),
        ("stratified", (80, 40), 1),
    ],
)
def test_streams_that_fill_no_batch_are_refused_with_their_samples(
    tmp_path: Path, batching_method: str, samples: tuple[int, int], total: int
) -> None:
    """Too few together; too few in one stream; too small a share of a global batch."""
    for name, size in zip("ab", samples, strict=True):
        write_stream(tmp_path / name, size)
    config = mixture({name: {"local": str(tmp_path / name)} for name in "ab"}, batching_method=batching_method)

    def build() -> str:
        try:
            build_loader(config, job(min(total, 2), total))
        except ConfigError as error:
            return str(error)
        return "no error"

    [message] = run_rank_values(build)
    told = f"(a {samples[0]}, b {samples[1]}), dataset.num_canonical_nodes = 4 takes multiples of 4"
    assert message.startswith(
        f"An epoch fills no global batch of {total} sequences. Of its samples in loader.toml {told}"
    )
    assert f"dataset.batching_method = {batching_method!r}" in message


def test_whole_epoch_of_one_canonical_node_leaves_nothing_out() -> None:
    shares = (50 / 83, 33 / 83)
    assert samples_of_epoch("random", [50, 33], [0.6, 0.4], 1, 8, 2) == (83, shares)
    assert samples_of_epoch("random", [50, 33], [0.6, 0.4], 4, 8, 2) == (80, shares)
    assert round_down(7, 8) == 0
