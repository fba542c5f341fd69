"""Samples of shards that stay open: the right ones, also where the file has changed meanwhile, and of a few files."""

import contextlib
import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from streaming.base.format import reader_from_json

from examples.mosaic_streaming.errors import DataError
from examples.mosaic_streaming.shards import reader
from examples.mosaic_streaming.shards.reader import CheckedReader, OpenFile
from tests.support.ranks import run_rank_values
from tests.support.streams import FIRST_ID, build_loader, job, loader_config, read_samples, write_stream


@pytest.fixture
def shard(tmp_path: Path) -> CheckedReader:
    """The first shard of a stream, which stays open."""
    write_stream(tmp_path, 40)
    [first, *_] = json.loads((tmp_path / "index.json").read_text())["shards"]
    shard: Any = reader_from_json(str(tmp_path), "", first)
    shard.__class__ = CheckedReader
    shard.stays = True
    reader.kept_open.cache_clear()
    return shard


def numbers(shard: CheckedReader) -> list[int]:
    """The numbers of a shard's samples."""
    return [int(shard[index]["tokens"][0]) - FIRST_ID for index in range(shard.samples)]


def test_a_shard_is_opened_once(shard: CheckedReader) -> None:
    assert numbers(shard) == numbers(shard) == list(range(shard.samples))
    assert reader.kept_open.cache_info().misses == 1


def test_a_file_that_was_put_right_is_read_anew(shard: CheckedReader) -> None:
    """Another process has found it cut, and has fetched it again."""
    path, expected = Path(shard._path), numbers(shard)
    content = path.read_bytes()
    os.truncate(path, 100)
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").rename(path)
    assert numbers(shard) == expected


def test_a_cached_file_that_is_cut_is_removed_and_missed(shard: CheckedReader) -> None:
    shard.is_cache = True
    numbers(shard)
    os.truncate(shard._path, 100)
    with pytest.raises(FileNotFoundError, match="was damaged while in use"):
        numbers(shard)
    assert not os.path.exists(shard._path)


def test_the_only_copy_stays_where_it_is_cut(shard: CheckedReader) -> None:
    numbers(shard)
    os.truncate(shard._path, 100)
    with pytest.raises(DataError, match="There is no remote to fetch it from"):
        numbers(shard)
    assert os.path.exists(shard._path)


def open_files() -> list[str]:
    """The paths of the files that this process has open; its threads may close theirs meanwhile."""
    paths = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return paths


@pytest.mark.parametrize(("cache_limit", "kept"), [(None, 3), (10_000, 0)])
def test_a_few_files_stay_open_and_none_that_may_be_evicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_limit: int | None, kept: int
) -> None:
    stream = write_stream(tmp_path / "remote", 100)
    settings: dict[str, Any] = {"cache_limit": cache_limit} if cache_limit else {}
    config = loader_config(tmp_path / "cache", remote=str(stream), shuffle=True, **settings)
    monkeypatch.setattr(reader, "kept_open", functools.lru_cache(3)(OpenFile))

    def read() -> int:
        loader = build_loader(config, job(4))
        assert sorted(itertools.chain(*read_samples(loader, 25))) == list(range(100))
        return sum(path.endswith(".mds") for path in open_files() if path.startswith(str(tmp_path / "cache")))

    assert run_rank_values(read) == [kept]


def test_file_is_closed_when_the_module_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when Python ends."""
    (tmp_path / "file").write_bytes(b"content")
    file = OpenFile(str(tmp_path / "file"))
    links = Path("/proc/self/fd").glob("*")
    [number] = [link for link in links if os.path.realpath(link) == str(tmp_path / "file")]
    monkeypatch.setattr(reader, "os", None)
    del file
    assert not number.exists()


ENDS = """
import ctypes, sys
from examples.mosaic_streaming.shards import reader
ctypes.pythonapi.Py_IncRef(ctypes.py_object(reader))  # as where C refers to it: Python empties it first
reader.kept_open(sys.argv[1])
"""


@pytest.mark.long
def test_files_that_are_open_when_python_ends_are_closed_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ENDS, str(tmp_path / "file")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
