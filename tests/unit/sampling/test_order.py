"""The order of samples: global batch k holds the same ones whoever reads it, and an epoch holds none twice.

With real streams in real ranks, for each batching method and shuffle algorithm of streaming.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming.base.batching import batching_methods
from streaming.base.shuffle import algos as shuffle_algos
from streaming.base.world import World

from examples.mosaic_streaming.distributed.abort import AbortChannel
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.sampling.order import round_down, samples_of_epoch
from tests.support.ranks import dp_ranks_of, run_rank_values
from tests.support.streams import (
    BATCHING,
    SHUFFLE,
    WEIGHTS,
    Reading,
    Turn,
    build_loader,
    job,
    mixture,
    read_each,
    read_samples,
    read_steps,
    sample_tokens,
    weigh,
    write_stream,
)

STEPS = 12
"""Of 8 sequences: more than an epoch."""


def test_the_tables_of_streaming_hold_no_other_methods() -> None:
    """Else a method would be untested."""
    assert set(BATCHING) <= set(batching_methods)
    assert set(SHUFFLE) == set(shuffle_algos)


WAYS = [(BATCHING[number % len(BATCHING)], SHUFFLE[number % len(SHUFFLE)]) for number in range(20)]
"""Each batching method with each shuffle algorithm: five in a row have all of both."""


def test_ways_are_all_and_those_that_are_read_in_one_go_have_all_methods_and_algorithms() -> None:
    assert sorted(WAYS) == sorted(itertools.product(BATCHING, SHUFFLE))
    for first in (0, 5, 10, 15):
        methods, algorithms = zip(*WAYS[first : first + 5], strict=True)
        assert {*methods} == {*BATCHING} and {*algorithms} == {*SHUFFLE}


@pytest.mark.parametrize("first", [0, *(pytest.param(first, marks=pytest.mark.long) for first in (5, 10, 15))])
def test_global_batches_are_the_same_for_any_ranks_workers_and_accumulation(
    streams: dict[str, dict[str, Any]], first: int
) -> None:
    ways = WAYS[first : first + 5]

    def read(ways: list[tuple[str, str]], num_workers: int = 0, **layout: Any) -> list[Reading]:
        configs = [
            mixture(streams, num_workers, batching_method=method, shuffle_algo=algorithm) for method, algorithm in ways
        ]
        return read_each([Turn(config, STEPS) for config in configs], **layout)

    one = dict(zip(ways, read(ways, local=2), strict=True))
    wide = dict(zip(ways, read(ways, num_workers=2, dp_ranks=range(4), local=2), strict=True))
    for way in ways:
        assert wide[way] == one[way], way
    ways = [way for way in ways if way[0] != "device_per_stream"]  # there the batch of a device is part of the order
    for way, two in zip(ways, read(ways, dp_ranks=range(2), local=4), strict=True):
        assert two.samples == one[way].samples, way


@pytest.mark.parametrize("num_canonical_nodes", [pytest.param(1, marks=pytest.mark.long), 4])
def test_epoch_is_as_long_as_reckoned_and_repeats_what_is_asked_alone(
    streams: dict[str, dict[str, Any]], num_canonical_nodes: int
) -> None:
    """For each way to weigh streams and each batching method."""
    cases = [*itertools.product(WEIGHTS, BATCHING)]

    def read(weights: str, batching_method: str, channel: AbortChannel) -> tuple[int, int, list[int], list[list[int]]]:
        weighted = weigh(streams, weights)
        config = mixture(weighted, batching_method=batching_method, num_canonical_nodes=num_canonical_nodes)
        loader = build_loader(config, job(2, 8), channel=channel)
        dataset, order = loader._dataset, loader._order
        samples = read_samples(loader, order.remaining(0) // 2)
        given = batching_methods[order.batching_method](dataset, World(1, 1, 1, 0), 0, 0)
        assert int((given >= 0).sum()) == order.epoch_samples
        loader.close()
        return order.remaining(0), order.epoch_samples, [int(stream.choose) for stream in dataset.streams], samples

    def read_all() -> list[tuple[int, int, list[int], list[list[int]]]]:
        channel = AbortChannel()
        return [read(*case, channel) for case in cases]

    [found] = run_rank_values(read_all)
    for case, (length, given, choose, samples) in zip(cases, found, strict=True):
        assert given - 8 < length <= given, case
        read_once = np.ravel(samples).tolist()
        assert len(read_once) == length, case
        for (first, size), chosen in zip([(0, 50), (50, 33)], choose, strict=True):
            times = [read_once.count(sample) for sample in range(first, first + size)]
            assert max(times) <= -(-chosen // size), f"{case}: no sample more often than its stream's passes"
            assert sum(times) <= chosen, case


def test_epochs_differ_and_each_starts_anew(streams: dict[str, dict[str, Any]]) -> None:
    methods = ["random", "per_stream", "stratified"]
    readings = read_each([Turn(mixture(streams, batching_method=method), 20) for method in methods])
    for method, reading in zip(methods, readings, strict=True):
        epochs: dict[int, list[list[int]]] = {}
        previous = 0
        for state, samples in zip(reading.states, reading.samples, strict=True):
            epochs.setdefault(previous, []).append(samples)
            previous = int(state["mosaic"].split('"epoch": ')[1].split(",")[0])
        assert len(epochs) >= 2, method
        assert epochs[0] != epochs[1], method


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


def test_without_num_canonical_nodes_the_data_decides_on_any_ranks(tmp_path: Path) -> None:
    config = {"name": "text", "dataset": {"local": str(write_stream(tmp_path, 200)), "shuffle": True}}
    explicit = {"name": "text", "dataset": {**config["dataset"], "num_canonical_nodes": 8}}  # type: ignore[dict-item]
    one, same = read_each([Turn(config, 30), Turn(explicit, 30)])
    assert one == same
    assert one == read_steps(config, 30, dp_ranks=range(4), local=2)
    assert len({sample for step in one.samples[:25] for sample in step}) == 200, "all: 64 ranges would leave out 8"


def test_three_nodes_of_samples_need_no_multiple_of_canonical_nodes(streams: dict[str, dict[str, Any]]) -> None:
    """streaming alone refuses 4 canonical nodes on 3 machines."""
    assert (
        read_steps(mixture(streams), 8, dp_ranks=range(3), total=6).samples
        == read_steps(mixture(streams), 8, total=6).samples
    )


def test_streams_that_fill_no_batch_are_refused_with_their_samples(tmp_path: Path) -> None:
    """Too few together; too few in one stream; too small a share of a global batch."""
    cases = [
        ("random", (40, 9), 50),
        ("per_stream", (80, 6), 8),
        ("device_per_stream", (80, 3), 8),
        ("stratified", (80, 3), 8),
        ("stratified", (80, 40), 1),
    ]
    for size in {size for _, sizes, _ in cases for size in sizes}:
        write_stream(tmp_path / f"{size}", size)

    def build(batching_method: str, samples: tuple[int, int], total: int, channel: AbortChannel) -> str:
        streams = {name: {"local": f"{tmp_path}/{size}"} for name, size in zip("ab", samples, strict=True)}
        try:
            build_loader(mixture(streams, batching_method=batching_method), job(min(total, 2), total), channel=channel)
        except ConfigError as error:
            return str(error)
        return "no error"

    def build_all() -> list[str]:
        channel = AbortChannel()
        return [build(*case, channel) for case in cases]

    [messages] = run_rank_values(build_all)
    for (batching_method, samples, total), message in zip(cases, messages, strict=True):
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
