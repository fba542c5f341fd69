"""The loader's configuration: fill what is derived, refuse what is owned elsewhere or unknown."""

import copy
import difflib
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

from llmfoundry import registry
from llmfoundry.data import StreamingFinetuningDataset, StreamingTextDataset
from llmfoundry.data.finetuning import dataloader as finetuning
from streaming import Stream, StreamingDataset
from streaming.base import batching, partition, shuffle
from transformers import PreTrainedTokenizerBase

from examples.mosaic_streaming.config.files import expand_path
from examples.mosaic_streaming.config.folders import Folder, check_folders, default_cache, is_copy, is_url
from examples.mosaic_streaming.config.values import hints_of, wrong_values
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.sampling.order import NUM_CANONICAL_NODES

Config = dict[str, Any]

MAKE_DEMO_DATA = "python -m examples.mosaic_streaming.make_demo_data"

TOKEN_IDS = [f"{name}_token_id" for name in ("eos", "bos")]
OVERRIDES = [f"override_{key}_mismatch_error" for key in TOKEN_IDS]

DATASET_KEYS = {
    "text": [
        *inspect.signature(StreamingTextDataset).parameters,
        *inspect.signature(StreamingDataset).parameters,
        # Read by the text collator. Its `mlm_probability` is left out: it masks inputs, which no causal model wants.
        *TOKEN_IDS,
        *OVERRIDES,
    ],
    "finetuning": [
        *TOKEN_IDS,
        *OVERRIDES,
        *inspect.signature(StreamingFinetuningDataset).parameters,
        *inspect.signature(finetuning._validate_config).parameters,
        *finetuning._ALLOWED_DATASET_KEYS,
    ],
}
"""What `dataset` can hold, by loader; other loaders check it themselves.

Source: llm-foundry 0.22.0, data/text_data.py, data/utils.py and data/finetuning/dataloader.py. The text loader drops
a key that it doesn't know without a word.
"""

CHOICES = {
    "shuffle_algo": tuple(shuffle.algos),
    "partition_algo": tuple(partition.algos),
    "batching_method": tuple(batching.batching_methods),
    "sampling_method": ("balanced", "fixed"),
}
"""The words that a setting of `dataset` can be; streaming's own, before ours are among them."""

STREAM_DEFAULTS = {
    key: inspect.signature(StreamingDataset).parameters[key].default
    for key in ("download_retry", "download_timeout", "validate_hash", "keep_zip")
}
"""Settings of `dataset` that streams take over, and their defaults."""

WITHOUT_WORKERS: Config = {"num_workers": 0, "prefetch_factor": None, "persistent_workers": False, "timeout": 0}
"""What torch takes where there are no workers: it refuses other values, also llm-foundry's own defaults."""

WEIGHT_TOLERANCE = 0.01
"""By how much the proportions of all streams may sum to another number than 1: people round."""

MAX_RATIO = 1000
"""Samples packed into a row, at most."""

ELSEWHERE = {"tokenizer_name": "the tokenizer is that of model.hf_assets_path in the job config"}
"""What stands in place of keys that llm-foundry's own YAMLs have."""

NOT_FOR_USERS = {"self", "tokenizer", "kwargs", "allowed_dataset_keys"}


def resolve(
    config: Config, path: str, *, seq_len: int, local_batch_size: int, replication: int, section: str = "training"
) -> Config:
    """The complete configuration for llm-foundry's `build_dataloader`, as a copy.

    Args:
        config: the loader's configuration as it was read.
        path: the file it was read from, for messages.
        seq_len: in tokens.
        local_batch_size: in sequences per dp rank.
        replication: ranks that receive the same samples: world size / dp_world_size.
        section: of the job config that `seq_len` and `local_batch_size` come from.

    Raises:
        ConfigError: a key is unknown, missing, owned by the job config, or differs from what it is derived from.
    """
    config = copy.deepcopy(config)
    check_keys(config, path)
    dataset = config["dataset"]
    if "batch_size" in dataset:
        raise ConfigError(
            f"dataset.batch_size = {dataset['batch_size']!r} in {path}. Remove the key: "
            f"the batch size is {section}.local_batch_size = {local_batch_size} in the job config."
        )
    derive(config, "device_batch_size", [local_batch_size], f"{section}.local_batch_size is", path)
    del config["device_batch_size"]  # an argument of `build_dataloader`
    derive(dataset, "dataset.max_seq_len", [seq_len + 1, seq_len], f"{section}.seq_len = {seq_len} allows", path)
    derive(dataset, "dataset.replication", [replication], "world size / data-parallel degree is", path)
    if config["name"] == "finetuning":
        derive(dataset, "dataset.decoder_only_format", [True], "each model of TorchTitan's asks for", path)
    dataset.setdefault("num_canonical_nodes", NUM_CANONICAL_NODES)
    place_streams(dataset, path)
    check_streams(dataset, path)
    check_weights(dataset, path)
    check_folders(folders_of(dataset, path))
    # Batches are made anew from the loader's: pinning these would help nobody.
    defaults: Config = {"drop_last": True, "num_workers": 0, "pin_memory": False}
    config = defaults | config
    return config | WITHOUT_WORKERS if config["num_workers"] == 0 else config


def derive(section: Config, name: str, values: list[Any], source: str, path: str) -> None:
    """Fill a derived key with the first of the values that it can have; refuse any other with ConfigError."""
    key = name.split(".")[-1]
    if section.setdefault(key, values[0]) not in values:
        raise ConfigError(
            f"{name} = {section[key]!r} in {path}, but {source} {' or '.join(map(str, values))}. "
            "Remove the key: it is derived from the job config. Or change that."
        )


def check_keys(config: Config, path: str) -> None:
    """Raise ConfigError, naming all of them, for keys that llm-foundry would drop or refuse."""
    name, dataset = str(config.get("name")), config.get("dataset")
    loaders = sorted(registry.dataloaders.get_all())
    if name not in loaders:
        raise ConfigError(f"name = {name!r} in {path}, expected one of: {', '.join(loaders)}.")
    if not isinstance(dataset, dict):
        raise ConfigError(f"{path} has no [dataset] section, which says what streams to read.")
    streams = dataset.get("streams", {})
    if not isinstance(streams, dict) or not all(isinstance(stream, dict) for stream in streams.values()):
        raise ConfigError(f"dataset.streams in {path} is not made of sections [dataset.streams.NAME], one each stream.")
    known = ["name", *(key for key in config if takes(name, key)), *arguments_of(name)]
    wrong = unknown(config, "", known, DATASET_KEYS.get(name, []))
    wrong += unknown(dataset, "dataset.", DATASET_KEYS.get(name, list(dataset)))
    for stream, settings in streams.items():
        wrong += unknown(settings, f"dataset.streams.{stream}.", list(inspect.signature(Stream).parameters))
    if wrong:
        raise ConfigError(f"{path} has keys that nothing reads: {'; '.join(wrong)}.")
    hints = hints_of(StreamingDataset.__init__) | hints_of(Stream.__init__)
    wrong = wrong_values(config, "", hints_of(registry.dataloaders.get(name)), path)
    wrong += wrong_values(dataset, "dataset.", hints, path)
    for stream, settings in streams.items():
        wrong += wrong_values(settings, f"dataset.streams.{stream}.", hints, path)
    if wrong:
        raise ConfigError(" ".join(wrong))
    check_packing(name, dataset, path)
    if name == "finetuning" and not (dataset.get("remote") or streams or "hf_name" in dataset):
        raise ConfigError(
            f"dataset in {path} has no `remote`: the finetuning loader streams only from `remote` or `streams`. "
            "Give the stream's folder as `remote`, and another folder as `local`, for the cache."
        )
    for key, choices in CHOICES.items():  # streaming looks only after the start, or never
        if (choice := dataset.get(key, choices[0])) not in choices:
            raise ConfigError(f"dataset.{key} = {choice!r} in {path}, expected one of: {', '.join(choices)}.")


def take_out_token_ids(config: Config, path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare the token ids of a finetuning loader with the tokenizer's, as llm-foundry does, and take them out.

    Nothing reads them there, but YAMLs of llm-foundry's have them, and it would hand them on to streaming, which
    refuses them (llm-foundry 0.22.0, data/finetuning/dataloader.py).

    Raises:
        ConfigError: they differ.
    """
    if config["name"] != "finetuning":
        return
    dataset = config["dataset"]
    for key, override in zip(TOKEN_IDS, OVERRIDES, strict=True):
        given, own, ignore = dataset.pop(key, None), getattr(tokenizer, key), dataset.pop(override, False)
        if given not in (None, own) and not ignore:
            raise ConfigError(
                f"dataset.{key} = {given!r} in {path}, but the tokenizer in model.hf_assets_path = "
                f"{tokenizer.name_or_path!r} has {own}. Remove the key, which nothing else reads, or set that path."
            )


def arguments_of(name: str) -> Mapping[str, inspect.Parameter]:
    """What a loader's builder takes, by its name in llm-foundry's registry."""
    return inspect.signature(registry.dataloaders.get(name)).parameters


def takes(name: str, key: str) -> bool:
    """Whether a loader's builder takes an argument; a user's may take fewer than llm-foundry's, or any."""
    arguments = arguments_of(name)
    return key in arguments or any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values())


def check_packing(name: str, dataset: Config, path: str) -> None:
    """Raise ConfigError for packing that is no packing, or that no resume could repeat; fill in what can be repeated.

    Source: llm-foundry's own default keeps all that didn't fit in the memory of a worker (0.22.0, data/packing.py).
    """
    if (ratio := dataset.get("packing_ratio")) is None:
        return
    if ratio != "auto" and not (type(ratio) in (int, float) and 1 <= ratio <= MAX_RATIO):
        raise ConfigError(
            f'dataset.packing_ratio = {ratio!r} in {path}, expected "auto" or a number from 1 to {MAX_RATIO:,}.'
        )
    if ratio == 1:  # as llm-foundry has it, no packing
        return
    if ratio == "auto" and name != "finetuning":
        raise ConfigError(
            f'dataset.packing_ratio = "auto" in {path} is for name = "finetuning", not {name!r}. Give a number.'
        )
    if ratio == "auto" and (method := dataset.get("batching_method", "random")) != "random":
        raise ConfigError(
            f'dataset.packing_ratio = "auto" with dataset.batching_method = {method!r} in {path}: it is chosen for '
            "batches of any samples, and those of one stream may need more room. Give a number."
        )
    if dataset.setdefault("max_leftover_bins_to_keep", 0) != 0:
        raise ConfigError(
            f"dataset.max_leftover_bins_to_keep = {dataset['max_leftover_bins_to_keep']!r} in {path}: what workers "
            "keep in memory is lost at a restart, so that a run can't go on as if it had not stopped. Remove the key: "
            "with 0, the default, a batch depends on its samples alone, and the log says how many tokens are left out."
        )


def unknown(section: Config, prefix: str, known: list[str], of_dataset: Sequence[str] = ()) -> list[str]:
    """The keys of a section that are not among the known ones, each with the nearest of these, or its place."""
    valid = sorted(set(known) - NOT_FOR_USERS)
    found = []
    for key in sorted(set(section) - set(valid)):
        near = difflib.get_close_matches(key, valid, n=1)
        hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(valid)}"
        hint = "it belongs into [dataset]" if key in of_dataset else hint
        hint = ELSEWHERE.get(key, hint)
        found.append(f"{prefix}{key} ({hint})")
    return found


def streams_of(dataset: Config) -> dict[str, Config]:
    """The settings of each stream, by its name; those of a single one stand in `dataset` itself."""
    return dataset.get("streams") or {"dataset": dataset}


def hashes_of(dataset: Config) -> list[str | None]:
    """The algorithm by which each stream's files are compared with its hashes; none where they are not."""
    return [(STREAM_DEFAULTS | dataset | stream)["validate_hash"] for stream in streams_of(dataset).values()]


def stream_folders(dataset: Config) -> dict[str, str]:
    """Where each stream's shards come from, by the stream's name: a URL, or a path on this machine."""
    folders = {}
    for name, stream in streams_of(dataset).items():
        place, split = stream.get("remote") or stream.get("local"), stream.get("split") or dataset.get("split")
        folders[name] = os.path.join(place, split) if place and split else place or ""
    return folders


def is_local(stream: Config) -> bool:
    """Whether a stream's shards come from a folder of this machine, rather than from a store."""
    return not is_url(stream.get("remote") or "")


def check_streams(dataset: Config, path: str) -> None:
    """Raise ConfigError if a stream has no place, no index.json there, or a cache limit would delete its only copy."""
    if "hf_name" in dataset:
        raise ConfigError(f"dataset.hf_name = {dataset['hf_name']!r} in {path} is not a stream. Convert it to MDS.")
    for name, folder in stream_folders(dataset).items():
        if not folder:
            raise ConfigError(f"{name} in {path} has no `local` or `remote`: set the folder or URL of the stream.")
        stream = streams_of(dataset)[name]
        if dataset.get("cache_limit") and not has_cache(dataset, stream):
            raise ConfigError(
                f"dataset.cache_limit in {path}, but {name} has no `remote` beside its `local`: streaming would delete "
                "its only copy. Remove the limit, or give a `remote` and another `local`."
            )
        if is_local(stream) and not os.path.isfile(os.path.join(folder, "index.json")):
            raise ConfigError(
                f"No index.json in {folder} ({name} in {path}). Set `local`, `remote` and `split` to an MDS stream, "
                f"or make the demo data: {MAKE_DEMO_DATA}"
            )


def has_cache(dataset: Config, stream: Config) -> bool:
    """Whether the `local` of a stream of a loader is a copy of its `remote`, rather than all there is."""
    return is_copy(stream.get("remote"), stream.get("local"), stream.get("split") or dataset.get("split"))


def check_weights(dataset: Config, path: str) -> None:
    """Raise ConfigError unless the proportions of all streams sum to 1; streaming would take them as ratios."""
    shares = {name: stream["proportion"] for name, stream in streams_of(dataset).items() if "proportion" in stream}
    without = [name for name in streams_of(dataset) if name not in shares]
    listed = ", ".join(f"{name} {share}" for name, share in shares.items())
    if shares and without:
        raise ConfigError(
            f"In {path} some streams have a `proportion` ({listed}), and some have none ({', '.join(without)}). Give "
            "one to each, or `repeat` or `choose` to any."
        )
    if shares and abs(sum(shares.values()) - 1) > WEIGHT_TOLERANCE:
        raise ConfigError(
            f"The proportions of the streams in {path} ({listed}) sum to {sum(shares.values()):g}, not 1. Change them: "
            "they are parts of the whole."
        )


def folders_of(dataset: Config, path: str) -> list[Folder]:
    """Where each stream of a loader lies; see `place_streams`."""
    folders, found = stream_folders(dataset), []
    for name, stream in streams_of(dataset).items():
        local, split = stream.get("local") or "", stream.get("split") or dataset.get("split") or ""
        source = os.path.abspath(folders[name]) if is_local(stream) else folders[name]
        found.append(Folder(name, path, local and os.path.join(local, split), source, has_cache(dataset, stream)))
    return found


def place_streams(dataset: Config, path: str) -> None:
    """Write out the folders of streams: paths in full, no `remote` that is `local` by another name, and each cache.

    Raises:
        ConfigError: a path has a variable that isn't set, or an unknown user.
    """
    for section in (dataset, *streams_of(dataset).values()):
        for key in ("remote", "local", "split"):
            if section.get(key) == "":  # as YAML files have it for none
                del section[key]
            elif section.get(key) and key != "split":
                section[key] = expand_path(section[key], f"`{key}` in {path}")
    for stream in streams_of(dataset).values():
        if stream.get("remote") and not stream.get("local"):
            stream["local"] = default_cache(stream["remote"])
        elif stream.get("remote") and not has_cache(dataset, stream):
            stream["remote"] = stream["local"]  # streaming compares the two as texts
