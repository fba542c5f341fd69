"""The temporary folder of a preview, which other processes of this user remove if it is killed."""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from examples.mosaic_streaming.distributed import AbortChannel
from examples.mosaic_streaming.errors import ConfigError

PREFIX, LOCK = "mosaic_streaming-preview-", "in_use"
"""The beginning of the folders' names, and the file in them that their process locks."""


@contextlib.contextmanager
def own_folder(channel: AbortChannel) -> Iterator[str]:
    """Make a temporary folder for this process, and remove those that killed processes of this user have left.

    Raises:
        ConfigError: no folder can be made.
    """
    try:
        for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):
                remove_left(left)
        folder = tempfile.mkdtemp(prefix=PREFIX)
    except OSError as error:
        raise ConfigError(
            f"No temporary folder can be made ({error}): set TMPDIR to a place with some room."
        ) from error
    with open(f"{folder}/{LOCK}.part", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        os.rename(lock.name, f"{folder}/{LOCK}")  # nobody sees it unlocked
        try:
            try:
                yield folder
            finally:
                channel.begin_shutdown()
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_left(folder: Path) -> None:
    """Remove a temporary folder of this user whose process has ended. Anybody may have put anything in its place.

    Raises:
        OSError: it is no such folder, or its process lives.
    """
    with contextlib.ExitStack() as stack:

        def open_own(name: str | Path, flags: int, within: int | None = None) -> int:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, dir_fd=within)
            stack.callback(os.close, file)
            if os.fstat(file).st_uid != os.getuid():
                raise PermissionError(errno.EPERM, "another user's", str(name))
            return file

        lock = open_own(LOCK, 0, within=open_own(folder, os.O_DIRECTORY))
        if stat.S_ISREG(os.fstat(lock).st_mode):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
