"""The loader configuration: what is derived is filled in; what is unknown, or owned elsewhere, is refused."""

import copy
import difflib
import functools
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from examples.mosaic_streaming.config.files import LoaderFile
from examples.mosaic_streaming.config.folders import Folder, check_folders
from examples.mosaic_streaming.config.job import BatchShape
from examples.mosaic_streaming.config.streams import (
    Config,
    check_streams,
    check_weights,
    complete_streams,
    expand_folders,
    has_cache,
    is_local,
    source_of,
    with_split,
)
from examples.mosaic_streaming.config.values import hints_of, wrong_values
from examples.mosaic_streaming.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_CANONICAL_NODES = 64
"""Default of `dataset.num_canonical_nodes`. streaming's own is the number of machines of the first run."""

TOKEN_IDS = [f"{name}_token_id" for name in ("eos", "bos")]
OVERRIDES = [f"override_{key}_mismatch_error" for key in TOKEN_IDS]

WITHOUT_WORKERS: Config = {"num_workers": 0, "prefetch_factor": None, "persistent_workers": False, "timeout": 0}
"""What torch takes where there are no workers. It refuses other values, llm-foundry's own defaults among them."""

MAX_RATIO = 1000
"""The most samples that are packed into a row, on average."""

ELSEWHERE = {"tokenizer_name": "the tokenizer is that of model.hf_assets_path in the job config"}
"""What replaces keys that llm-foundry's own YAMLs have."""

NOT_FOR_USERS = {"self", "tokenizer", "kwargs", "allowed_dataset_keys"}
"""Arguments that no configuration can give."""


@dataclass(frozen=True)
class ResolvedLoader:
    """The complete configuration of a loader, and the file that it comes from.

    Attributes:
        config: what llm-foundry's `build_dataloader` gets. It is never changed: `with_settings` makes another.
        source: the file, for messages.
        may_cut: whether samples that are longer than a row may lose their end: the file has `dataset.max_seq_len`.
    """

    config: Config
    source: str
    may_cut: bool

    @property
    def name(self) -> str:
        """Its loader in llm-foundry's registry: "text", "finetuning", or one that a user has registered."""
        return str(self.config["name"])

    @property
    def dataset(self) -> Config:
        """The section `[dataset]`."""
        found: Config = self.config["dataset"]
        return found

    @property
    def streams(self) -> dict[str, Config]:
        """The complete settings of each stream, by its name."""
        return complete_streams(self.dataset)

    @property
    def labels(self) -> list[str]:
        """What each stream is called in messages."""
        return [
            f"{'the stream' if name == 'dataset' else f'stream {name!r}'} in {self.source}" for name in self.streams
        ]

    @property
    def sources(self) -> dict[str, str]:
        """Where each stream's shards come from, by its name: a URL, or a path on this machine."""
        return {name: source_of(stream) for name, stream in self.streams.items()}

    @property
    def hashes(self) -> list[str | None]:
        """The algorithm by which each stream's files are compared with its hashes; None where they are not."""
        return [stream["validate_hash"] for stream in self.streams.values()]

    @property
    def folders(self) -> list[Folder]:
        """Where each stream lies."""
        return [
            Folder(
                name,
                self.source,
                with_split(stream.get("local"), stream),
                os.path.realpath(source_of(stream)) if is_local(stream) else source_of(stream).rstrip("/"),
                has_cache(stream),
            )
            for name, stream in self.streams.items()
        ]

    def with_settings(self, **dataset: Any) -> "ResolvedLoader":
        """The same, with other settings of `[dataset]`."""
        return replace(self, config=self.config | {"dataset": self.dataset | dataset})


def resolve(file: LoaderFile, shape: BatchShape, replication: int) -> ResolvedLoader:
    """Complete a loader configuration.

    Args:
        file: as it was read; it stays as it is.
        shape: of the model's batches.
        replication: ranks that receive the same samples: world size / dp_world_size.

    Raises:
        ConfigError: a key is unknown, missing, owned by the job config, or differs from what it is derived from.
    """
    config, path = copy.deepcopy(file.config), file.path
    section, seq_len, local_batch_size = shape.section, shape.seq_len, shape.local_batch_size
    check_keys(config, path)
    dataset = config["dataset"]
    may_cut = "max_seq_len" in dataset
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
    expand_folders(dataset, path)
    check_streams(dataset, path)
    check_weights(dataset, path)
    # Batches are made anew from the loader's: pinning these would help nobody.
    config = {"drop_last": True, "num_workers": 0, "pin_memory": False} | config
    if config["num_workers"] == 0:
        config |= WITHOUT_WORKERS
    resolved = ResolvedLoader(config, path, may_cut)
    check_folders(resolved.folders)
    return resolved


def derive(section: Config, name: str, values: list[Any], source: str, path: str) -> None:
    """Fill in a derived key with the first of the values that it can have; refuse any other with ConfigError."""
    key = name.split(".")[-1]
    if section.setdefault(key, values[0]) not in values:
        raise ConfigError(
            f"{name} = {section[key]!r} in {path}, but {source} {' or '.join(map(str, values))}. "
            "Remove the key: it is derived from the job config. Or change that."
        )


def check_keys(config: Config, path: str) -> None:
    """Raise ConfigError, naming all of them, for keys that llm-foundry would drop or refuse."""
    from llmfoundry import registry
    from streaming import Stream, StreamingDataset

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
    wrong = unknown(config, "", known, dataset_keys().get(name, []))
    wrong += unknown(dataset, "dataset.", dataset_keys().get(name, list(dataset)))
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
    for key, choices in choices_of().items():  # streaming looks only after the start, or never
        if (choice := dataset.get(key, choices[0])) not in choices:
            raise ConfigError(f"dataset.{key} = {choice!r} in {path}, expected one of: {', '.join(choices)}.")


@functools.cache
def dataset_keys() -> dict[str, list[str]]:
    """What `dataset` can hold, by loader; other loaders check it themselves.

    Source: llm-foundry 0.22.0, data/text_data.py, data/utils.py and data/finetuning/dataloader.py. The text loader
    drops a key that it doesn't know without a word.
    """
    from llmfoundry.data import StreamingFinetuningDataset, StreamingTextDataset
    from llmfoundry.data.finetuning import dataloader as finetuning
    from streaming import StreamingDataset

    arguments = lambda function: list(inspect.signature(function).parameters)  # noqa: E731
    # The text collator's `mlm_probability` is left out: it masks inputs, which no causal model wants.
    text = [*arguments(StreamingTextDataset), *arguments(StreamingDataset), *TOKEN_IDS, *OVERRIDES]
    examples = [*arguments(StreamingFinetuningDataset), *arguments(finetuning._validate_config), *TOKEN_IDS, *OVERRIDES]
    return {"text": text, "finetuning": [*examples, *finetuning._ALLOWED_DATASET_KEYS]}


@functools.cache
def choices_of() -> dict[str, tuple[str, ...]]:
    """The words that a setting of `dataset` can be: those of streaming's tables, before ours are among them."""
    from streaming.base import batching, partition, shuffle

    return {
        "shuffle_algo": tuple(shuffle.algos),
        "partition_algo": tuple(partition.algos),
        "batching_method": tuple(batching.batching_methods),
        "sampling_method": ("balanced", "fixed"),
    }


def without_token_ids(loader: ResolvedLoader, tokenizer: "PreTrainedTokenizerBase") -> ResolvedLoader:
    """Compare the token ids of a finetuning loader with the tokenizer's, and leave them out.

    Nothing reads them there, but llm-foundry's YAMLs have them. It compares them, too, and then hands them on to
    streaming, which refuses them (llm-foundry 0.22.0, data/finetuning/dataloader.py).

    Raises:
        ConfigError: they differ.
    """
    if loader.name != "finetuning":
        return loader
    dataset = loader.dataset
    for key, override in zip(TOKEN_IDS, OVERRIDES, strict=True):
        given, own = dataset.get(key), getattr(tokenizer, key)
        if given not in (None, own) and not dataset.get(override, False):
            raise ConfigError(
                f"dataset.{key} = {given!r} in {loader.source}, but the tokenizer in model.hf_assets_path = "
                f"{tokenizer.name_or_path!r} has {own}. Remove the key, which nothing else reads, or set that path."
            )
    kept = {key: value for key, value in dataset.items() if key not in (*TOKEN_IDS, *OVERRIDES)}
    return replace(loader, config=loader.config | {"dataset": kept})


def arguments_of(name: str) -> Mapping[str, inspect.Parameter]:
    """What a loader's builder takes, by its name in llm-foundry's registry."""
    from llmfoundry import registry

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
