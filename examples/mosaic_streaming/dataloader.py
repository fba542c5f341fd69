"""The `build_dataloader_fn` of a Mosaic TrainSpec, and the loader that it builds: batches, epochs, state."""

import copy
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from composer import DataSpec
from llmfoundry.data.dataloader import build_dataloader
from streaming import StreamingDataset
from torch.utils.data import DataLoader
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import logger

from examples.mosaic_streaming.batch import BatchFormat, TitanBatch, to_titan_batch
from examples.mosaic_streaming.errors import ConfigError, DataError, is_rank_0
from examples.mosaic_streaming.loader_config import Config, resolve, stream_folders
from examples.mosaic_streaming.order import Order, set_order
from examples.mosaic_streaming.peers import check_peers
from examples.mosaic_streaming.placement import dp_ranks_per_node, sample_world
from examples.mosaic_streaming.resume import Data, check_same_data, describe, pack, unpack
from examples.mosaic_streaming.tokenizer import build_transformers_tokenizer, check_vocabulary


def build_mosaic_dataloader(
    *,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: HuggingFaceTokenizer,
    job_config: JobConfig,
    loader_config: Config,
    loader_config_path: str,
) -> "MosaicDataLoader":
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
    # A copy: `build_dataloader` writes into what it is given.
    try:
        spec: DataSpec = build_dataloader(copy.deepcopy(config), transformers_tokenizer, training.local_batch_size)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"llm-foundry refuses {loader_config_path}: {type(error).__name__}: {error}") from error
    loader = spec.dataloader
    if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, StreamingDataset):
        raise ConfigError(f"{loader_config_path} does not stream: give `dataset` a `remote` or `streams`.")
    assert loader.batch_size is not None
    order = set_order(loader.dataset, loader.batch_size, loader.batch_size * dp_world_size * accumulation)
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


class MosaicDataLoader(BaseDataLoader):
    """Batches of this rank without end, epoch after epoch, from any position.

    An epoch is as many whole global batches as the streams' epoch holds; the rest of it is left out, so that no
    optimizer step mixes two epochs. The position counts optimizer steps whose batches have all been handed out: what
    workers have prefetched doesn't count.

    Args:
        loader: llm-foundry's, over a StreamingDataset that has this rank's place in its `_parallel_rank_world`.
        form: what batches have to look like.
        order: the dataset's.
        data: what a checkpoint has to agree with.
        dp_rank: this rank on TorchTitan's batch mesh.
        path: the file that configures the loader, for messages.

    Raises:
        ConfigError: an epoch holds no whole global batch.
    """

    def __init__(
        self,
        loader: DataLoader[Mapping[str, Any]],
        form: BatchFormat,
        order: Order,
        data: Data,
        dp_rank: int,
        path: str,
    ) -> None:
        assert isinstance(loader.dataset, StreamingDataset)
        self._loader = loader
        self._dataset = loader.dataset
        self._form = form
        self._order = order
        self._data = data
        self._dp_rank = dp_rank
        self._path = path
        self._samples_per_batch = order.local_batch_size * self._dataset._parallel_rank_world.num_ranks
        self._epoch = 0
        self._sample_in_epoch = 0
        """Samples of this epoch that all ranks together have read, in whole optimizer steps."""
        self._batches: Iterator[Mapping[str, Any]] | None = None
        if self._epoch_is_read():
            raise ConfigError(
                f"An epoch of the streams has {self._dataset.epoch_size} samples, too few for a global batch of "
                f"{order.global_batch_size} with dataset.num_canonical_nodes = {self._dataset.num_canonical_nodes} and "
                f"batching_method = {order.batching_method!r}. Add data, raise dataset.epoch_size or `repeat`, or "
                f"lower one of these. {form.origin}"
            )

    def __iter__(self) -> Iterator[TitanBatch]:
        """Yield batches from the present position on, for ever; their shapes are in `to_titan_batch`.

        Raises:
            DataError: a batch is not as it has to be, ranks don't read the same data, or an epoch ends early.
            RuntimeError: this is not the first iteration: the position is that of one reader.
        """
        if self._batches is not None:
            raise RuntimeError("A MosaicDataLoader can be iterated once.")
        first = True
        while True:
            self._batches = iter(self._loader)
            while step := self._next_step(self._batches):
                for number, batch in enumerate(step):
                    titan_batch = to_titan_batch(batch, self._form)
                    if first:
                        check_peers(titan_batch, self._dp_rank, self._data, self._path)
                        first = False
                    if number == len(step) - 1:
                        self._sample_in_epoch += self._order.global_batch_size
                    yield titan_batch
            if is_rank_0():
                logger.info(f"Epoch {self._epoch} of the streams ends: {self._sample_in_epoch:,} samples read.")
            self._epoch, self._sample_in_epoch = self._epoch + 1, 0

    def _next_step(self, batches: Iterator[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """This rank's batches of the next optimizer step; none at the end of the epoch."""
        if self._epoch_is_read():
            return []
        accumulation = self._order.global_batch_size // self._samples_per_batch
        step = list(itertools.islice(batches, accumulation))
        if len(step) < accumulation:
            raise DataError(
                f"Epoch {self._epoch} ended after {self._sample_in_epoch} of {self._order.epoch_samples} samples. "
                f"{self._form.origin}"
            )
        return step

    def _epoch_is_read(self) -> bool:
        """Whether the rest of the epoch fills no global batch."""
        return self._order.left(self._sample_in_epoch) == 0

    def state_dict(self) -> dict[str, str]:
        """The position of the next batch: the same JSON string on each rank, under one key."""
        return pack(*self._next_position(), self._order.global_batch_size, self._data)

    def _next_position(self) -> tuple[int, int]:
        """Epoch and sample in it of the next batch; at the end of an epoch that is the next one's beginning."""
        return (self._epoch + 1, 0) if self._epoch_is_read() else (self._epoch, self._sample_in_epoch)

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Go on from a saved position; call it before iterating.

        Raises:
            DataError: the state is damaged, or of another version.
            ConfigError: the data is not what it was when the state was saved.
        """
        self._epoch, self._sample_in_epoch, global_batch_size, data = unpack(state_dict)
        check_same_data(data, self._data, self._path)
        self._epoch, self._sample_in_epoch = self._next_position()
        if is_rank_0():
            logger.info(
                f"The streams go on in epoch {self._epoch}, after {self._sample_in_epoch:,} of "
                f"{self._order.epoch_samples:,} samples."
            )
            if global_batch_size != self._order.global_batch_size:
                logger.warning(
                    f"The global batch changes from {global_batch_size} to {self._order.global_batch_size} sequences: "
                    "the same samples follow, in other batches."
                )
        position = {"epoch": self._epoch, "sample_in_epoch": self._sample_in_epoch}
        keep = ("num_canonical_nodes", "shuffle_seed", "initial_physical_nodes")
        self._dataset.load_state_dict(position | {key: getattr(self._dataset, key) for key in keep})

    def close(self) -> None:
        """End the dataloader workers.

        Source: torch's iterator has no public way to end its workers (torch 2.13, utils/data/dataloader.py).
        """
        batches, self._batches = self._batches, None
        shutdown = getattr(batches, "_shutdown_workers", None)  # there are none where num_workers = 0
        if shutdown:
            shutdown()
