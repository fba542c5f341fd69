"""The validation loader: the same batches in each round, and equally many on each rank."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.tools.logging import logger

from examples.mosaic_streaming import batch, config, distributed, sampling, shards
from examples.mosaic_streaming.batch import BatchSpec, TitanBatch
from examples.mosaic_streaming.config import Job, LoaderFile, ResolvedLoader
from examples.mosaic_streaming.dataloader import build_foundry_loader
from examples.mosaic_streaming.errors import ConfigError, DataError, is_rank_0
from examples.mosaic_streaming.tokenizer import build_transformers_tokenizer
from examples.mosaic_streaming.upstream.sample_order import set_reader_world


def resolve_validation(file: LoaderFile, job: Job, training: Sequence[ResolvedLoader]) -> ResolvedLoader:
    """Complete the configuration of the validation loader; `training` has that of each stage's training loader.

    ConfigError if the loader, the job and the training loader don't fit together, or samples would be left out.
    """
    assert job.validation
    loader_config = config.resolve(file, job.validation.shape, job.layout.replication)
    if (loader_config.dataset.get("packing_ratio") or 1) != 1:
        raise ConfigError(
            f"dataset.packing_ratio in {loader_config.source}: packing leaves samples out, and a validation round "
            "reads each once. Remove the key: examples are padded."
        )
    if (method := loader_config.dataset.get("batching_method", "random")) != "random":
        raise ConfigError(
            f"dataset.batching_method = {method!r} in {loader_config.source} is for training. A validation round "
            "has an order of its own, the same each time. Remove the key."
        )
    for stage in training:
        config.check_folders(loader_config.folders, stage.folders)
    # With more canonical nodes, the last samples of an epoch would be left out.
    loader_config = loader_config.with_settings(num_canonical_nodes=1)
    # `pad_batch` fills the last batch, and the next round needs the workers, too.
    settings = {"drop_last": False, "persistent_workers": loader_config.config["num_workers"] > 0}
    return dataclasses.replace(loader_config, config=loader_config.config | settings)


def build_validation_loader(
    job: Job, dp_rank: int, titan_tokenizer: HuggingFaceTokenizer, loader_config: ResolvedLoader
) -> "ValidationLoader":
    """Build the validation loader of one rank, `dp_rank` on TorchTitan's batch mesh. All ranks call it together.

    ConfigError if llm-foundry or streaming refuses the configuration, or it doesn't fit the streams. DataError if an
    index or a first sample can't be read.
    """
    assert job.validation
    shape, steps = job.validation.shape, job.validation.steps
    hf_tokenizer = build_transformers_tokenizer(job.assets, titan_tokenizer)
    loader_config = config.without_token_ids(loader_config, hf_tokenizer)
    if is_rank_0():
        logger.info(f"Mosaic validation loader, resolved: {json.dumps(loader_config.config)}")
    number = distributed.draw_number()
    distributed.on_each_node(number, lambda: shards.prepare_streams([loader_config]))
    loader = build_foundry_loader(loader_config, hf_tokenizer, shape.local_batch_size, number)
    dataset = cast(shards.CheckedDataset, loader.dataset)
    spec = batch.spec_of(job, shape, loader_config, hf_tokenizer, f"Rank {dist.get_rank()} (dp rank {dp_rank})")
    warnings: list[str] = distributed.on_rank_0(
        lambda: batch.check_first_samples(loader, spec, loader_config, hf_tokenizer, shape)
    )
    set_reader_world(dataset, job.layout.world(dp_rank))
    global_batch_size = shape.local_batch_size * job.layout.dp_world_size
    batches, samples = sampling.size_of_round(dataset.epoch_size, global_batch_size, steps)
    sampling.set_validation_order(dataset, shape.local_batch_size, global_batch_size, samples)
    if is_rank_0():
        more = "" if steps <= batches else f"; validation.steps = {steps} would need more"
        logger.info(
            f"A validation round reads {samples:,} of {dataset.epoch_size:,} samples, in {batches} batches of "
            f"{global_batch_size}{more}."
        )
        for warning in warnings:
            logger.warning(warning)
    return ValidationLoader(loader, spec, batches, dp_rank, loader_config.source)


class ValidationLoader(batch.Batches):
    """Yields the `count` batches of a round, the same each time it is iterated, and equally many on each rank.

    The order of the loader's dataset is a `ValidationOrder`. `dp_rank` is this rank's place on TorchTitan's batch mesh.
    """

    def __init__(self, loader: DataLoader[Any], spec: BatchSpec, count: int, dp_rank: int, config_file: str) -> None:
        super().__init__(loader, spec.source, config_file)
        self._spec, self._count, self._dp_rank, self._is_checked = spec, count, dp_rank, False

    def __iter__(self) -> Iterator[TitanBatch]:
        """Yield a round's batches. Rows without loss tokens fill the last one.

        DataError if a batch is not as it has to be, or ranks don't read the same data.
        """
        self.begin()
        for number in range(self._count):
            foundry_batch = next(iter(self.take(1)), None)  # None: no sample of the last global batch
            if foundry_batch is None and number < self._count - 1:
                raise DataError(f"A validation round ended after {number} of {self._count} batches. {self._source}")
            titan_batch = pad_batch(foundry_batch, self._spec)
            if not self._is_checked:
                settings = {"batches of a validation round": self._count}
                distributed.check_peers(titan_batch, self._dp_rank, settings, self._config_file)
                self._is_checked = True
            yield titan_batch
        if self.take(1):
            raise DataError(f"A validation round goes on after {self._count} batches. {self._source}")

    def no_loss_token_error(self) -> DataError:
        """Make the error for a round that has nothing to take a mean loss of."""
        return DataError(
            f"A validation round has no loss token: all labels of its {self._count:,} batches are -100. {self._source}"
        )


def pad_batch(foundry_batch: Mapping[str, Any] | None, spec: BatchSpec) -> TitanBatch:
    """Convert llm-foundry's batch, None where this rank has no sample left; fill it with rows without loss tokens."""
    row = torch.zeros(spec.rows, spec.max_seq_len, dtype=torch.int64)
    filled = {"input_ids": row, "attention_mask": row, "labels": row + IGNORE_INDEX, "sequence_id": row}
    rows = 0
    if foundry_batch is not None:
        batch.check_keys(foundry_batch, spec)
        ids = foundry_batch["input_ids"]
        rows = len(ids)
        if rows >= spec.rows or ids.shape[1] != spec.max_seq_len:
            return batch.to_titan_batch(foundry_batch, spec)  # full, or of a wrong shape, which this refuses
        filled = {key: torch.cat([foundry_batch[key], filled[key][rows:]]) for key in foundry_batch if key in filled}
    inputs, labels = batch.to_titan_batch(filled, spec)
    labels[rows:] = IGNORE_INDEX  # those of text are its ids
    return inputs, labels
