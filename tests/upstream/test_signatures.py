"""llm-foundry and streaming take what `config/signatures.py` says, and read numbers with units as `config` does."""

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import pytest
from llmfoundry import registry
from llmfoundry.data import StreamingFinetuningDataset, StreamingTextDataset
from llmfoundry.data.finetuning import dataloader as finetuning
from streaming import Stream, StreamingDataset
from streaming.base import batching, partition, shuffle, util

from examples.mosaic_streaming.config import signatures
from examples.mosaic_streaming.config.keys import NOT_FOR_USERS
from examples.mosaic_streaming.config.values import hints_of, number_of

ADAPT = "adapt config/signatures.py"
CHOICES: dict[str, Iterable[str]] = {
    "shuffle_algo": shuffle.algos,
    "partition_algo": partition.algos,
    "batching_method": batching.batching_methods,
}
FUNCTIONS = [
    *((registry.dataloaders.get(name), signatures.BUILDER) for name in ("text", "finetuning")),
    (StreamingDataset, signatures.STREAMING),
    (Stream, signatures.STREAM),
]


def arguments(*functions: Any) -> set[str]:
    """What a configuration can give to functions."""
    return {name for one in functions for name in inspect.signature(one).parameters} - NOT_FOR_USERS


@pytest.mark.parametrize(("function", "known"), FUNCTIONS)
def test_functions_have_the_known_arguments_of_the_known_types(function: Any, known: Mapping[str, Any]) -> None:
    assert arguments(function) == set(known), ADAPT
    hints = hints_of(function.__init__ if inspect.isclass(function) else function)
    hints |= hints_of(Stream.__init__) if function is StreamingDataset else {}
    for key, kind in known.items():
        if typing.get_origin(kind) is Literal:
            words = set(CHOICES.get(key, ("balanced", "fixed"))) | ({"blend"} if key == "batching_method" else set())
            assert hints[key] is str and set(typing.get_args(kind)) == words, ADAPT
        elif kind is not Any:
            assert kind == hints[key], ADAPT


def test_llm_foundry_has_the_known_loaders() -> None:
    assert sorted(registry.dataloaders.get_all()) == signatures.LOADERS, ADAPT


@pytest.mark.parametrize(
    ("name", "functions", "more"),
    [
        ("text", (StreamingTextDataset, StreamingDataset), ()),
        ("finetuning", (StreamingFinetuningDataset, finetuning._validate_config), finetuning._ALLOWED_DATASET_KEYS),
    ],
)
def test_datasets_take_the_known_keys(name: str, functions: tuple[Any, ...], more: Iterable[str]) -> None:
    own = {*signatures.TOKEN_IDS, *signatures.OVERRIDES}
    assert arguments(*functions) | {*more} | own == set(signatures.DATASET_KEYS[name]), ADAPT


def test_streams_take_over_the_known_defaults() -> None:
    parameters = inspect.signature(StreamingDataset).parameters
    assert {key: parameters[key].default for key in signatures.STREAM_DEFAULTS} == signatures.STREAM_DEFAULTS, ADAPT
    assert set(signatures.STREAM_DEFAULTS) | {"remote", "local"} == arguments(Stream) & arguments(StreamingDataset)


TEXTS = ["10", "10b", "1.5kb", " 2 GB ", "3tb", "1pb", "1eb", "1zb", "1yb", "10k", "2.5m", "1t", "7B", "1.5b"]
TEXTS += ["", "b", "kb", "k", "ten", "-1", "1.5", "1e3", "1e3mb", "1e3k", "²", "10 b", "10bb", "1_000", "1_0k", "nanmb"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    ("key", "read"), [("cache_limit", util.bytes_to_int), ("epoch_size", util.number_abbrev_to_int)]
)
def test_numbers_with_units_are_those_of_streaming(key: str, read: Callable[[str], int], text: str) -> None:
    def result(read: Callable[..., int], *arguments: str) -> int | None:
        try:
            return read(*arguments)
        except ValueError:
            return None

    assert result(number_of, text, key) == result(read, text)
