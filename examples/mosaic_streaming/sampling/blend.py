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
- **Going on.** A stream that an earlier blend has read goes on where that one stands: first, what is left of its pass,
  in the order of that blend's nodes, is shared out to the nodes of this one; then, the next passes follow.

Everything is computed from a hash with integers, and with single products and quotients of floats, which are the same
on each machine. So no version of a library changes it.
"""

import bisect
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from examples.mosaic_streaming.sampling.hashing import Ints, by_hash, mix, permute

PERIOD = 1 << 16  # positions of a period of the pattern, up to a multiple of the canonical nodes
SHARDS, SPANS, SAMPLES, PATTERN = range(4)  # what a hash is for


class Reading(NamedTuple):
    """How far a blend has read a stream."""

    blend: "Blend"
    stream: int  # its place in the blend
    times: int  # samples of it that the blend has read


class Stream(NamedTuple):
    """A stream of a blend."""

    first: int  # id of its first sample
    shards: Ints  # samples of each shard, int64 [shards]
    weight: int  # its share is this, of the sum of all weights
    key: int  # by which its order differs from other streams'
    before: Reading | None = None  # how far an earlier blend has read it; this one goes on from there


class Period(NamedTuple):
    """The pattern of a period, by position: int64 [positions]."""

    stream: Ints  # which stream is read
    read: Ints  # how often all nodes have read it before
    read_by_node: Ints  # how often this position's node has
    places: list[Ints]  # of each stream's samples in the period, int64 [samples]


class Pass(NamedTuple):
    """What each canonical node reads of a stream in one pass over it.

    The spans are whole shards, and the parts of those that two nodes share; each node's follow each other. There are
    none where the pass is the rest of one that an earlier blend has begun.
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
        self.streams, self.nodes, self._seed, self._shuffle_block = streams, nodes, seed, shuffle_block
        self._is_shuffled, self._total = shuffle_block > 0, sum(stream.weight for stream in streams)
        self._sizes = np.array([stream.shards.sum() for stream in streams])
        old = [stream.before for stream in streams]
        self.read_before: Ints = np.array([one.blend.read_before[one.stream] + one.times if one else 0 for one in old])
        """Samples of each stream that earlier blends have read, int64 [streams]."""
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

    def going_on(self, streams: Sequence[tuple[int, Reading | None]]) -> "Blend":
        """Return the same blend whose streams go on where earlier ones stand; of each stream its key, and how far."""
        known = [one._replace(key=key, before=before) for one, (key, before) in zip(self.streams, streams, strict=True)]
        return Blend(known, self.nodes, self._seed, self._shuffle_block)

    def samples(self, positions: Ints) -> Ints:
        """Return the ids of the samples at positions, int64 of the same shape, [positions]."""
        ids, numbers = np.empty_like(positions), positions // self._period_size
        for number in np.unique(numbers).tolist():
            chosen = np.flatnonzero(numbers == number)
            places, period = positions[chosen] % self._period_size, self._period(number)
            streams = period.stream[places]
            passes = self._pass_of(streams, period.read[places])
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
        number = periods[bisect.bisect_right(periods, count, key=lambda period: self._counts(period)[stream].sum()) - 1]
        return number, count - int(self._counts(number)[stream].sum())

    def _read_before(self, stream: int, count: int) -> Ints:
        """How often each node has read a stream when all nodes have read it so often, int64 [nodes]."""
        number, of_period = self._find(stream, count)
        nodes = self._period(number).places[stream][:of_period] % self.nodes
        return self._counts(number)[stream] + np.bincount(nodes, minlength=self.nodes)

    def _pass_of(self, stream: Any, count: Any) -> Any:
        """Return the number of the pass in which streams are read next that this blend has read so often."""
        return (self.read_before[stream] + count) // self._sizes[stream]

    def _pass(self, stream: int, number: int) -> Pass:
        """Divide a stream among the nodes for a pass, which has the given number."""
        size, sizes, key = int(self._sizes[stream]), self.streams[stream].shards, self.streams[stream].key
        begin = number * size - int(self.read_before[stream])  # counted in this blend; an earlier one may have begun it
        before = self._read_before(stream, max(0, begin))
        counts = self._read_before(stream, begin + size) - before
        node_ends = counts.cumsum()
        if begin < 0:
            return Pass(before, counts, node_ends - counts, node_ends, node_ends[:0])
        shards = np.arange(sizes.size)  # in their order for the whole run
        if self._is_shuffled:
            shards = by_hash(mix(self._seed, SHARDS, key, shards))
        line = sizes[shards].cumsum()
        cuts = np.union1d(np.append(0, line), node_ends)
        begins, ends = cuts[:-1], cuts[1:]
        shard = np.searchsorted(line, begins, "right")
        offsets = self.streams[stream].first + sizes.cumsum() - sizes
        ids = begins + (offsets[shards] - line + sizes[shards])[shard]
        if self._is_shuffled:
            nodes = np.searchsorted(node_ends, begins, "right")
            order = by_hash(mix(self._seed, SPANS, key, number, begins))
            of_node = nodes[order].astype(np.min_scalar_type(self.nodes))  # small numbers are sorted faster
            order = order[np.argsort(of_node, kind="stable")]
            ids, lengths = ids[order], (ends - begins)[order]
            ends = lengths.cumsum()
            begins = ends - lengths
        return Pass(before, counts, node_ends - counts, ends, ids - begins)

    def _samples_of_pass(self, stream: int, number: int, nodes: Ints, read: Ints) -> Ints:
        """Return the ids of samples of one pass over a stream, given how often their nodes have read it before."""
        of_pass, earlier = self._pass(stream, number), self.streams[stream].before
        place = read - of_pass.before[nodes]
        if not of_pass.ids.size and earlier:
            ids = earlier.blend._rest(earlier.stream, earlier.times, place + of_pass.begins[nodes])
            return ids - earlier.blend.streams[earlier.stream].first + self.streams[stream].first
        if self._is_shuffled:
            place = self._shuffled(stream, number, nodes, place, of_pass.counts[nodes])
        place += of_pass.begins[nodes]
        span = np.searchsorted(of_pass.ends, place, "right")
        return of_pass.ids[span] + place

    def _rest(self, stream: int, count: int, places: Ints) -> Ints:
        """Return the ids at places in what is left of a pass when a stream has been read so often: node after node."""
        number, read = int(self._pass_of(stream, count)), self._read_before(stream, count)
        of_pass = self._pass(stream, number)
        left = of_pass.before + of_pass.counts - read
        ends = left.cumsum()
        nodes = np.searchsorted(ends, places, "right")
        return self._samples_of_pass(stream, number, nodes, places - (ends - left - read)[nodes])

    def _shuffled(self, stream: int, number: int, nodes: Ints, place: Ints, counts: Ints) -> Ints:
        """Permute places in the ranges of nodes within shuffle blocks, which begin at other places on each node."""
        key, size = mix(self._seed, SAMPLES, self.streams[stream].key, number), self.shuffle_blocks[stream]
        shift = np.where(counts > size, mix(key, nodes) % np.uint64(size), 0).astype(np.int64)
        block = (place + shift) // size
        begin = np.maximum(block * size - shift, 0)
        end = np.minimum((block + 1) * size - shift, counts)
        return begin + permute(place - begin, end - begin, mix(key, nodes, block))
