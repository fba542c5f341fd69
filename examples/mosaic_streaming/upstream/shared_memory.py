"""Gives each job its own shared memory for streaming datasets, and removes what killed jobs have left.

streaming 0.13.0 takes the first free number for its shared memory. Two jobs that start at once find the same number,
its clean-up removes a running job's memory, and what killed jobs leave stops later ones (base/shared/prefix.py). Here
each job has a number of its own, and its processes hold a lock while any of them lives. A streaming that allows jobs to
start at once, be killed at any time and reuse the same `local` makes this module needless.
"""

import atexit
import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory as BuiltinSharedMemory
from pathlib import Path

from streaming import StreamingDataset
from streaming.base import dataset as streaming_dataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS
from streaming.base.distributed import barrier
from streaming.base.shared import SharedMemory
from streaming.base.shared import memory as streaming_memory
from streaming.base.shared.prefix import _get_path, _pack_locals
from streaming.base.world import World

from examples.mosaic_streaming.upstream.patch import replaced

SHM = Path("/dev/shm")
FIRST_NUMBER = 10**12
"""Our numbers start here and have 13 digits; streaming counts up from 0."""
LOCK = "job"
"""The file in a job's shared memory that its processes lock."""
CREATION_SECONDS, POLL_SECONDS = 60.0, 0.002
"""How long to wait for shared memory that another process is creating, and between two checks."""


class ReadySharedMemory(BuiltinSharedMemory):
    """Shared memory that is opened only once it has its size, which its creator sets a moment after its name.

    Source: streaming 0.13.0 waits 7 ms, and then fails with "cannot mmap an empty file" (base/shared/memory.py).
    """

    def __init__(self, name: str | None = None, create: bool = False, size: int = 0) -> None:
        end = time.monotonic() + CREATION_SECONDS
        with contextlib.suppress(FileNotFoundError):  # the base class raises it
            while not create and not (SHM / str(name)).stat().st_size and time.monotonic() < end:
                time.sleep(POLL_SECONDS)
        super().__init__(name, create, size)


@contextlib.contextmanager
def shared_memory(number: int) -> Iterator[None]:
    """Give a StreamingDataset made in this context the shared memory with this number, not the first free one.

    The number has to be the same on all ranks, and belongs to this dataset alone.
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
        replaced(streaming_dataset, "get_shm_prefix", get_shm_prefix),
        replaced(streaming_memory, "BuiltinSharedMemory", ReadySharedMemory),
    ):
        yield


def keep_locks_together(dataset: StreamingDataset) -> None:
    """Move a dataset's lock files to its shared memory; in the temporary folder they would stay forever."""
    number = dataset._shm_prefix_int
    dataset._cache_filelock_path = str(SHM / _get_path(number, CACHE_FILELOCK))
    dataset._shared_barrier.filelock_path = str(SHM / _get_path(number, BARRIER_FILELOCK))


def hold(number: int) -> None:
    """Hold a number until this process and its forks have ended; the last one removes the shared memory."""
    lock = SHM / _get_path(number, LOCK)
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        fcntl.flock(file, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(lock)):
                break
        os.close(file)  # another job removed it before the lock was taken
    atexit.register(remove_unused, number)
    atexit.register(os.close, file)  # which comes first: what is registered last is called first


def remove_unused(number: int) -> None:
    """Remove this user's shared memory of a number, unless a running process holds it."""
    lock = SHM / _get_path(number, LOCK)
    with contextlib.ExitStack() as stack:
        try:  # never follow or wait for what another user may have put there
            file = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            stack.callback(os.close, file)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            pass
        except OSError:  # held, or another user's
            return
        for left in [*SHM.glob(_get_path(number, "*")), lock]:  # the lock last, whether or not it was there before
            if is_own(left):
                left.unlink(missing_ok=True)


def is_own(file: Path) -> bool:
    """Whether a file belongs to this user."""
    with contextlib.suppress(FileNotFoundError):
        return file.lstat().st_uid == os.getuid()
    return False


def remove_stale() -> None:
    """Remove shared memory with our numbers that this user's dead jobs have left."""
    names = [re.match(r"([1-9]\d{12})_", file.name) for file in SHM.iterdir() if is_own(file)]
    for number in {int(name[1]) for name in names if name}:
        remove_unused(number)
