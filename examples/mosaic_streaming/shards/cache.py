"""Stream caches: which folders may be used as one, and by which job.

Files in a cache are copies, so they may be removed and fetched again; any other folder may hold the only copy. So a
folder is written to only if the stream has a `remote` elsewhere and the folder was empty when it was first taken. From
then on a marker in it names the source of the copies.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import stat
from pathlib import Path

from torchtitan.tools.logging import logger

from examples.mosaic_streaming.config import is_url, private_root
from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.shards.stream import INCOMING, CheckedStream

MARKER = ".mosaic_cache"  # the file that makes a folder a cache; it holds the source of the copies
IN_USE = ".in_use"  # the file in a cache that the job locks

held: list[int] = []  # file descriptors of the locks that this process keeps until it ends


def take_cache(stream: CheckedStream, config_path: str) -> None:
    """Lock a stream's cache for this job and remove what a dead job left half fetched; `config_path` is for messages.

    ConfigError if it is in use or isn't a cache of this stream, DataError if it can't be written.
    """
    folder = Path(os.path.abspath(stream.path("")))
    if folder.is_relative_to(private_root()):
        with contextlib.suppress(OSError):  # the checks below report what is wrong with it
            os.mkdir(private_root(), 0o700)
    source = stream.source("").rstrip("/")
    source = source if is_url(source) else os.path.realpath(source)
    check_owner(folder, stream.label, config_path)
    check_marker(folder, stream.label, source, config_path)
    try:
        with stream.storing(IN_USE, 0) as own:  # creates the folder, or reports why it can't
            lock(folder, stream.label, config_path)
            if read_marker(folder) != source:
                Path(own, "file").write_text(source + "\n")
                os.replace(f"{own}/file", folder / MARKER)
    except OSError as error:
        raise DataError(f"{folder} can't be the cache of {stream.label}: {error}") from error
    for left in folder.glob(f"{INCOMING}*"):
        shutil.rmtree(left, ignore_errors=True)


def lock(folder: Path, label: str, config_path: str) -> None:
    """Lock a cache for as long as this process lives, or raise ConfigError if another job has it."""
    file = os.open(folder / IN_USE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ConfigError(
                f"`local` of {label}, {folder}, is the cache of another job, process "
                f"{os.pread(file, 1000, 0).decode(errors='replace').strip()}. Give each job another `local` in "
                f"{config_path}, or end that one."
            ) from error
        logger.warning(f"{folder} knows no locks ({error.strerror}): make sure that no other job uses it.")
    held.append(file)  # closing it would release the lock
    os.ftruncate(file, 0)
    with contextlib.suppress(OSError):  # the disk may be full, with all files in the cache already
        os.pwrite(file, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def check_marker(folder: Path, label: str, source: str, config_path: str) -> None:
    """Raise ConfigError unless a folder is empty, or marked as a cache of this source."""
    if (marked := read_marker(folder)) is not None:
        if marked not in ("", source):
            raise ConfigError(
                f"`local` of {label}, {folder}, is a cache of {marked}, not of {source}. Give another `local` in "
                f"{config_path}, or remove that folder."
            )
        return
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if found := sorted(name for name in os.listdir(folder) if name[0] != "." and name != "lost+found"):
            raise ConfigError(
                f"`local` of {label}, {folder}, is to be a cache, which may be emptied, but it holds "
                f"{', '.join(found[:3])}{', …' * (len(found) > 3)} and no {MARKER}: it may be the only copy. Give "
                f"another `local` in {config_path}. Or, if it is a copy of {source} that may be removed, say so with: "
                f"touch {folder / MARKER}"
            )


def read_marker(folder: Path) -> str | None:
    """The source that a folder's marker names: empty if the user made it with `touch`, None without a marker."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return (folder / MARKER).read_text().strip()
    return None


def check_owner(folder: Path, label: str, config_path: str) -> None:
    """Raise ConfigError if another user may have put files into a cache, as its files are trusted.

    In a folder that everybody may write to, like `/tmp`, each folder on the way has to belong to this user or to root.
    """
    real = Path(os.path.realpath(folder))
    for place in dict.fromkeys([folder, *folder.parents, real, *real.parents]):
        try:
            found, around = os.lstat(place), os.stat(place.parent)
        except OSError:  # it doesn't exist yet
            continue
        foreign = around.st_mode & stat.S_IWOTH and found.st_uid not in (0, os.getuid())
        private = place == Path(private_root()) and not stat.S_ISLNK(found.st_mode)
        if foreign or (private and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
            raise ConfigError(
                f"The cache of {label}, {folder}, lies in {place}, which belongs to user {found.st_uid} or can be "
                f"written by others: they may have put other data there. Remove it, or set `local` in "
                f"{config_path} to a folder of yours."
            )
