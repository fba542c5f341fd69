"""The `build_dataloader_fn` of a Mosaic TrainSpec."""

import functools
import json
import os

import torch.distributed as dist
from streaming import StreamingDataset
from streaming.base.world import World
from torchtitan.components.optimizer import build_optimizers, build_optimizers_with_moe_load_balancing
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import JobConfig
from torchtitan.models import _supported_models
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import logger
from transformers import PreTrainedTokenizerBase

from examples.mosaic_streaming.batch.convert import BatchFormat
from examples.mosaic_streaming.batch.documents import check_attention, check_eos, no_masks
from examples.mosaic_streaming.batch.first_samples import look_at_samples
from examples.mosaic_streaming.config.files import LoaderFile
from examples.mosaic_streaming.config.folders import is_url
from examples.mosaic_streaming.config.loader import STREAM_DEFAULTS, Config, has_cache, streams_of, take_out_token_ids
from examples.mosaic_streaming.dataloader import MosaicDataLoader
from examples.mosaic_streaming.distributed.abort import AbortChannel
from examples.mosaic_streaming.distributed.store import (
    check_machines,
    new_job_id,
    on_each_node,
    on_rank_0,
    open_store,
)
from examples.mosaic_streaming.errors import ConfigError, is_rank_0
from examples.mosaic_streaming.sampling.mixture import log_mixture
from examples.mosaic_streaming.sampling.placement import dp_ranks_per_node, sample_world
from examples.mosaic_streaming.shards.prepare import prepare_streams
from examples.mosaic_streaming.streams import Streams, fill_in_ratio, open_streams, resolve_training
from examples.mosaic_streaming.titan.v0_2.job_config import parallel_dims
from examples.mosaic_streaming.tokenizer import build_transformers_tokenizer, check_vocabulary
from examples.mosaic_streaming.upstream.memory import memory_limit

OPTIMIZERS = ("Adam", "AdamW")
"""Those that TorchTitan makes."""

ORDER_BYTES = 47
"""Of a node's memory for each sample of an epoch: seen with 100 million samples."""


def build_mosaic_dataloader(
    *,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: HuggingFaceTokenizer,
    job_config: JobConfig,
    loader_config: Config,
    loader_config_path: str,
    channel: AbortChannel,
) -> MosaicDataLoader:
    """Build the training loader of one rank; a TrainSpec's `build_dataloader_fn` once the last three are bound.

    Args:
        dp_world_size: data-parallel degree, on TorchTitan's batch mesh.
        dp_rank: this rank on that mesh.
        tokenizer: TorchTitan's tokenizer.
        job_config: the whole job.
        loader_config: the loader TOML, for llm-foundry's `build_dataloader`.
        loader_config_path: the file it was read from, for messages.
        channel: tells all ranks why one stops.

    Raises:
        ConfigError: the loader, the tokenizer, the model and the job don't fit together.
    """
    world_size = dist.get_world_size()
    file = LoaderFile(loader_config, loader_config_path)
    config, transformers_tokenizer, global_batches = settle(job_config, file, tokenizer, dp_world_size, world_size)
    job_id = new_job_id()
    channel.connect(job_id)
    check_machines()
    on_each_node(job_id, lambda: prepare_streams(config, loader_config_path))
    choose = functools.partial(on_rank_0, job_id)
    fill_in_ratio(job_config, config, loader_config_path, transformers_tokenizer, choose)
    if is_rank_0():
        logger.info(f"Mosaic loader, resolved: {json.dumps(config)}")
    streams = open_streams(
        job_config,
        config,
        loader_config_path,
        tokenizer,
        transformers_tokenizer,
        job_id,
        reader=f"Rank {dist.get_rank()} (dp rank {dp_rank})",
        global_batches=global_batches,
        may_cut="max_seq_len" in loader_config["dataset"],
    )
    check_memory(streams.dataset, loader_config_path)
    look = functools.partial(
        look_at_samples, streams.loader, streams.form, config, loader_config_path, transformers_tokenizer
    )
    looked: list[str] = on_rank_0(new_job_id(), look)
    streams.dataset._parallel_rank_world = place(job_config, dp_rank, dp_world_size)
    if is_rank_0():
        log_mixture(streams.names, streams.dataset, streams.order, streams.tokens_of_a_sample)
        for warning in looked + warnings_of(job_config, streams, transformers_tokenizer, world_size):
            logger.warning(warning)
    return MosaicDataLoader(
        streams.loader,
        streams.form,
        streams.order,
        streams.data,
        dp_rank,
        loader_config_path,
        job_config.training.steps,
        functools.partial(open_store, job_id),
        channel,
    )


def settle(
    job_config: JobConfig, file: LoaderFile, tokenizer: HuggingFaceTokenizer, dp_world_size: int, world_size: int
) -> tuple[Config, PreTrainedTokenizerBase, int]:
    """What has to fit together before streams are looked at.

    Args:
        job_config: the whole job.
        file: the loader's configuration.
        tokenizer: TorchTitan's tokenizer.
        dp_world_size: data-parallel degree, on TorchTitan's batch mesh.
        world_size: processes.

    Returns:
        the resolved loader configuration, transformers' tokenizer, and batches of all dp ranks in a global batch.

    Raises:
        ConfigError: it doesn't.
    """
    accumulation, model = accumulation_steps(job_config, dp_world_size), job_config.model
    check_model(job_config, tokenizer)
    check_training(job_config, world_size)
    config = resolve_training(job_config, file.config, file.path, world_size // dp_world_size)
    transformers_tokenizer = build_transformers_tokenizer(model.hf_assets_path, tokenizer)
    take_out_token_ids(config, file.path, transformers_tokenizer)
    model_args = get_train_spec(model.name).model_args[model.flavor]
    check_eos(model_args, model.flavor, tokenizer.eos_id, model.hf_assets_path)
    return config, transformers_tokenizer, accumulation * dp_world_size


def place(job_config: JobConfig, dp_rank: int, dp_world_size: int) -> World:
    """This rank's place among those that share out the samples."""
    pp = job_config.parallelism.pipeline_parallel_degree
    per_node = dp_ranks_per_node(dist.get_world_size(), dp_world_size, pp, int(os.environ["LOCAL_WORLD_SIZE"]))
    return sample_world(dp_rank, dp_world_size, per_node)


def check_model(job_config: JobConfig, tokenizer: HuggingFaceTokenizer) -> None:
    """Raise ConfigError unless there is such a flavor, for this tokenizer and these degrees of parallelism."""
    model = job_config.model
    flavors = get_train_spec(model.name).model_args
    if model.flavor not in flavors:
        raise ConfigError(f"model.flavor = {model.flavor!r}, but {model.name} has: {', '.join(flavors)}.")
    model_args = flavors[model.flavor]
    check_vocabulary(tokenizer, model_args.vocab_size, f"{model.name} {model.flavor}")
    check_attention(model_args, model.flavor, job_config.parallelism.pipeline_parallel_degree)


def check_training(job_config: JobConfig, world_size: int) -> None:
    """Raise ConfigError for what TorchTitan's own models and optimizers would refuse once they are built.

    Source: each `parallelize_fn` in torchtitan 0.2.2, models, asserts the first; its `build_optimizers`, in
    components/optimizer.py, knows the second's names.
    """
    model, seq_len = job_config.model.name, job_config.training.seq_len
    divisor = parallel_dims(job_config, world_size).seq_len_divisor
    if model.removesuffix("_mosaic") in _supported_models and seq_len % divisor:
        hint = f"For samples of {seq_len} tokens set {seq_len - 1}: then each label is real." if seq_len % 2 else ""
        raise ConfigError(
            f"training.seq_len = {seq_len}, but TorchTitan's models take multiples of {divisor}: 2 x tensor-parallel x "
            f"context-parallel degree. {hint or 'Change one of them.'}"
        )
    is_titans = get_train_spec(model).build_optimizers_fn in (
        build_optimizers,
        build_optimizers_with_moe_load_balancing,
    )
    if is_titans and job_config.optimizer.name not in OPTIMIZERS:
        raise ConfigError(f"optimizer.name = {job_config.optimizer.name!r}, expected one of: {', '.join(OPTIMIZERS)}.")


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


def check_memory(dataset: StreamingDataset, path: str) -> None:
    """Raise ConfigError unless an epoch can be put in order in the memory that this process may use.

    Args:
        dataset: with its samples an epoch.
        path: the file that configures the loader, for the message.
    """
    if (needed := dataset.epoch_size * ORDER_BYTES) > (memory := memory_limit()):
        raise ConfigError(
            f"An epoch of {dataset.epoch_size:,} samples takes about {needed / 1e9:,.1f} GB of each node's memory to "
            f"put in order, of {memory / 1e9:,.1f} GB that a process may use. Lower `epoch_size`, `repeat` or `choose` "
            f"in {path}."
        )


def warnings_of(
    job_config: JobConfig, streams: Streams, tokenizer: PreTrainedTokenizerBase, world_size: int
) -> list[str]:
    """What is allowed, but would hurt."""
    dataset, timeout = streams.config["dataset"], job_config.comm.train_timeout_seconds
    columns = getattr(streams.dataset.shards[0], "column_names", [])
    rows = warnings_of_rows(streams.config, job_config, streams.form, tokenizer, columns)
    if algo := dataset.get("partition_algo"):
        rows.append(
            f"dataset.partition_algo = {algo!r} in {streams.path} has no effect: global batches are the same on any "
            "number of ranks, which streaming's algorithms don't keep. Remove the key."
        )
    return rows + (warnings_of_patience(dataset, timeout, streams.path) if world_size > 1 else [])


def warnings_of_rows(
    config: Config, job_config: JobConfig, form: BatchFormat, tokenizer: PreTrainedTokenizerBase, columns: list[str]
) -> list[str]:
    """Whether rows hold several documents that attention is not kept within, or change from day to day."""
    dataset, model, found = config["dataset"], job_config.model, []
    packed = int(form.rows * (dataset.get("packing_ratio") or 1)) > form.rows
    marked = dataset.get("eos_token_id") is not None or dataset.get("bos_token_id") is not None
    if (packed or marked) and not form.documents:
        documents = "packed examples" if packed else "documents (dataset.eos_token_id or bos_token_id)"
        found.append(no_masks(documents, model.name, get_train_spec(model.name).model_args, model.flavor))
    is_text = config["name"] == "finetuning" and not {"turns", "input_ids"} & set(columns)
    if is_text and "date_string" in str(tokenizer.chat_template):
        found.append(
            f"The chat template in model.hf_assets_path = {model.hf_assets_path!r} writes a date, and llm-foundry "
            "gives it today's: a run that goes on tomorrow reads other tokens. Remove `date_string` from the template."
        )
    if is_text and "messages" in columns and tokenizer.chat_template is None:
        found.append(
            f"The tokenizer in model.hf_assets_path = {model.hf_assets_path!r} has no chat template: llm-foundry "
            "writes chats in a form of its own (ChatML, with <|im_start|>). Set `chat_template` in "
            "tokenizer_config.json, or put a chat_template.jinja beside it."
        )
    return found


def warnings_of_patience(dataset: Config, timeout: float, path: str) -> list[str]:
    """Whether one rank may wait for a shard for longer than the others wait for that rank.

    Args:
        dataset: of the resolved loader configuration.
        timeout: `comm.train_timeout_seconds`.
        path: the file that configures the loader, for the message.
    """
    found = []
    for name, stream in streams_of(dataset).items():
        retry, patience = ((STREAM_DEFAULTS | dataset | stream)[f"download_{key}"] for key in ("retry", "timeout"))
        if has_cache(dataset, stream) and is_url(stream["remote"]) and retry * patience >= timeout:
            found.append(
                f"{name} in {path} gives a store that stalls {retry} (download_retry) x {patience:g} s "
                f"(download_timeout), but ranks wait for each other only {timeout:g} s (comm.train_timeout_seconds in "
                "the job config): they would stop before that one can say why. Lower the first two, or raise the last."
            )
    return found
