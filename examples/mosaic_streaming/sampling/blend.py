"""The order "blend": a mixture of streams that each go on without end, told at any position from nothing but settings.

- **Positions and nodes.** Position g belongs to canonical node c = g mod C. Periods of positions are the unit in which
  streams take turns.
- **Pattern.** `_counts` says how many samples of each stream come before a period, on each canonical node. Within a
  period, each node spreads a stream's samples evenly, each one moved at random within its own interval.
- **Passes.** The samples of a stream, in the order of their positions, are passes over it: each run of as many samples
  as it has holds each of them once. In a pass, a canonical node reads one range of the stream, as long as the pattern
  asks for. The ranges hardly change from pass to pass, so a machine keeps to its own shards.
- **Shuffle.** A stream's shards are put in an order for the whole run, and each node's range is cut out of it. In each
  pass, the node permutes the shards of its range, cuts them into shuffle blocks, and permutes each block's samples.

Everything is computed from a hash with integers, and with single products and quotients of floats, which are the same
on each machine. So no version of a library changes it.
"""

import bisect
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

PERIOD = 1 << 16
"""Positions of a period of the pattern, up to a multiple of the canonical nodes."""

ENDLESS = 1 << 40
"""Positions that an order has, so to speak; no run reads as many."""

MASK = (1 << 64) - 1  # hashes have 64 bits, also where Python's numbers have more
FEW = 16  # numbers that are permuted by their hashes alone
ROUNDS = 8  # of a Feistel network, an even number
SHARDS, SPANS, SAMPLES, PATTERN = range(4)  # what a hash is for


def mix(*parts: "Ints | Hashes | int") -> Hashes:
    """Hash whole numbers, elementwise, into uint64 [1 or as long as the arrays], by the finalizer of SplitMix64."""
    mixed: Any = 0
    for part in parts:
        if not isinstance(part, int):
            part, mixed = part.astype(np.uint64), np.uint64(mixed) if isinstance(mixed, int) else mixed
        mixed = (mixed ^ part) + 0x9E3779B97F4A7C15 & MASK
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & MASK
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & MASK
        mixed ^= mixed >> 31
    return np.atleast_1d(np.asarray(mixed, np.uint64))


def by_hash(hashes: Hashes) -> Ints:
    """Return the order of hashes, int64 of the same length; places take their last digits, so that none are equal."""
    places = np.arange(hashes.size).astype(np.uint64)
    digits = np.uint64(hashes.size.bit_length())
    return np.argsort(hashes >> digits << digits | places)  # whichever algorithm sorts, as nothing is equal


def permute(index: Ints, size: Ints, key: Hashes) -> Ints:
    """Permute each index among the `size` numbers from 0 on, as its key says; all have the same shape, 1D.

    Of a few numbers, the hashes are put in order. Of more, a Feistel network permutes the numbers below the next power
    of two, and results beyond `size` are permuted again.
    """
    result = np.empty_like(index)
    few = np.flatnonzero(size <= FEW)
    hashes = mix(key[few, None], np.arange(FEW))
    own = np.take_along_axis(hashes, index[few, None], 1)
    result[few] = ((hashes < own) & (np.arange(FEW) < size[few, None])).sum(1)
    at = np.flatnonzero(size > FEW)
    value, size, key = index[at].astype(np.uint64), size[at].astype(np.uint64), key[at]
    bits = np.frexp(size - np.uint64(1))[1].astype(np.uint64)
    while at.size:
        width = np.array([bits // 2, bits - bits // 2])
        left, right = value >> width[1], value & ~(~np.uint64(0) << width[1])
        for number in range(ROUNDS):
            noise = (right ^ key) * np.uint64(0xD6E8FEB86659FD93) + np.uint64(number) * key
            noise = (noise ^ noise >> np.uint64(32)) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ noise >> np.uint64(64) - width[number % 2]
        value = left << width[1] | right
        result[at] = value
        again = value >= size
        at, value, size, key, bits = (array[again] for array in (at, value, size, key, bits))
    return result


class Stream(NamedTuple):
    """A stream of a blend."""

    first: int  # id of its first sample
    shards: Ints  # samples of each shard, int64 [shards]
    weight: int  # its share is this, of the sum of all weights


class Period(NamedTuple):
    """The pattern of a period, by position: int64 [positions]."""

    stream: Ints  # which stream is read
    read: Ints  # how often all nodes have read it before
    read_by_node: Ints  # how often this position's node has
    places: list[Ints]  # of each stream's samples in the period, int64 [samples]


class Pass(NamedTuple):
    """What each canonical node reads of a stream in one pass over it.

    The spans are whole shards, and the parts of those that two nodes share; each node's follow each other.
    """

    before: Ints  # how often each node has read the stream before the pass, int64 [nodes]
    counts: Ints  # samples that each node reads in the pass, int64 [nodes]
    begins: Ints  # places in the pass of each node's first sample, int64 [nodes]
    ends: Ints  # places after the last sample of each span, int64 [spans]
    ids: Ints  # what to add to a place in a span to get the id of the sample there, int64 [spans]


class Blend:
    """Which sample is at which position of a mixture.

    Args:
        streams: with at least one weight that isn't 0.
        nodes: canonical nodes.
        seed: of the shuffle.
        shuffle_block: samples of a shuffle block on a node, of all streams together; 0 reads each node's ranges in
            order. A stream has its share of it, but no less than a shard.
    """

    def __init__(self, streams: Sequence[Stream], nodes: int, seed: int, shuffle_block: int) -> None:
        self.streams, self.nodes, self._seed = streams, nodes, seed
        self._is_shuffled, self._total = shuffle_block > 0, sum(stream.weight for stream in streams)
        self._sizes = np.array([stream.shards.sum() for stream in streams])
        self.shuffle_blocks = [
            max(int(shuffle_block * (stream.weight / self._total)), -(-size // stream.shards.size))
            for stream, size in zip(streams, self._sizes.tolist(), strict=True)
        ]
        self._slots = -(-PERIOD // nodes)
        self._period_size = nodes * self._slots
        numbers = (number for number, stream in enumerate(streams) if stream.weight)
        self._rounding = {  # Python's integers, as their products have more than 64 bits
            number: by_hash(mix(PATTERN, turn, np.arange(nodes))).astype(object) * 2 + 1
            for turn, number in enumerate(sorted(numbers, key=lambda number: -streams[number].weight))
        }
        self._counts = functools.lru_cache(8)(self._counts)  # type: ignore[method-assign]
        self._period = functools.lru_cache(4)(self._period)  # type: ignore[method-assign]
        self._read_before = functools.lru_cache(2 * len(streams))(self._read_before)  # type: ignore[method-assign]
        self._pass = functools.lru_cache(2 * len(streams))(self._pass)  # type: ignore[method-assign]

    def samples(self, positions: Ints) -> Ints:
        """Return the ids of the samples at positions, int64 of the same shape, [positions]."""
        ids = np.empty_like(positions)
        numbers = positions // self._period_size
        for number in np.unique(numbers).tolist():
            chosen = np.flatnonzero(numbers == number)
            places, period = positions[chosen] % self._period_size, self._period(number)
            streams = period.stream[places]
            passes = period.read[places] // self._sizes[streams]
            nodes, read = places % self.nodes, period.read_by_node[places]
            for stream in np.unique(streams).tolist():
                of_stream = np.flatnonzero(streams == stream)
                for which in np.unique(passes[of_stream]).tolist():
                    at = of_stream[passes[of_stream] == which]
                    ids[chosen[at]] = self._samples_of_pass(stream, which, nodes[at], read[at])
        return ids

    def counts(self, position: int) -> Ints:
        """Return how many samples of each stream come before a position, int64 [streams]."""
        number, place = divmod(position, self._period_size)
        counts: Ints = self._counts(number).sum(1)
        if place:
            counts += np.bincount(self._period(number).stream[:place], minlength=counts.size)
        return counts

    def _counts(self, period: int) -> Ints:
        """Samples of each stream that each node has read before a period, int64 [streams, nodes].

        From the largest stream on, each takes its share of what is left, rounded at another fraction on each node. So
        no count is less than before an earlier period, and each is within 2 + ln(streams) of its share.
        """
        found = np.zeros((len(self.streams), self.nodes), np.int64)
        left: Any = period * self._slots
        weights, parts = self._total, 2 * self.nodes
        for number, rounding in self._rounding.items():
            weight = self.streams[number].weight
            taken = (left * weight * parts + rounding * weights) // (weights * parts)
            found[number], left, weights = taken, left - taken, weights - weight
        return found

    def _period(self, period: int) -> Period:
        """Make the pattern of a period: each node spreads each stream's samples evenly, and moves each a little."""
        before = self._counts(period)
        counts = (self._counts(period + 1) - before).T.ravel()  # by node, then by stream
        node = np.repeat(np.arange(self.nodes), self._slots)
        stream = np.repeat(np.tile(np.arange(len(self.streams)), self.nodes), counts)
        number = np.arange(stream.size) - np.repeat(counts.cumsum() - counts, counts)
        if self._is_shuffled:
            moved = mix(mix(self._seed, PATTERN, period), node, stream, number)
        else:  # nodes don't go in step
            moved = mix(PATTERN, node, stream)
        when = ((number + moved / 2.0**64) / np.repeat(counts, counts)).reshape(self.nodes, -1)
        taken = np.argsort(when, axis=1, kind="stable") + np.arange(self.nodes)[:, None] * self._slots
        by_position = taken.T.ravel()
        stream, node, number = stream[by_position], node[by_position], number[by_position]
        places, read = [np.flatnonzero(stream == one) for one in range(len(self.streams))], np.empty_like(stream)
        for own, count in zip(places, before.sum(1), strict=True):
            read[own] = count + np.arange(own.size)
        return Period(stream, read, number + before[stream, node], places)

    def position(self, stream: int, count: int) -> int:
        """Return the position at which a stream, whose weight isn't 0 and which was read so often, is read next."""
        number, of_period = self._find(stream, count)
        return number * self._period_size + int(self._period(number).places[stream][of_period])

    def _find(self, stream: int, count: int) -> tuple[int, int]:
        """Return the period in which a stream is read next, and how often it is read there before."""
        scale, off = self.streams[stream].weight * self._period_size, self.nodes * (2 + len(self.streams).bit_length())
        periods = range(max(0, (count - off) * self._total // scale), (count + off) * self._total // scale + 2)
        place = bisect.bisect_right(periods, count, key=lambda period: self._counts(period)[stream].sum())
        number = periods[place - 1]
        return number, count - int(self._counts(number)[stream].sum())

    def _read_before(self, stream: int, count: int) -> Ints:
        """How often each node has read a stream when all nodes have read it so often, int64 [nodes]."""
        number, of_period = self._find(stream, count)
        nodes = self._period(number).places[stream][:of_period] % self.nodes
        return self._counts(number)[stream] + np.bincount(nodes, minlength=self.nodes)

    def _pass(self, stream: int, number: int) -> Pass:
        """Divide a stream among the nodes for a pass, which has the given number."""
        size, sizes = int(self._sizes[stream]), self.streams[stream].shards
        shards = np.arange(sizes.size)  # in their order for the whole run
        if self._is_shuffled:
            shards = by_hash(mix(self._seed, SHARDS, stream, shards))
        line = sizes[shards].cumsum()
        before = self._read_before(stream, number * size)
        counts = self._read_before(stream, (number + 1) * size) - before
        node_ends = counts.cumsum()
        ends = np.insert(line, np.searchsorted(line, node_ends), node_ends)
        ends = ends[np.diff(ends, prepend=0) > 0]
        begins = np.concatenate([[0], ends[:-1]])
        shard = np.searchsorted(line, begins, "right")
        offsets = self.streams[stream].first + sizes.cumsum() - sizes
        ids = begins + (offsets[shards] - line + sizes[shards])[shard]
        if self._is_shuffled:
            nodes = np.searchsorted(node_ends, begins, "right")
            order = by_hash(mix(self._seed, SPANS, stream, number, begins))
            of_node = nodes[order].astype(np.min_scalar_type(self.nodes))  # small numbers are sorted faster
            order = order[np.argsort(of_node, kind="stable")]
            ids, lengths = ids[order], (ends - begins)[order]
            ends = lengths.cumsum()
            begins = ends - lengths
        return Pass(before, counts, node_ends - counts, ends, ids - begins)

    def _samples_of_pass(self, stream: int, number: int, nodes: Ints, read: Ints) -> Ints:
        """Return the ids of samples of one pass over a stream, given how often their nodes have read it before."""
        of_pass = self._pass(stream, number)
        place = read - of_pass.before[nodes]
        if self._is_shuffled:
            place = self._shuffled(stream, number, nodes, place, of_pass.counts[nodes])
        place += of_pass.begins[nodes]
        span = np.searchsorted(of_pass.ends, place, "right")
        return of_pass.ids[span] + place

    def _shuffled(self, stream: int, number: int, nodes: Ints, place: Ints, counts: Ints) -> Ints:
        """Permute places in the ranges of nodes within shuffle blocks, which begin at other places on each node."""
        key, size = mix(self._seed, SAMPLES, stream, number), self.shuffle_blocks[stream]
        shift = np.where(counts > size, mix(key, nodes) % np.uint64(size), 0).astype(np.int64)
        block = (place + shift) // size
        begin = np.maximum(block * size - shift, 0)
        end = np.minimum((block + 1) * size - shift, counts)
        return begin + permute(place - begin, end - begin, mix(key, nodes, block))
