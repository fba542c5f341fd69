"""The folders of streams: which are caches, and whether one would take the place of another."""

import contextlib
import hashlib
import itertools
import os
import tempfile
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from examples.mosaic_streaming.errors import ConfigError


class Folder(NamedTuple):
    """Where a stream lies."""

    name: str
    path: str  # file that configures the stream
    local: str  # folder on this machine; empty where none is given
    source: str  # URL or folder that the shards come from
    is_copy: bool  # whether `local` is a copy of `source`


def is_copy(remote: str | None, local: str | None, split: str | None) -> bool:
    """Return whether a stream's `local` is a copy of its `remote`, rather than all there is."""
    if not remote:
        return False
    if not local or is_url(remote):
        return True
    return identity(os.path.join(remote, split or "")) != identity(os.path.join(local, split or ""))


def is_url(remote: str) -> bool:
    """Return whether a `remote` is in a store, rather than a folder of this machine.

    Source: streaming takes it for a URL if it has a scheme, with `//` behind that or not, as in `dbfs:/Volumes/...`
    (0.13.0, base/storage/download.py). What is behind `//`, which urlparse may refuse, doesn't matter.
    """
    return bool(urllib.parse.urlparse(remote.partition("//")[0]).scheme)


def identity(folder: str | Path) -> tuple[object, object]:
    """Return what is the same for all names of a folder, also through links and mounts."""
    with contextlib.suppress(OSError):
        found = os.stat(folder)
        return found.st_dev, found.st_ino
    return "path", os.path.realpath(folder)


def private_root() -> str:
    """Return the folder with the caches of streams that name none; other users can't write to it."""
    return os.path.join(tempfile.gettempdir(), f"mosaic_streaming-{os.getuid()}")


def default_cache(remote: str) -> str:
    """Where shards are kept if a stream doesn't say; streaming refuses its own default where that exists already."""
    return os.path.join(private_root(), hashlib.blake2b(remote.encode(), digest_size=8).hexdigest())


def check_folders(folders: Sequence[Folder], others: Sequence[Folder] = ()) -> None:
    """Raise ConfigError if a cache would take the place of what another stream reads or keeps.

    `others` are of another loader in this job, which may share caches of the same source.
    """
    for one, other in itertools.combinations(folders, 2):
        if one.local and other.local:
            check_not_same(one, other)
    for one, other in itertools.product(others, folders):
        if one.is_copy and other.is_copy and one.source != other.source:
            check_not_same(one, other)
    for one, other in [*itertools.product(folders, [*folders, *others]), *itertools.product(others, folders)]:
        check_apart(one, other)


def check_not_same(one: Folder, other: Folder) -> None:
    """Raise ConfigError if two streams are in one folder: each would overwrite the other's index."""
    if identity(one.local) != identity(other.local):
        return
    both = f"{one.name} in {one.path} and {other.name} in {other.path}"
    if one.is_copy and one.source == other.source:
        raise ConfigError(
            f"{both} are the same stream, {one.source}. Give it once, with the weight of both, or give each another "
            "`local`."
        )
    different = ", but another `remote`" if one.is_copy else ""
    raise ConfigError(f"{both} have the same `local`, {os.path.realpath(one.local)}{different}. Give each its own.")


def check_apart(cache: Folder, other: Folder) -> None:
    """Raise ConfigError if the cache of a stream overlaps with what a stream reads or keeps in another cache."""
    kept = [] if is_url(other.source) else [("reads", other.source)]
    if other.is_copy and identity(cache.local) != identity(other.local):
        kept.append(("keeps in its cache", other.local))
    for does, folder in kept if cache.is_copy else []:
        if folder and overlap(cache.local, folder):
            raise ConfigError(
                f"`local` of {cache.name} in {cache.path}, {cache.local}, is a cache, which may be emptied, and "
                f"overlaps with {folder}, which {other.name} in {other.path} {does}. Give {cache.name} another `local`."
            )


def overlap(one: str, other: str) -> bool:
    """Whether two folders are the same, or one lies in the other."""
    paths = [Path(os.path.realpath(folder)) for folder in (one, other)]
    around = [{identity(place) for place in (path, *path.parents)} for path in paths]
    return identity(one) in around[1] or identity(other) in around[0]
