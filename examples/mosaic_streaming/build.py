"""The `build_dataloader_fn` of a Mosaic TrainSpec."""

import copy
import functools
import json
import os
from typing import Any

import torch.distributed as dist
from composer import DataSpec
from llmfoundry.data.dataloader import build_dataloader
from streaming import StreamingDataset
from streaming.base.world import World
from torch.utils.data import DataLoader
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import logger
from transformers import PreTrainedTokenizerBase

from examples.mosaic_streaming.auto_ratio import choose_ratio
from examples.mosaic_streaming.batch import BatchFormat
from examples.mosaic_streaming.dataloader import MosaicDataLoader
from examples.mosaic_streaming.documents import check_attention, masks_documents, no_masks, takes_positions
from examples.mosaic_streaming.errors import ConfigError, is_rank_0
from examples.mosaic_streaming.faults import check_dataset
from examples.mosaic_streaming.job import new_number, on_each_node, on_rank_0, open_line
from examples.mosaic_streaming.loader_config import (
    STREAM_DEFAULTS,
    Config,
    has_cache,
    resolve,
    stream_folders,
    streams_of,
)
from examples.mosaic_streaming.mixture import log_mixture
from examples.mosaic_streaming.node import keep_locks_together, prepare_streams, shared_memory, stream_label
from examples.mosaic_streaming.order import Order, set_order
from examples.mosaic_streaming.packing import count_left_out
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
    check_model(job_config, tokenizer)
    transformers_tokenizer = build_transformers_tokenizer(model.hf_assets_path, tokenizer)
    config = resolve(
        loader_config,
        loader_config_path,
        seq_len=training.seq_len,
        local_batch_size=training.local_batch_size,
        replication=dist.get_world_size() // dp_world_size,
    )
    number = new_number()
    open_line(number)
    on_each_node(number, lambda: prepare_streams(config, loader_config_path))
    rows, dataset = training.local_batch_size, config["dataset"]
    if dataset.get("packing_ratio") == "auto":
        single = config | {"dataset": dataset | {"packing_ratio": 1}}
        loader = build_loader(single, loader_config_path, transformers_tokenizer, rows, new_number())
        origin = f"The streams are {stream_folders(dataset)}, set in {loader_config_path}."
        choose = functools.partial(choose_ratio, loader, rows, dataset["max_seq_len"], origin, loader_config_path)
        dataset["packing_ratio"] = on_rank_0(number, choose)
    if is_rank_0():
        logger.info(f"Mosaic loader, resolved: {json.dumps(config)}")
        if dist.get_world_size() > 1:
            warn_of_patience(dataset, job_config.comm.train_timeout_seconds, loader_config_path)
    loader = build_loader(config, loader_config_path, transformers_tokenizer, rows, number)
    assert loader.batch_size is not None and isinstance(loader.dataset, StreamingDataset)
    packed = count_left_out(loader)
    names = list(streams_of(dataset))
    steps = accumulation * dp_world_size
    order = set_order(loader.dataset, loader.batch_size, loader.batch_size * steps, packed)
    check_epoch(order, loader.dataset, names, loader_config_path)
    loader.dataset._parallel_rank_world = place(job_config, dp_rank, dp_world_size)
    form = batch_format(
        job_config, config, loader_config_path, transformers_tokenizer, dp_rank, rows=rows, seq_len=training.seq_len
    )
    if is_rank_0():
        log_mixture(names, loader.dataset, order, training.seq_len if form.labels_are_ids else None)
        columns = getattr(loader.dataset.shards[0], "column_names", [])
        warn_of_rows(config, job_config, form, transformers_tokenizer, columns)
    data = describe(config, loader.dataset, order, training.seq_len, tokenizer)
    return MosaicDataLoader(loader, form, order, data, dp_rank, loader_config_path)


def build_loader(
    config: Config, path: str, tokenizer: PreTrainedTokenizerBase, batch_size: int, number: int
) -> DataLoader[Any]:
    """llm-foundry's loader over streams that are ready, on all ranks together.

    Args:
        config: the resolved loader configuration.
        path: the file it was read from, for messages.
        tokenizer: the model's.
        batch_size: rows of a batch, per dp rank.
        number: for the dataset's shared memory.

    Raises:
        ConfigError: llm-foundry or streaming refuses the configuration.
    """
    try:
        with shared_memory(number):
            # A copy: `build_dataloader` writes into what it is given.
            spec: DataSpec = build_dataloader(copy.deepcopy(config), tokenizer, batch_size)
    except Exception as error:
        raise ConfigError(f"llm-foundry refuses {path}: {type(error).__name__}: {error}") from error
    loader = spec.dataloader
    if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, StreamingDataset):
        raise ConfigError(f"{path} does not stream: give `dataset` a `remote` or `streams`.")
    check_dataset(loader.dataset, [stream_label(name, path) for name in streams_of(config["dataset"])])
    keep_locks_together(loader.dataset)
    return loader


def place(job_config: JobConfig, dp_rank: int, dp_world_size: int) -> World:
    """This rank's place among those that share out the samples."""
    pp = job_config.parallelism.pipeline_parallel_degree
    per_node = dp_ranks_per_node(dist.get_world_size(), dp_world_size, pp, int(os.environ["LOCAL_WORLD_SIZE"]))
    return sample_world(dp_rank, dp_world_size, per_node)


def batch_format(
    job_config: JobConfig,
    config: Config,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    dp_rank: int,
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
        dp_rank: this rank on TorchTitan's batch mesh.
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
        origin=f"Rank {dist.get_rank()} (dp rank {dp_rank}) reads {stream_folders(config['dataset'])}, set in {path}.",
        documents=masks_documents(model_args),
        positions=takes_positions(spec.model_cls, degrees),
    )


def check_model(job_config: JobConfig, tokenizer: HuggingFaceTokenizer) -> None:
    """Raise ConfigError unless there is such a flavor, for this tokenizer and these degrees of parallelism."""
    model = job_config.model
    flavors = get_train_spec(model.name).model_args
    if model.flavor not in flavors:
        raise ConfigError(f"model.flavor = {model.flavor!r}, but {model.name} has: {', '.join(flavors)}.")
    model_args = flavors[model.flavor]
    check_vocabulary(tokenizer, model_args.vocab_size, f"{model.name} {model.flavor}")
    check_attention(model_args, model.flavor, job_config.parallelism.pipeline_parallel_degree)


def warn_of_rows(
    config: Config, job_config: JobConfig, form: BatchFormat, tokenizer: PreTrainedTokenizerBase, columns: list[str]
) -> None:
    """Warn once if rows hold several documents that attention is not kept within, or change from day to day."""
    dataset, model = config["dataset"], job_config.model
    packed = int(form.rows * (dataset.get("packing_ratio") or 1)) > form.rows
    marked = dataset.get("eos_token_id") is not None or dataset.get("bos_token_id") is not None
    if (packed or marked) and not form.documents:
        documents = "packed examples" if packed else "documents (dataset.eos_token_id or bos_token_id)"
        logger.warning(no_masks(documents, model.name, get_train_spec(model.name).model_args, model.flavor))
    is_text = config["name"] == "finetuning" and not {"turns", "input_ids"} & set(columns)
    if is_text and "date_string" in str(tokenizer.chat_template):
        logger.warning(
            f"The chat template in model.hf_assets_path = {model.hf_assets_path!r} writes a date, and llm-foundry "
            "gives it today's: a run that goes on tomorrow reads other tokens. Remove `date_string` from the template."
        )


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
        if has_cache(stream) and "://" in stream["remote"] and retry * patience >= timeout:
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
