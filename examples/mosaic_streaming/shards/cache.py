"""Caches of streams: which folders are caches, and which caches are ours.

A cache holds copies of a stream's files, so damaged ones may be removed and fetched again, and `cache_limit` may evict
whole ones. Any other folder may hold the only copy. So a folder is written to only if the stream has a `remote`
elsewhere, and if the folder was empty when it was taken: since then it has a marker with the source that it copies.
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

from examples.mosaic_streaming.config import is_url, private_root, resolved_path
from examples.mosaic_streaming.errors import ConfigError, DataError

if TYPE_CHECKING:
    from examples.mosaic_streaming.shards.stream import CheckedStream

MARKER = ".mosaic_cache"
"""The file that makes a folder a cache of ours; it holds what the cache is a copy of."""
IN_USE = ".in_use"
"""The file in a cache that its job locks."""
INCOMING = ".incoming-"
"""Folders in a cache with what is being fetched begin so."""
NO_DATA = {"lost+found"}
"""What a folder may hold beside hidden files and still be empty."""

held: list[int] = []
"""Locks that this process keeps until it ends."""


def take_cache(stream: "CheckedStream", path: str) -> None:
    """Take a cache for this job, and remove from it what a dead one was fetching.

    Args:
        stream: with a cache.
        path: the file that configures it, for messages.

    Raises:
        ConfigError: another job has it, or it isn't ours.
        DataError: it can't be written.
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
    """Lock a cache for as long as this process lives.

    Raises:
        ConfigError: another job has it.
    """
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
    held.append(file)  # closing it would give it up
    os.ftruncate(file, 0)
    with contextlib.suppress(OSError):  # a full disk: it may be that everything is there already
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
    """What the marker of a folder says; empty if its owner has made it, none where there is none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return (folder / MARKER).read_text().strip()
    return None


def source_of(stream: "CheckedStream") -> str:
    """What a marker says: where the files of a stream come from."""
    source = stream.source("").rstrip("/")
    return source if is_url(source) else os.path.realpath(source)


def check_owner(folder: Path, label: str, path: str) -> None:
    """Raise ConfigError if another user may have put files into a cache: what is in it is believed.

    Below a folder that anybody may write to, like `/tmp`, each folder has to be this user's, or root's.

    Args:
        folder: the cache, absolute.
        label: of its stream.
        path: the file that configures it, for the message.
    """
    for place in dict.fromkeys(
        part for whole in (folder, resolved_path(str(folder))) for part in (whole, *whole.parents)
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
