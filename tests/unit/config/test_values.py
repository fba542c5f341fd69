"""Every setting of the loader that is a number, a switch or a word, given as something else."""

import copy
import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmfoundry import registry
from streaming import Stream, StreamingDataset

from examples.mosaic_streaming.config.values import LIMITS, WITH_UNITS, has_type, hints_of
from examples.mosaic_streaming.errors import ConfigError
from tests.support import streams as support
from tests.support.streams import write_stream

TOP = hints_of(registry.dataloaders.get("text"))
DATASET = hints_of(StreamingDataset.__init__)
STREAM = hints_of(Stream.__init__)
PLACES = {"": TOP, "dataset.": DATASET, "dataset.streams.web.": STREAM}
OWNED = {"max_seq_len", "replication", "batch_size", "device_batch_size"}
"""By the job config: any value is refused, with other words."""


def numeric(hints: dict[str, Any]) -> list[str]:
    """The arguments that can be numbers."""
    return [key for key, hint in hints.items() if has_type(3, hint) and not has_type({}, hint) and key not in OWNED]


NUMBERS = [(place, key) for place, hints in PLACES.items() for key in numeric(hints)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stream(tmp_path_factory.mktemp("data") / "web", samples=4)


@pytest.fixture
def config(folder: Path) -> dict[str, Any]:
    return {"name": "text", "dataset": {"streams": {"web": {"local": str(folder)}}}}


def with_value(config: dict[str, Any], place: str, key: str, value: Any) -> dict[str, Any]:
    """The configuration with one more value."""
    changed = section = copy.deepcopy(config)
    for name in place.split(".")[:-1]:
        section = section[name]
    section[key] = value
    return changed


def resolved(config: dict[str, Any]) -> dict[str, Any]:
    return support.resolved(config).config


def test_all_numbers_that_the_loader_has_are_tried() -> None:
    names = {f"{place}{key}" for place, key in NUMBERS}
    assert {"num_workers", "timeout", "dataset.predownload", "dataset.shuffle_seed", "dataset.epoch_size"} <= names
    assert {"dataset.streams.web.proportion", "dataset.streams.web.download_timeout", "prefetch_factor"} <= names
    assert {key for _, key in NUMBERS} >= LIMITS.keys(), "each limit is that of an argument"
    unlimited = {key for _, key in NUMBERS} - LIMITS.keys()
    assert not unlimited, "each number has limits"


@pytest.mark.parametrize("value", [math.nan, math.inf, -1, 10**30, -(10**30), [], {}, "many", "-1", "nan", True])
@pytest.mark.parametrize(("place", "key"), NUMBERS)
def test_number_that_makes_no_sense_is_refused_with_its_limits(
    config: dict[str, Any], place: str, key: str, value: Any
) -> None:
    low, high = LIMITS[key]
    expected = rf"{re.escape(f'{place}{key} = {value!r}')} in loader\.toml, expected .*, from {low:,} to {high:,}\."
    with pytest.raises(ConfigError, match=expected):
        resolved(with_value(config, place, key, value))


@pytest.mark.parametrize(("place", "key"), [(place, key) for place, key in NUMBERS if LIMITS[key][0] > 0])
def test_zero_is_refused_where_it_makes_no_sense(config: dict[str, Any], place: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{re.escape(place)}{key} = 0 in loader\.toml, expected"):
        resolved(with_value(config, place, key, 0))


@pytest.mark.parametrize("key", WITH_UNITS)
def test_numbers_with_units_are_read_as_streaming_does(config: dict[str, Any], folder: Path, key: str) -> None:
    config["dataset"]["streams"]["web"] = {"remote": str(folder), "local": str(folder.parent / "cache")}
    value = {"cache_limit": "10gb", "epoch_size": "10k"}[key]
    assert resolved(with_value(config, "dataset.", key, value))["dataset"][key] == value


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("epoch_size", "10ba", 'a whole number, also as "10k" (k, m, b, t), from 1 to'),
        ("epoch_size", "-10k", 'a whole number, also as "10k" (k, m, b, t), from 1 to'),
        ("cache_limit", "10 gigs", 'a number of bytes, also as "10gb" (b, kb, mb, gb, tb, pb), from 1 to'),
    ],
)
def test_unit_that_there_is_not_is_refused_with_those_that_there_are(
    config: dict[str, Any], key: str, value: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"dataset.{key} = {value!r} in loader.toml, expected {expected} ")):
        resolved(with_value(config, "dataset.", key, value))


@pytest.mark.parametrize("key", ["shuffle", "allow_unsafe_types", "keep_zip"])
@pytest.mark.parametrize("value", ["false", 0, 1.0, []])
def test_switch_that_is_neither_true_nor_false_is_refused(config: dict[str, Any], key: str, value: Any) -> None:
    """streaming takes "false" for true."""
    with pytest.raises(ConfigError, match=rf"dataset\.{key} = {re.escape(repr(value))} .*expected true or false"):
        resolved(with_value(config, "dataset.", key, value))


@pytest.mark.parametrize("key", ["sampling_method", "batching_method", "partition_algo", "split", "validate_hash"])
def test_word_that_is_a_number_is_refused(config: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"dataset\.{key} = 3 in loader\.toml, expected (a string|one of: \w+)"):
        resolved(with_value(config, "dataset.", key, 3))


def test_all_wrong_values_are_told_at_once(config: dict[str, Any]) -> None:
    config |= {"num_workers": -1}
    config["dataset"] |= {"predownload": 0, "shuffle": "no"}
    with pytest.raises(ConfigError) as error:
        resolved(config)
    assert [word in str(error.value) for word in ("num_workers", "dataset.predownload", "dataset.shuffle")] == [
        True
    ] * 3


@pytest.mark.parametrize("streams", [{}, {"web": {}}])
def test_empty_mixture_is_refused(config: dict[str, Any], streams: dict[str, Any]) -> None:
    config["dataset"]["streams"] = streams
    with pytest.raises(ConfigError, match=r"has no `local` or `remote`"):
        resolved(config)


def test_stream_that_is_not_there_is_refused(config: dict[str, Any]) -> None:
    config["dataset"]["streams"]["code"] = {"local": "/nowhere"}
    with pytest.raises(ConfigError, match=r"No index\.json in /nowhere \(code in loader\.toml\)"):
        resolved(config)


def mixture(folder: Path, *proportions: float) -> dict[str, Any]:
    """Streams with these shares, each in a folder of its own."""
    streams = {}
    for number, proportion in enumerate(proportions):
        streams[f"s{number}"] = {"local": str(folder / f"s{number}"), "proportion": proportion}
        if not (folder / f"s{number}").exists():
            write_stream(folder / f"s{number}", samples=4)
    return {"name": "text", "dataset": {"streams": streams}}


@pytest.mark.parametrize("proportions", [(0.5, 0.4), (0.5, 0.6), (1, 1), (0, 0), (0.1,)])
def test_proportions_that_do_not_sum_to_one_are_refused(tmp_path: Path, proportions: tuple[float, ...]) -> None:
    listed = ", ".join(f"s{number} {share}" for number, share in enumerate(proportions))
    with pytest.raises(ConfigError, match=rf"streams in loader\.toml \({listed}\) sum to {sum(proportions):g}, not 1"):
        resolved(mixture(tmp_path, *proportions))


@pytest.mark.parametrize("proportions", [(0.7, 0.3), (0.333, 0.333, 0.333), (1.0,)])
def test_proportions_that_sum_to_one_or_nearly_are_taken(tmp_path: Path, proportions: tuple[float, ...]) -> None:
    assert resolved(mixture(tmp_path, *proportions))["dataset"]["streams"]["s0"]["proportion"] == proportions[0]


def test_streams_with_one_folder_are_refused_however_it_is_spelled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    same = [
        {"local": "web"},
        {"local": str(folder)},
        {"local": str(folder.parent), "split": "web"},
        {"local": "./web/"},
    ]
    for one in same:
        for other in same:
            streams = {"a": dict(one), "b": dict(other)}
            with pytest.raises(
                ConfigError, match=rf"a in loader\.toml and b in loader\.toml have the same `local`, {folder}\."
            ):
                resolved({"name": "text", "dataset": {"streams": streams}})


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=10),
    st.sampled_from(["py1e", "py1br", "xxh64", "s3://bucket/x", "10gb", "balanced", "/nowhere"]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)
KEYS = sorted({*DATASET, *STREAM, *TOP, *inspect.signature(Stream).parameters, "dataset", "streams", "name"})
SECTION = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=10), VALUES, max_size=5)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(top=SECTION, dataset=SECTION, stream=SECTION)
def test_any_configuration_is_taken_or_refused_with_words(
    config: dict[str, Any], top: dict[str, Any], dataset: dict[str, Any], stream: dict[str, Any]
) -> None:
    web = {**config["dataset"]["streams"]["web"], **stream}
    changed = {**config, "dataset": {**config["dataset"], "streams": {"web": web}, **dataset}, **top}
    before = copy.deepcopy(changed)
    try:
        complete = resolved(changed)
    except ConfigError as error:
        assert "loader.toml" in str(error) and len(str(error)) > 30
    else:
        assert complete["name"] in registry.dataloaders.get_all() and complete["dataset"]["max_seq_len"] == 17
    assert repr(changed) == repr(before), "the caller's is left as it was"
