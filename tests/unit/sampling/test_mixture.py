"""The table of a mixture's streams against the samples that are delivered."""

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torchtitan.tools.logging import init_logger

from examples.mosaic_streaming.distributed.abort import AbortChannel
from tests.support.ranks import run_ranks
from tests.support.streams import BATCHING, FIRST_ID, build_loader, job, mixture, write_stream

SIZES = {"a": 400, "b": 300, "c": 100}
TOTAL = 8
WEIGHTS: dict[str, tuple[dict[str, dict[str, Any]], dict[str, Any]]] = {
    "none": ({}, {}),
    "proportion": ({"a": {"proportion": 0.5}, "b": {"proportion": 0.2}, "c": {"proportion": 0.3}}, {}),
    "proportion, epoch_size": (
        {"a": {"proportion": 0.1}, "b": {"proportion": 0.2}, "c": {"proportion": 0.7}},
        {"epoch_size": 480},
    ),
    "repeat": ({"a": {"repeat": 0.5}, "c": {"repeat": 3}}, {}),
    "choose": ({"a": {"choose": 200}, "b": {"choose": 80}, "c": {"choose": 120}}, {}),
    "epoch_size": ({}, {"epoch_size": 320}),
}


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three streams, whose samples are numbered through."""
    folder, first = tmp_path_factory.mktemp("mixture"), 0
    for name, size in SIZES.items():
        write_stream(folder / name, size, first=first)
        first += size
    return {name: str(folder / name) for name in SIZES}


Case = tuple[str, str]
"""A way to weigh streams, and a batching method."""


def cases(first: int) -> list[Case]:
    """Each way to weigh streams with one batching method; together, the four lists have all with all."""
    return [(weights, BATCHING[(first + number) % len(BATCHING)]) for number, weights in enumerate(WEIGHTS)]


@pytest.mark.parametrize("first", [0, *(pytest.param(first, marks=pytest.mark.long) for first in (1, 2, 3))])
def test_delivered_shares_are_those_of_the_table(streams: dict[str, str], first: int) -> None:
    def read_epoch(case: Case, channel: AbortChannel) -> tuple[int, Counter[str]]:
        weights, method = case
        settings, dataset = WEIGHTS[weights]
        config = mixture(
            {name: {"local": local} | settings.get(name, {}) for name, local in streams.items()},
            batching_method=method,
            **dataset,
        )
        print(f"begins: {case}")
        loader = build_loader(config, job(TOTAL // 2, TOTAL), channel=channel)
        batches, found = iter(loader), Counter[str]()
        bounds = [(name, first) for name, first in zip(SIZES, (0, 400, 700), strict=True)]
        samples = loader._order.remaining(0)
        for _ in range(samples // TOTAL * 2):
            for sample in (next(batches)[0]["input"][:, 0] - FIRST_ID).tolist():
                found[[name for name, first in bounds if sample >= first][-1]] += 1
        loader.close()
        return samples, found

    def read_epochs() -> list[tuple[int, Counter[str]]]:
        init_logger()
        channel = AbortChannel()
        return [read_epoch(case, channel) for case in cases(first)]

    [rank] = run_ranks(read_epochs)
    assert rank.code == 0, rank.output
    outputs = re.split("^begins: .*\n", rank.output, flags=re.MULTILINE)[1:]
    for case, (samples, found), output in zip(cases(first), rank.value, outputs, strict=True):
        compare(case, samples, found, table(output))


def compare(
    case: Case, samples: int, found: Counter[str], rows: dict[str, tuple[int, int, float, float, float]]
) -> None:
    """Check the rows of a table against what was delivered."""
    weights, method = case
    assert found.total() == samples, case
    assert set(rows) == set(SIZES), case
    for name, (size, tokens, asked, effect, passes) in rows.items():
        assert (size, tokens) == (SIZES[name], SIZES[name] * 16), case
        assert abs(effect - found[name] / samples) < (0.01 if method in ("random", "device_per_stream") else 0.0001)
        assert abs(passes - found[name] / SIZES[name]) < (0.03 if method in ("random", "device_per_stream") else 0.001)
        assert abs(asked - share_asked(name, WEIGHTS[weights][0])) < 0.0001, case


def test_each_way_to_weigh_is_read_with_each_batching_method() -> None:
    assert sorted(case for first in range(4) for case in cases(first)) == sorted(itertools.product(WEIGHTS, BATCHING))


def share_asked(name: str, settings: dict[str, dict[str, Any]]) -> float:
    """The share of a stream that its weight and the others' come to."""
    if any("proportion" in setting for setting in settings.values()):
        return float(settings[name]["proportion"])
    sizes = {
        one: settings.get(one, {}).get("choose", size * settings.get(one, {}).get("repeat", 1))
        for one, size in SIZES.items()
    }
    return float(sizes[name] / sum(sizes.values()))


def table(output: str) -> dict[str, tuple[int, int, float, float, float]]:
    """The rows of the table in a log, by stream."""
    lines = output.splitlines()
    begin = next(number for number, line in enumerate(lines) if "Streams, and their part of an epoch:" in line)
    assert lines[begin + 1].split("  ")[1:] and "share in effect" in lines[begin + 1]
    assert sum("Streams, and their part of an epoch:" in line for line in lines) == 1
    rows = {}
    for line in lines[begin + 2 : begin + 2 + len(SIZES)]:
        name, samples, tokens, asked, effect, passes = line.split()
        rows[name] = (
            int(samples.replace(",", "")),
            int(tokens.replace(",", "")),
            float(asked.rstrip("%")) / 100,
            float(effect.rstrip("%")) / 100,
            float(passes),
        )
    return rows


def test_rank_0_alone_shows_the_table(streams: dict[str, str], tmp_path: Path) -> None:
    def run() -> None:
        init_logger()
        build_loader(mixture({name: {"local": local} for name, local in streams.items()}), job(2, TOTAL))

    first, second = run_ranks(run, 2)
    assert (
        "Streams, and their part of an epoch:" in first.output
        and "Streams, and their part of an epoch:" not in second.output
    )
