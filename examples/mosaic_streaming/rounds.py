"""The rounds of validation: their batches, the same in each, and what their loader and the job have to agree on."""

import copy
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from streaming import StreamingDataset
from torch.utils.data import DataLoader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from examples.mosaic_streaming.batch.convert import BatchFormat, TitanBatch, check_keys, to_titan_batch
from examples.mosaic_streaming.batch.first_samples import look_at_samples
from examples.mosaic_streaming.batch.iterator import Batches
from examples.mosaic_streaming.build import place
from examples.mosaic_streaming.config.files import LoaderFile
from examples.mosaic_streaming.config.folders import check_folders
from examples.mosaic_streaming.config.loader import Config, folders_of, place_streams, resolve, take_out_token_ids
from examples.mosaic_streaming.distributed.agreement import check_peers
from examples.mosaic_streaming.distributed.store import new_job_id, on_each_node, on_rank_0
from examples.mosaic_streaming.errors import ConfigError, DataError, is_rank_0
from examples.mosaic_streaming.sampling.order import set_round
from examples.mosaic_streaming.shards.prepare import prepare_streams
from examples.mosaic_streaming.streams import batch_format, build_loader
from examples.mosaic_streaming.tokenizer import build_transformers_tokenizer


class Rounds:
    """The batches of a validation round, the same in each, and as many on each rank.

    Args:
        loader: llm-foundry's, over a StreamingDataset whose order is a `Round`.
        form: what batches have to look like.
        batches: of a round.
        dp_rank: this rank on TorchTitan's batch mesh.
        path: the file that configures the loader, for messages.
    """

    def __init__(
        self, loader: DataLoader[Mapping[str, Any]], form: BatchFormat, batches: int, dp_rank: int, path: str
    ) -> None:
        self._batches = Batches(loader, form.origin, path)
        self._form = form
        self._count = batches
        self._dp_rank = dp_rank
        self._path = path
        self._checked = False

    def __iter__(self) -> Iterator[TitanBatch]:
        """Yield a round's batches; what the last ones lack is filled up with rows that have no targets.

        Raises:
            DataError: a batch is not as it has to be, or ranks don't read the same data.
        """
        self._batches.begin()
        for number in range(self._count):
            batch = next(iter(self._batches.take(1)), None)
            if batch is None and number < self._count - 1:
                raise DataError(
                    f"A validation round ended after {number} of {self._count} batches. {self._form.origin}"
                )
            titan_batch = fill_up(batch, self._form)
            if not self._checked:
                check_peers(titan_batch, self._dp_rank, {"batches of a validation round": self._count}, self._path)
                self._checked = True
            yield titan_batch
        if self._batches.take(1):
            raise DataError(f"A validation round goes on after {self._count} batches. {self._form.origin}")

    def no_loss_token(self) -> DataError:
        """What to raise where a round has nothing to take a mean loss of."""
        return DataError(
            f"A validation round has no loss token: all labels of its {self._count:,} batches are -100. "
            f"{self._form.origin}"
        )

    def lost_workers(self) -> str:
        """Which dataloader workers have ended with an error, and how."""
        return self._batches.lost_workers()

    def close(self) -> None:
        """End the dataloader workers."""
        self._batches.close()


def fill_up(batch: Mapping[str, Any] | None, form: BatchFormat) -> TitanBatch:
    """A batch as TorchTitan takes it, with rows without targets behind those that there are.

    Args:
        batch: of llm-foundry; none where this rank has no sample left.
        form: what the batch has to look like, in the end.
    """
    if batch is not None:
        check_keys(batch, form)
    found = 0 if batch is None else len(batch["input_ids"])
    missing = form.rows - found
    if batch is not None and (missing <= 0 or batch["input_ids"].shape[1] != form.max_seq_len):
        return to_titan_batch(batch, form)  # which says what is wrong
    row = torch.zeros(missing, form.max_seq_len, dtype=torch.int64)
    empty = {"input_ids": row, "attention_mask": row, "labels": row + IGNORE_INDEX, "sequence_id": row}
    filled = (
        dict(empty) if batch is None else {key: torch.cat([batch[key], empty[key]]) for key in batch if key in empty}
    )
    inputs, labels = to_titan_batch(filled, form)
    labels[found:] = IGNORE_INDEX
    return inputs, labels


def resolve_validation(job_config: JobConfig, replication: int, file: LoaderFile, train_file: LoaderFile) -> Config:
    """The complete configuration of the validation loader.

    Args:
        job_config: the whole job.
        replication: ranks that receive the same samples.
        file: the loader's configuration as it was read.
        train_file: that of the training loader, which has been checked.

    Raises:
        ConfigError: the loader, the job and the training loader don't fit together.
    """
    validation = job_config.validation
    check_validation(job_config)
    config = resolve(
        file.config,
        file.path,
        seq_len=validation.seq_len,
        local_batch_size=validation.local_batch_size,
        replication=replication,
        section="validation",
    )
    check_loader(config["dataset"], file.path)
    train_dataset = copy.deepcopy(train_file.config["dataset"])
    place_streams(train_dataset, train_file.path)
    check_folders(folders_of(config["dataset"], file.path), folders_of(train_dataset, train_file.path))
    config |= {"drop_last": False, "persistent_workers": config["num_workers"] > 0}
    config["dataset"]["num_canonical_nodes"] = 1  # with more, the last samples of an epoch would be left out
    return config


def build_rounds(
    job_config: JobConfig,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: HuggingFaceTokenizer,
    config: Config,
    file: LoaderFile,
) -> Rounds:
    """The validation batches of one rank.

    Args:
        job_config: the whole job.
        dp_world_size: data-parallel degree, on TorchTitan's batch mesh.
        dp_rank: this rank on that mesh.
        tokenizer: TorchTitan's tokenizer.
        config: the resolved loader configuration.
        file: as it was read.

    Raises:
        ConfigError: llm-foundry or streaming refuses the configuration, or it doesn't fit the streams.
    """
    validation, path = job_config.validation, file.path
    transformers_tokenizer = build_transformers_tokenizer(job_config.model.hf_assets_path, tokenizer)
    take_out_token_ids(config, path, transformers_tokenizer)
    if is_rank_0():
        logger.info(f"Mosaic validation loader, resolved: {json.dumps(config)}")
    number = new_job_id()
    on_each_node(number, lambda: prepare_streams(config, path))
    may_cut = "max_seq_len" in file.config["dataset"]
    loader = build_loader(config, path, transformers_tokenizer, validation.local_batch_size, number, may_cut)
    dataset = loader.dataset
    assert isinstance(dataset, StreamingDataset)
    form = batch_format(
        job_config,
        config,
        path,
        transformers_tokenizer,
        f"Rank {dist.get_rank()} (dp rank {dp_rank})",
        rows=validation.local_batch_size,
        seq_len=validation.seq_len,
    )
    look = functools.partial(look_at_samples, loader, form, config, path, transformers_tokenizer, "validation")
    looked: list[str] = on_rank_0(new_job_id(), look)
    dataset._parallel_rank_world = place(job_config, dp_rank, dp_world_size)
    global_batch_size = validation.local_batch_size * dp_world_size
    batches, samples = size_of_round(dataset.epoch_size, global_batch_size, validation.steps)
    set_round(dataset, validation.local_batch_size, global_batch_size, samples)
    if is_rank_0():
        least = "" if validation.steps <= batches else f"; validation.steps = {validation.steps} would need more"
        logger.info(
            f"A validation round reads {samples:,} of {dataset.epoch_size:,} samples, in {batches} batches of "
            f"{global_batch_size}{least}."
        )
        for warning in looked:
            logger.warning(warning)
    return Rounds(loader, form, batches, dp_rank, path)


def size_of_round(epoch_size: int, global_batch_size: int, steps: int) -> tuple[int, int]:
    """Batches of all ranks together in a validation round, and samples; `steps` is `validation.steps`."""
    whole = -(-epoch_size // global_batch_size)
    batches = whole if steps == -1 else min(steps, whole)
    return batches, min(epoch_size, batches * global_batch_size)


def check_validation(job_config: JobConfig) -> None:
    """Raise ConfigError for batches that the model, as it is built for training, can't take.

    Source: rotary embeddings have `training.seq_len` rows; a pipeline's stages receive tensors of the first batch's
    shape (torchtitan 0.2.2, models/*/model/args.py; torch 2.13, distributed/pipelining/stage.py).
    """
    training, validation = job_config.training, job_config.validation
    if validation.local_batch_size < 1:
        raise ConfigError(f"validation.local_batch_size = {validation.local_batch_size}, expected at least 1.")
    if not 1 <= validation.seq_len <= training.seq_len:
        raise ConfigError(
            f"validation.seq_len = {validation.seq_len}, but the model is made for training.seq_len = "
            f"{training.seq_len}. Set it to that, or less."
        )
    if job_config.parallelism.pipeline_parallel_degree > 1:
        for key in ("local_batch_size", "seq_len"):
            now, needed = getattr(validation, key), getattr(training, key)
            if now != needed:
                raise ConfigError(
                    f"validation.{key} = {now}, but the stages of a pipeline take batches of one shape, and "
                    f"training.{key} = {needed}. Set it to that."
                )


def check_loader(dataset: Config, path: str) -> None:
    """Raise ConfigError for settings that leave samples out of a round."""
    if (dataset.get("packing_ratio") or 1) != 1:
        raise ConfigError(
            f"dataset.packing_ratio in {path}: packing leaves samples out, and a validation round reads each once. "
            "Remove the key: examples are padded."
        )
    if dataset.get("batching_method", "random") != "random":
        raise ConfigError(
            f"dataset.batching_method = {dataset['batching_method']!r} in {path}, but a validation round reads all "
            "samples, or the first of them, in any batch. Remove the key."
        )
