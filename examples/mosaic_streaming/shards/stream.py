"""Streams whose cache holds only whole files that match the index.

streaming 0.13.0 compares hashes after it has put a file into its place, never compares sizes, and never looks again.
"""

import contextlib
import errno
import os
import random
import shutil
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from streaming import Stream
from streaming.base.compression import decompress
from streaming.base.format import FileInfo, Reader, get_index_basename
from streaming.base.format.mds import MDSReader
from streaming.base.hashing import get_hash
from streaming.base.storage import CloudDownloader
from torchtitan.tools.logging import logger

from examples.mosaic_streaming.config import is_copy
from examples.mosaic_streaming.errors import DataError
from examples.mosaic_streaming.shards.cache import INCOMING
from examples.mosaic_streaming.shards.fetch_stats import RETRY, count_fetched
from examples.mosaic_streaming.shards.index import FileError, ShardFile

MAX_BACKOFF = 60.0
"""The longest pause between two attempts to fetch a file, in seconds."""


class CheckedStream(Stream):
    """A stream whose cache holds only whole files that match the index.

    Attributes:
        label: what the stream is called in messages.
        is_cache: whether `local` is a copy of a remote, so that it can be fetched again.
        fetch_stats: the file that counts what is fetched; None where nothing is counted.
    """

    label: str
    is_cache: bool
    fetch_stats: str | None = None

    def path(self, basename: str) -> str:
        """The path of a file of the stream on this machine."""
        return os.path.join(self.local, self.split, basename)

    def source(self, basename: str) -> str:
        """The path or URL that a file of the stream comes from."""
        return os.path.join(self.remote or self.local, self.split, basename)

    def prepare_shard(self, shard: Reader) -> int:
        """Make a shard's files ready, and return the bytes by which the cache has grown.

        Raises:
            DataError: a file is missing, damaged, or can't be stored.
        """
        samples = shard.samples if isinstance(shard, MDSReader) else None
        return sum(self.prepare(ShardFile(raw, packed, samples), shard.compression) for raw, packed in shard.file_pairs)

    def prepare(self, part: ShardFile, compression: str | None) -> int:
        """Make one file ready, and return the bytes by which the cache has grown."""
        if os.path.isfile(self.path(part.raw.basename)):
            return 0
        if part.packed and os.path.isfile(packed := self.path(part.packed.basename)):
            try:
                with self.storing(part.raw.basename, part.raw.bytes) as folder:
                    return self.store(packed, folder, part, compression) - part.packed.bytes
            except FileError as error:
                if not self.is_cache:
                    raise DataError(f"{packed} of {self.label} is damaged: {describe(error)}") from error
                Path(packed).unlink(missing_ok=True)
        needed = part.stored.bytes + (part.raw.bytes if part.packed else 0)
        self.fetch(part.stored.basename, needed, lambda path, folder: self.store(path, folder, part, compression))
        self.count(part.stored.bytes)
        return part.raw.bytes + (part.packed.bytes if part.packed and self.safe_keep_zip else 0)

    def store(self, path: str, folder: str, part: ShardFile, compression: str | None) -> int:
        """Check a file, put it into its place, unpacked, and return the bytes that it takes there.

        Args:
            path: the file as the remote has it.
            folder: a folder for files that aren't ready yet.
            part: what the index says of the file.
            compression: the shard's compression.

        Raises:
            FileError: the file doesn't match the index.
        """
        if part.packed is None:
            check_file(path, part.raw, self.validate_hash, part.samples)
            os.replace(path, self.path(part.raw.basename))
            return part.raw.bytes
        check_file(path, part.packed, self.validate_hash, None)
        raw = unpack_into(folder, path, compression)
        check_file(raw, part.raw, None, part.samples)
        os.replace(raw, self.path(part.raw.basename))
        if not self.safe_keep_zip:
            os.remove(path)
            return part.raw.bytes
        os.replace(path, self.path(part.packed.basename))
        return part.raw.bytes + part.packed.bytes

    def fetch(self, basename: str, needed: int, store: Callable[[str, str], object]) -> None:
        """Fetch a file into the cache: whole and right, or not at all.

        Args:
            basename: the file's name in the stream.
            needed: bytes that it will take.
            store: called with the file's path and a folder to work in. It puts the file into its place, or raises
                FileError.

        Raises:
            DataError: none of `download_retry` attempts got the file.
        """
        if not self.is_cache:
            raise DataError(f"{self.path(basename)} is missing, and {self.label} has no remote to fetch it from.")
        for attempt in range(1, self.download_retry + 1):
            try:
                with self.storing(basename, needed) as folder:
                    path = os.path.join(folder, "file")
                    self.download(self.source(basename), path, folder)
                    store(path, folder)
                    return
            except DataError:
                raise
            except Exception as error:
                self._downloader = CloudDownloader.get(self.remote)  # other threads still use the old one
                problem = f"{self.source(basename)} of {self.label} can't be had: {describe(error)}"
                if attempt == self.download_retry:
                    if isinstance(error, FileError):  # or the index here is old or damaged
                        Path(self.path(get_index_basename())).unlink(missing_ok=True)
                    raise DataError(f"{problem} Attempts: {attempt} (dataset.download_retry).") from error
                pause = min(2.0 ** (attempt - 1), MAX_BACKOFF) + random.random() / 2
                logger.warning(f"{problem} Attempt {attempt} of {self.download_retry}; next in {pause:.1f} s.")
                self.count(RETRY)
                time.sleep(pause)

    def count(self, record: int) -> None:
        """Count a fetched file, or a retry."""
        if self.fetch_stats:
            count_fetched(self.fetch_stats, record)

    def download(self, remote: str, path: str, folder: str) -> None:
        """Download a file, and give up if it doesn't grow for `download_timeout` seconds.

        streaming's downloaders have no such limit, or pass it on to clients that retry within it.
        """
        outcome: list[BaseException | None] = []
        downloader = self._downloader

        def run() -> None:
            try:
                downloader.download(remote, path, self.download_timeout)
                outcome.append(None)
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=run, daemon=True)  # an executor's would keep the process from ending
        thread.start()
        size, since = -1, time.monotonic()
        while not outcome:
            thread.join(min(1.0, self.download_timeout / 4))
            if (now := size_of(folder)) != size:
                size, since = now, time.monotonic()
            elif not outcome and time.monotonic() - since > self.download_timeout:
                raise TimeoutError(f"no progress for {self.download_timeout} s (dataset.download_timeout)")
        if outcome[0] is not None:
            raise outcome[0]

    def storing(self, basename: str, needed: int) -> "Storing":
        """Make a folder beside the shards for a file that isn't ready yet and will take so many bytes."""
        path, folder = self.path(basename), self.path("")
        advice = f"Make room, set dataset.cache_limit, or set another `local` for {self.label}."
        if not self.is_cache:
            advice = (
                f"{self.label} is compressed and has no cache: shards are unpacked beside the packed ones. Or give it "
                f"`remote` = {self.remote or self.local!r} and another folder as `local`."
            )
        return Storing(path, folder, needed, advice)


class Storing:
    """A temporary folder for a file to come. If the disk refuses something, it raises DataError.

    Args:
        path: the place of the file.
        folder: the folder of all shards, in which the temporary one is made.
        needed: the file's size in bytes.
        advice: what to do if the disk refuses.
    """

    def __init__(self, path: str, folder: str, needed: int, advice: str) -> None:
        self._path, self._root, self._needed, self._advice = path, folder, needed, advice
        self._folder = ""

    def __enter__(self) -> str:
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            self._folder = tempfile.mkdtemp(prefix=INCOMING, dir=self._root)
        except OSError as error:
            raise self._refused(error) from error
        return self._folder

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        if isinstance(error, OSError) and self._is_ours(error):
            raise self._refused(error) from error

    def _is_ours(self, error: OSError) -> bool:
        """Whether this machine's disk refuses, not the remote."""
        is_here = str(error.filename).startswith(self._root)
        return error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno in (errno.EROFS, errno.EACCES) and is_here)

    def _refused(self, error: OSError) -> DataError:
        folder = os.path.dirname(self._path)
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        return DataError(
            f"{self._path} can't be stored: {error.strerror}. It needs {self._needed:,} bytes, "
            f"{shutil.disk_usage(folder).free:,} are free in {folder}. {self._advice}"
        )


def size_of(folder: str) -> int:
    """Bytes in the files of a folder. A client may rename some meanwhile."""
    size = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                size += entry.stat().st_size
    return size


def check_file(path: str, info: FileInfo, validate_hash: str | None, samples: int | None) -> None:
    """Raise FileError unless a file matches the index.

    Args:
        path: the file.
        info: what the index says of it.
        validate_hash: the algorithm of the hashes to compare; None compares none.
        samples: the number of samples that an MDS file has to have; None for other files.
    """
    if (size := os.path.getsize(path)) != info.bytes:
        raise FileError(f"it has {size:,} bytes, expected {info.bytes:,}")
    with open(path, "rb") as file:
        if samples is not None:
            found, *_ = struct.unpack("<I", file.read(4).ljust(4, b"\0"))
            if found != samples:
                raise FileError(f"it has {found:,} samples, the index says {samples:,}")
            file.seek(4 + 4 * samples)
            end, *_ = struct.unpack("<I", file.read(4).ljust(4, b"\0"))
            if end != size:
                raise FileError(f"its samples end at byte {end:,} of {size:,}")
            file.seek(0)
        if validate_hash and (hash := get_hash(validate_hash, file.read())) != info.hashes[validate_hash]:
            raise FileError(f"its {validate_hash} is {hash}, expected {info.hashes[validate_hash]}")


def unpack_into(folder: str, packed: str, compression: str | None) -> str:
    """Decompress a file into a folder, and return the path of the result."""
    content = Path(packed).read_bytes()
    try:
        content = decompress(compression, content)
    except Exception as error:  # each library has its own
        raise FileError(f"it doesn't decompress ({compression}): {error}") from error
    raw = os.path.join(folder, "raw")
    Path(raw).write_bytes(content)
    return raw


def describe(error: Exception) -> str:
    """Put an error into a sentence, with a store's error code."""
    error = getattr(error, "last_exception", error)  # of boto3's RetriesExceededError
    if isinstance(error, FileError | TimeoutError):
        return f"{error}".rstrip(".") + "."
    response = getattr(error, "response", None)  # boto3's
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return f"{type(error).__name__}{f' ({code})' if code else ''}: {error}".strip().rstrip(".") + "."


def make_checked(stream: Stream, label: str) -> CheckedStream:
    """Turn a stream of streaming or llm-foundry into a checked one."""
    stream.__class__ = CheckedStream
    assert isinstance(stream, CheckedStream)
    stream.label = label
    stream.is_cache = is_copy(stream.remote, stream.local, stream.split)
    stream.safe_keep_zip |= not stream.is_cache
    return stream
