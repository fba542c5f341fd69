"""Reads and validates a stream's index.json, which is untrusted input."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streaming.base.compression import get_compressions
from streaming.base.format import FileInfo, get_index_basename
from streaming.base.format.mds.encodings import is_mds_encoding, is_mds_encoding_safe

FILES = {"mds": ("data",), "json": ("data", "meta"), "csv": ("data", "meta"), "tsv": ("data", "meta")}
"""The files of a shard by its format; the index adds `raw_` and `zip_` in front (streaming 0.13.0, base/format)."""

COLUMNS = ("column_names", "column_encodings", "column_sizes")

MAX_BYTES = 1 << 62

ADD_HASHES = "python -m examples.mosaic_streaming.shards.add_hashes FOLDER"


class FileError(ValueError):
    """A file is wrong: the message says what it has and what was expected."""


@dataclass(frozen=True)
class ShardFile:
    """One file of a shard: raw, as it is read, and packed, if it is compressed; `samples` only for MDS."""

    raw: FileInfo
    packed: FileInfo | None
    samples: int | None

    @property
    def stored(self) -> FileInfo:
        """The file as the remote stores it."""
        return self.packed or self.raw


def read_index(path: str, allow_unsafe_types: bool, validate_hash: str | None) -> list[ShardFile]:
    """The files that a stream's index lists, or FileError if it is no valid index.

    Pickled columns run code when they are read, so `allow_unsafe_types` has to permit them. With `validate_hash`, each
    file needs a hash of that algorithm.
    """
    try:
        index = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileError(f"it is not JSON: {error}") from error
    shards = index.get("shards") if isinstance(index, dict) else None
    if not isinstance(shards, list) or index.get("version") != 2:
        raise FileError("it is not a streaming index of version 2 with a list of shards")
    if not shards:
        raise FileError("it has no samples: write some, or leave the stream out")
    columns: set[str] = set()  # that have been checked
    files = [file for number, shard in enumerate(shards) for file in read_shard(f"shards[{number}]", shard, columns)]
    names: set[str] = set()
    for file in files:
        expect(file.raw.basename not in names, "basename", file.raw.basename, "one entry for each file")
        names.add(file.raw.basename)
        if validate_hash and not (file.raw.hashes.get(validate_hash) and file.stored.hashes.get(validate_hash)):
            have = ", ".join(sorted(file.stored.hashes)) or "none"
            raise FileError(
                f"it has no {validate_hash} of {file.stored.basename} (validate_hash); its hashes: {have}. Remove "
                f"validate_hash, name a hash that it has, or add hashes: {ADD_HASHES}"
            )
    for number, shard in enumerate([] if allow_unsafe_types else shards):
        for column, encoding in zip(shard.get("column_names", []), shard.get("column_encodings", []), strict=False):
            if shard["format"] == "mds" and not is_mds_encoding_safe(encoding):
                raise FileError(
                    f"it has pickled data, which can run any code when it is read: column {column!r} ({encoding}) of "
                    f"shards[{number}]. If you trust its source, set dataset.allow_unsafe_types = true"
                )
    return files


def read_shard(name: str, shard: Any, checked: set[str]) -> list[ShardFile]:
    """Validate one shard's entry and return its files; `checked` are the columns of those before, which are valid."""
    expect(isinstance(shard, dict), name, shard, "a section")
    kind, samples = str(shard.get("format")), shard.get("samples")
    expect(kind in FILES and shard.get("version") == 2, f"{name}.format", kind, f"one of {', '.join(FILES)}, version 2")
    expect(type(samples) is int and samples > 0, f"{name}.samples", samples, "a whole number from 1 on")
    compression = shard.get("compression")
    known = compression is None or (isinstance(compression, str) and compression in get_compressions())
    expect(known, f"{name}.compression", compression, "none, or one that streaming knows")
    if kind == "mds" and (columns := str([shard.get(key) for key in COLUMNS])) not in checked:
        check_columns(name, shard)
        checked.add(columns)
    files = []
    for suffix in FILES[kind]:
        raw, entry = read_file(f"{name}.raw_{suffix}", shard.get(f"raw_{suffix}")), shard.get(f"zip_{suffix}")
        expect(bool(entry) == bool(compression), f"{name}.zip_{suffix}", entry, "one where compression is set")
        packed = read_file(f"{name}.zip_{suffix}", entry) if entry else None
        files.append(ShardFile(raw, packed, samples if kind == "mds" else None))
    size = files[0].raw.bytes
    expect(samples * 4 < size or kind != "mds", f"{name}.samples", samples, f"fewer in {size} bytes")
    return files


def read_file(name: str, entry: Any) -> FileInfo:
    """Validate one file's entry: a path in the stream's folder, neither the index nor hidden, as our own files are."""
    expect(isinstance(entry, dict), name, entry, "a section")
    basename, size, hashes = entry.get("basename"), entry.get("bytes"), entry.get("hashes") or {}
    right = isinstance(basename, str) and basename.isprintable() and "\\" not in basename
    right = right and all(part and part[0] != "." for part in basename.split("/")) and basename != get_index_basename()
    expect(right, f"{name}.basename", basename, "a file in the stream's folder")
    expect(type(size) is int and 0 <= size < MAX_BYTES, f"{name}.bytes", size, "a number of bytes")
    right = isinstance(hashes, dict) and all(isinstance(value, str) for value in hashes.values())
    expect(right, f"{name}.hashes", hashes, "hashes by algorithm")
    return FileInfo(basename, size, hashes)


def check_columns(name: str, shard: dict[str, Any]) -> None:
    """Raise FileError unless each column has a name, a known encoding, and a valid size or none."""
    columns = [shard.get(key) for key in COLUMNS]
    right = all(isinstance(column, list) for column in columns) and len({len(column or []) for column in columns}) == 1
    expect(right, f"{name}.column_names, _encodings, _sizes", columns, "three lists of one length")
    for column, encoding, size in zip(*map(list, columns), strict=True):  # type: ignore[arg-type]
        expect(isinstance(column, str), f"{name}.column_names", column, "names")
        known = isinstance(encoding, str) and is_mds_encoding(encoding)
        expect(known, f"{name}.column_encodings", encoding, "encodings that streaming knows")
        right = size is None or (type(size) is int and 0 <= size < MAX_BYTES)
        expect(right, f"{name}.column_sizes", size, "a number of bytes, or null")


def expect(right: bool, name: str, value: Any, expected: str) -> None:
    """Raise FileError with the value found unless `right`."""
    if not right:
        raise FileError(f"it has {name} = {str(value)[:200]!r}, expected {expected}")
