"""The validation loader: the batches of a round, the same in each, and as many on each rank."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.tools.logging import logger

from examples.mosaic_streaming.batch import (
    Batches,
    BatchSpec,
    TitanBatch,
    check_first_samples,
    check_keys,
    to_titan_batch,
)
from examples.mosaic_streaming.config import Job, LoaderFile, ResolvedLoader, check_folders, resolve, without_token_ids
from examples.mosaic_streaming.dataloader import batch_spec, open_loader
from examples.mosaic_streaming.distributed import check_peers, new_job_id, on_each_node, on_rank_0
from examples.mosaic_streaming.errors import ConfigError, DataError, is_rank_0
from examples.mosaic_streaming.sampling import set_validation_order
from examples.mosaic_streaming.shards import CheckedDataset, prepare_streams
from examples.mosaic_streaming.tokenizer import build_transformers_tokenizer


def resolve_validation(file: LoaderFile, job: Job, training: ResolvedLoader) -> ResolvedLoader:
    """The complete configuration of the validation loader.

    Args:
        file: as it was read.
        job: that validates.
        training: the configuration of the training loader.

    Raises:
        ConfigError: the loader, the job and the training loader don't fit together.
    """
    assert job.validation
    loader = resolve(file, job.validation.shape, job.layout.replication)
    check_validation_loader(loader)
    check_folders(loader.folders, training.folders)
    # With more canonical nodes, the last samples of an epoch would be left out.
    loader = loader.with_settings(num_canonical_nodes=1)
    settings = {"drop_last": False, "persistent_workers": loader.config["num_workers"] > 0}
    return dataclasses.replace(loader, config=loader.config | settings)


def check_validation_loader(loader: ResolvedLoader) -> None:
    """Raise ConfigError for settings that leave samples out of a round."""
    if (loader.dataset.get("packing_ratio") or 1) != 1:
        raise ConfigError(
            f"dataset.packing_ratio in {loader.source}: packing leaves samples out, and a validation round reads each "
            "once. Remove the key: examples are padded."
        )
    if (method := loader.dataset.get("batching_method", "random")) != "random":
        raise ConfigError(
            f"dataset.batching_method = {method!r} in {loader.source}, but a validation round reads all samples, or "
            "the first of them, in any batch. Remove the key."
        )


def build_validation_loader(
    job: Job, dp_rank: int, tokenizer: HuggingFaceTokenizer, config: ResolvedLoader
) -> "ValidationLoader":
    """The validation batches of one rank; all ranks call it together.

    Args:
        job: that validates.
        dp_rank: this rank on TorchTitan's batch mesh.
        tokenizer: TorchTitan's tokenizer.
        config: of the loader.

    Raises:
        ConfigError: llm-foundry or streaming refuses the configuration, or it doesn't fit the streams.
        DataError: an index or a first sample can't be read.
    """
    assert job.validation
    shape, steps = job.validation.shape, job.validation.steps
    hf_tokenizer = build_transformers_tokenizer(job.assets, tokenizer)
    config = without_token_ids(config, hf_tokenizer)
    if is_rank_0():
        logger.info(f"Mosaic validation loader, resolved: {json.dumps(config.config)}")
    shm_number = new_job_id()
    on_each_node(shm_number, lambda: prepare_streams(config))
    loader = open_loader(config, hf_tokenizer, shape.local_batch_size, shm_number)
    dataset = cast(CheckedDataset, loader.dataset)
    spec = batch_spec(job, shape, config, hf_tokenizer, f"Rank {dist.get_rank()} (dp rank {dp_rank})")
    look = functools.partial(check_first_samples, loader, spec, config, hf_tokenizer, shape)
    warnings: list[str] = on_rank_0(new_job_id(), look)
    dataset._parallel_rank_world = job.layout.world(dp_rank)
    global_batch_size = shape.local_batch_size * job.layout.dp_world_size
    batches, samples = size_of_round(dataset.epoch_size, global_batch_size, steps)
    set_validation_order(dataset, shape.local_batch_size, global_batch_size, samples)
    if is_rank_0():
        more = "" if steps <= batches else f"; validation.steps = {steps} would need more"
        logger.info(
            f"A validation round reads {samples:,} of {dataset.epoch_size:,} samples, in {batches} batches of "
            f"{global_batch_size}{more}."
        )
        for warning in warnings:
            logger.warning(warning)
    return ValidationLoader(loader, spec, batches, dp_rank, config.source)


class ValidationLoader:
    """The batches of a validation round, the same in each, and as many on each rank.

    Args:
        loader: llm-foundry's, over a dataset whose order is a `ValidationOrder`.
        spec: what batches have to look like.
        batches: of a round.
        dp_rank: this rank on TorchTitan's batch mesh.
        source: the file that configures the loader.
    """

    def __init__(
        self, loader: DataLoader[Mapping[str, Any]], spec: BatchSpec, batches: int, dp_rank: int, source: str
    ) -> None:
        self._batches = Batches(loader, spec.source, source)
        self._spec = spec
        self._count = batches
        self._dp_rank = dp_rank
        self._source = source
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
                    f"A validation round ended after {number} of {self._count} batches. {self._spec.source}"
                )
            titan_batch = pad_batch(batch, self._spec)
            if not self._checked:
                check_peers(titan_batch, self._dp_rank, {"batches of a validation round": self._count}, self._source)
                self._checked = True
            yield titan_batch
        if self._batches.take(1):
            raise DataError(f"A validation round goes on after {self._count} batches. {self._spec.source}")

    def no_loss_token(self) -> DataError:
        """What to raise where a round has nothing to take a mean loss of."""
        return DataError(
            f"A validation round has no loss token: all labels of its {self._count:,} batches are -100. "
            f"{self._spec.source}"
        )

    def lost_workers(self) -> str:
        """Which dataloader workers have ended with an error, and how."""
        return self._batches.lost_workers()

    def close(self) -> None:
        """End the dataloader workers."""
        self._batches.close()


def pad_batch(batch: Mapping[str, Any] | None, spec: BatchSpec) -> TitanBatch:
    """A batch as TorchTitan takes it, with rows without targets behind those that there are.

    Args:
        batch: of llm-foundry; none where this rank has no sample left.
        spec: what the batch has to look like, in the end.
    """
    if batch is not None:
        check_keys(batch, spec)
    found = 0 if batch is None else len(batch["input_ids"])
    missing = spec.rows - found
    if batch is not None and (missing <= 0 or batch["input_ids"].shape[1] != spec.max_seq_len):
        return to_titan_batch(batch, spec)  # which says what is wrong
    row = torch.zeros(missing, spec.max_seq_len, dtype=torch.int64)
    empty = {"input_ids": row, "attention_mask": row, "labels": row + IGNORE_INDEX, "sequence_id": row}
    filled = (
        dict(empty) if batch is None else {key: torch.cat([batch[key], empty[key]]) for key in batch if key in empty}
    )
    inputs, labels = to_titan_batch(filled, spec)
    labels[found:] = IGNORE_INDEX
    return inputs, labels


def size_of_round(epoch_size: int, global_batch_size: int, steps: int) -> tuple[int, int]:
    """Batches of all ranks together in a validation round, and samples; `steps` is `validation.steps`."""
    whole = -(-epoch_size // global_batch_size)
    batches = whole if steps == -1 else min(steps, whole)
    return batches, min(epoch_size, batches * global_batch_size)
