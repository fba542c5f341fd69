"""Keys and values of a loader configuration that llm-foundry or streaming would drop, refuse or misread."""

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from examples.mosaic_streaming.config.signatures import DATASET_KEYS, STREAM, STREAMING
from examples.mosaic_streaming.config.streams import Config
from examples.mosaic_streaming.config.values import LIMITS, hints_of, refuse, wrong_value
from examples.mosaic_streaming.errors import ConfigError

MAX_RATIO = 1000  # the most samples that are packed into a row, on average

ELSEWHERE = {"tokenizer_name": "the tokenizer is that of model.hf_assets_path in the job config"}
"""What replaces keys that llm-foundry's own YAMLs have."""

NOT_WITH_BLEND = {
    "epoch_size": "its streams go on pass after pass, so there is no epoch",
    **dict.fromkeys(["sampling_method", "sampling_granularity"], "a pass reads all samples of its stream"),
    "shuffle_algo": "samples are shuffled within blocks, of dataset.shuffle_block_size",
}
"""Settings that mean nothing with `batching_method = "blend"`, and why."""

NOT_FOR_USERS = {"self", "tokenizer", "kwargs", "allowed_dataset_keys"}  # arguments that no configuration can give


def check_keys(config: Config, path: str, builder: Mapping[str, Any] | None = None) -> None:
    """Raise ConfigError for keys that nothing reads and values that make no sense, naming all of a kind.

    `builder` has the arguments of the loader's builder, and their types; if None, llm-foundry's registry is asked.
    """
    sections = sections_of(config, path, builder)
    name, dataset, unknown, wrong = config["name"], config["dataset"], [], []
    for prefix, section, known, hints in sections:
        unknown += unknown_keys(prefix, section, known, [] if prefix == "dataset." else DATASET_KEYS.get(name, []))
        for key, value in section.items():
            if hints.get(key, Any) is not Any:
                wrong.append(wrong_value(f"{prefix}{key}", value, hints[key], path, LIMITS.get(key)))
    if unknown:
        raise ConfigError(f"{path} has keys that nothing reads: {'; '.join(unknown)}.")
    refuse(wrong)
    check_packing(name, dataset, path)
    if dataset.get("batching_method") == "blend":
        means = f"in {path} means nothing with dataset.batching_method = 'blend'"
        given = {key: dataset[key] for key in NOT_WITH_BLEND if dataset.get(key) is not None}
        refuse([f"dataset.{key} = {given[key]!r} {means}: {NOT_WITH_BLEND[key]}. Remove it." for key in given])
    if name == "finetuning" and not (dataset.get("remote") or dataset.get("streams") or "hf_name" in dataset):
        raise ConfigError(
            f"dataset in {path} has no `remote`: the finetuning loader streams only from `remote` or `streams`. "
            "Give the stream's folder as `remote`, and another folder as `local`, for the cache."
        )


def sections_of(
    config: Config, path: str, builder: Mapping[str, Any] | None
) -> list[tuple[str, Config, Sequence[str], Mapping[str, Any]]]:
    """Each section's prefix, settings, known keys and types; ConfigError if there is no such loader or section."""
    name, dataset = str(config.get("name")), config.get("dataset")
    builder = registered(config, path) if builder is None else builder
    if not isinstance(dataset, dict):
        raise ConfigError(f"{path} has no [dataset] section, which says what streams to read.")
    streams = dataset.get("streams", {})
    if not isinstance(streams, dict) or not all(isinstance(stream, dict) for stream in streams.values()):
        raise ConfigError(f"dataset.streams in {path} is not made of sections [dataset.streams.NAME], one each stream.")
    hints, keys = STREAMING | STREAM, DATASET_KEYS.get(name, list(dataset))
    found = [(f"dataset.streams.{key}.", stream, list(STREAM), hints) for key, stream in streams.items()]
    return [("", config, ["name", *builder], builder), ("dataset.", dataset, keys, hints), *found]


def check_name(config: Config, path: str, loaders: Iterable[str]) -> str:
    """The name of a loader; ConfigError if there is none of this name."""
    if (name := str(config.get("name"))) not in loaders:
        given = f"{path} has no `name`" if "name" not in config else f"name = {name!r} in {path}"
        raise ConfigError(f"{given}, expected one of: {', '.join(sorted(loaders))}.")
    return name


def registered(config: Config, path: str) -> dict[str, Any]:
    """The arguments that the builder in llm-foundry's registry takes, and their types; ConfigError if there is none."""
    from llmfoundry import registry

    name = check_name(config, path, registry.dataloaders.get_all())
    builder = registry.dataloaders.get(name)
    keys = [*inspect.signature(builder).parameters, *(key for key in config if takes(name, key))]
    hints = hints_of(builder)
    return {key: hints.get(key, Any) for key in keys}


def unknown_keys(prefix: str, section: Config, known: Sequence[str], of_dataset: Sequence[str] = ()) -> list[str]:
    """The unknown keys of a section, each with the nearest known one, or its place."""
    valid, found = sorted({*known} - NOT_FOR_USERS), []
    for key in sorted({*section} - {*valid}):
        near = difflib.get_close_matches(key, valid, n=1)
        hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(valid)}"
        hint = "it belongs in [dataset]" if key in {*of_dataset} - NOT_FOR_USERS else hint
        found.append(f"{prefix}{key} ({ELSEWHERE.get(key, hint)})")
    return found


def takes(name: str, key: str) -> bool:
    """Whether a loader's builder takes an argument; a user's may take fewer than llm-foundry's, or any."""
    from llmfoundry import registry

    arguments = inspect.signature(registry.dataloaders.get(name)).parameters
    return key in arguments or any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values())


def check_packing(name: str, dataset: Config, path: str) -> None:
    """Raise ConfigError for packing that is none or that no resume could repeat; fill in what makes it repeatable.

    Source: by default, llm-foundry 0.22.0 keeps what didn't fit in the memory of a worker (data/packing.py).
    """
    if (ratio := dataset.get("packing_ratio")) is None:
        return
    if ratio != "auto" and not (type(ratio) in (int, float) and 1 <= ratio <= MAX_RATIO):
        expected = f'"auto" or a number from 1 to {MAX_RATIO:,}'
        raise ConfigError(f"dataset.packing_ratio = {ratio!r} in {path}, expected {expected}.")
    if ratio == 1:  # no packing, as in llm-foundry
        return
    auto, method = 'dataset.packing_ratio = "auto"', dataset.get("batching_method", "random")
    if ratio == "auto" and name != "finetuning":
        raise ConfigError(f'{auto} in {path} is for name = "finetuning", not {name!r}. Give a number.')
    if ratio == "auto" and method not in ("random", "blend"):
        raise ConfigError(
            f"{auto} with dataset.batching_method = {method!r} in {path}: it is chosen for batches of any samples, and "
            "those of one stream may need more room. Give a number."
        )
    if (kept := dataset.setdefault("max_leftover_bins_to_keep", 0)) != 0:
        raise ConfigError(
            f"dataset.max_leftover_bins_to_keep = {kept!r} in {path}: what workers keep in memory is lost at a "
            "restart, so that a run can't go on as if it had not stopped. Remove the key: with 0, the default, a batch "
            "depends on its samples alone, and the log says how many tokens are left out."
        )
