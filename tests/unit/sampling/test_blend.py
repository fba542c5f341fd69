"""The order "blend": against its definition, written once more, and its promises, without any dataset.

What loaders hand out in this order is in `test_blend_loaders`.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from examples.mosaic_streaming.sampling.blend import Blend, Stream
from examples.mosaic_streaming.sampling.hashing import mix, permute
from examples.mosaic_streaming.sampling.order import ENDLESS
from tests.unit.sampling import plain_blend

Mixture = tuple[list[plain_blend.Stream], int, int, int]
"""Streams, canonical nodes, seed, and samples of a shuffle block."""


@st.composite
def mixtures(draw: st.DrawFn, least: int = 1, weights: tuple[int, ...] = (0, 1, 3, 1000, 7919, 10**7)) -> Mixture:
    """One to four streams with shards of at least so many samples."""
    streams, first = [], 0
    for _ in range(draw(st.integers(1, 4))):
        shards = draw(st.lists(st.integers(least, least + 60), min_size=1, max_size=8))
        streams.append((first, shards, draw(st.sampled_from(weights))))
        first += sum(shards)
    if not any(weight for *_, weight in streams):
        streams[0] = (*streams[0][:2], 1)
    nodes = draw(st.sampled_from([1, 2, 7, 64, 300]))
    return streams, nodes, draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([0, 2, 9, 50, 1 << 18]))


def made(mixture: Mixture) -> Blend:
    """A mixture's blend."""
    streams, *rest = mixture
    return Blend(
        [Stream(*stream[:1], np.array(stream[1]), stream[2], key) for key, stream in enumerate(streams)], *rest
    )


def streams_of(mixture: Mixture, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The stream that each sample belongs to."""
    return np.searchsorted([first for first, *_ in mixture[0]], ids, side="right") - 1


@settings(max_examples=8, deadline=None, database=None, derandomize=True)
@given(mixtures(least=20, weights=(0, 1, 3, 9)))
def test_samples_are_those_of_the_definition(mixture: Mixture) -> None:
    assert made(mixture).samples(np.arange(1000)).tolist() == plain_blend.blend(*mixture, positions=1000)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(mixtures(), st.integers(0, 20))
def test_counts_are_those_of_the_definition(mixture: Mixture, number: int) -> None:
    """With rare streams, which have less than a sample in a block."""
    blend, (streams, nodes, *_) = made(mixture), mixture
    position = number * blend._period_size
    table = np.array(plain_blend.counts(streams, nodes, position // nodes))
    assert blend._counts(number).T.tolist() == table.tolist()
    assert blend.counts(position).tolist() == table.sum(0).tolist()


def test_a_second_block_is_that_of_the_definition() -> None:
    mixture: Mixture = ([(0, [30_000, 10_001], 5), (40_001, [777, 5], 2)], 64, 3, 500)
    found = made(mixture).samples(np.arange(65_000, 67_000))
    assert found.tolist() == plain_blend.blend(*mixture, positions=67_000)[65_000:]


@settings(max_examples=12, deadline=None, database=None, derandomize=True)
@given(mixtures(least=50), st.integers(0, 3000))
def test_each_pass_over_a_stream_has_each_of_its_samples_once(mixture: Mixture, begin: int) -> None:
    blend, weights = made(mixture), [weight for *_, weight in mixture[0]]
    ids = blend.samples(np.arange(75_000))
    streams = streams_of(mixture, ids)
    for number, (first, shards, _) in enumerate(mixture[0]):
        mine, size = ids[streams == number], sum(shards)
        whole = len(mine) // size * size
        passes = np.sort(mine[:whole].reshape(-1, size), axis=1)
        assert (passes == np.arange(first, first + size)).all()
        if not weights[number]:
            assert not len(mine)
        for count in (0, size, len(mine) - 1) if len(mine) > size else ():
            assert blend.position(number, count) == np.flatnonzero(streams == number)[count]
    for position in (begin, 65_536, 70_000):
        assert blend.counts(position).tolist() == np.bincount(streams[:position], minlength=len(weights)).tolist()


def check_shares(weights: list[int], nodes: int) -> None:
    """Hold the stated bounds against the counts of a blend, over periods of the pattern and within its first."""
    blend, total = (
        Blend([Stream(0, np.array([9]), weight, key) for key, weight in enumerate(weights)], nodes, 3, 9),
        sum(weights),
    )
    size, shares, streams = blend._period_size, np.array(weights) / total, len(weights)
    before = np.zeros((streams, nodes), np.int64)
    for number in (*range(50), 10**6, 10**6 + 1):
        counts = blend._counts(number)
        assert (counts >= before).all(), "no counter goes back"
        assert (counts.sum(0) == number * blend._slots).all()
        exact = np.array([weight * number * blend._slots / total for weight in weights])
        assert np.abs(counts - exact[:, None]).max() < 2 + np.log(streams), "on each node"
        assert np.abs(counts.sum(1) - exact * nodes).max() < max(nodes, 1.5), "on all together"
        before = counts
    within = blend._period(0).stream
    for stream, share in enumerate(shares):
        off = np.abs((within == stream).cumsum() - share * np.arange(1, size + 1))
        assert off.max() < nodes * (4 + np.log(streams) + streams * share)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(mixtures())
def test_shares_are_within_the_stated_bounds(mixture: Mixture) -> None:
    streams, nodes, *_ = mixture
    check_shares([weight for *_, weight in streams], nodes)


@pytest.mark.parametrize("nodes", [1, 64])
def test_shares_of_many_streams_are_within_the_stated_bounds(nodes: int) -> None:
    check_shares([7 + number**5 for number in range(150)], nodes)


def test_position_is_told_without_what_comes_before() -> None:
    mixture: Mixture = ([(0, [50_000] * 20_000, 7), (10**9, [1000, 999], 3)], 64, 17, 1 << 18)
    late = np.array([10**9, 10**9 + 1, 10**11, ENDLESS - 1])
    found = made(mixture).samples(late)
    assert [int(made(mixture).samples(late[[number]])[0]) for number in range(4)] == found.tolist()
    assert len(made(mixture).samples(np.arange(0))) == 0


def test_nodes_ranges_hardly_change_from_pass_to_pass() -> None:
    """So that machines keep to the shards that they have."""
    size, nodes = 64_000, 64
    blend = Blend([Stream(0, np.full(640, 100), 3, 0), Stream(size, np.full(100, 100), 1, 1)], nodes, 5, 1 << 18)
    ids = blend.samples(np.arange(4 * size))
    positions = np.flatnonzero(ids < size)
    shards = []
    for number in range(3):
        mine = positions[number * size : (number + 1) * size]
        shards.append([set((ids[mine[mine % nodes == node]] // 100).tolist()) for node in range(nodes)])
    for node in range(nodes):
        assert 9 <= len(shards[0][node]) <= 13, "a 64th of 640 shards, with two that are shared"
        for later in shards[1:]:
            assert len(later[node] - shards[0][node]) <= 3
    assert sum(len(later[node] - shards[0][node]) for later in shards[1:] for node in range(nodes)) < 100


def test_without_shuffle_a_single_node_reads_streams_in_order() -> None:
    blend = Blend([Stream(0, np.array([5, 7]), 1, 0), Stream(12, np.array([9]), 1, 1)], 1, 17, 0)
    ids = blend.samples(np.arange(60))
    assert ids[ids < 12].tolist() == [*range(12), *range(12), *range(6)]
    assert ids[ids >= 12].tolist() == [*range(12, 21)] * 3 + [12, 13, 14]
    assert set(map(tuple, (ids.reshape(-1, 2) < 12).tolist())) <= {(True, False), (False, True)}, "in turns"


@pytest.mark.parametrize("nodes", [1, 4, 64])
def test_without_shuffle_streams_take_turns_all_the_same(nodes: int) -> None:
    streams = [
        Stream(0, np.array([1000]), 6, 0),
        Stream(1000, np.array([900]), 3, 1),
        Stream(1900, np.array([50]), 1, 2),
    ]
    ids = Blend(streams, nodes, 17, 0).samples(np.arange(20_000))
    for first, last, share in ((0, 1000, 0.6), (1000, 1900, 0.3), (1900, 1950, 0.1)):
        at = np.flatnonzero((ids >= first) & (ids < last))
        assert np.diff(at, prepend=-1).max() < 10 / share, "never long without any stream"
        assert abs(at.size - share * ids.size) < nodes


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 9, 100, 256, 257])
def test_permutation_has_each_number_once(size: int) -> None:
    for key in mix(3, np.arange(20)):
        assert sorted(permute(np.arange(size), np.full(size, size), np.full(size, key))) == [*range(size)]


@pytest.mark.parametrize("size", [4, 5, 8, 10, 50])
def test_permutations_are_as_good_as_random(size: int) -> None:
    """Each number comes to each place equally often, and next to each other number: over 20,000 keys, by chi-squared.

    Of a random variable with so many degrees of freedom, a value this many deviations off is one in millions.
    """
    tries = 20_000
    keys = mix(11, np.arange(tries))
    places = np.array([permute(np.full(tries, index), np.full(tries, size), keys) for index in range(size)])
    for found in (places, (places[1:] - places[:-1]) % size - 1):
        values = size if found is places else size - 1
        table = np.array([np.bincount(row, minlength=values) for row in found])
        expected = tries / values
        chi = ((table - expected) ** 2 / expected).sum(1)
        assert chi.max() < values - 1 + 6 * np.sqrt(2 * (values - 1)), (found is places, chi.max())


def test_hashes_differ_by_each_part() -> None:
    assert len({int(mix(a, b, c)[0]) for a in range(20) for b in range(20) for c in range(20)}) == 8000
