"""Reads MDS shards: whole samples only, and with less work per sample than streaming's reader."""

import functools
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from streaming.base.format.mds import MDSReader
from streaming.base.format.mds.encodings import Encoding, _get_coder

from examples.mosaic_streaming.errors import DataError

OPEN_FILES = min(512, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
"""Files that a process keeps open, at most: with `py1e` shuffling, a rank reads hundreds of shards in turn."""


class OpenFile:
    """An open shard, which is closed when it is garbage-collected."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone at interpreter exit
        if "_descriptor" in self.__dict__:
            close(self._descriptor)

    def sample(self, number: int) -> bytes | None:
        """The bytes of a sample, or None if the file doesn't have all of them."""
        begin, end = struct.unpack("<2I", os.pread(self._descriptor, 8, (1 + number) * 4).ljust(8, b"\0"))
        data = os.pread(self._descriptor, end - begin, begin) if begin < end else b""
        return data if data and len(data) == end - begin else None


kept_open = functools.lru_cache(OPEN_FILES)(OpenFile)
"""Files by path: opening one takes as long as reading a sample, and far longer on a network file system."""


class CheckedReader(MDSReader):
    """Reads only whole samples; `is_cache`: the file can be fetched again; `stays`: it is never evicted."""

    is_cache = False
    stays = False

    def get_sample_data(self, idx: int) -> bytes:
        """Read a sample's bytes; of a damaged file in a cache, FileNotFoundError makes streaming fetch it again."""
        data = kept_open(self._path).sample(idx) if self.stays else OpenFile(self._path).sample(idx)
        if data is None and self.stays:
            kept_open.cache_clear()
            data = OpenFile(self._path).sample(idx)  # another process may have replaced it
        if data is not None:
            return data
        if not self.is_cache:
            raise DataError(f"{self._path} is damaged: sample {idx} isn't whole. There is no remote to fetch it from.")
        Path(self._path).unlink(missing_ok=True)
        raise FileNotFoundError(f"{self._path} was damaged while in use")

    def decode_sample(self, data: bytes) -> dict[str, Any]:
        """Decode a sample's columns; streaming looks up each column's decoder for every sample."""
        sizes, begin = [], 0
        for size in self.column_sizes:
            if not size:
                [size] = struct.unpack_from("<I", data, begin)
                begin += 4
            sizes.append(size)
        sample = {}
        for (name, decode), size in zip(self._decoders, sizes, strict=True):
            sample[name] = decode(data[begin : begin + size])
            begin += size
        return sample

    @functools.cached_property
    def _path(self) -> str:
        return os.path.join(self.dirname, self.split, self.raw_data.basename)

    @functools.cached_property
    def _decoders(self) -> list[tuple[str, Callable[[bytes], Any]]]:
        """Each column's name and decoder; the index has only encodings that streaming knows."""
        columns = zip(self.column_names, self.column_encodings, strict=True)
        return [(name, cast(Encoding, _get_coder(encoding)).decode) for name, encoding in columns]
