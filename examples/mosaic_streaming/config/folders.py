"""The folders of streams: which are caches, and whether one would take the place of another."""

import contextlib
import hashlib
import os
import tempfile
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from examples.mosaic_streaming.errors import ConfigError

Identity = tuple[object, object]
"""What tells a folder from others, whatever it is called."""


class Folder(NamedTuple):
    """Where a stream lies.

    Attributes:
        name: of the stream.
        path: the file that configures it.
        local: its folder on this machine; empty where none is given.
        source: a URL or a folder that its shards come from.
        is_copy: whether the first is a copy of the second.
    """

    name: str
    path: str
    local: str
    source: str
    is_copy: bool


def is_copy(remote: str | None, local: str | None, split: str | None) -> bool:
    """Whether a stream's `local` is a copy of its `remote`, rather than all there is."""
    if not remote:
        return False
    if not local or is_url(remote):
        return True
    return identity(os.path.join(remote, split or "")) != identity(os.path.join(local, split or ""))


def is_url(remote: str) -> bool:
    """Whether a `remote` is in a store, rather than a folder of this machine.

    Source: streaming takes a `remote` for a URL if it has a scheme, with `//` behind that or not, as
    `dbfs:/Volumes/...` (0.13.0, base/storage/download.py). Nothing behind `//` matters, which urlparse may refuse.
    """
    return bool(urllib.parse.urlparse(remote.partition("//")[0]).scheme)


def identity(folder: str | Path) -> Identity:
    """The same for two names of one folder, also through links and mounts."""
    with contextlib.suppress(OSError):
        found = os.stat(folder)
        return found.st_dev, found.st_ino
    return "path", os.path.realpath(folder)


def overlap(one: str, other: str) -> bool:
    """Whether two folders are the same, or one lies in the other."""
    around = [{identity(place) for place in (path, *path.parents)} for path in map(resolved_path, (one, other))]
    return identity(one) in around[1] or identity(other) in around[0]


def resolved_path(folder: str) -> Path:
    """The path of a folder without links."""
    return Path(os.path.realpath(folder))


def private_root() -> str:
    """The folder with the caches of streams that name none; other users can't write to it."""
    return os.path.join(tempfile.gettempdir(), f"mosaic_streaming-{os.getuid()}")


def default_cache(remote: str) -> str:
    """Where shards are kept if a stream says nothing; streaming's own default is refused when it is there already."""
    return os.path.join(private_root(), hashlib.blake2b(remote.encode(), digest_size=8).hexdigest())


def check_folders(folders: Sequence[Folder], others: Sequence[Folder] = ()) -> None:
    """Raise ConfigError if a cache would take the place of what another stream reads or keeps.

    Args:
        folders: of a loader's streams.
        others: of the streams of another loader in this job, which may share caches of the same source.
    """
    for number, one in enumerate(folders):
        for other in folders[:number]:
            if one.local and other.local and is_same(one, other):
                refuse_same(other, one)
        for other in others:
            if one.is_copy and other.is_copy and one.source != other.source and is_same(one, other):
                refuse_same(other, one)
    for one in folders:
        for other in folders:
            check_apart(one, other)
        for other in others:
            check_apart(one, other)
            check_apart(other, one)


def refuse_same(one: Folder, other: Folder) -> None:
    """Raise ConfigError for two streams in one folder: each would overwrite the other's index."""
    both = f"{one.name} in {one.path} and {other.name} in {other.path}"
    if one.is_copy and one.source == other.source:
        raise ConfigError(
            f"{both} are the same stream, {one.source}. Give it once, with the weight of both, or give each another "
            "`local`."
        )
    different = ", but another `remote`" if one.is_copy and one.source != other.source else ""
    raise ConfigError(f"{both} have the same `local`, {os.path.realpath(one.local)}{different}. Give each its own.")


def check_apart(one: Folder, other: Folder) -> None:
    """Raise ConfigError if the cache of a stream overlaps with the source or the cache of one."""
    if not one.is_copy:
        return
    kept = [("reads", other.source)] if not is_url(other.source) else []
    kept += [("keeps in its cache", other.local)] if other.is_copy and not is_same(one, other) else []
    for does, folder in kept:
        if folder and overlap(one.local, folder):
            raise ConfigError(
                f"`local` of {one.name} in {one.path}, {one.local}, is a cache, which may be emptied, and overlaps "
                f"with {folder}, which {other.name} in {other.path} {does}. Give {one.name} another `local`."
            )


def is_same(one: Folder, other: Folder) -> bool:
    """Whether two caches are one."""
    return identity(one.local) == identity(other.local)
