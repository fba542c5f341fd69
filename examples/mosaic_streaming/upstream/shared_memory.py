"""Gives each job shared memory of its own, of which a killed job leaves nothing that stops the next one.

streaming 0.13.0 looks for the first free number for its shared memory, minding what dead jobs have left. Two jobs that
start at once find the same number, and its clean-up takes a living neighbour's. Here each job has a number of its own,
and its processes hold a lock for as long as one of them lives. A streaming that does so makes this module needless.
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
"""This project's numbers have 13 digits and begin here. streaming counts up from 0."""
LOCK = "job"
"""The name of the file in a job's shared memory that its processes lock."""
CREATION_SECONDS, POLL_SECONDS = 60.0, 0.002
"""How long a process waits for shared memory that another one creates, and the pause between two polls."""


class ReadySharedMemory(BuiltinSharedMemory):
    """Shared memory that is opened only once it has its size. Its creator sets the size shortly after the name.

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
    """A context in which a new StreamingDataset gets shared memory of a given number, not of the first free one.

    Args:
        number: the same on all ranks, and used for this dataset alone.

    Source: streaming 0.13.0, base/shared/prefix.py. A version in which jobs may start at once and be killed at any
    time, and in which the next job may use the same `local`, makes this needless.
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
    """Put a dataset's lock files beside its shared memory. In the temporary folder, they would stay for ever."""
    number = dataset._shm_prefix_int
    dataset._cache_filelock_path = str(SHM / _get_path(number, CACHE_FILELOCK))
    dataset._shared_barrier.filelock_path = str(SHM / _get_path(number, BARRIER_FILELOCK))


def hold(number: int) -> None:
    """Hold shared memory of a number until this process and its forks have ended. The last one removes it."""
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
    """Stop holding shared memory."""
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
    """Remove the shared memory that this project's dead jobs of this user have left."""
    numbers = set()
    with os.scandir(SHM) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                name = re.match(r"([1-9]\d{12})_", entry.name)
                if name and entry.stat(follow_symlinks=False).st_uid == os.getuid():
                    numbers.add(int(name[1]))
    for number in numbers:
        remove_unused(number)
