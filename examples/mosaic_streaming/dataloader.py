"""The loader that TorchTitan reads: how it is built, and its batches, epochs and position."""

import copy
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch.distributed as dist
from llmfoundry.data.dataloader import build_dataloader
from streaming import StreamingDataset
from torch.utils.data import DataLoader
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.tools.logging import logger
from transformers import PreTrainedTokenizerBase

from examples.mosaic_streaming.batch import (
    DROPPED_TOKENS,
    PACKED_TOKENS,
    Batches,
    BatchSpec,
    Collator,
    TitanBatch,
    check_first_samples,
    choose_ratio,
    convert,
    use_fast_collator,
)
from examples.mosaic_streaming.checkpoint import (
    ConsumedCounts,
    ConsumptionCounter,
    Fingerprint,
    Progress,
    Segment,
    State,
    check_position,
    check_same_data,
    fingerprint_of,
    go_on,
    pack,
    unpack,
)
from examples.mosaic_streaming.config import (
    BatchShape,
    Job,
    ResolvedLoader,
    dataset_keys,
    takes,
    warnings_of,
    without_token_ids,
)
from examples.mosaic_streaming.distributed import (
    AbortChannel,
    check_machines,
    check_peers,
    new_job_id,
    on_each_node,
    on_rank_0,
    open_store,
)
from examples.mosaic_streaming.errors import ConfigError, DataError, is_rank_0
from examples.mosaic_streaming.sampling import (
    Order,
    check_blocks,
    check_epoch,
    check_memory,
    global_batch,
    log_mixture,
    round_down,
    set_order,
    start_at,
)
from examples.mosaic_streaming.shards import (
    CheckedDataset,
    CheckedStream,
    FetchCounts,
    FetchStats,
    check_columns,
    check_dataset,
    fetch_stats_file,
    prepare_streams,
)
from examples.mosaic_streaming.tokenizer import build_transformers_tokenizer, check_pad_token, check_tokenizer
from examples.mosaic_streaming.upstream.shared_memory import keep_locks_together, shared_memory

DROP_LOG_STEPS = {10**digits for digits in range(10)}
"""Steps after a start at which the log says what packing has dropped, beside the ends of epochs."""

DROP_WARN_FRACTION = 0.01
"""If more of the data is left out, the log warns."""

SHOWN_SAMPLES = 8
"""Of a global batch, by number, in a message."""


def build_mosaic_dataloader(
    job: Job, dp_rank: int, tokenizer: HuggingFaceTokenizer, config: ResolvedLoader, channel: AbortChannel
) -> "MosaicDataLoader":
    """Build the training loader of one rank; all ranks call it together.

    Args:
        job: that reads the streams.
        dp_rank: this rank on TorchTitan's batch mesh.
        tokenizer: TorchTitan's tokenizer.
        config: of the loader.
        channel: tells all ranks why one stops.

    Raises:
        ConfigError: the loader, the tokenizer, the model and the job don't fit together.
        DataError: an index or a first sample can't be read.
    """
    hf_tokenizer = build_transformers_tokenizer(job.assets, tokenizer)
    check_tokenizer(tokenizer, job)
    config = without_token_ids(config, hf_tokenizer)
    job_id = new_job_id()
    channel.connect(job_id)
    check_machines()
    on_each_node(job_id, lambda: prepare_streams(config))
    config = fill_in_packing_ratio(config, job, hf_tokenizer, functools.partial(on_rank_0, job_id))
    if is_rank_0():
        logger.info(f"Mosaic loader, resolved: {json.dumps(config.config)}")
    opened = open_streams(job, config, tokenizer, hf_tokenizer, job_id, f"Rank {dist.get_rank()} (dp rank {dp_rank})")
    check_memory(opened.dataset.epoch_size, config.source)
    look = functools.partial(check_first_samples, opened.loader, opened.spec, config, hf_tokenizer, job.training)
    warnings: list[str] = on_rank_0(new_job_id(), look)
    opened.dataset._parallel_rank_world = job.layout.world(dp_rank)
    if is_rank_0():
        log_mixture(opened.names, opened.dataset, opened.order, opened.tokens_of_a_sample)
        for warning in warnings + warnings_of(config, job, hf_tokenizer, opened.columns):
            logger.warning(warning)
    return MosaicDataLoader(opened, dp_rank, job.steps, functools.partial(open_store, job_id), channel)


def open_loader(
    config: ResolvedLoader, tokenizer: PreTrainedTokenizerBase, batch_size: int, shm_number: int
) -> DataLoader[Any]:
    """llm-foundry's loader over streams that are ready on this machine; all ranks call it together.

    Args:
        config: of the loader.
        tokenizer: transformers', of the model.
        batch_size: rows of a batch, per dp rank.
        shm_number: for the dataset's shared memory.

    Raises:
        ConfigError: llm-foundry or streaming refuses the configuration, or the streams don't have the right columns.
    """
    given = {key: value for key, value in config.config.items() if key == "name" or takes(config.name, key)}
    try:
        with shared_memory(shm_number):
            spec: Any = build_dataloader(copy.deepcopy(given), tokenizer, batch_size)  # which changes what it is given
    except Exception as error:
        who = "llm-foundry" if config.name in dataset_keys() else f"The loader {config.name!r}"
        raise ConfigError(f"{who} refuses {config.source}: {type(error).__name__}: {error}") from error
    loader = getattr(spec, "dataloader", spec)
    if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, StreamingDataset):
        raise ConfigError(f"{config.source} does not stream: give `dataset` a `remote` or `streams`.")
    if loader.batch_size is None or len(loader.dataset.streams) != len(config.streams):
        raise ConfigError(
            f"The loader {config.name!r} of {config.source} has {len(loader.dataset.streams)} streams and batch_size = "
            f"{loader.batch_size}, expected the {len(config.streams)} of the file, and a number."
        )
    check_columns(loader.dataset, config.name, config.labels, config.source)
    check_dataset(loader.dataset, config.labels, config.may_cut)
    check_pad_token(config.name, loader.dataset.shards[0], tokenizer)
    use_fast_collator(loader, config.name == "text")
    keep_locks_together(loader.dataset)
    return loader


@dataclass(frozen=True)
class OpenLoader:
    """llm-foundry's loader over streams that are open, in the order in which they are read.

    Attributes:
        config: the loader's.
        loader: llm-foundry's.
        order: of its samples.
        spec: what its batches have to look like.
        fingerprint: of the data.
    """

    config: ResolvedLoader
    loader: DataLoader[Any]
    order: Order
    spec: BatchSpec
    fingerprint: Fingerprint

    @property
    def dataset(self) -> CheckedDataset:
        """The streams."""
        assert isinstance(self.loader.dataset, CheckedDataset)
        return self.loader.dataset

    @property
    def names(self) -> list[str]:
        """The names of the streams in the configuration."""
        return list(self.config.streams)

    @property
    def columns(self) -> list[str]:
        """The columns of the first stream."""
        return list(getattr(self.dataset.shards[0], "column_names", []))

    @property
    def tokens_of_a_sample(self) -> int | None:
        """How many tokens of each sample the model gets; None where samples differ in length."""
        return self.spec.seq_len if self.spec.labels_are_ids else None


def open_streams(
    job: Job,
    config: ResolvedLoader,
    tokenizer: HuggingFaceTokenizer,
    hf_tokenizer: PreTrainedTokenizerBase,
    shm_number: int,
    reader: str,
) -> OpenLoader:
    """Open the training streams, which are ready on this machine; all ranks call it together.

    Args:
        job: that reads them.
        config: of the loader.
        tokenizer: TorchTitan's.
        hf_tokenizer: the same, of transformers.
        shm_number: for the dataset's shared memory.
        reader: who reads the streams, for messages.

    Raises:
        ConfigError: llm-foundry or streaming refuses the configuration, or an epoch fills no global batch.
    """
    loader = open_loader(config, hf_tokenizer, job.training.local_batch_size, shm_number)
    dataset, batch_size = cast(StreamingDataset, loader.dataset), cast(int, loader.batch_size)
    global_batch_size = batch_size * job.global_batch_size // job.training.local_batch_size
    order = set_order(dataset, batch_size, global_batch_size, cast(Collator, loader.collate_fn).packs)
    check_epoch(order, dataset, list(config.streams), config.source)
    check_blocks(order, dataset, list(config.streams), config.source)
    spec = batch_spec(job, job.training, config, hf_tokenizer, reader)
    fingerprint = fingerprint_of(config, dataset, order, job.training.seq_len, tokenizer)
    return OpenLoader(config, loader, order, spec, fingerprint)


def fill_in_packing_ratio(
    config: ResolvedLoader, job: Job, tokenizer: PreTrainedTokenizerBase, on_one: Callable[[Callable[[], Any]], Any]
) -> ResolvedLoader:
    """Replace `packing_ratio = "auto"` by a number; all ranks call it together.

    Args:
        config: of the loader.
        job: that reads the streams.
        tokenizer: transformers', of the model.
        on_one: calls a function on one rank, and returns its result on all.
    """
    if config.dataset.get("packing_ratio") != "auto":
        return config
    rows = job.training.local_batch_size
    loader = open_loader(config.with_settings(packing_ratio=1), tokenizer, rows, new_job_id())
    return config.with_settings(packing_ratio=on_one(lambda: choose_ratio(loader, rows, config)))


def batch_spec(
    job: Job, shape: BatchShape, config: ResolvedLoader, tokenizer: PreTrainedTokenizerBase, reader: str
) -> BatchSpec:
    """What the batches of a loader have to look like.

    Args:
        job: that reads them.
        shape: of the batches.
        config: of the loader.
        tokenizer: transformers', of the model.
        reader: who reads the streams, for messages.
    """
    return BatchSpec(
        rows=shape.local_batch_size,
        seq_len=shape.seq_len,
        max_seq_len=config.dataset["max_seq_len"],
        vocab_size=job.vocab_size,
        pad_id=tokenizer.pad_token_id,
        eos_id=tokenizer.eos_token_id,
        labels_are_ids=config.name == "text",
        source=f"{reader} reads {config.sources}, set in {config.source}.",
        documents=job.documents,
        positions=job.positions,
    )


class MosaicDataLoader(BaseDataLoader):
    """Batches of this rank without end, epoch after epoch, from any position.

    An epoch is as many whole global batches as the streams' epoch holds; the rest of it is left out, so that no
    optimizer step mixes two epochs. The position counts optimizer steps whose batches have all been handed out: what
    workers have prefetched doesn't count.

    Args:
        opened: llm-foundry's, over a dataset that has this rank's place in its `_parallel_rank_world`.
        dp_rank: this rank on TorchTitan's batch mesh.
        steps: optimizer steps of the whole run, for the log.
        open_store: connects to the store of the job.
        channel: tells all ranks why one stops.
    """

    def __init__(
        self,
        opened: OpenLoader,
        dp_rank: int,
        steps: int,
        open_store: Callable[[], dist.Store],
        channel: AbortChannel,
    ) -> None:
        order = opened.order
        self.config = opened.config
        self._batches = Batches(opened.loader, opened.spec.source, opened.config.source)
        self._dataset = opened.dataset
        self._spec = opened.spec
        self._order = order
        self._fingerprint = opened.fingerprint
        self._dp_rank = dp_rank
        self._steps_of_run = steps
        self._open_store = open_store
        self._channel = channel
        self._global_batch_sizes = {order.global_batch_size}
        """Of all steps, as far as they are known."""
        self._samples_per_batch = order.local_batch_size * self._dataset._parallel_rank_world.num_ranks
        self._epoch = 0
        self._sample_in_epoch = 0
        """Samples of this epoch that all ranks together have read, in whole optimizer steps."""
        self._steps_read = 0
        """Since the streams' beginning, as far as it is known: those of `_segments`."""
        self._segments: tuple[Segment, ...] = (Segment(0, 0, 0, order.global_batch_size),)
        self._steps = self._left_out = self._packed = 0
        """Since the start: steps, and tokens of this rank's samples that packing has left out, and that it has not."""
        self._counter = ConsumptionCounter(opened.spec, order.local_batch_size)
        self._fetch_stats = FetchStats(fetch_stats_file(self._dataset._shm_prefix_int))
        self._fetched_before = FetchCounts()
        """In earlier epochs, since the start."""
        self._is_read = False

    def __iter__(self) -> Iterator[TitanBatch]:
        """Yield batches from the present position on, for ever; their shapes are in `to_titan_batch`.

        Raises:
            DataError: a batch is not as it has to be, ranks don't read the same data, an epoch ends early, or a global
                batch has no loss token.
            RuntimeError: this is not the first iteration: the position is that of one reader.
        """
        if self._is_read:
            raise RuntimeError("A MosaicDataLoader can be iterated once.")
        self._is_read = True
        self._log_start()
        checked = False
        while True:
            self._batches.begin()
            while step := self._next_step():
                targets = 0
                for number, batch in enumerate(step, start=1):
                    titan_batch, padding = convert(batch, self._spec)
                    if not checked:
                        check_peers(titan_batch, self._dp_rank, self._fingerprint | self._place(), self.config.source)
                        checked = True
                    targets += self._counter.add(titan_batch[1], padding)
                    if number == len(step):
                        if not targets:
                            self._check_others()
                        self._sample_in_epoch += self._order.global_batch_size
                        self._steps_read += 1
                        self._counter.add_step(self._order.global_batch_size)
                    yield titan_batch
            self._log_end()
            self._log_left_out()
            self._epoch, self._sample_in_epoch = self._epoch + 1, 0

    @property
    def is_read(self) -> bool:
        """Whether a batch has been asked for."""
        return self._is_read

    def _log_start(self) -> None:
        """Say on rank 0 where in the streams the run starts, what an epoch leaves out, and what the whole run reads."""
        if is_rank_0():
            samples, start = self._dataset.epoch_size, self._sample_in_epoch
            left = self._order.remaining(start)
            before = self._counter.seen().samples
            more = [self._whole_run(), f"{before:,} samples were read before this start." if before else ""]
            logger.log(
                logging.INFO if start + left > (1 - DROP_WARN_FRACTION) * samples else logging.WARNING,
                f"The streams start at sample {start:,} of epoch {self._epoch}, of which "
                f"{left // self._order.global_batch_size:,} steps follow; it leaves out {samples - start - left:,} of "
                f"{samples:,} samples (what fills no global batch, or no turn of dataset.num_canonical_nodes: fewer of "
                f"them leave out less). {' '.join(filter(None, more))}",
            )

    def _whole_run(self) -> str:
        """What all steps of a run read that has one global batch size; of another, nothing is said."""
        if len(self._global_batch_sizes) > 1:
            return ""
        samples = self._steps_of_run * self._order.global_batch_size
        return (
            f"In all, {self._steps_of_run:,} steps (training.steps) read {samples:,} samples, "
            f"{self._counter.tokens(samples):,} tokens, {samples / self._order.remaining(0):.2f} epochs."
        )

    def _log_end(self) -> None:
        """Say on rank 0 what this start has read of the epoch, and what its machine has fetched meanwhile."""
        if is_rank_0():
            start = self._order.first_sample if self._epoch == self._order.first_epoch else 0
            samples = self._sample_in_epoch - start
            now, before = self._fetch_stats.read(), self._fetched_before
            fetched = FetchCounts(*(new - old for new, old in zip(now, before, strict=True)))
            self._fetched_before = now
            logger.info(
                f"Epoch {self._epoch} of the streams ends: {samples:,} samples read"
                f"{f' since this start, at sample {start:,}' if start else ''}, in "
                f"{samples // self._order.global_batch_size:,} steps, {self._counter.tokens(samples):,} tokens"
                f"{f'; fetched: {fetched}' if any(fetched) else ''}."
            )

    def _place(self) -> Fingerprint:
        """What all ranks have to agree on at a start, beside the data."""
        world = self._dataset._parallel_rank_world
        return {
            "samples of a global batch": self._order.global_batch_size,
            "samples of a rank's batch": self._order.local_batch_size,
            "nodes x dp ranks on each": f"{world.num_nodes} x {world.ranks_per_node}",
            "epoch": self._epoch,
            "samples read of it": self._sample_in_epoch,
        }

    def _next_step(self) -> list[Mapping[str, Any]]:
        """This rank's batches of the next optimizer step; none at the end of the epoch."""
        self._channel.exit_if_signalled()
        if self._epoch_is_read():
            return []
        accumulation = self._order.global_batch_size // self._samples_per_batch
        step = self._batches.take(accumulation)
        if len(step) < accumulation:
            raise DataError(
                f"Epoch {self._epoch} ended after {self._sample_in_epoch} of {self._order.epoch_samples} samples. "
                f"{self._spec.source}"
            )
        self._left_out += sum(batch.get(DROPPED_TOKENS, 0) for batch in step)
        self._packed += sum(batch.get(PACKED_TOKENS, 0) for batch in step)
        self._steps += 1
        if self._steps in DROP_LOG_STEPS:
            self._log_left_out()
        return step

    @functools.cached_property
    def _store(self) -> dist.Store:
        """Kept, once it is needed: to connect takes seconds where a name server doesn't answer."""
        return self._open_store()

    def _check_others(self) -> None:
        """Raise DataError if no rank has a loss token in this step, as this one has none.

        TorchTitan would divide by their number, log a loss of NaN and go on. It sums that number over ranks once each
        of them has all batches of the step, so where one stops before its last, no rank changes the model (torchtitan
        0.2.2, train.py).
        """
        key = f"no loss token in epoch {self._epoch} at {self._sample_in_epoch}"
        if self._store.add(key, 1) == dist.get_world_size():
            raise self._no_loss_token()

    def _no_loss_token(self) -> DataError:
        """What to raise where the next global batch has none."""
        samples = global_batch(self._dataset, self._order, self._epoch, self._sample_in_epoch)
        told = ", ".join(map(str, samples[:SHOWN_SAMPLES]))
        more = f" and {samples.size - SHOWN_SAMPLES:,} more" if samples.size > SHOWN_SAMPLES else ""
        numbers = np.searchsorted(self._dataset.sample_offset_per_stream, samples, side="right") - 1
        streams = [cast(CheckedStream, self._dataset.streams[number]).label for number in np.unique(numbers)]
        return DataError(
            f"The global batch at sample {self._sample_in_epoch:,} of epoch {self._epoch} has no loss token: all its "
            f"labels are -100. It is made of samples {told}{more} of {', '.join(streams)}. `preview show --sample "
            f"{samples[0]}` shows one. Remove such samples, or raise training.global_batch_size, so that others are "
            "in a batch with them."
        )

    def _log_left_out(self) -> None:
        """Say on rank 0 how many tokens packing has left out."""
        if self._packed and is_rank_0():
            samples = self._left_out + self._packed
            share = self._left_out / samples
            hint = " Lower dataset.packing_ratio." if share > DROP_WARN_FRACTION else ""
            logger.log(
                logging.WARNING if share > DROP_WARN_FRACTION else logging.INFO,
                f"Packing has left out {self._left_out:,} of {samples:,} tokens of rank 0's samples ({share:.2%})."
                f"{hint}",
            )

    def _epoch_is_read(self) -> bool:
        """Whether the rest of the epoch fills no global batch."""
        return self._order.remaining(self._sample_in_epoch) == 0

    def state_dict(self) -> dict[str, str]:
        """The position of the next batch: the same JSON string on each rank, under one key."""
        size, seen = self._order.global_batch_size, self._counter.seen()
        return pack(State(*self._next_position(), size, self._fingerprint, seen, self._steps_read, self._segments))

    def _next_position(self) -> tuple[int, int]:
        """Epoch and sample in it of the next batch; at the end of an epoch that is the next one's beginning."""
        return (self._epoch + 1, 0) if self._epoch_is_read() else (self._epoch, self._sample_in_epoch)

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Go on from a saved position; call it before iterating.

        Raises:
            DataError: the state is damaged, or of another version.
            ConfigError: the data is not what it was when the state was saved.
            RuntimeError: it is iterated already.
        """
        if self._is_read:
            raise RuntimeError("A MosaicDataLoader that is iterated can't load another position: build a new one.")
        state = unpack(state_dict)
        check_same_data(state.data, self._fingerprint, self.config.source)
        check_position(state, self._dataset.epoch_size)
        self._epoch, self._sample_in_epoch = state.epoch, state.sample_in_epoch
        self._counter.resume_from(state.seen or self._seen_before(state))
        self._epoch, self._sample_in_epoch = self._next_position()
        self._steps_read, self._segments = state.steps, state.segments
        sizes = {segment.global_batch_size for segment in state.segments}
        self._global_batch_sizes = {self._order.global_batch_size} | sizes
        if state.global_batch_size != self._order.global_batch_size:
            here = Segment(self._steps_read, self._epoch, self._sample_in_epoch, self._order.global_batch_size)
            self._segments = go_on(self._segments, here)
            if is_rank_0():
                logger.warning(
                    f"The global batch changes from {state.global_batch_size} to {self._order.global_batch_size} "
                    "samples: the same samples follow, in other batches."
                )
        self._order = start_at(self._dataset, self._order, self._epoch, self._sample_in_epoch)

    def _seen_before(self, state: State) -> ConsumedCounts:
        """What had been read by a position, if its whole run had one global batch size."""
        samples = state.epoch * round_down(self._order.epoch_samples, state.global_batch_size) + state.sample_in_epoch
        return ConsumedCounts(samples, self._counter.tokens(samples))

    def progress(self) -> Progress:
        """Where the run is; one small collective, so all ranks have to ask at the same step."""
        self._counter.count_targets(dist.get_world_size() // self._dataset._parallel_rank_world.num_ranks)
        return Progress(
            self._epoch,
            self._sample_in_epoch / (self._sample_in_epoch + self._order.remaining(self._sample_in_epoch)),
            self._counter.seen(),
            self._counter.take_padding(),
            self._fetch_stats.read(),
            self._dataset.bytes_in_cache(),
        )

    def lost_workers(self) -> str:
        """Which dataloader workers have ended with an error, and how."""
        return self._batches.lost_workers()

    def close(self) -> None:
        """End the dataloader workers."""
        if self._epoch_is_read():  # and nobody has asked for the next one's first batch
            self._log_end()
        self._log_left_out()
        self._batches.close()
