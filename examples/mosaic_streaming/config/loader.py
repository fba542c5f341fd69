"""The loader configuration: `resolve` fills in what is derived, and refuses what is unknown or owned elsewhere."""

import copy
import sys
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from examples.mosaic_streaming.config.files import LoaderFile
from examples.mosaic_streaming.config.folders import Folder
from examples.mosaic_streaming.config.job import BatchShape
from examples.mosaic_streaming.config.keys import check_keys, check_name, takes
from examples.mosaic_streaming.config.signatures import BUILDER, DATASET_KEYS, LOADERS, OVERRIDES, TOKEN_IDS
from examples.mosaic_streaming.config.streams import Config, check_streams, complete_streams, folders_of, source_of
from examples.mosaic_streaming.errors import ConfigError

if TYPE_CHECKING:
    from streaming import StreamingDataset
    from transformers import PreTrainedTokenizerBase

WITHOUT_WORKERS: Config = {"num_workers": 0, "prefetch_factor": None, "persistent_workers": False, "timeout": 0}
"""What torch takes where there are no workers. It refuses other values, also llm-foundry's own defaults."""


@dataclass(frozen=True)
class ResolvedLoader:
    """The complete configuration of a loader, and the file that it comes from."""

    config: Config  # never changed: `with_settings` makes another one
    source: str  # file, for messages
    may_cut: bool  # whether samples longer than a row may lose their end, as the file has `dataset.max_seq_len`

    @property
    def name(self) -> str:
        """Its loader in llm-foundry's registry: "text", "finetuning", or one that a user has registered."""
        return str(self.config["name"])

    @property
    def builder(self) -> str:
        """Who builds it, for messages."""
        return "llm-foundry" if self.name in DATASET_KEYS else f"The loader {self.name!r}"

    @property
    def arguments(self) -> Config:
        """What `build_dataloader` gets; a user's builder may take fewer settings than llm-foundry's."""
        dropped = ("batching_method",) if self.is_blend else ()
        config = self.config | {"dataset": {key: value for key, value in self.dataset.items() if key not in dropped}}
        return {key: value for key, value in config.items() if key == "name" or takes(self.name, key)}

    @property
    def dataset(self) -> Config:
        return dict(self.config["dataset"])

    @property
    def is_blend(self) -> bool:
        """Whether the batching method is "blend", which streaming doesn't know."""
        return self.dataset.get("batching_method") == "blend"

    def batching_method(self, dataset: "StreamingDataset") -> str:
        """The method of a dataset that was built with this; a user's builder may have its own."""
        return "blend" if self.is_blend else dataset.batching_method

    @property
    def streams(self) -> dict[str, Config]:
        """The complete settings of each stream by name."""
        return complete_streams(self.dataset)

    @property
    def labels(self) -> list[str]:
        """What each stream is called in messages."""
        names = ["the stream" if name == "dataset" else f"stream {name!r}" for name in self.streams]
        return [f"{name} in {self.source}" for name in names]

    @property
    def sources(self) -> dict[str, str]:
        """The URL or path that each stream's shards come from, by name."""
        return {name: source_of(stream) for name, stream in self.streams.items()}

    @property
    def hashes(self) -> list[str | None]:
        """The algorithm of the hashes that each stream's files are compared with; None where they are not."""
        return [stream["validate_hash"] for stream in self.streams.values()]

    @property
    def folders(self) -> list[Folder]:
        return folders_of(self.dataset, self.source)

    def with_settings(self, **dataset: Any) -> "ResolvedLoader":
        """Return the same with other settings of `[dataset]`."""
        return replace(self, config=self.config | {"dataset": self.dataset | dataset})


def check_file(file: LoaderFile) -> None:
    """Raise ConfigError for what is wrong in a loader's file whatever the job is, before anything slow is imported.

    Where code of the user's may have registered loaders, also under llm-foundry's names, only `resolve` can tell: in
    this process, or in a package (by an entry point).
    """
    if "llmfoundry" in sys.modules:
        return
    config, path = copy.deepcopy(file.config), file.path
    try:
        if check_name(config, path, LOADERS) in DATASET_KEYS:
            check_keys(config, path, BUILDER)
            check_streams(config["dataset"], path)
    except ConfigError:
        if not entry_points(group="llmfoundry_dataloaders"):
            raise


def resolve(file: LoaderFile, shape: BatchShape, replication: int) -> ResolvedLoader:
    """Complete the configuration of a loader, for a model's batches and `replication` ranks with the same samples.

    ConfigError if a key is unknown, missing, owned by the job config, or differs from what it is derived from.
    """
    config, path = copy.deepcopy(file.config), file.path
    section, seq_len, rows = shape.section, shape.seq_len, shape.local_batch_size
    check_keys(config, path)
    dataset = config["dataset"]
    may_cut = "max_seq_len" in dataset
    if "batch_size" in dataset:
        raise ConfigError(
            f"dataset.batch_size = {dataset['batch_size']!r} in {path}. Remove the key: the batch size is "
            f"{section}.local_batch_size = {rows} in the job config."
        )
    derive(config, "device_batch_size", [rows], f"{section}.local_batch_size is", path)
    del config["device_batch_size"]  # an argument of `build_dataloader`
    derive(dataset, "dataset.max_seq_len", [seq_len + 1, seq_len], f"{section}.seq_len = {seq_len} allows", path)
    derive(dataset, "dataset.replication", [replication], "world size / data-parallel degree is", path)
    if config["name"] == "finetuning":
        derive(dataset, "dataset.decoder_only_format", [True], "each model of TorchTitan's asks for", path)
    check_streams(dataset, path)
    # TorchTitan gets new tensors made from the loader's batches: pinning these would help nobody.
    config = {"drop_last": True, "num_workers": 0, "pin_memory": False} | config
    if config["num_workers"] == 0:
        config |= WITHOUT_WORKERS
    return ResolvedLoader(config, path, may_cut)


def derive(section: Config, name: str, values: list[Any], source: str, path: str) -> None:
    """Fill in a derived key with the first of its possible values; refuse any other with ConfigError."""
    key = name.split(".")[-1]
    if section.setdefault(key, values[0]) not in values:
        raise ConfigError(
            f"{name} = {section[key]!r} in {path}, but {source} {' or '.join(map(str, values))}. "
            "Remove the key: it is derived from the job config. Or change that."
        )


def without_token_ids(loader: ResolvedLoader, tokenizer: "PreTrainedTokenizerBase") -> ResolvedLoader:
    """Return a finetuning loader without its token ids; any other as it is. ConfigError if they aren't the tokenizer's.

    llm-foundry's YAMLs have them, though nothing reads them there.

    Source: llm-foundry 0.22.0 compares them, too, but then hands them on to streaming, which refuses them
    (data/finetuning/dataloader.py).
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
