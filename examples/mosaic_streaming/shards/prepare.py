"""What processes share on a node: caches and shared memory, made ready before streaming uses them, left to nobody.

streaming 0.13.0 looks for the first free number for its shared memory, minding what dead jobs have left; two jobs that
start at once find the same, and its clean-up takes a living neighbour's. Here each job has a number of its own, and
its processes hold a lock for as long as one of them lives.
"""

import atexit
import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.shared_memory import SharedMemory as BuiltinSharedMemory
from pathlib import Path
from unittest import mock

from streaming import Stream, StreamingDataset
from streaming.base import dataset as streaming_dataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS
from streaming.base.distributed import barrier
from streaming.base.format import get_index_basename
from streaming.base.shared import SharedMemory
from streaming.base.shared import memory as streaming_memory
from streaming.base.shared.prefix import _get_path, _pack_locals
from streaming.base.world import World
from torchtitan.tools.logging import logger

from examples.mosaic_streaming.config.loader import STREAM_DEFAULTS, Config, streams_of
from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.shards.cache import identity, take_cache
from examples.mosaic_streaming.shards.index import FileError, Part, read_index
from examples.mosaic_streaming.shards.stream import CheckedStream, check_file, describe, make_checked

SHM = Path("/dev/shm")
FIRST_NUMBER = 10**12
"""Ours, of 13 digits, begin here: streaming counts up from 0."""
LOCK = "job"
"""Of a job's files in shared memory, the one that its processes lock."""
THREADS = 4
"""That verify files."""
CREATION_SECONDS, POLL_SECONDS = 60.0, 0.002
"""How long a process waits for shared memory that another one is creating, and between two looks."""


def prepare_streams(config: Config, path: str) -> None:
    """Have the indexes and caches of all streams ready on this node; its local leader calls it.

    Args:
        config: the resolved loader configuration.
        path: the file it was read from, for messages.

    Raises:
        ConfigError: a cache is in use, or can't be used.
        DataError: an index can't be had or can't be believed, or a file that can't be fetched again is damaged.
    """
    remove_stale()
    dataset = config["dataset"]
    for name, settings in streams_of(dataset).items():
        stream = make_stream(settings, dataset, stream_label(name, path))
        if stream.is_cache:
            take_cache(stream, path)
        parts = get_index(stream, bool(dataset.get("allow_unsafe_types")))
        verify(stream, parts)


def stream_label(name: str, path: str) -> str:
    """What a stream is called in messages."""
    return f"the stream in {path}" if name == "dataset" else f"stream {name!r} in {path}"


def make_stream(settings: Config, dataset: Config, label: str) -> CheckedStream:
    """A stream as streaming will make it from its settings.

    Raises:
        ConfigError: streaming refuses them.
    """
    keys = ("remote", "local", "split", *STREAM_DEFAULTS)
    try:
        stream = Stream(**{key: settings[key] for key in keys if key in settings})
        stream.apply_default({"split": None} | STREAM_DEFAULTS | {key: dataset[key] for key in keys if key in dataset})
    except Exception as error:  # a store's client, too, may refuse
        raise ConfigError(f"{label}: {describe(error)}") from error
    return make_checked(stream, label)


def get_index(stream: CheckedStream, allow_unsafe_types: bool) -> list[Part]:
    """What a stream's index says; one in the cache that can't be believed is fetched again.

    Raises:
        DataError: the index can't be had, or can't be believed.
    """
    index = stream.path(get_index_basename())

    def read(path: str) -> list[Part]:
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


def verify(stream: CheckedStream, parts: list[Part]) -> None:
    """Compare the files that are there with the index: sizes and samples, and hashes with `validate_hash`.

    Those of a cache that are damaged are removed, to be fetched again.

    Raises:
        DataError: a file is damaged or missing, and there is no remote to fetch it from.
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


def verify_part(stream: CheckedStream, part: Part) -> tuple[int, list[str]]:
    """Bytes found of a file, and what is wrong; a damaged one in a cache is removed."""
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


class ReadySharedMemory(BuiltinSharedMemory):
    """Shared memory that is opened once it has its size, which its creator gives it a moment after its name.

    Source: streaming 0.13.0 waits 7 ms, and then fails with "cannot mmap an empty file" (base/shared/memory.py).
    """

    def __init__(self, name: str | None = None, create: bool = False, size: int = 0) -> None:
        end = time.monotonic() + CREATION_SECONDS
        with contextlib.suppress(FileNotFoundError):  # the base class says so
            while not create and not (SHM / str(name)).stat().st_size and time.monotonic() < end:
                time.sleep(POLL_SECONDS)
        super().__init__(name, create, size)


@contextlib.contextmanager
def shared_memory(number: int) -> Iterator[None]:
    """Within it, a StreamingDataset that is made gets shared memory of this number, in place of the first free one.

    Args:
        number: the same on all ranks, of this dataset alone.

    Source: streaming 0.13.0, base/shared/prefix.py; that jobs may start at once and be killed at any time, and that
    the next one may use the same `local`, makes this unnecessary.
    """

    def get_shm_prefix(
        streams_local: list[str], streams_remote: list[str | None], world: World, retry: int = 0
    ) -> tuple[int, SharedMemory]:
        mine = number + world.node
        data = _pack_locals(streams_local, mine)
        if world.is_local_leader:
            hold(mine)
            memory = SharedMemory(_get_path(mine, LOCALS), True, len(data))
            memory.buf[: len(data)] = data
        barrier()
        if not world.is_local_leader:
            hold(mine)
            memory = SharedMemory(_get_path(mine, LOCALS), False)
        return mine, memory

    with (
        mock.patch.object(streaming_dataset, "get_shm_prefix", get_shm_prefix),
        mock.patch.object(streaming_memory, "BuiltinSharedMemory", ReadySharedMemory),
    ):
        yield


def keep_locks_together(dataset: StreamingDataset) -> None:
    """Put a dataset's lock files to its shared memory: in the temporary folder, they would stay for ever."""
    number = dataset._shm_prefix_int
    dataset._cache_filelock_path = str(SHM / _get_path(number, CACHE_FILELOCK))
    dataset._shared_barrier.filelock_path = str(SHM / _get_path(number, BARRIER_FILELOCK))


def hold(number: int) -> None:
    """Hold shared memory of a number until this process and all that it forks have ended; the last removes it."""
    lock = SHM / _get_path(number, LOCK)
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        fcntl.flock(file, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(lock)):
                break
        os.close(file)  # another job has just removed it, as nobody held it yet
    atexit.register(let_go, file, number)


def let_go(file: int, number: int) -> None:
    """Hold shared memory no longer."""
    os.close(file)
    remove_unused(number)


def remove_unused(number: int) -> None:
    """Remove this user's shared memory of a number, unless a living process holds it."""
    lock = SHM / _get_path(number, LOCK)
    with contextlib.ExitStack() as stack:
        try:  # what another user may have put there is neither followed nor waited for
            file = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            stack.callback(os.close, file)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            pass
        except OSError:  # it is held, or not ours
            return
        for left in [*SHM.glob(_get_path(number, "*")), lock]:  # the lock again, and last
            if is_own(left):
                left.unlink(missing_ok=True)


def is_own(file: Path) -> bool:
    """Whether a file is this user's."""
    with contextlib.suppress(FileNotFoundError):
        return file.lstat().st_uid == os.getuid()
    return False


def remove_stale() -> None:
    """Remove shared memory that dead jobs of this user have left, as far as it is of ours."""
    numbers = set()
    with os.scandir(SHM) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                name = re.match(r"([1-9]\d{12})_", entry.name)
                if name and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                    numbers.add(int(name[1]))
    for number in numbers:
        remove_unused(number)
