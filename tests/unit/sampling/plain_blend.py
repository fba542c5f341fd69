"""The order "blend" once more, by its definition: plain, slow, and without a line of the package."""

import functools
import itertools
from collections import Counter
from fractions import Fraction
from math import floor

BITS = 2**64 - 1
SHARDS, SPANS, SAMPLES, PATTERN = range(4)

Stream = tuple[int, list[int], int]
"""Id of the first sample, samples of each shard, weight."""


def mix(*parts: int) -> int:
    """A hash of 64 bits."""
    mixed = 0
    for part in parts:
        mixed = (mixed ^ part) + 0x9E3779B97F4A7C15 & BITS
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & BITS
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & BITS
        mixed ^= mixed >> 31
    return mixed


def permute(index: int, size: int, key: int) -> int:
    """Where an index goes in a permutation of so many."""
    if size <= 16:
        return sorted(range(size), key=lambda one: mix(key, one)).index(index)
    bits = (size - 1).bit_length()
    low = bits - bits // 2
    while True:
        left, right = index >> low, index % 2**low
        for number in range(8):
            noise = (right ^ key) * 0xD6E8FEB86659FD93 + number * key & BITS
            noise = (noise ^ noise >> 32) * 0xD6E8FEB86659FD93 & BITS
            left, right = right, left ^ noise >> 64 - [bits // 2, low][number % 2]
        index = left << low | right
        if index < size:
            return index


@functools.cache
def order_of_nodes(turn: int, nodes: int) -> list[int]:
    """The nodes in the order of their hashes."""
    return sorted(range(nodes), key=lambda node: (mix(PATTERN, turn, node) >> nodes.bit_length(), node))


def counts(streams: list[Stream], nodes: int, slots: int) -> list[list[int]]:
    """Samples of each stream that each node has read when each has read so many of all: from the largest stream on,
    each takes its share of what is left, and rounding begins at another fraction on each node."""
    descending = sorted(range(len(streams)), key=lambda number: -streams[number][2])
    table = []
    for node in range(nodes):
        row, left, weights = [0] * len(streams), slots, sum(weight for *_, weight in streams)
        for turn, number in enumerate(descending):
            if weight := streams[number][2]:
                part = Fraction(2 * order_of_nodes(turn, nodes)[node] + 1, 2 * nodes)
                row[number] = floor(left * Fraction(weight, weights) + part)
                left, weights = left - row[number], weights - weight
        table.append(row)
    return table


def pattern(streams: list[Stream], nodes: int, seed: int, shuffle: bool, positions: int) -> list[int]:
    """The stream of each position, for at least so many."""
    slots = -(-65536 // nodes)
    found: list[int] = []
    for period in range(-(-positions // (slots * nodes))):
        before, after = (counts(streams, nodes, (period + more) * slots) for more in (0, 1))
        rows = []
        for node in range(nodes):
            times = []
            for number in range(len(streams)):
                count = after[node][number] - before[node][number]
                for sample in range(count):
                    moved = mix(PATTERN, node, number)
                    if shuffle:
                        moved = mix(mix(seed, PATTERN, period), node, number, sample)
                    times.append(((sample + moved / 2**64) / count, number))
            rows.append([number for _, number in sorted(times)])
        found += itertools.chain.from_iterable(zip(*rows, strict=True))
    return found


def read_pass(stream: Stream, key: int, which: int, seed: int, block: int, nodes: list[int]) -> dict[int, list[int]]:
    """The ids of a pass over a stream by node, given the node of each place in it, and its block (0: no shuffle)."""
    first, shards, _ = stream
    ids, begins = list(range(first, first + sum(shards))), [0, *itertools.accumulate(shards)]
    order = list(range(len(shards)))
    if block:
        order.sort(key=lambda shard: (mix(seed, SHARDS, key, shard) >> len(shards).bit_length(), shard))
    line = [(shard, sample) for shard in order for sample in ids[begins[shard] : begins[shard + 1]]]
    size, lists, begin, pieces = Counter(nodes), {}, 0, {}
    for node in sorted(size):
        mine, line = line[: size[node]], line[size[node] :]
        for _, span in itertools.groupby(mine, key=lambda pair: pair[0]):
            samples = [sample for _, sample in span]
            pieces[begin] = node, samples
            begin += len(samples)
    for node in sorted(size):
        spans = []
        for place, (begin, (of, samples)) in enumerate(pieces.items()):
            if of == node:
                hashed = mix(seed, SPANS, key, which, begin) >> len(pieces).bit_length()
                spans.append((hashed if block else 0, place, samples))
        flat = [sample for *_, span in sorted(spans) for sample in span]
        if not block:
            lists[node] = flat
            continue
        hashed = mix(seed, SAMPLES, key, which)
        shift = mix(hashed, node) % block if len(flat) > block else 0
        lists[node] = []
        for place in range(len(flat)):
            part = (place + shift) // block
            low, high = max(part * block - shift, 0), min((part + 1) * block - shift, len(flat))
            lists[node].append(flat[low + permute(place - low, high - low, mix(hashed, node, part))])
    return lists


def blend(streams: list[Stream], nodes: int, seed: int, block: int, positions: int) -> list[int]:
    """The ids of the first samples; without shuffle, the block is 0."""
    return stage(streams, nodes, seed, block, positions, {}, [*range(len(streams))])[0]


Before = tuple[int, list[int]]
"""How far a stream has been read: its samples read in all, and the numbers of those left of the pass under way."""


def stage(
    streams: list[Stream],
    nodes: int,
    seed: int,
    block: int,
    positions: int,
    before: dict[int, Before],
    keys: list[int],
) -> tuple[list[int], dict[int, Before]]:
    """The ids of the first samples of a stage, and how far its streams have been read then, by their keys."""
    longest = max(Fraction(sum(shards), weight) for _, shards, weight in streams if weight)
    more = floor(longest * sum(weight for *_, weight in streams)) + 65536  # until the passes end that are under way
    numbers = pattern(streams, nodes, seed, bool(block), positions + more)
    found = [-1] * len(numbers)
    total = sum(weight for *_, weight in streams)
    after = dict(before)
    for number, stream in enumerate(streams):
        key, length = keys[number], sum(stream[1])
        of_stream = block and max(int(block * (stream[2] / total)), -(-length // len(stream[1])))
        places = [place for place, one in enumerate(numbers) if one == number]
        read, left = before.get(key, (0, []))
        while places and places[0] < positions:
            size = len(left) or length
            mine, places = places[:size], places[size:]
            of_node = [place % nodes for place in mine]
            if left:  # shared out in order, to one node after another
                counted, ends = Counter(of_node), iter(stream[0] + sample for sample in left)
                lists = {node: list(itertools.islice(ends, counted[node])) for node in sorted(counted)}
            else:
                lists = read_pass(stream, key, read // length, seed, of_stream, of_node)
            for place, node in zip(mine, of_node, strict=True):
                if place < positions:
                    found[place] = lists[node].pop(0)
                    read += 1
            left = [sample - stream[0] for node in sorted(lists) for sample in lists[node]]
        after[key] = (read, left)
    return found[:positions], after
