"""The loader that TorchTitan reads: batches, epochs, position."""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch.distributed as dist
from streaming import StreamingDataset
from torch.utils.data import DataLoader
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.tools.logging import logger

from examples.mosaic_streaming.batch.collate import DROPPED_TOKENS, PACKED_TOKENS
from examples.mosaic_streaming.batch.convert import BatchFormat, TitanBatch, convert
from examples.mosaic_streaming.batch.iterator import Batches
from examples.mosaic_streaming.checkpoint.history import Segment, go_on
from examples.mosaic_streaming.checkpoint.progress import Counter, Progress, Seen
from examples.mosaic_streaming.checkpoint.state import Data, State, check_position, check_same_data, pack, unpack
from examples.mosaic_streaming.distributed.abort import AbortChannel
from examples.mosaic_streaming.distributed.agreement import check_peers
from examples.mosaic_streaming.errors import DataError, is_rank_0
from examples.mosaic_streaming.sampling.order import Order, global_batch, start_at, whole
from examples.mosaic_streaming.shards.dataset import CheckedDataset
from examples.mosaic_streaming.shards.fetch_stats import Fetched, Tally, fetched_file
from examples.mosaic_streaming.shards.stream import CheckedStream

TELLING_STEPS = {10**digits for digits in range(10)}
"""Steps after a start at which the log says what packing has left out, beside the ends of epochs."""

MUCH = 0.01
"""Of the data that is left out: the log warns."""

SAMPLES_TOLD = 8
"""Of a global batch, by number, in a message."""


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
        steps: optimizer steps of the whole run, for the log.
        open_store: connects to the store of the job.
        channel: tells all ranks why one stops.
    """

    def __init__(
        self,
        loader: DataLoader[Mapping[str, Any]],
        form: BatchFormat,
        order: Order,
        data: Data,
        dp_rank: int,
        path: str,
        steps: int,
        open_store: Callable[[], dist.Store],
        channel: AbortChannel,
    ) -> None:
        assert isinstance(loader.dataset, StreamingDataset)
        self._batches = Batches(loader, form.origin, path)
        self._dataset = loader.dataset
        self._form = form
        self._order = order
        self._data = data
        self._dp_rank = dp_rank
        self._path = path
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
        self._counter = Counter(form, order.local_batch_size)
        self._tally = Tally(fetched_file(self._dataset._shm_prefix_int))
        self._fetched_before = Fetched()
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
                    titan_batch, padding = convert(batch, self._form)
                    if not checked:
                        check_peers(titan_batch, self._dp_rank, self._data | self._place(), self._path)
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
            left = self._order.left(start)
            before = self._counter.seen().samples
            more = [self._whole_run(), f"{before:,} samples were read before this start." if before else ""]
            logger.log(
                logging.INFO if start + left > (1 - MUCH) * samples else logging.WARNING,
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
            f"{self._counter.tokens(samples):,} tokens, {samples / self._order.left(0):.2f} epochs."
        )

    def _log_end(self) -> None:
        """Say on rank 0 what this start has read of the epoch, and what its machine has fetched meanwhile."""
        if is_rank_0():
            start = self._order.first_sample if self._epoch == self._order.first_epoch else 0
            samples = self._sample_in_epoch - start
            now, before = self._tally.read(), self._fetched_before
            fetched = Fetched(*(new - old for new, old in zip(now, before, strict=True)))
            self._fetched_before = now
            logger.info(
                f"Epoch {self._epoch} of the streams ends: {samples:,} samples read"
                f"{f' since this start, at sample {start:,}' if start else ''}, in "
                f"{samples // self._order.global_batch_size:,} steps, {self._counter.tokens(samples):,} tokens"
                f"{f'; fetched: {fetched}' if any(fetched) else ''}."
            )

    def _place(self) -> Data:
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
                f"{self._form.origin}"
            )
        self._left_out += sum(batch.get(DROPPED_TOKENS, 0) for batch in step)
        self._packed += sum(batch.get(PACKED_TOKENS, 0) for batch in step)
        self._steps += 1
        if self._steps in TELLING_STEPS:
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
        told = ", ".join(map(str, samples[:SAMPLES_TOLD]))
        more = f" and {samples.size - SAMPLES_TOLD:,} more" if samples.size > SAMPLES_TOLD else ""
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
            hint = " Lower dataset.packing_ratio." if share > MUCH else ""
            logger.log(
                logging.WARNING if share > MUCH else logging.INFO,
                f"Packing has left out {self._left_out:,} of {samples:,} tokens of rank 0's samples ({share:.2%})."
                f"{hint}",
            )

    def _epoch_is_read(self) -> bool:
        """Whether the rest of the epoch fills no global batch."""
        return self._order.left(self._sample_in_epoch) == 0

    def state_dict(self) -> dict[str, str]:
        """The position of the next batch: the same JSON string on each rank, under one key."""
        size, seen = self._order.global_batch_size, self._counter.seen()
        return pack(State(*self._next_position(), size, self._data, seen, self._steps_read, self._segments))

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
        check_same_data(state.data, self._data, self._path)
        check_position(state, self._dataset.epoch_size)
        self._epoch, self._sample_in_epoch = state.epoch, state.sample_in_epoch
        self._counter.go_on(state.seen or self._seen_before(state))
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

    def _seen_before(self, state: State) -> Seen:
        """What had been read by a position, if its whole run had one global batch size."""
        samples = state.epoch * whole(self._order.epoch_samples, state.global_batch_size) + state.sample_in_epoch
        return Seen(samples, self._counter.tokens(samples))

    def progress(self) -> Progress:
        """Where the run is; one small collective, so all ranks have to ask at the same step."""
        assert isinstance(self._dataset, CheckedDataset)
        self._counter.count_targets(dist.get_world_size() // self._dataset._parallel_rank_world.num_ranks)
        return Progress(
            self._epoch,
            self._sample_in_epoch / (self._sample_in_epoch + self._order.left(self._sample_in_epoch)),
            self._counter.seen(),
            self._counter.take_padding(),
            self._tally.read(),
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
