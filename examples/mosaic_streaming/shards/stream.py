"""Streams whose caches hold only whole files that match the index.

streaming 0.13.0 compares hashes only after it has put a file in place, never compares sizes, and never checks again.
"""

import contextlib
import errno
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
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
from examples.mosaic_streaming.shards.fetch_stats import RETRY, count_fetched
from examples.mosaic_streaming.shards.index import FileError, ShardFile

MAX_BACKOFF = 60.0  # seconds, at most, between two attempts to fetch a file
INCOMING = ".incoming-"  # prefix of the folders in a cache that hold files being fetched


class CheckedStream(Stream):
    """A stream whose cache holds only whole files that match the index."""

    label: str  # its name in messages
    is_cache: bool  # whether `local` is a copy of a remote, so that files can be fetched again
    fetch_stats: str | None  # path of the file that counts fetches; None to count nothing

    def path(self, basename: str) -> str:
        """The path of a file of the stream on this machine."""
        return os.path.join(self.local, self.split, basename)

    def source(self, basename: str) -> str:
        """The path or URL that a file of the stream comes from."""
        return os.path.join(self.remote or self.local, self.split, basename)

    def prepare_shard(self, shard: Reader) -> int:
        """Prepare a shard's files, or raise DataError; return by how many bytes the cache has grown."""
        samples = shard.samples if isinstance(shard, MDSReader) else None
        return sum(self.prepare(ShardFile(raw, packed, samples), shard.compression) for raw, packed in shard.file_pairs)

    def prepare(self, file: ShardFile, compression: str | None) -> int:
        """Prepare one file; return by how many bytes the cache has grown."""
        if os.path.isfile(self.path(file.raw.basename)):
            return 0
        growth = file.raw.bytes + (file.packed.bytes if file.packed and self.safe_keep_zip else 0)
        if file.packed and os.path.isfile(packed := self.path(file.packed.basename)):
            try:
                with self.storing(file.raw.basename, file.raw.bytes) as folder:
                    self.store(packed, folder, file, compression)
                return growth - file.packed.bytes
            except FileError as error:
                if not self.is_cache:
                    raise DataError(f"{packed} of {self.label} is damaged: {describe(error)}") from error
                Path(packed).unlink(missing_ok=True)
        needed = file.stored.bytes + (file.raw.bytes if file.packed else 0)
        self.fetch(file.stored.basename, needed, lambda path, folder: self.store(path, folder, file, compression))
        count_fetched(self.fetch_stats, file.stored.bytes)
        return growth

    def store(self, path: str, folder: str, file: ShardFile, compression: str | None) -> None:
        """Check a fetched file, unpack it in `folder` and put it in place."""
        check_file(path, file.stored, self.validate_hash, None if file.packed else file.samples)
        raw = path
        if file.packed:
            content = Path(path).read_bytes()
            try:
                content = decompress(compression, content)
            except Exception as error:  # each library raises its own
                raise FileError(f"it doesn't decompress ({compression}): {error}") from error
            raw = os.path.join(folder, "raw")
            Path(raw).write_bytes(content)
            check_file(raw, file.raw, None, file.samples)
        os.replace(raw, self.path(file.raw.basename))
        if file.packed and self.safe_keep_zip:
            os.replace(path, self.path(file.packed.basename))
        elif file.packed:
            os.remove(path)

    def fetch(self, basename: str, needed: int, store: Callable[[str, str], object]) -> None:
        """Fetch a file into the cache, whole and correct, or raise DataError after `download_retry` attempts.

        `needed` is the space it takes in bytes. `store` gets the file's path and a folder to work in; it puts the file
        in place, or raises FileError.
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
                self._downloader = CloudDownloader.get(self.remote)  # other threads keep using the old one
                problem = f"{self.source(basename)} of {self.label} can't be fetched: {describe(error)}"
                if attempt == self.download_retry:
                    if isinstance(error, FileError):  # perhaps the index in the cache is the wrong one
                        Path(self.path(get_index_basename())).unlink(missing_ok=True)
                    raise DataError(f"{problem} Attempts: {attempt} (dataset.download_retry).") from error
                pause = min(2.0 ** (attempt - 1), MAX_BACKOFF) + random.random() / 2
                logger.warning(f"{problem} Attempt {attempt} of {self.download_retry}; next in {pause:.1f} s.")
                count_fetched(self.fetch_stats, RETRY)
                time.sleep(pause)

    def download(self, remote: str, path: str, folder: str) -> None:
        """Download a file, giving up when its folder doesn't grow for `download_timeout` seconds.

        streaming's downloaders have no such limit, or pass it to clients that retry internally.
        """
        failed: list[BaseException] = []
        downloader = self._downloader

        def run() -> None:
            try:
                downloader.download(remote, path, self.download_timeout)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, daemon=True)  # an executor's thread would keep the process alive
        thread.start()
        size, since = -1, time.monotonic()
        while thread.is_alive():
            thread.join(min(1.0, self.download_timeout / 4))
            if (now := size_of(folder)) != size:
                size, since = now, time.monotonic()
            elif thread.is_alive() and time.monotonic() - since > self.download_timeout:
                raise TimeoutError(f"no progress for {self.download_timeout} s (dataset.download_timeout)")
        if failed:
            raise failed[0]

    @contextlib.contextmanager
    def storing(self, basename: str, needed: int) -> Iterator[str]:
        """Make a temporary folder beside the shards for a file of `needed` bytes.

        DataError if the disk here refuses it, with what to do; errors of the remote pass.
        """
        path, root, folder = self.path(basename), self.path(""), ""
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            folder = tempfile.mkdtemp(prefix=INCOMING, dir=root)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            is_closed = error.errno in (errno.EROFS, errno.EACCES) and str(error.filename).startswith(root)
            if not folder or is_full or is_closed:
                raise self.not_stored(path, needed, error) from error
            raise

    def not_stored(self, path: str, needed: int, error: OSError) -> DataError:
        """The error for a file that the disk refuses, with the free space and what to do."""
        advice = f"Make room, set dataset.cache_limit, or set another `local` for {self.label}."
        if not self.is_cache:
            advice = (
                f"{self.label} is compressed and has no cache: shards are unpacked beside the packed ones. Or give it "
                f"`remote` = {self.remote or self.local!r} and another folder as `local`."
            )
        folder = os.path.dirname(path)
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        return DataError(
            f"{path} can't be stored: {error.strerror}. It needs {needed:,} bytes, "
            f"{shutil.disk_usage(folder).free:,} are free in {folder}. {advice}"
        )


def size_of(folder: str) -> int:
    """Bytes in a folder's files; a client may be renaming some of them."""
    size = 0
    for file in Path(folder).iterdir():
        with contextlib.suppress(FileNotFoundError):
            size += file.stat().st_size
    return size


def check_file(path: str, info: FileInfo, validate_hash: str | None, samples: int | None) -> None:
    """Raise FileError unless a file has the size, hash and, for MDS, the samples that the index gives."""
    if (size := os.path.getsize(path)) != info.bytes:
        raise FileError(f"it has {size:,} bytes, expected {info.bytes:,}")
    with open(path, "rb") as file:
        if samples is not None:
            if (found := int.from_bytes(file.read(4), "little")) != samples:
                raise FileError(f"it has {found:,} samples, the index says {samples:,}")
            file.seek(4 + 4 * samples)
            if (end := int.from_bytes(file.read(4), "little")) != size:
                raise FileError(f"its samples end at byte {end:,} of {size:,}")
            file.seek(0)
        if validate_hash and (hash := get_hash(validate_hash, file.read())) != info.hashes[validate_hash]:
            raise FileError(f"its {validate_hash} is {hash}, expected {info.hashes[validate_hash]}")


def describe(error: Exception) -> str:
    """Describe an error in one sentence, with a store's error code."""
    error = getattr(error, "last_exception", error)  # boto3's RetriesExceededError hides the cause
    if isinstance(error, FileError | TimeoutError):
        return f"{error}".rstrip(".") + "."
    response = getattr(error, "response", None)  # boto3's
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return f"{type(error).__name__}{f' ({code})' if code else ''}: {error}".strip().rstrip(".") + "."


def make_checked(stream: Stream, label: str, fetch_stats: str | None = None) -> CheckedStream:
    """Turn a stream made by streaming or llm-foundry into a checked one."""
    stream.__class__ = CheckedStream
    assert isinstance(stream, CheckedStream)
    stream.label, stream.fetch_stats = label, fetch_stats
    stream.is_cache = is_copy(stream.remote, stream.local, stream.split)
    stream.safe_keep_zip |= not stream.is_cache
    return stream
