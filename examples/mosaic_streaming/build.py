"""The `build_dataloader_fn` of a Mosaic TrainSpec."""

import copy
import json
import os

import torch.distributed as dist
from composer import DataSpec
from llmfoundry.data.dataloader import build_dataloader
from streaming import StreamingDataset
from torch.utils.data import DataLoader
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import logger

from examples.mosaic_streaming.batch import BatchFormat
from examples.mosaic_streaming.dataloader import MosaicDataLoader
from examples.mosaic_streaming.errors import ConfigError, is_rank_0
from examples.mosaic_streaming.faults import check_dataset
from examples.mosaic_streaming.job import new_number, on_each_node, open_line
from examples.mosaic_streaming.loader_config import (
    STREAM_DEFAULTS,
    Config,
    has_cache,
    resolve,
    stream_folders,
    streams_of,
)
from examples.mosaic_streaming.node import keep_locks_together, prepare_streams, shared_memory, stream_label
from examples.mosaic_streaming.order import Order, set_order
from examples.mosaic_streaming.placement import dp_ranks_per_node, sample_world
from examples.mosaic_streaming.resume import describe
from examples.mosaic_streaming.tokenizer import build_transformers_tokenizer, check_vocabulary

ORDER_BYTES = 40
"""Of a node's memory for each sample of an epoch: seen with 100 million samples."""


def build_mosaic_dataloader(
    *,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: HuggingFaceTokenizer,
    job_config: JobConfig,
    loader_config: Config,
    loader_config_path: str,
) -> MosaicDataLoader:
    """Build the training loader of one rank; a TrainSpec's `build_dataloader_fn` once the last two are bound.

    Args:
        dp_world_size: data-parallel degree, on TorchTitan's batch mesh.
        dp_rank: this rank on that mesh.
        tokenizer: TorchTitan's tokenizer.
        job_config: the whole job.
        loader_config: the loader TOML, for llm-foundry's `build_dataloader`.
        loader_config_path: the file it was read from, for messages.

    Raises:
        ConfigError: the loader, the tokenizer, the model and the job don't fit together.
    """
    training, model = job_config.training, job_config.model
    accumulation = accumulation_steps(job_config, dp_world_size)
    vocab_size = embedding_rows(model.name, model.flavor)
    check_vocabulary(tokenizer, vocab_size, f"{model.name} {model.flavor}")
    transformers_tokenizer = build_transformers_tokenizer(model.hf_assets_path, tokenizer)
    config = resolve(
        loader_config,
        loader_config_path,
        seq_len=training.seq_len,
        local_batch_size=training.local_batch_size,
        replication=dist.get_world_size() // dp_world_size,
    )
    if is_rank_0():
        logger.info(f"Mosaic loader, resolved: {json.dumps(config)}")
        warn_of_patience(config["dataset"], job_config.comm.train_timeout_seconds, loader_config_path)
    number = new_number()
    open_line(number)
    on_each_node(number, lambda: prepare_streams(config, loader_config_path))
    try:
        with shared_memory(number):
            # A copy: `build_dataloader` writes into what it is given.
            spec: DataSpec = build_dataloader(copy.deepcopy(config), transformers_tokenizer, training.local_batch_size)
    except Exception as error:
        raise ConfigError(f"llm-foundry refuses {loader_config_path}: {type(error).__name__}: {error}") from error
    loader = spec.dataloader
    if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, StreamingDataset):
        raise ConfigError(f"{loader_config_path} does not stream: give `dataset` a `remote` or `streams`.")
    assert loader.batch_size is not None
    names = list(streams_of(config["dataset"]))
    check_dataset(loader.dataset, [stream_label(name, loader_config_path) for name in names])
    keep_locks_together(loader.dataset)
    order = set_order(loader.dataset, loader.batch_size, loader.batch_size * dp_world_size * accumulation)
    check_epoch(order, loader.dataset, names, loader_config_path)
    loader.dataset._parallel_rank_world = sample_world(
        dp_rank,
        dp_world_size,
        dp_ranks_per_node(
            dist.get_world_size(),
            dp_world_size,
            job_config.parallelism.pipeline_parallel_degree,
            int(os.environ["LOCAL_WORLD_SIZE"]),
        ),
    )
    form = BatchFormat(
        rows=training.local_batch_size,
        seq_len=training.seq_len,
        max_seq_len=config["dataset"]["max_seq_len"],
        vocab_size=vocab_size,
        pad_id=transformers_tokenizer.pad_token_id,
        eos_id=transformers_tokenizer.eos_token_id,
        labels_are_ids=config["name"] == "text",
        origin=f"Rank {dist.get_rank()} (dp rank {dp_rank}) reads {stream_folders(config['dataset'])}, set in "
        f"{loader_config_path}.",
    )
    data = describe(config, loader.dataset, order, training.seq_len, tokenizer)
    return MosaicDataLoader(loader, form, order, data, dp_rank, loader_config_path)


def embedding_rows(model: str, flavor: str) -> int:
    """Rows of a model's embedding, before the model is built.

    Raises:
        ConfigError: the model has no such flavor.
    """
    flavors = get_train_spec(model).model_args
    if flavor not in flavors:
        raise ConfigError(f"model.flavor = {flavor!r}, but {model} has: {', '.join(flavors)}.")
    return flavors[flavor].vocab_size


def accumulation_steps(job_config: JobConfig, dp_world_size: int) -> int:
    """Batches that each rank reads for one optimizer step, as TorchTitan's Trainer will reckon.

    Raises:
        ConfigError: the global batch is not a multiple of the batches of all ranks.
    """
    local, total = job_config.training.local_batch_size, job_config.training.global_batch_size
    if local < 1:
        raise ConfigError(f"training.local_batch_size = {local}, but each rank needs at least one sequence.")
    if total == 0 or (total > 0 and total % (local * dp_world_size)):
        raise ConfigError(
            f"training.global_batch_size = {total} is not a multiple of training.local_batch_size = {local} x "
            f"data-parallel degree = {dp_world_size}. Change one of them."
        )
    return max(1, total // (local * dp_world_size))


def warn_of_patience(dataset: Config, timeout: float, path: str) -> None:
    """Warn if one rank may wait for a shard for longer than the others wait for that rank.

    Args:
        dataset: of the resolved loader configuration.
        timeout: `comm.train_timeout_seconds`.
        path: the file that configures the loader, for the message.
    """
    for name, stream in streams_of(dataset).items():
        retry, patience = ((STREAM_DEFAULTS | dataset | stream)[f"download_{key}"] for key in ("retry", "timeout"))
        if has_cache(stream) and retry * patience >= timeout:
            logger.warning(
                f"{name} in {path} gives a store that stalls {retry} (download_retry) x {patience:g} s "
                f"(download_timeout), but ranks wait for each other only {timeout:g} s (comm.train_timeout_seconds in "
                "the job config): they would stop before that one can say why. Lower the first two, or raise the last."
            )


def check_epoch(order: Order, dataset: StreamingDataset, names: list[str], path: str) -> None:
    """Raise ConfigError unless an epoch holds a whole global batch, and can be put in order in this machine's memory.

    Args:
        order: the dataset's.
        dataset: with its streams' samples an epoch.
        names: of the streams.
        path: the file that configures the loader, for the message.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if (needed := dataset.epoch_size * ORDER_BYTES) > memory:
        raise ConfigError(
            f"An epoch of {dataset.epoch_size:,} samples takes about {needed / 1e9:,.0f} GB of each node's memory to "
            f"put in order, of {memory / 1e9:,.0f} GB. Lower `epoch_size`, `repeat` or `choose` in {path}."
        )
    if order.left(0) == 0:
        samples = [f"{name} {int(stream.choose):,}" for name, stream in zip(names, dataset.streams, strict=True)]
        nodes, each = dataset.num_canonical_nodes, "" if order.batching_method == "random" else " from each stream"
        raise ConfigError(
            f"An epoch fills no global batch of {order.global_batch_size} sequences. Of its samples in {path} "
            f"({', '.join(samples)}), dataset.num_canonical_nodes = {nodes} takes multiples of {nodes}{each}, and "
            f"dataset.batching_method = {order.batching_method!r} whole batches. Add data, `repeat` it, or lower the "
            "batch size or num_canonical_nodes."
        )
