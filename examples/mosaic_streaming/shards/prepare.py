"""Prepares a loader's streams on a node before they are read: indexes, caches, verified files, and first shards."""

import contextlib
import functools
import itertools
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from streaming import Stream
from streaming.base.format import get_index_basename
from torchtitan.tools.logging import logger

from examples.mosaic_streaming.config import STREAM_DEFAULTS, ResolvedLoader, identity
from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.sampling import Order, assign_to_ranks
from examples.mosaic_streaming.shards.cache import take_cache
from examples.mosaic_streaming.shards.dataset import CheckedDataset
from examples.mosaic_streaming.shards.index import FileError, ShardFile, read_index
from examples.mosaic_streaming.shards.stream import CheckedStream, check_file, describe, make_checked
from examples.mosaic_streaming.upstream.sample_order import reader_world
from examples.mosaic_streaming.upstream.shared_memory import remove_stale

VERIFY_THREADS = 4


def prepare_streams(loaders: Sequence[ResolvedLoader]) -> None:
    """Prepare the indexes and caches of all streams on this node, each once; only its local leader calls this.

    ConfigError if a cache is in use by another job, or can't be used; DataError if an index is missing or invalid, or a
    file that can't be fetched again is damaged.
    """
    remove_stale()
    prepared: list[dict[str, Any]] = []
    for loader in loaders:
        unsafe = bool(loader.dataset.get("allow_unsafe_types"))
        for settings, label in zip(loader.streams.values(), loader.labels, strict=True):
            stream = make_stream(settings, label)
            keys = ("remote", "local", "split", "validate_hash", "keep_zip")
            if (found := {"unsafe": unsafe} | {key: vars(stream).get(key) for key in keys}) in prepared:
                continue
            prepared.append(found)
            if stream.is_cache:
                take_cache(stream, loader.source)
            verify(stream, fetch_index(stream, unsafe))


def make_stream(settings: dict[str, Any], label: str) -> CheckedStream:
    """Make a stream from its complete settings, as streaming will; ConfigError if it refuses them."""
    keys = ("remote", "local", *STREAM_DEFAULTS)
    try:
        stream = Stream(**{key: settings[key] for key in keys if key in settings})
        stream.apply_default(STREAM_DEFAULTS)
    except Exception as error:  # a store's client may refuse them, too
        raise ConfigError(f"{label}: {describe(error)}") from error
    return make_checked(stream, label)


def fetch_index(stream: CheckedStream, allow_unsafe_types: bool) -> list[ShardFile]:
    """Read a stream's index, or fetch an invalid one in a cache again; DataError if it is missing or invalid."""
    index = stream.path(get_index_basename())
    read = functools.partial(read_index, allow_unsafe_types=allow_unsafe_types, validate_hash=stream.validate_hash)
    fetched: list[ShardFile] = []

    def store(path: str, folder: str) -> None:
        fetched[:] = read(path)
        os.replace(path, index)

    try:
        return read(index)
    except FileNotFoundError:
        pass
    except FileError as fault:
        if not stream.is_cache:
            raise DataError(f"{index} of {stream.label} can't be used: {describe(fault)}") from fault
        logger.warning(f"{index} in the cache of {stream.label} is fetched again: {describe(fault)}")
        os.remove(index)
    stream.fetch(get_index_basename(), 0, store)
    return fetched


def verify(stream: CheckedStream, files: list[ShardFile]) -> None:
    """Compare the existing files with the index: sizes, samples, and hashes if `validate_hash` is set.

    Damaged files in a cache are removed, to be fetched again. DataError for a file that has no remote.
    """
    start = time.monotonic()
    if stream.is_cache:  # which mostly has few of the files
        walk = os.walk(stream.path(""), followlinks=True)
        found = {os.path.join(place, name) for place, _, names in walk for name in names}

        def may_be_wrong(name: str) -> bool:
            return stream.path(name) in found or os.path.islink(stream.source(name))

        files = [one for one in files if any(may_be_wrong(info.basename) for info in (one.raw, one.packed) if info)]
    with ThreadPoolExecutor(VERIFY_THREADS) as pool:
        checked = list(pool.map(functools.partial(verify_file, stream), files))
    size = sum(found for found, _ in checked)
    bad = [fault for _, faults in checked for fault in faults]
    if stream.validate_hash and size:
        seconds = time.monotonic() - start
        logger.info(f"Verified {size / 1e6:,.2f} MB of {stream.label} by {stream.validate_hash} in {seconds:.1f} s.")
    told = f"{len(bad)} damaged or missing files in {stream.path('')} of {stream.label}: {' '.join(bad[:3])}"
    if bad and not stream.is_cache:
        raise DataError(f"{told} There is no remote to fetch them from.")
    if bad:
        logger.warning(f"{told} They were removed, and will be fetched again.")


def verify_file(stream: CheckedStream, file: ShardFile) -> tuple[int, list[str]]:
    """Return a file's verified bytes and what is wrong with it; remove it if it is damaged and in a cache."""
    size, faults = 0, []
    for info in filter(None, (file.raw, file.packed)):
        place, source = stream.path(info.basename), stream.source(info.basename)
        if stream.is_cache and os.path.islink(source) and identity(source) == identity(place):
            raise DataError(f"{source} of {stream.label} is a link to {place} in its cache. Put the file in its place.")
        try:
            check_file(place, info, stream.validate_hash, file.samples if info is file.raw else None)
            size += info.bytes
        except FileNotFoundError:
            if not stream.is_cache and info is file.stored:
                faults.append(f"{info.basename} is missing.")
        except (OSError, FileError) as fault:
            faults.append(f"{info.basename}: {describe(fault)}")
            if stream.is_cache:
                Path(place).unlink(missing_ok=True)
    return size, faults


def fetch_first(dataset: CheckedDataset, order: Order, workers: int) -> BaseProcess:
    """Begin to fetch the shards that this machine reads first in a blend, before anything is read.

    They are those that so many workers of each rank ask for at once. What fails now, the reader tries again. A
    process of its own does it: one that has fetched must not be forked later, as the ranks are for workers.
    """
    assert order.blend
    world = reader_world(dataset)
    count = -(-(dataset.predownload or 1) * max(1, workers) * world.num_ranks // order.global_batch_size)
    positions = itertools.islice(itertools.chain(*order.runs(order.first_epoch)), count * order.global_batch_size)
    samples = order.blend.samples(np.array(list(positions)))
    own = assign_to_ranks(samples, world, order.local_batch_size, order.group_size)[world.node]
    shards = dataset.shards_of(own.reshape(-1))
    parent = os.getpid()

    def fetch() -> None:
        for shard in shards:
            stream = dataset.streams[dataset.stream_per_shard[shard]]
            if stream.is_cache and os.getppid() == parent:
                with contextlib.suppress(Exception):
                    stream.prepare_shard(dataset.shards[shard])

    process = multiprocessing.get_context("fork").Process(target=fetch, daemon=True)
    process.start()
    return process
