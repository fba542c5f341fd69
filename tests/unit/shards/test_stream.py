"""Streams alone: files come into a cache whole and right, or not at all."""

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import pytest
from streaming.base.format import FileInfo

from examples.mosaic_streaming.errors import DataError
from examples.mosaic_streaming.shards.fetch_stats import FetchCounts, FetchStats
from examples.mosaic_streaming.shards.index import FileError, ShardFile, read_index
from examples.mosaic_streaming.shards.prepare import make_stream
from examples.mosaic_streaming.shards.stream import CheckedStream, check_file, describe
from tests.support.streams import write_stream

LABEL = "the stream"


def open_stream(folder: Path, **settings: Any) -> tuple[CheckedStream, list[ShardFile]]:
    """A stream of `folder/remote` with its cache beside it, and its files."""
    remote = write_stream(folder / "remote", 60)
    given = {"remote": str(remote), "local": str(folder / "cache"), "download_retry": 1, "validate_hash": "xxh64"}
    stream = make_stream(given | settings, LABEL)
    return stream, read_index(str(remote / "index.json"), False, "xxh64")


def test_file_is_fetched_once_and_its_bytes_are_counted(tmp_path: Path) -> None:
    stream, parts = open_stream(tmp_path)
    stream.fetch_stats = str(tmp_path / "counts")
    assert [stream.prepare(part, None) for part in parts] == [part.raw.bytes for part in parts]
    assert [stream.prepare(part, None) for part in parts] == [0] * len(parts)
    size = sum(part.raw.bytes for part in parts)
    assert FetchStats([stream.fetch_stats]).read() == FetchCounts(len(parts), size, 0)
    for part in parts:
        name = part.raw.basename
        assert (tmp_path / "cache" / name).read_bytes() == (tmp_path / "remote" / name).read_bytes()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda content: content[:-1], "bytes, expected"),
        (lambda content: content[:-1] + b"?", "its xxh64 is"),
        (lambda content: b"\1" + content[1:], "samples, the index says"),
    ],
)
def test_damaged_file_never_comes_into_the_cache(tmp_path: Path, damage: Any, told: str) -> None:
    stream, [part, *_] = open_stream(tmp_path)
    file = tmp_path / "remote" / part.raw.basename
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=rf"{file} of {LABEL} can't be fetched: .*{told}.* Attempts: 1"):
        stream.prepare(part, None)
    assert os.listdir(tmp_path / "cache") == []


def test_what_fails_once_is_fetched_again(tmp_path: Path) -> None:
    stream, [part, *_] = open_stream(tmp_path, download_retry=2)
    stream.fetch_stats = str(tmp_path / "counts")
    faults = [FileError("it is not what it was")]

    def store(path: str, folder: str) -> None:
        if faults:
            raise faults.pop()
        stream.store(path, folder, part, None)

    stream.fetch(part.raw.basename, part.raw.bytes, store)
    assert os.listdir(tmp_path / "cache") == [part.raw.basename]
    assert FetchStats([stream.fetch_stats]).read().retries == 1


def test_stream_without_a_remote_names_the_file_that_is_missing(tmp_path: Path) -> None:
    local = write_stream(tmp_path / "local", 60)
    stream, [part, *_] = make_stream({"local": str(local)}, LABEL), read_index(str(local / "index.json"), False, None)
    assert not stream.is_cache
    assert stream.prepare(part, None) == 0
    (local / part.raw.basename).unlink()
    with pytest.raises(DataError, match=f"{local}/{part.raw.basename} is missing, and {LABEL} has no remote"):
        stream.prepare(part, None)


def test_full_disk_is_told_with_the_bytes_that_are_needed(tmp_path: Path) -> None:
    stream, [part, *_] = open_stream(tmp_path)

    def fill_the_disk() -> None:
        with stream.storing(part.raw.basename, 123_456) as folder:
            assert Path(folder).parent == tmp_path / "cache"
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DataError, match=r"can't be stored: No space left .* It needs 123,456 bytes, .* Make room"):
        fill_the_disk()
    assert os.listdir(tmp_path / "cache") == []


def test_file_matches_the_index_in_size_samples_and_hash(tmp_path: Path) -> None:
    _, [part, *_] = open_stream(tmp_path)
    file, info = str(tmp_path / "remote" / part.raw.basename), part.raw
    check_file(file, info, "xxh64", part.samples)
    for other, samples, told in [
        (dataclasses.replace(info, bytes=info.bytes + 1), part.samples, "bytes, expected"),
        (info, 1, "samples, the index says 1"),
        (FileInfo(info.basename, info.bytes, {"xxh64": "0"}), part.samples, "its xxh64 is .*, expected 0"),
    ]:
        with pytest.raises(FileError, match=told):
            check_file(file, other, "xxh64", samples)


def test_errors_of_a_store_are_told_with_their_code() -> None:
    error: Any = OSError("An error occurred.")
    error.response = {"Error": {"Code": "SlowDown"}}
    assert describe(error) == "OSError (SlowDown): An error occurred."
    assert describe(FileError("it has no samples")) == "it has no samples."
