"""A temporary folder that is removed with its process; what a killed process has left is removed by the next."""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from examples.mosaic_streaming.distributed import AbortChannel
from examples.mosaic_streaming.errors import ConfigError

PREFIX = "mosaic_streaming-preview-"
"""How the folders' names begin."""

LOCK = "in_use"
"""The file in each folder that its process keeps locked."""


@contextlib.contextmanager
def private_folder(channel: AbortChannel) -> Iterator[str]:
    """Make a folder, and remove those that this user's killed processes have left; ConfigError if none can be made."""
    try:
        for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):
                remove_stale_folder(folder)
        own = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigError(f"No temporary folder can be made ({error}): set TMPDIR to a folder with space.") from error
    with own as mine, open(f"{mine}/{LOCK}.part", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        os.rename(lock.name, f"{mine}/{LOCK}")  # so that nobody sees it unlocked
        try:
            yield mine
        finally:
            channel.begin_shutdown()


def remove_stale_folder(folder: Path) -> None:
    """Remove a folder of this user's whose process has ended; raise OSError for one that is in use.

    The temporary folder is open to all users: a link is not followed, and a pipe in place of the lock can't block.
    """
    with open(os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as lock:
        found = os.fstat(lock.fileno())
        if {found.st_uid, folder.lstat().st_uid} == {os.getuid()} and stat.S_ISREG(found.st_mode):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)  # which refuses a link
