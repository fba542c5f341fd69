"""The streams of a training loader: opened on this machine, in the order in which they are read."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from composer import DataSpec
from llmfoundry.data.dataloader import build_dataloader
from streaming import StreamingDataset
from torch.utils.data import DataLoader
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import get_train_spec
from transformers import PreTrainedTokenizerBase

from examples.mosaic_streaming.batch.collate import Collator, use_fast_collator
from examples.mosaic_streaming.batch.convert import BatchFormat
from examples.mosaic_streaming.batch.documents import masks_documents, takes_positions
from examples.mosaic_streaming.batch.packing_ratio import choose_ratio
from examples.mosaic_streaming.checkpoint.state import Data, describe
from examples.mosaic_streaming.config.loader import DATASET_KEYS, Config, resolve, stream_folders, streams_of, takes
from examples.mosaic_streaming.distributed.store import new_job_id
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.sampling.order import Order, set_order
from examples.mosaic_streaming.shards.columns import check_columns
from examples.mosaic_streaming.shards.dataset import check_dataset
from examples.mosaic_streaming.shards.prepare import stream_label
from examples.mosaic_streaming.upstream.shared_memory import keep_locks_together, shared_memory

BY_BLOCKS = ("py1e", "py1br")
"""The shuffle algorithms that `shuffle_block_size` matters to."""


@dataclass(frozen=True)
class Streams:
    """The streams of a training loader, ready to be read.

    Attributes:
        config: the resolved loader configuration.
        path: the file it was read from, for messages.
        loader: llm-foundry's.
        order: of its dataset.
        form: what batches have to look like.
        data: what decides which samples come next.
    """

    config: Config
    path: str
    loader: DataLoader[Any]
    order: Order
    form: BatchFormat
    data: Data

    @property
    def dataset(self) -> StreamingDataset:
        """That of the loader."""
        assert isinstance(self.loader.dataset, StreamingDataset)
        return self.loader.dataset

    @property
    def names(self) -> list[str]:
        """Of the streams, as the configuration has them."""
        return list(streams_of(self.config["dataset"]))

    @property
    def tokens_of_a_sample(self) -> int | None:
        """That the model gets; none where samples differ in length."""
        return self.form.seq_len if self.form.labels_are_ids else None


def resolve_training(job_config: JobConfig, loader_config: Config, path: str, replication: int) -> Config:
    """The complete configuration of the training loader; arguments and errors are those of `resolve`."""
    training = job_config.training
    return resolve(
        loader_config,
        path,
        seq_len=training.seq_len,
        local_batch_size=training.local_batch_size,
        replication=replication,
    )


def fill_in_ratio(
    job_config: JobConfig,
    config: Config,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    on_one: Callable[[Callable[[], Any]], Any],
) -> None:
    """Put a number in place of `packing_ratio = "auto"`; all ranks call it together.

    Args:
        job_config: the whole job.
        config: the resolved loader configuration.
        path: the file it was read from, for messages.
        tokenizer: the model's.
        on_one: calls a function on one rank, and returns on all what it returns.
    """
    rows, dataset = job_config.training.local_batch_size, config["dataset"]
    if dataset.get("packing_ratio") != "auto":
        return
    single = config | {"dataset": dataset | {"packing_ratio": 1}}
    loader = build_loader(single, path, tokenizer, rows, new_job_id())
    origin = f"The streams are {stream_folders(dataset)}, set in {path}."
    choose = functools.partial(choose_ratio, loader, rows, dataset["max_seq_len"], origin, path)
    dataset["packing_ratio"] = on_one(choose)


def open_streams(
    job_config: JobConfig,
    config: Config,
    path: str,
    titan_tokenizer: HuggingFaceTokenizer,
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    *,
    reader: str,
    global_batches: int,
    may_cut: bool,
) -> Streams:
    """Open streams that are ready on this machine, in the order in which they are read; all ranks call it together.

    Args:
        job_config: the whole job.
        config: the resolved loader configuration.
        path: the file it was read from, for messages.
        titan_tokenizer: TorchTitan's tokenizer.
        tokenizer: the same, of transformers.
        number: for the dataset's shared memory.
        reader: who reads them, for messages.
        global_batches: batches of all dp ranks that make a global batch.
        may_cut: whether samples that are longer than a row may lose their end: `dataset.max_seq_len` is given.

    Raises:
        ConfigError: llm-foundry or streaming refuses the configuration, or an epoch fills no global batch.
    """
    training = job_config.training
    loader = build_loader(config, path, tokenizer, training.local_batch_size, number, may_cut)
    dataset, batch_size = loader.dataset, loader.batch_size
    assert batch_size is not None and isinstance(dataset, StreamingDataset)
    assert isinstance(loader.collate_fn, Collator)
    order = set_order(dataset, batch_size, batch_size * global_batches, loader.collate_fn.packs)
    check_epoch(order, dataset, list(streams_of(config["dataset"])), path)
    check_blocks(order, dataset, list(streams_of(config["dataset"])), path)
    form = batch_format(
        job_config, config, path, tokenizer, reader, rows=training.local_batch_size, seq_len=training.seq_len
    )
    data = describe(config, dataset, order, training.seq_len, titan_tokenizer)
    return Streams(config, path, loader, order, form, data)


def build_loader(
    config: Config,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    number: int,
    may_cut: bool = False,
) -> DataLoader[Any]:
    """llm-foundry's loader over streams that are ready, on all ranks together.

    Args:
        config: the resolved loader configuration.
        path: the file it was read from, for messages.
        tokenizer: the model's.
        batch_size: rows of a batch, per dp rank.
        number: for the dataset's shared memory.
        may_cut: whether samples that are longer than a row may lose their end.

    Raises:
        ConfigError: llm-foundry or streaming refuses the configuration, or the streams have not the right columns.
    """
    name, streams = config["name"], streams_of(config["dataset"])
    is_own = name not in DATASET_KEYS
    given = {key: value for key, value in config.items() if key == "name" or takes(name, key)}
    try:
        with shared_memory(number):
            # A copy: `build_dataloader` writes into what it is given.
            spec: DataSpec = build_dataloader(copy.deepcopy(given), tokenizer, batch_size)
    except Exception as error:
        who = f"The loader {name!r}" if is_own else "llm-foundry"
        raise ConfigError(f"{who} refuses {path}: {type(error).__name__}: {error}") from error
    loader = getattr(spec, "dataloader", spec)
    if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, StreamingDataset):
        raise ConfigError(f"{path} does not stream: give `dataset` a `remote` or `streams`.")
    if loader.batch_size is None or len(loader.dataset.streams) != len(streams):
        raise ConfigError(
            f"The loader {name!r} of {path} has {len(loader.dataset.streams)} streams and batch_size = "
            f"{loader.batch_size}, expected the {len(streams)} of the file, and a number."
        )
    labels = [stream_label(stream, path) for stream in streams]
    check_columns(loader.dataset, name, labels, path)
    check_dataset(loader.dataset, labels, may_cut)
    check_pad_token(name, loader.dataset, tokenizer)
    use_fast_collator(loader, name == "text")
    keep_locks_together(loader.dataset)
    return loader


def check_pad_token(name: str, dataset: StreamingDataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError for text that is tokenized as it is read, and a tokenizer without a padding token.

    Source: llm-foundry 0.22.0, data/text_data.py, refuses it at the first sample.
    """
    if name == "text" and tokenizer.pad_token is None and "text" in getattr(dataset.shards[0], "column_names", []):
        raise ConfigError(
            f"The tokenizer in model.hf_assets_path = {tokenizer.name_or_path!r} has no padding token, which text that "
            "is tokenized as it is read needs. Set `pad_token` in its tokenizer_config.json; it may be the `eos_token`."
        )


def batch_format(
    job_config: JobConfig,
    config: Config,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    reader: str,
    *,
    rows: int,
    seq_len: int,
) -> BatchFormat:
    """What batches have to look like.

    Args:
        job_config: the whole job.
        config: the resolved loader configuration.
        path: the file it was read from, for messages.
        tokenizer: the model's.
        reader: who reads the streams, for messages.
        rows: of a batch, per dp rank.
        seq_len: of the model, in tokens.
    """
    spec, parallelism = get_train_spec(job_config.model.name), job_config.parallelism
    model_args = spec.model_args[job_config.model.flavor]
    degrees = {
        "pp": parallelism.pipeline_parallel_degree,
        "cp": parallelism.context_parallel_degree,
        "tp": parallelism.tensor_parallel_degree,
    }
    return BatchFormat(
        rows=rows,
        seq_len=seq_len,
        max_seq_len=config["dataset"]["max_seq_len"],
        vocab_size=model_args.vocab_size,
        pad_id=tokenizer.pad_token_id,
        eos_id=tokenizer.eos_token_id,
        labels_are_ids=config["name"] == "text",
        origin=f"{reader} reads {stream_folders(config['dataset'])}, set in {path}.",
        documents=masks_documents(model_args),
        positions=takes_positions(spec.model_cls, degrees),
    )


def check_epoch(order: Order, dataset: StreamingDataset, names: list[str], path: str) -> None:
    """Raise ConfigError unless an epoch holds a whole global batch.

    Args:
        order: the dataset's.
        dataset: with its streams' samples an epoch.
        names: of the streams.
        path: the file that configures the loader, for the message.
    """
    if order.left(0) == 0:
        samples = [f"{name} {int(stream.choose):,}" for name, stream in zip(names, dataset.streams, strict=True)]
        nodes, each = dataset.num_canonical_nodes, "" if order.batching_method == "random" else " from each stream"
        raise ConfigError(
            f"An epoch fills no global batch of {order.global_batch_size} sequences. Of its samples in {path} "
            f"({', '.join(samples)}), dataset.num_canonical_nodes = {nodes} takes multiples of {nodes}{each}, and "
            f"dataset.batching_method = {order.batching_method!r} whole batches. Add data, `repeat` it, or lower the "
            "batch size or num_canonical_nodes."
        )


def check_blocks(order: Order, dataset: StreamingDataset, names: list[str], path: str) -> None:
    """Raise ConfigError where a stream's part of a shuffle block is no block.

    Args:
        order: the dataset's.
        dataset: with its streams' proportions.
        names: of the streams.
        path: the file that configures the loader, for the message.

    Source: each stream is shuffled by its share of the block; with less than 2 samples, algorithms that go by blocks
    fail at the first batch, or never end (streaming 0.13.0, base/batching, base/shuffle).
    """
    block = dataset.shuffle_block_size
    if (
        block is None
        or not dataset.shuffle
        or order.batching_method == "random"
        or dataset.shuffle_algo not in BY_BLOCKS
    ):
        return
    for name, stream in zip(names, dataset.streams, strict=True):
        if int(block * stream.proportion) < 2:
            raise ConfigError(
                f"dataset.shuffle_block_size = {block} in {path} leaves stream {name} a block of less than 2 samples, "
                f"by its share of {stream.proportion:.2g} under dataset.batching_method = {order.batching_method!r}. "
                "Raise it."
            )
