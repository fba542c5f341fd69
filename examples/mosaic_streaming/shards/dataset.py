"""Datasets whose errors reach the reader.

In streaming 0.13.0 an error in a background thread ends the epoch early, or leaves other workers waiting forever.
"""

import functools
import itertools
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _Iterator, _ShardState
from streaming.base.format.mds import MDSReader
from torch.utils.data import get_worker_info

from examples.mosaic_streaming.errors import DataError
from examples.mosaic_streaming.sampling import Order, WorkerSamples
from examples.mosaic_streaming.shards.fetch_stats import fetch_stats_file
from examples.mosaic_streaming.shards.forms import WholeExamples, check_turns
from examples.mosaic_streaming.shards.reader import CheckedReader
from examples.mosaic_streaming.shards.stream import CheckedStream, describe, make_checked
from examples.mosaic_streaming.upstream.workers import prepare_worker

LOOKUP_SAMPLES = 1024  # whose shards `_prepare_thread` looks up in one go


def as_data_error(error: Exception) -> DataError:
    """Return what a dataloader worker sends to the training process in place of a sample or a batch that it can't make.

    If it raised the error, torch would put the worker's traceback into the message.
    """
    return error if isinstance(error, DataError) else DataError(f"{type(error).__name__}: {error}")


class CheckedDataset(WholeExamples, StreamingDataset):
    """A dataset whose errors reach its reader, in all processes of a node."""

    streams: list[CheckedStream]
    predownload: int  # streaming has filled it in
    order: Order | None = None  # in which training reads; None for validation

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Prepare a shard as streaming does, and mark it as failed for the whole node on an error."""
        if fault := self.failure_reason():
            raise DataError(fault)
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception as error:
            self.mark_failed(shard_id, error)
            raise

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """Read a sample, and fetch its shard first if it is missing.

        Without a cache limit nothing is evicted, so streaming need not record which shards are in use.
        """
        has_failed = "_event" in self.__dict__ and self._event.is_set()
        if not self.cache_limit and not has_failed:
            shard, number = self.spanner[int(sample_id)]
            try:
                return self.shards[shard].get_item(number)
            except FileNotFoundError:
                pass
        return super().get_item(sample_id, retry)

    def failure_reason(self) -> str | None:
        """Why a shard failed on this node, if one did."""
        path = self._failure_file()
        return Path(path).read_text() if os.path.exists(path) else None

    def _failure_file(self) -> str:
        return f"/dev/shm/{self._shm_prefix_int:06}_fault"

    def mark_failed(self, shard_id: int, error: Exception) -> None:
        """Record why a shard failed for all processes of this node, so that none of them waits for it.

        streaming 0.13.0 leaves the shard in the state PREPARING, which other processes wait for. In the state LOCAL
        they find no file, ask for the shard, and get the reason. streaming also keeps its lock if evicting shards
        failed (base/dataset.py).
        """
        if self._cache_filelock.is_locked:
            self._cache_filelock.release(force=True)
        self._record_failure(error)
        self._shard_states[shard_id] = _ShardState.LOCAL

    def _record_failure(self, error: Exception) -> None:
        part = Path(f"{self._failure_file()}.{os.getpid()}-{threading.get_ident()}")
        part.write_text(str(error) if isinstance(error, DataError) else describe(error))
        part.rename(self._failure_file())

    def bytes_in_cache(self) -> int:
        """Bytes of the shards in this node's caches.

        streaming's `cache_usage` also counts streams without a cache, and counts a shard twice when it is fetched
        again because its file was lost (streaming 0.13.0, base/dataset.py).
        """
        return int(self._sizes_in_cache[self._shard_states.numpy() == _ShardState.LOCAL].sum())

    @functools.cached_property
    def _sizes_in_cache(self) -> NDArray[np.int64]:
        """Bytes of each shard in a cache; 0 where its stream has none."""
        streams = [self.streams[number] for number in self.stream_per_shard]
        pairs = zip(self.shards, streams, strict=True)
        sizes = [shard.get_persistent_size(own.safe_keep_zip) if own.is_cache else 0 for shard, own in pairs]
        return np.array(sizes, np.int64)

    def shards_of(self, samples: NDArray[np.int64]) -> list[int]:
        """The shards of samples, each once, in order."""
        return list(dict.fromkeys((np.searchsorted(self.spanner.shard_bounds, samples, "right") - 1).tolist()))

    def take_stock(self) -> None:
        """Look again which shards the caches have, as another dataset has changed them; the local leader calls this.

        Source: what streaming does when it opens a dataset (streaming 0.13.0, base/dataset.py).
        """
        sizes, end = np.zeros(self.num_shards, np.int64), 0
        for stream, count in zip(self.streams, self.shards_per_stream.tolist(), strict=True):
            begin, end = end, end + count
            stream.set_up_local(self.shards[begin:end], sizes[begin:end])
        self.cache_usage = int(sizes.sum()) + sum(stream.get_index_size() for stream in self.streams)
        self._shard_states.numpy()[:] = np.where(sizes, _ShardState.LOCAL, _ShardState.REMOTE)

    def _get_work(self, epoch: int, sample_in_epoch: int) -> Any:
        """Return this worker's samples; those of an order without end are worked out as they are needed."""
        order, world = self.order, self._parallel_worker_world
        if not order or not order.blend:
            return super()._get_work(epoch, sample_in_epoch)
        return WorkerSamples(order.blend.samples, order.runs(epoch), world, order.local_batch_size, order.group_size)

    def __iter__(self) -> Iterator[Any]:
        if get_worker_info() is None:
            yield from super().__iter__()
            return
        prepare_worker()
        try:
            yield from super().__iter__()
        except Exception as error:
            yield from itertools.repeat(as_data_error(error))  # a single one could be dropped with a last, short batch

    def __getitem__(self, at: Any) -> Any:
        try:
            sample = super().__getitem__(at)
            if isinstance(sample, dict) and "turns" in sample:
                check_turns(sample["turns"])
            return sample
        except DataError:
            raise
        except Exception as error:
            raise DataError(self.failure_reason() or self._describe(at, error)) from error

    def stored(self, sample_id: int) -> dict[str, Any]:
        """The columns of a sample as its shard stores them; DataError if it can't be read."""
        try:
            return dict(self.get_item(sample_id))
        except DataError:
            raise
        except Exception as error:
            raise DataError(self.failure_reason() or self._describe(sample_id, error)) from error

    def _describe(self, sample_id: int, error: Exception) -> str:
        """Name the sample that can't be read, its shard and the error."""
        shard_id, index = self.spanner[sample_id]
        stream = self.streams[self.stream_per_shard[shard_id]]
        file = self.shards[shard_id].file_pairs[0][0].basename
        hint = " Is dataset.token_encoding_type right?" if "buffer size must be a multiple" in str(error) else ""
        return f"Sample {index} in {file} of {stream.label} can't be read: {describe(error)}{hint}"

    def on_exception(self, future: "Future[None]") -> None:
        """Stop reading when a thread fails; streaming raises the error where nothing catches it."""
        if error := future.exception():
            try:
                if not self.failure_reason() and isinstance(error, Exception):
                    self._record_failure(error)
            finally:
                self._event.set()

    def _prepare_thread(self, it: _Iterator) -> None:
        """Request the shards of the next samples, each once; the reader requests a missing shard again.

        streaming's thread takes the cache lock for every sample, and so slows down reading. With a cache limit that is
        needed: it records which shards must not be evicted.
        """
        if self.cache_limit:
            return super()._prepare_thread(it)
        asked = set[int]()
        while it.prepare_index < it.total and not (it.should_exit() or self._event.is_set()):
            end = min(it.prepare_index + LOOKUP_SAMPLES, it.yield_index + self.predownload + 1)
            samples = it.sample_ids[it.prepare_index : end]
            if not samples.size:
                time.sleep(TICK)
            for shard in self.shards_of(samples[samples >= 0]):
                if shard in asked:
                    continue
                if it.should_exit() or self._event.is_set():  # fetching may take long
                    break
                self.prepare_shard(shard, False)
                asked.add(shard)
            it.prepare_index += samples.size
        return it.on_exit()

    def _ready_thread(self, it: _Iterator) -> None:
        """Do nothing: only reading waits for shards. streaming's thread waits forever for one that failed elsewhere."""
        it.on_exit()

    def _each_sample_id(self, it: _Iterator) -> Iterator[int]:
        """Yield sample ids without waiting for their shards: reading a sample fetches its shard, or fails."""
        for number, sample_id in enumerate(it.sample_ids):
            it.yield_index = number
            if it.should_exit():
                break
            if sample_id != -1:
                yield sample_id
        it.on_exit()


def make_checked_dataset(dataset: StreamingDataset, labels: list[str], may_cut: bool) -> None:
    """Turn a dataset made by llm-foundry into a checked one, with its streams and readers.

    Source: llm-foundry 0.22.0's text loader names the class that it makes, so it can't be given one of ours.
    """
    kind = type(dataset)
    dataset.__class__ = type(f"Checked{kind.__name__}", (CheckedDataset, kind), {"may_cut": may_cut})
    stats = fetch_stats_file(dataset._shm_prefix_int)
    streams = [make_checked(stream, label, stats) for stream, label in zip(dataset.streams, labels, strict=True)]
    for shard, number in zip(dataset.shards, dataset.stream_per_shard, strict=True):
        if type(shard) is MDSReader:
            shard.__class__ = CheckedReader
            reader = cast(CheckedReader, shard)
            reader.is_cache, reader.stays = streams[number].is_cache, not dataset.cache_limit
