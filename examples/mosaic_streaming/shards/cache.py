"""Takes the caches of streams, and leaves every other folder alone.

A cache holds copies of a stream's files. Damaged ones may be removed and fetched again, and `cache_limit` may evict
whole ones. Any other folder may hold the only copy. So a folder is written to only if the stream has a `remote`
elsewhere and the folder was empty when it was taken. Since then, a marker in it names the source that it copies.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from torchtitan.tools.logging import logger

from examples.mosaic_streaming.config import is_url, private_root
from examples.mosaic_streaming.errors import ConfigError, DataError

if TYPE_CHECKING:
    from examples.mosaic_streaming.shards.stream import CheckedStream

MARKER = ".mosaic_cache"
"""The file that makes a folder a cache. It holds the source of the copies."""
IN_USE = ".in_use"
"""The file in a cache that the job locks."""
INCOMING = ".incoming-"
"""The prefix of folders in a cache for files that are being fetched."""
NO_DATA = {"lost+found"}
"""A folder that holds only these and hidden files counts as empty."""

held: list[int] = []
"""The locks that this process keeps until it ends."""


def take_cache(stream: "CheckedStream", path: str) -> None:
    """Take a stream's cache for this job, and remove what a dead job was fetching.

    Args:
        stream: a stream with a cache.
        path: the file that configures the stream, for messages.

    Raises:
        ConfigError: another job uses the cache, or the folder is none.
        DataError: the cache can't be written to.
    """
    folder = Path(os.path.abspath(stream.path("")))
    if folder.is_relative_to(private_root()):
        with contextlib.suppress(OSError):  # what is wrong with it is said below
            os.mkdir(private_root(), 0o700)
    check_owner(folder, stream.label, path)
    check_marker(folder, stream, path)
    try:
        with stream.storing(IN_USE, 0) as own:  # makes the folder, or says why that doesn't go
            lock(folder, stream.label, path)
            if read_marker(folder) != source_of(stream):
                Path(own, "file").write_text(source_of(stream) + "\n")
                os.replace(f"{own}/file", folder / MARKER)
    except OSError as error:
        raise DataError(f"{folder} can't be the cache of {stream.label}: {error}") from error
    for left in folder.glob(f"{INCOMING}*"):
        shutil.rmtree(left, ignore_errors=True)


def lock(folder: Path, label: str, path: str) -> None:
    """Lock a cache for as long as this process lives; raise ConfigError if another job has locked it."""
    file = os.open(folder / IN_USE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ConfigError(
                f"`local` of {label}, {folder}, is the cache of another job, process "
                f"{os.pread(file, 1000, 0).decode(errors='replace').strip()}. Give each job another `local` in {path}, "
                "or end that one."
            ) from error
        logger.warning(f"{folder} knows no locks ({error.strerror}): make sure that no other job uses it.")
    held.append(file)  # closing it would unlock it
    os.ftruncate(file, 0)
    with contextlib.suppress(OSError):  # on a full disk, everything may be there already
        os.pwrite(file, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def check_marker(folder: Path, stream: "CheckedStream", path: str) -> None:
    """Raise ConfigError unless a folder is empty, or marked as a cache of this stream."""
    if (of := read_marker(folder)) is not None:
        if of not in ("", source_of(stream)):
            raise ConfigError(
                f"`local` of {stream.label}, {folder}, is a cache of {of}, not of {source_of(stream)}. Give another "
                f"`local` in {path}, or remove that folder."
            )
        return
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if found := sorted(name for name in os.listdir(folder) if name[0] != "." and name not in NO_DATA):
            raise ConfigError(
                f"`local` of {stream.label}, {folder}, is to be a cache, which may be emptied, but it holds "
                f"{', '.join(found[:3])}{', …' * (len(found) > 3)} and no {MARKER}: it may be the only copy. Give "
                f"another `local` in {path}. Or, if it is a copy of {source_of(stream)} that may be removed, say so "
                f"with: touch {folder / MARKER}"
            )


def read_marker(folder: Path) -> str | None:
    """The content of a folder's marker: empty if the user has made it, None without a marker."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return (folder / MARKER).read_text().strip()
    return None


def source_of(stream: "CheckedStream") -> str:
    """The source of a stream's files, as a marker names it."""
    source = stream.source("").rstrip("/")
    return source if is_url(source) else os.path.realpath(source)


def check_owner(folder: Path, label: str, path: str) -> None:
    """Raise ConfigError if another user may have put files into a cache, whose content is trusted.

    Below a folder that anybody may write to, like `/tmp`, each folder has to belong to this user or to root.
    """
    for place in dict.fromkeys(
        part for whole in (folder, Path(os.path.realpath(folder))) for part in (whole, *whole.parents)
    ):
        try:
            found, around = os.lstat(place), os.stat(place.parent)
        except OSError:  # it is still to be made
            continue
        foreign = around.st_mode & stat.S_IWOTH and found.st_uid not in (0, os.getuid())
        private = place == Path(private_root()) and not stat.S_ISLNK(found.st_mode)
        if foreign or (private and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
            raise ConfigError(
                f"The cache of {label}, {folder}, lies in {place}, which belongs to user {found.st_uid} or can be "
                f"written by others: they may have put other data there. Remove it, or set `local` in {path} to a "
                "folder of yours."
            )
