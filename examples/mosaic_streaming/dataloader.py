"""The training loader: `build_mosaic_dataloader` builds it, and `MosaicDataLoader` is what TorchTitan iterates."""

import copy
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist
from llmfoundry.data.dataloader import build_dataloader
from streaming import StreamingDataset
from torch.utils.data import DataLoader
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.tools.logging import logger
from transformers import PreTrainedTokenizerBase

from examples.mosaic_streaming import batch, checkpoint, config, distributed, sampling, shards
from examples.mosaic_streaming.batch import BatchSpec, TitanBatch
from examples.mosaic_streaming.checkpoint import Segment, State
from examples.mosaic_streaming.config import BatchShape, Job, ResolvedLoader
from examples.mosaic_streaming.distributed import AbortChannel
from examples.mosaic_streaming.errors import ConfigError, DataError, is_rank_0
from examples.mosaic_streaming.tokenizer import build_transformers_tokenizer, check_pad_token, check_tokenizer
from examples.mosaic_streaming.upstream.large_index import large_indexes, without_collection
from examples.mosaic_streaming.upstream.sample_order import reader_world, set_reader_world
from examples.mosaic_streaming.upstream.shared_memory import keep_locks_together, shared_memory

DROP_LOG_STEPS = {10**digits for digits in range(10)}
"""Steps after a start (1, 10, 100, …) at which the log says how much packing has dropped, as at each epoch's end."""

DROP_WARN_FRACTION = 0.01
"""The log warns if a larger share of the data is left out."""


@without_collection()
def build_mosaic_dataloader(
    job: Job, dp_rank: int, titan_tokenizer: HuggingFaceTokenizer, loader_config: ResolvedLoader, channel: AbortChannel
) -> "MosaicDataLoader":
    """Build the training loader of one rank. All ranks call it together.

    Args:
        dp_rank: this rank's coordinate on TorchTitan's batch mesh.
        loader_config: the complete configuration of the loader.
        channel: tells all ranks why one of them stops.

    Raises:
        ConfigError: the loader, the tokenizer, the model and the job don't fit together.
        DataError: an index or a first sample can't be read.
    """
    hf_tokenizer = build_transformers_tokenizer(job.assets, titan_tokenizer)
    check_tokenizer(titan_tokenizer, job)
    loader_config = config.without_token_ids(loader_config, hf_tokenizer)
    number = distributed.draw_number()
    channel.connect(number)
    distributed.check_ranks_per_node()
    distributed.on_each_node(number, lambda: shards.prepare_streams(loader_config))
    on_rank_0 = functools.partial(distributed.on_rank_0, number)
    loader_config = fill_in_packing_ratio(loader_config, job, hf_tokenizer, on_rank_0)
    if is_rank_0():
        logger.info(f"Mosaic loader, resolved: {json.dumps(loader_config.config)}")
    who = f"Rank {dist.get_rank()} (dp rank {dp_rank})"
    opened = open_loader(job, loader_config, titan_tokenizer, hf_tokenizer, number, who)
    sampling.check_memory(opened.order, opened.dataset.epoch_size, loader_config.source)
    warnings: list[str] = distributed.on_rank_0(
        distributed.draw_number(),  # each result that ranks share needs its own
        lambda: batch.check_first_samples(opened.loader, opened.spec, loader_config, hf_tokenizer, job.training),
    )
    set_reader_world(opened.dataset, job.layout.world(dp_rank))  # the first samples were read as by a single reader
    if is_rank_0():
        sampling.log_mixture(opened.names, opened.dataset, opened.order, opened.tokens_of_a_sample)
        for warning in warnings + config.warnings_of(loader_config, job, hf_tokenizer, opened.columns):
            logger.warning(warning)
    return MosaicDataLoader(opened, dp_rank, job, channel)


def build_foundry_loader(
    loader_config: ResolvedLoader, hf_tokenizer: PreTrainedTokenizerBase, batch_size: int, shm_number: int
) -> DataLoader[Any]:
    """Build llm-foundry's loader over streams that are ready on this machine. All ranks call it together.

    Args:
        loader_config: the complete configuration of the loader.
        batch_size: rows of a batch, per dp rank.
        shm_number: names the dataset's shared memory; the same on all ranks.

    Raises:
        ConfigError: llm-foundry or streaming refuses the configuration, or the streams don't have the right columns.
    """
    name, source = loader_config.name, loader_config.source
    arguments = copy.deepcopy(loader_config.arguments)  # because build_dataloader changes them
    try:
        with shared_memory(shm_number), large_indexes():
            data_spec: Any = build_dataloader(arguments, hf_tokenizer, batch_size)
    except Exception as error:
        raise ConfigError(f"{loader_config.builder} refuses {source}: {type(error).__name__}: {error}") from error
    loader = getattr(data_spec, "dataloader", data_spec)  # a user's builder may return the bare loader
    if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, StreamingDataset):
        raise ConfigError(f"{source} does not stream: give `dataset` a `remote` or `streams`.")
    if loader.batch_size is None or len(loader.dataset.streams) != len(loader_config.streams):
        raise ConfigError(
            f"The loader {name!r} of {source} has {len(loader.dataset.streams)} streams and batch_size = "
            f"{loader.batch_size}, expected the {len(loader_config.streams)} of the file, and a number."
        )
    # In place, and in this order: each step needs the one before it.
    shards.check_columns(loader.dataset, name, loader_config.labels, source)
    shards.make_checked_dataset(loader.dataset, loader_config.labels, loader_config.may_cut)
    check_pad_token(name, loader.dataset.shards[0], hf_tokenizer)
    batch.use_fast_collator(loader, name == "text")
    keep_locks_together(loader.dataset)
    return loader


@dataclass(frozen=True)
class OpenLoader:
    """llm-foundry's loader over open streams, with the order in which they are read.

    Attributes:
        config: the configuration of the loader.
        loader: llm-foundry's loader.
        order: the order of the samples.
        spec: what the batches have to look like.
        fingerprint: what a checkpoint records of the data.
    """

    config: ResolvedLoader
    loader: DataLoader[Any]
    order: sampling.Order
    spec: BatchSpec
    fingerprint: checkpoint.Fingerprint

    @property
    def dataset(self) -> shards.CheckedDataset:
        """The dataset of all streams."""
        assert isinstance(self.loader.dataset, shards.CheckedDataset)
        return self.loader.dataset

    @property
    def names(self) -> list[str]:
        """The names of the streams in the configuration."""
        return list(self.config.streams)

    @property
    def columns(self) -> list[str]:
        """The columns of the first stream."""
        return list(getattr(self.dataset.shards[0], "column_names", []))

    def with_nodes_of(self, saved: checkpoint.Fingerprint) -> "OpenLoader":
        """Return it with the `num_canonical_nodes` of a checkpoint where that is 64, and the file gives none.

        The default for small data was 64, too, when the checkpoint was written.
        """
        dataset, order, settings = self.dataset, self.order, self.config.dataset
        nodes = sampling.MAX_CANONICAL_NODES
        is_default = "num_canonical_nodes" not in settings and dataset.num_canonical_nodes != nodes
        if not is_default or saved.get("dataset.num_canonical_nodes") != nodes:
            return self
        dataset.num_canonical_nodes, dataset.shuffle_block_size = nodes, settings.get("shuffle_block_size")
        sizes = (order.local_batch_size, order.global_batch_size)
        order = sampling.set_order(dataset, order.batching_method, *sizes, order.packed)
        sampling.check_order(order, dataset, self.names, self.config.source)
        changed = {key: getattr(dataset, key) for key in ("num_canonical_nodes", "shuffle_block_size")}
        known = {f"dataset.{key}": value for key, value in changed.items() if f"dataset.{key}" in self.fingerprint}
        return dataclasses.replace(self, order=order, fingerprint=self.fingerprint | known)

    @property
    def tokens_of_a_sample(self) -> int | None:
        """How many tokens of each sample the model gets. Text fills its rows; other samples differ in length: None."""
        return self.spec.seq_len if self.spec.labels_are_ids else None


def open_loader(
    job: Job,
    loader_config: ResolvedLoader,
    titan_tokenizer: HuggingFaceTokenizer,
    hf_tokenizer: PreTrainedTokenizerBase,
    shm_number: int,
    who: str,
) -> OpenLoader:
    """Open the training streams, which are ready on this machine. All ranks call it together.

    Args:
        loader_config: the complete configuration of the loader.
        shm_number: names the dataset's shared memory; the same on all ranks.
        who: reads the streams, for messages.

    Raises:
        ConfigError: llm-foundry or streaming refuses the configuration, or an epoch fills no global batch.
    """
    loader = build_foundry_loader(loader_config, hf_tokenizer, job.training.local_batch_size, shm_number)
    dataset, batch_size = cast(StreamingDataset, loader.dataset), cast(int, loader.batch_size)
    # In samples. `batch_size` differs from the rows of a batch where several samples are packed into a row.
    global_batch_size = batch_size * job.global_batch_size // job.training.local_batch_size
    packs, method = cast(batch.Collator, loader.collate_fn).packs, loader_config.batching_method(dataset)
    order = sampling.set_order(dataset, method, batch_size, global_batch_size, packs)
    sampling.check_order(order, dataset, list(loader_config.streams), loader_config.source)
    spec = batch_spec(job, job.training, loader_config, hf_tokenizer, who)
    fingerprint = checkpoint.fingerprint_of(loader_config, dataset, order, job.training.seq_len, titan_tokenizer)
    return OpenLoader(loader_config, loader, order, spec, fingerprint)


def fill_in_packing_ratio(
    loader_config: ResolvedLoader,
    job: Job,
    hf_tokenizer: PreTrainedTokenizerBase,
    on_one: Callable[[Callable[[], Any]], Any],
) -> ResolvedLoader:
    """Replace `packing_ratio = "auto"` by a number. All ranks call it together.

    `on_one` calls a function on one rank, and returns its result on all.
    """
    if loader_config.dataset.get("packing_ratio") != "auto":
        return loader_config
    rows, any_ratio = job.training.local_batch_size, loader_config.with_settings(packing_ratio=1)
    loader = build_foundry_loader(any_ratio, hf_tokenizer, rows, distributed.draw_number())
    return loader_config.with_settings(packing_ratio=on_one(lambda: batch.choose_ratio(loader, rows, loader_config)))


def batch_spec(
    job: Job, shape: BatchShape, loader_config: ResolvedLoader, hf_tokenizer: PreTrainedTokenizerBase, who: str
) -> BatchSpec:
    """Tell what the batches of a loader have to look like. `who` reads them, for messages."""
    return BatchSpec(
        rows=shape.local_batch_size,
        seq_len=shape.seq_len,
        max_seq_len=loader_config.dataset["max_seq_len"],
        vocab_size=job.vocab_size,
        pad_id=hf_tokenizer.pad_token_id,
        eos_id=hf_tokenizer.eos_token_id,
        labels_are_ids=loader_config.name == "text",
        source=f"{who} reads {loader_config.sources}, set in {loader_config.source}.",
        documents=job.documents,
        positions=job.positions,
        masks_by_positions=job.masks_by_positions,
    )


class MosaicDataLoader(BaseDataLoader):
    """Yields this rank's batches without end, epoch after epoch, from any saved position.

    An epoch is as many whole global batches as the streams' epoch holds. The rest of it is left out, so that no
    optimizer step mixes two epochs. Under "blend" the first epoch never ends. The position counts whole optimizer
    steps, as batches are yielded: what workers have prefetched doesn't count.

    Args:
        opened: the open loader, whose dataset knows this rank's place (`set_reader_world`).
        dp_rank: this rank's coordinate on TorchTitan's batch mesh.
        job: what is trained.
        channel: tells all ranks why one of them stops.
    """

    def __init__(self, opened: OpenLoader, dp_rank: int, job: Job, channel: AbortChannel) -> None:
        order = opened.order
        self._opened, self.config = opened, opened.config
        self.has_started = False
        """Whether a batch has been asked for."""
        self._batches = batch.Batches(opened.loader, opened.spec.source, opened.config.source)
        self._dataset, self._spec, self._order = opened.dataset, opened.spec, order
        self._dp_rank, self._channel = dp_rank, channel
        self._microbatches = job.microbatches
        self._steps_of_run = 0 if {"dataloader", "train_state"} & {*job.checkpoints.exclude_from_loading} else job.steps
        """`training.steps`, or 0 where the steps and the streams of a run may not begin together."""
        self._state = State.at_beginning(opened.fingerprint, order.global_batch_size)
        """The position after the last whole optimizer step; `seen` is in the counter."""
        self._counter = checkpoint.ConsumptionCounter(opened.spec, order.local_batch_size)
        self._fetch_stats = shards.FetchStats(shards.fetch_stats_file(self._dataset._shm_prefix_int))
        self._fetched_before = shards.FetchCounts()
        """Fetched in earlier epochs of this start."""
        self._steps_since_start = self._dropped_tokens = self._packed_tokens = 0
        """Since this start: optimizer steps, and tokens of this rank that packing has dropped and kept."""

    def __iter__(self) -> Iterator[TitanBatch]:
        """Yield batches from the present position on, forever. `to_titan_batch` describes them.

        Raises:
            DataError: a batch is not as it has to be, ranks don't read the same data, an epoch ends early, or a global
                batch has no loss token.
            RuntimeError: this is not the first iteration.
        """
        if self.has_started:
            raise RuntimeError("A MosaicDataLoader can be iterated once.")
        self.has_started = True
        self._log_start()
        is_checked = False
        while True:
            self._batches.begin()
            while micro_batches := self._next_step():
                loss_tokens = 0
                for number, micro_batch in enumerate(micro_batches, start=1):
                    titan_batch, padding = batch.convert(micro_batch, self._spec)
                    _, labels = titan_batch
                    if not is_checked:
                        settings = self._state.data | self._settings_to_agree_on()
                        distributed.check_peers(titan_batch, self._dp_rank, settings, self.config.source)
                        is_checked = True
                    loss_tokens += self._counter.add(labels, padding)
                    if number == len(micro_batches):  # TorchTitan saves after a step, before it asks for another batch
                        if not loss_tokens:
                            self._stop_if_no_rank_has_loss_tokens()
                        self._counter.add_step(self._order.global_batch_size)
                        read = self._state.sample_in_epoch + self._order.global_batch_size
                        self._state = self._state._replace(sample_in_epoch=read, steps=self._state.steps + 1)
                    yield from batch.split_rows(titan_batch, self._microbatches)
            self._log_epoch_end()
            self._log_dropped_tokens()
            self._state = self._state._replace(epoch=self._state.epoch + 1, sample_in_epoch=0)

    @property
    def _remaining(self) -> int:
        """Samples of this epoch that follow, in whole global batches."""
        return self._order.remaining(self._state.sample_in_epoch)

    @property
    def _accumulation(self) -> int:
        """Micro-batches of this rank in an optimizer step."""
        ranks = reader_world(self._dataset).num_ranks
        return self._order.global_batch_size // (self._order.local_batch_size * ranks)

    def _next_step(self) -> list[Mapping[str, Any]]:
        """This rank's micro-batches of the next optimizer step; none at the end of the epoch."""
        self._channel.exit_if_signalled()
        if not self._remaining:
            return []
        micro_batches = self._batches.take(self._accumulation)
        if len(micro_batches) < self._accumulation:
            raise DataError(
                f"Epoch {self._state.epoch} ended after {self._state.sample_in_epoch} of {self._order.epoch_samples} "
                f"samples. {self._spec.source}"
            )
        self._dropped_tokens += sum(one.get(batch.DROPPED_TOKENS, 0) for one in micro_batches)
        self._packed_tokens += sum(one.get(batch.PACKED_TOKENS, 0) for one in micro_batches)
        self._steps_since_start += 1
        if self._steps_since_start in DROP_LOG_STEPS:
            self._log_dropped_tokens()
        return micro_batches

    def _stop_if_no_rank_has_loss_tokens(self) -> None:
        """Raise DataError if no rank has a loss token in this step. Each rank without one calls it; the last raises.

        TorchTitan would divide by the number of loss tokens, log a loss of NaN and go on. It sums them over ranks once
        each rank has all batches of the step. So a rank that raises before it yields its last batch keeps all ranks
        from changing the model (torchtitan 0.2.2, train.py).
        """
        epoch, sample = self._state.epoch, self._state.sample_in_epoch
        if self._channel.count(f"no loss token in epoch {epoch} at {sample}") == dist.get_world_size():
            raise batch.no_loss_token_error(self._dataset, self._order, epoch, sample)

    def _settings_to_agree_on(self) -> checkpoint.Fingerprint:
        """What all ranks have to agree on at a start, in addition to the data."""
        world = reader_world(self._dataset)
        return {
            "samples of a global batch": self._order.global_batch_size,
            "samples of a rank's batch": self._order.local_batch_size,
            "nodes x dp ranks on each": f"{world.num_nodes} x {world.ranks_per_node}",
            "epoch": self._state.epoch,
            "samples read of the epoch": self._state.sample_in_epoch,
        }

    def state_dict(self) -> dict[str, str]:
        """The position of the next batch: the same JSON string on each rank, under one key."""
        return checkpoint.pack(self._past_epoch_end(self._state)._replace(seen=self._counter.seen()))

    def _past_epoch_end(self, state: State) -> State:
        """Return a position, at the end of an epoch as the beginning of the next one."""
        at_end = not self._order.remaining(state.sample_in_epoch)
        return state._replace(epoch=state.epoch + 1, sample_in_epoch=0) if at_end else state

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Continue from a saved position. Call it before iterating.

        Raises:
            DataError: the state is damaged, or of another version.
            ConfigError: the data is not what it was when the state was saved.
            RuntimeError: the loader is iterated already.
        """
        if self.has_started:
            raise RuntimeError("A MosaicDataLoader that is iterated can't load another position: build a new one.")
        saved, size = checkpoint.unpack(state_dict), self._order.global_batch_size
        opened = self._opened.with_nodes_of(saved.data)
        checkpoint.check_same_data(saved.data, opened.fingerprint, self.config.source)
        checkpoint.check_position(saved, self._dataset.epoch_size, opened.order)
        self._order = opened.order
        self._counter.resume_from(saved.seen or self._seen_before(saved))
        state = self._past_epoch_end(saved)._replace(data=opened.fingerprint, global_batch_size=size)
        if saved.global_batch_size != size:
            here = Segment(state.steps, state.epoch, state.sample_in_epoch, size)
            state = state._replace(segments=checkpoint.append_segment(state.segments, here))
            if is_rank_0():
                logger.warning(
                    f"The global batch changes from {saved.global_batch_size} to {size} samples: the same samples "
                    "follow, in other batches."
                )
        self._state = state
        self._order = sampling.start_at(self._dataset, self._order, state.epoch, state.sample_in_epoch)

    def _seen_before(self, state: State) -> checkpoint.ConsumedCounts:
        """What a run had read whose state, of an earlier version, doesn't say; it had one global batch size."""
        in_an_epoch = sampling.round_down(self._order.epoch_samples, state.global_batch_size)
        samples = state.epoch * in_an_epoch + state.sample_in_epoch
        return checkpoint.ConsumedCounts(samples, self._counter.tokens(samples))

    def progress(self) -> checkpoint.Progress:
        """Where the run is. It takes one small collective, so all ranks have to call it at the same step."""
        self._counter.count_loss_tokens(peers=dist.get_world_size() // reader_world(self._dataset).num_ranks)
        order, read = self._order, self._state.sample_in_epoch
        passes = sampling.passes_of(self._opened.names, self._dataset, order, read) if order.blend else None
        return checkpoint.Progress(
            self._state.epoch,
            read / (read + self._remaining),
            passes,
            self._counter.seen(),
            self._counter.take_padding(),
            self._fetch_stats.read(),
            self._dataset.bytes_in_cache(),
        )

    def lost_workers(self) -> str:
        """Which dataloader workers have ended with an error, and how."""
        return self._batches.lost_workers()

    def close(self) -> None:
        """Log what is left to say of the epoch and of packing, and end the dataloader workers."""
        if not self._remaining:  # the run ends with an epoch, so `__iter__` has not logged its end
            self._log_epoch_end()
        self._log_dropped_tokens()
        self._batches.close()

    def _log_start(self) -> None:
        """Log on rank 0 where in the streams the run starts, what an epoch leaves out, and what a new run will read."""
        if not is_rank_0():
            return
        data = (self._opened.names, self._dataset, self._order, self._state)
        message, left_out = checkpoint.start_message(*data)
        if self._steps_of_run and not self._state.steps:
            message += checkpoint.run_message(*data, self._steps_of_run, self._counter)
        if before := self._counter.seen().samples:
            message += f" {before:,} samples were read before this start."
        logger.log(logging.INFO if left_out < DROP_WARN_FRACTION else logging.WARNING, message)

    def _log_epoch_end(self) -> None:
        """Log on rank 0 what this start has read of the epoch, and what its machine has fetched meanwhile."""
        if is_rank_0():
            now, before = self._fetch_stats.read(), self._fetched_before
            fetched = shards.FetchCounts(*(new - old for new, old in zip(now, before, strict=True)))
            self._fetched_before = now
            logger.info(checkpoint.epoch_end_message(self._order, self._state, fetched, self._counter))

    def _log_dropped_tokens(self) -> None:
        """Log on rank 0 how many tokens packing has dropped."""
        if self._packed_tokens and is_rank_0():
            tokens = self._dropped_tokens + self._packed_tokens
            share = self._dropped_tokens / tokens
            is_much = share > DROP_WARN_FRACTION
            logger.log(
                logging.WARNING if is_much else logging.INFO,
                f"Packing has left out {self._dropped_tokens:,} of {tokens:,} tokens of rank 0's samples ({share:.2%})."
                f"{' Lower dataset.packing_ratio.' if is_much else ''}",
            )
