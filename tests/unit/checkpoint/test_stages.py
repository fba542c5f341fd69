"""Stages and skips: which samples each step reads, against the plain definition of the single stages' orders."""

import itertools
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from examples.mosaic_streaming.checkpoint.history import History
from examples.mosaic_streaming.config.files import LoaderFile
from examples.mosaic_streaming.config.plan import Plan, Skip, Stage
from examples.mosaic_streaming.sampling.blend import Blend, Stream
from examples.mosaic_streaming.sampling.order import ENDLESS, Order
from tests.unit.sampling import plain_blend

SHARDS = {"a": [7, 5, 8], "b": [3] * 4, "c": [11], "d": [1, 2, 2], "e": [40, 9]}
"""Samples of each shard of some streams."""


@dataclass(frozen=True)
class Part:
    """A stage: its first step, its streams with their weights, and the settings of its order."""

    from_step: int
    weights: dict[str, int]
    nodes: int = 4
    seed: int = 3
    block: int = 9  # of the shuffle; 0 for none
    restart: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)  # other names of its streams

    def streams(self) -> list[tuple[int, list[int], int]]:
        """Its streams, for the plain definition."""
        firsts = itertools.accumulate((sum(SHARDS[name]) for name in self.weights), initial=0)
        return [(first, SHARDS[name], self.weights[name]) for first, name in zip(firsts, self.weights, strict=False)]

    def order(self, batch: int) -> Order:
        """Its order, by itself."""
        streams = [
            Stream(first, np.array(shards), weight, key) for key, (first, shards, weight) in enumerate(self.streams())
        ]
        return Order("blend", batch, batch, ENDLESS, blend=Blend(streams, self.nodes, self.seed, self.block))

    def fingerprint(self) -> dict[str, Any]:
        """What tells its streams."""
        names = [self.names.get(name, name) for name in self.weights]
        indexes = [f"index {name}" for name in self.weights]
        streams = zip(names, indexes, strict=True)
        return {f"stream {n}": {"name": name, "index": index} for n, (name, index) in enumerate(streams, start=1)}

    def located(self, ids: Sequence[int]) -> list[tuple[str, int]]:
        """The stream of each sample, and its number there."""
        found, streams = [], self.streams()
        for sample in ids:
            number = max(place for place, (first, *_) in enumerate(streams) if first <= sample)
            found.append(([*self.weights][number], sample - streams[number][0]))
        return found


def history_of(parts: Sequence[Part], batch: int, skips: Sequence[Skip] = ()) -> History:
    """The history of a run of these stages."""
    stages = tuple(Stage(part.from_step, LoaderFile({}, "loader.toml"), part.restart) for part in parts)
    plan = Plan(stages, tuple(skips), "plan.toml")
    return History.of(plan, [part.order(batch) for part in parts], [part.fingerprint() for part in parts])


def defined(parts: Sequence[Part], batch: int, steps: int, skips: Sequence[Skip] = ()) -> list[list[tuple[str, int]]]:
    """The samples of each step by the definition; skipped batches count as read."""
    left_out = {number for skip in skips for number in range(skip.first, skip.last + 1)}
    numbers = [number for number in range(1, steps + len(left_out) + 1) if number not in left_out][:steps]
    before: dict[int, plain_blend.Before] = {}
    keys: dict[str, int] = {}
    found: list[list[tuple[str, int]]] = []
    begin = 0  # batches before the stage
    for part, following in itertools.zip_longest(parts, parts[1:]):
        last = min(following.from_step - 1 if following else steps, steps)
        end = numbers[last - 1]
        for name in part.weights:
            keys.setdefault(name, len(keys))
            if part.names.get(name, name) in part.restart:
                before.pop(keys[name], None)
        of_stage = [keys[name] for name in part.weights]
        ids, before = plain_blend.stage(
            part.streams(), part.nodes, part.seed, part.block, (end - begin) * batch, before, of_stage
        )
        located = part.located(ids)
        for number in numbers[part.from_step - 1 : last]:
            found.append(located[(number - 1 - begin) * batch : (number - begin) * batch])
        begin = end
    return found


def read(history: History, parts: Sequence[Part], steps: int) -> list[list[tuple[str, int]]]:
    """The samples of each step, as the history tells them."""
    found = []
    for step in range(1, steps + 1):
        piece = history.slice(step)
        blend = history.orders[piece.stage].blend
        assert blend
        found.append(parts[piece.stage].located(blend.samples(np.arange(piece.begin, piece.end)).tolist()))
    return found


def drawn(seed: int) -> tuple[list[Part], int, list[Skip], int]:
    """Stages, a global batch, skips and steps."""
    draw = random.Random(seed)
    batch, firsts = draw.choice([1, 3, 4]), [1, *sorted(draw.sample(range(2, 60), draw.choice([1, 2, 3])))]
    parts: list[Part] = []
    for first in firsts:
        names = draw.sample([*SHARDS], draw.randint(1, 4))
        weights = {name: draw.choice([0, 1, 1, 2, 7]) for name in names}
        weights[names[0]] = weights[names[0]] or 1
        restart = tuple(name for name in names if parts and draw.random() < 0.15)
        settings = (draw.choice([1, 2, 4, 64]), draw.choice([3, 4]), draw.choice([0, 5, 1000]))
        parts.append(Part(first, weights, *settings, restart))
    edges = sorted(draw.sample(range(1, 90), 2 * draw.choice([0, 1, 2])))
    skips = [Skip(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True)]
    return parts, batch, skips, 80


@pytest.mark.parametrize("first", [0, *(pytest.param(first, marks=pytest.mark.long) for first in range(8, 40, 8))])
def test_steps_read_what_the_single_stages_orders_say(first: int) -> None:
    for seed in range(first, first + 8):
        parts, batch, skips, steps = drawn(seed)
        history = history_of(parts, batch, skips)
        assert read(history, parts, steps) == defined(parts, batch, steps, skips), f"seed {seed}: {parts} {skips}"


def test_no_sample_of_a_stream_is_read_twice_before_all_are_read_once_over_all_stages() -> None:
    parts = [
        Part(1, {"a": 3, "e": 2}),
        Part(9, {"e": 1, "b": 5}, nodes=1, seed=8),
        Part(20, {"b": 1, "a": 1, "e": 6}, nodes=64),
        Part(40, {"a": 1}, block=0),
    ]
    steps = 80
    found: dict[str, list[int]] = defaultdict(list)
    for name, sample in itertools.chain(*read(history_of(parts, 4), parts, steps)):
        found[name].append(sample)
    assert {"a", "b", "e"} == set(found) and len(found["e"]) > 49, "more than a pass"
    for name, samples in found.items():
        size = sum(SHARDS[name])
        for begin in range(0, len(samples), size):
            of_pass = samples[begin : begin + size]
            assert len(set(of_pass)) == len(of_pass), name


def test_streams_are_known_by_their_index_and_keep_their_place_while_they_are_gone() -> None:
    parts = [Part(1, {"a": 1, "b": 1}), Part(5, {"b": 1}), Part(9, {"a": 2, "b": 1}, names={"a": "other", "b": "a"})]
    assert read(history_of(parts, 2), parts, 20) == defined(parts, 2, 20)


def test_of_streams_with_equal_indexes_one_of_the_same_name_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHARDS, "twin", SHARDS["a"])
    parts = [Part(1, {"a": 1, "twin": 3}), Part(6, {"twin": 1})]
    prints = [{key: stream | {"index": "same"} for key, stream in part.fingerprint().items()} for part in parts]
    stages = tuple(Stage(part.from_step, LoaderFile({}, "loader.toml")) for part in parts)
    history = History.of(Plan(stages), [part.order(4) for part in parts], prints)
    assert read(history, parts, 20) == defined(parts, 4, 20)
    [last] = prints[1].values()
    renamed = History.of(
        Plan(stages), [part.order(4) for part in parts], [prints[0], {"stream 1": last | {"name": "x"}}]
    )
    as_a = [parts[0], Part(6, {"a": 1}, names={"a": "x"})]
    assert read(renamed, as_a, 20) == defined(as_a, 4, 20), "without one, the first of them"


def test_stage_begins_at_its_step_whatever_is_skipped() -> None:
    plan = Plan((Stage(1, LoaderFile({}, "")), Stage(10, LoaderFile({}, ""))), (Skip(1, 2), Skip(5, 6), Skip(14, 20)))
    assert [plan.batch(step) for step in range(12)] == [0, 3, 4, 7, 8, 9, 10, 11, 12, 13, 21, 22]
    assert plan.begins == [0, 13], "the batches that are skipped between two stages belong to the second"
    assert [plan.steps(batch) for batch in (0, 2, 3, 6, 7, 13, 20, 21)] == [0, 0, 1, 2, 3, 9, 9, 10]
    assert [*plan.runs(0, 22)] == [(2, 4), (6, 13), (20, 22)]
    assert [*plan.runs(3, 9)] == [(3, 4), (6, 9)]
    assert [*plan.runs(5, 6)] == [*plan.runs(14, 15)] == []
