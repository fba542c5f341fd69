"""Makes a loader's streams ready on a node before streaming opens them: indexes, caches, verified files."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from streaming import Stream
from streaming.base.format import get_index_basename
from torchtitan.tools.logging import logger

from examples.mosaic_streaming.config import ResolvedLoader, identity, stream_defaults
from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.shards.cache import take_cache
from examples.mosaic_streaming.shards.index import FileError, ShardFile, read_index
from examples.mosaic_streaming.shards.stream import CheckedStream, check_file, describe, make_checked
from examples.mosaic_streaming.upstream.shared_memory import remove_stale

THREADS = 4
"""So many threads verify files."""


def prepare_streams(loader: ResolvedLoader) -> None:
    """Make the indexes and caches of all streams ready on this node. Its first rank calls it.

    Raises:
        ConfigError: a cache is in use, or can't be used.
        DataError: an index is missing or wrong, or a file that can't be fetched again is damaged.
    """
    remove_stale()
    for settings, label in zip(loader.streams.values(), loader.labels, strict=True):
        stream = make_stream(settings, label)
        if stream.is_cache:
            take_cache(stream, loader.source)
        parts = get_index(stream, bool(loader.dataset.get("allow_unsafe_types")))
        verify(stream, parts)


def make_stream(settings: dict[str, Any], label: str) -> CheckedStream:
    """Make a stream from its complete settings, as streaming will; raise ConfigError if it refuses them."""
    keys = ("remote", "local", *stream_defaults())
    try:
        stream = Stream(**{key: settings[key] for key in keys if key in settings})
        stream.apply_default(stream_defaults())
    except Exception as error:  # a store's client, too, may refuse
        raise ConfigError(f"{label}: {describe(error)}") from error
    return make_checked(stream, label)


def get_index(stream: CheckedStream, allow_unsafe_types: bool) -> list[ShardFile]:
    """Read a stream's index. A wrong one in the cache is fetched again.

    Raises:
        DataError: the index is missing or wrong.
    """
    index = stream.path(get_index_basename())

    def read(path: str) -> list[ShardFile]:
        return read_index(path, allow_unsafe_types, stream.validate_hash)

    def store(path: str, folder: str) -> None:
        read(path)
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
    return read(index)


def verify(stream: CheckedStream, parts: list[ShardFile]) -> None:
    """Compare the files on this machine with the index: sizes, samples, and with `validate_hash` also hashes.

    Damaged files in a cache are removed, to be fetched again. Without a cache, they raise DataError.
    """
    start = time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        checked = list(pool.map(lambda part: verify_part(stream, part), parts))
    size = sum(found for found, _ in checked)
    bad = [fault for _, faults in checked for fault in faults]
    if stream.validate_hash and size:
        logger.info(
            f"Verified {size / 1e6:,.2f} MB of {stream.label} by {stream.validate_hash} in "
            f"{time.monotonic() - start:.1f} s."
        )
    if not bad:
        return
    told = f"{len(bad)} damaged or missing files in {stream.path('')} of {stream.label}: {' '.join(bad[:3])}"
    if not stream.is_cache:
        raise DataError(f"{told} There is no remote to fetch them from.")
    logger.warning(f"{told} They were removed, and will be fetched again.")


def verify_part(stream: CheckedStream, part: ShardFile) -> tuple[int, list[str]]:
    """Return the bytes of a file that are right, and its faults. A damaged file in a cache is removed."""
    size, faults = 0, []
    samples = {part.raw.basename: part.samples}
    for info in filter(None, (part.raw, part.packed)):
        place, source = stream.path(info.basename), stream.source(info.basename)
        if stream.is_cache and os.path.islink(source) and identity(source) == identity(place):
            raise DataError(f"{source} of {stream.label} is a link to {place} in its cache. Put the file in its place.")
        try:
            check_file(place, info, stream.validate_hash, samples.get(info.basename))
            size += info.bytes
        except FileNotFoundError:
            if not stream.is_cache and info is part.stored:
                faults.append(f"{info.basename} is missing.")
        except (OSError, FileError) as fault:
            faults.append(f"{info.basename}: {describe(fault)}")
            if stream.is_cache:
                Path(place).unlink(missing_ok=True)
    return size, faults
