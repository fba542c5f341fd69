"""No index is believed that lies, and nothing that it says reaches beyond the cache."""

import copy
import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streaming import JSONWriter, MDSWriter

from examples.mosaic_streaming.shards.index import FileError, read_index
from tests.support.reading import read_job
from tests.support.streams import sample_tokens, write_stream

SHARDS = 4


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What streaming writes."""
    folder = write_stream(tmp_path_factory.mktemp("index") / "stream", samples=32)
    content: dict[str, Any] = json.loads((folder / "index.json").read_text())
    assert len(content["shards"]) == SHARDS
    return content


def read(index: object, folder: Path, allow_unsafe_types: bool = False, validate_hash: str | None = None) -> list[Any]:
    """Write an index and read it."""
    (folder / "index.json").write_text(json.dumps(index))
    return read_index(str(folder / "index.json"), allow_unsafe_types, validate_hash)


def test_true_index_is_read(index: dict[str, Any], tmp_path: Path) -> None:
    parts = read(index, tmp_path, validate_hash="xxh64")
    assert [part.raw.basename for part in parts] == [f"shard.{number:05}.mds" for number in range(SHARDS)]
    assert sum(part.samples for part in parts) == 32
    assert all(part.stored is part.raw for part in parts)


def test_compressed_stream_is_read(tmp_path: Path) -> None:
    with MDSWriter(out=str(tmp_path), columns={"text": "str"}, compression="zstd:3", hashes=["sha1"]) as writer:
        writer.write({"text": "a" * 1000})
    [part] = read_index(str(tmp_path / "index.json"), False, "sha1")
    assert part.stored.basename == "shard.00000.mds.zstd"


def test_other_formats_are_read(tmp_path: Path) -> None:
    with JSONWriter(out=str(tmp_path), columns={"text": "str"}) as writer:
        writer.write({"text": "a"})
    parts = read_index(str(tmp_path / "index.json"), False, None)
    assert [part.raw.basename for part in parts] == ["shard.00000.json", "shard.00000.json.meta"]


NAMES: list[str] = [
    "../../x",
    "/tmp/x",
    "a/../../x",
    "..",
    ".",
    "",
    "./x",
    "a//b",
    "index.json",
    ".in_use",
    "a/.b",
    "a\0b",
    "a\\..\\b",
]
NUMBERS: list[Any] = [-1, 1.5, "7", None, True]
LIES: list[Any] = [
    *[("samples", value, "samples = ") for value in [*NUMBERS, 0, 10**9, []]],
    *[("raw_data.bytes", value, "raw_data.bytes = ") for value in [*NUMBERS, 1 << 70]],
    *[("raw_data.basename", value, "raw_data.basename = ") for value in [*NAMES, None, 3, ["x"]]],
    *[("raw_data.hashes", value, "raw_data.hashes = ") for value in ({"xxh64": 3}, "abc", ["abc"])],
    *[("raw_data", value, "raw_data = ") for value in [*NUMBERS, "x"]],
    *[("zip_data", value, "zip_data = ") for value in ({"basename": "x", "bytes": 1, "hashes": {}}, "x")],
    *[("compression", value, "compression = ") for value in ("zip", 3, True)],
    *[("format", value, "format = ") for value in ("parquet", None, 3)],
    ("version", 1, "format = "),
    *[("column_encodings", value, "column_") for value in (None, [], ["int"] * 2, ["spam"], [3], "ndarray:int32")],
    *[("column_sizes", value, "column_") for value in (None, [-1], ["8"], [])],
    *[("column_names", value, "column_") for value in (None, [3], ["a", "b"])],
    ("raw_data.basename", "shard.00001.mds", "basename = "),
]


@pytest.mark.parametrize(("key", "value", "told"), LIES)
def test_entry_that_cannot_be_is_refused(
    index: dict[str, Any], tmp_path: Path, key: str, value: object, told: str
) -> None:
    changed = copy.deepcopy(index)
    entry = changed["shards"][3]
    *sections, last = key.split(".")
    for section in sections:
        entry = entry[section]
    entry[last] = value
    with pytest.raises(FileError, match=rf"it has (shards\[3\]\.)?{re.escape(told)}.*, expected "):
        read(changed, tmp_path)


@pytest.mark.parametrize("content", [{}, [], None, 3, "x", {"version": 2}, {"version": 1, "shards": []}])
def test_file_that_is_no_index_is_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(FileError, match="it is not a streaming index of version 2"):
        read(content, tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_file_that_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(FileError, match="it is not JSON"):
        read_index(str(tmp_path / "index.json"), False, None)


def test_index_without_samples_is_said_to_have_none(tmp_path: Path) -> None:
    with MDSWriter(out=str(tmp_path / "empty"), columns={"tokens": "ndarray:int32"}):
        pass
    write_stream(tmp_path / "full", 40)
    streams = {name: {"local": str(tmp_path / name)} for name in ("full", "empty")}
    read = read_job({"name": "text", "dataset": {"streams": streams}}, tmp_path / "notes", 2, steps=1)
    told = f"{tmp_path}/empty/index.json of stream 'empty' in loader.toml can't be used: it has no samples: write some,"
    assert told in read.message and not read.steps


def test_missing_hash_is_refused_with_those_that_there_are(index: dict[str, Any], tmp_path: Path) -> None:
    told = r"no sha1 of shard\.00000\.mds \(validate_hash\); its hashes: xxh64\. .* add hashes: python -m .*add_hashes"
    with pytest.raises(FileError, match=told):
        read(index, tmp_path, validate_hash="sha1")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(NAMES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
ENTRY = [*("samples", "raw_data", "zip_data", "compression", "format", "version", "hashes", "size_limit")]
ENTRY += ["column_names", "column_encodings", "column_sizes"]


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entry=st.dictionaries(st.sampled_from(ENTRY), JSON, max_size=3),
    file=st.dictionaries(st.sampled_from(["basename", "bytes", "hashes"]), JSON, max_size=2),
)
def test_any_entry_is_taken_or_refused_with_words(
    index: dict[str, Any], tmp_path: Path, entry: dict[str, Any], file: dict[str, Any]
) -> None:
    changed = copy.deepcopy(index)
    changed["shards"][0] |= {"raw_data": changed["shards"][0]["raw_data"] | file} | entry
    try:
        parts = read(changed, tmp_path)
    except FileError as error:
        assert re.match(r"it (has|is not) ", str(error))
        return
    for part in parts:
        place = os.path.normpath(os.path.join("/cache", part.raw.basename))
        assert place.startswith("/cache/") and place != "/cache/index.json" and part.raw.bytes >= 0


def config(folder: Path, cache: Path, **settings: Any) -> dict[str, Any]:
    """A loader that fetches from another folder."""
    dataset = {"remote": str(folder), "local": str(cache), "num_canonical_nodes": 1, **settings}
    return {"name": "text", "num_workers": 2, "dataset": dataset}


def more_samples(index: dict[str, Any]) -> None:
    index["shards"][0]["samples"] += 1


def fewer_samples(index: dict[str, Any]) -> None:
    index["shards"][0]["samples"] -= 1


def outside(index: dict[str, Any]) -> None:
    index["shards"][0]["raw_data"]["basename"] = "../../x"


def negative(index: dict[str, Any]) -> None:
    index["shards"][0]["raw_data"]["bytes"] = -972


TOLD: dict[Callable[[dict[str, Any]], None], str] = {
    more_samples: r"it has 10 samples, the index says 11\.",
    fewer_samples: r"it has 10 samples, the index says 9\.",
    outside: r"shards\[0\]\.raw_data\.basename = '\.\./\.\./x', expected a file in the stream's folder\.",
    negative: r"shards\[0\]\.raw_data\.bytes = '-972', expected a number of bytes\.",
}
QUICK = {(more_samples, True), (outside, False)}


@pytest.mark.parametrize(
    ("lie", "is_local"),
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.long)
        for case in itertools.product(TOLD, (True, False))
    ],
)
def test_job_on_an_index_that_lies_stops_and_writes_nothing_outside(
    tmp_path: Path, lie: Callable[[dict[str, Any]], None], is_local: bool
) -> None:
    stream, cache = write_stream(tmp_path / "jobs/streams/a", 32), tmp_path / "jobs/caches/a"
    (tmp_path / "x").write_text("not yours")
    (tmp_path / "jobs/x").write_text("not yours")
    content = json.loads((stream / "index.json").read_text())
    true = (stream / "index.json").read_text()
    lie(content)
    (stream / "index.json").write_text(json.dumps(content))
    before = files(tmp_path)
    loader = config(stream, cache)
    if is_local:
        loader["dataset"] |= {"remote": None, "local": str(stream)}
    stopped = read_job(loader, tmp_path / "notes", 2, steps=3)
    assert re.search(TOLD[lie], stopped.message), stopped.message
    assert "of the stream in loader.toml" in stopped.message
    mine = (cache, tmp_path / "notes")
    found = {file: text for file, text in files(tmp_path).items() if not any(map(file.is_relative_to, mine))}
    assert found == before
    (stream / "index.json").write_text(true)
    rest = read_job(loader, tmp_path / "rest", 2, steps=3 - len(stopped.steps), state=stopped.state)
    assert stopped.steps + rest.steps == [list(range(begin, begin + 8)) for begin in (0, 8, 16)]


def files(folder: Path) -> dict[Path, str]:
    """All files below a folder."""
    return {file: file.read_text(errors="replace") for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("is_local", [True, pytest.param(False, marks=pytest.mark.long)])
def test_pickled_columns_are_refused_unless_allowed(tmp_path: Path, is_local: bool) -> None:
    stream = tmp_path / "stream"
    with MDSWriter(out=str(stream), columns={"tokens": "ndarray:int32", "extra": "pkl"}) as writer:
        for sample in range(16):
            writer.write({"tokens": sample_tokens(sample), "extra": {"a": 1}})
    loader = config(stream, tmp_path / "cache")
    if is_local:
        loader["dataset"] |= {"remote": None, "local": str(stream)}
    stopped = read_job(loader, tmp_path / "1", steps=1)
    assert "pickled data, which can run any code when it is read: column 'extra' (pkl) of shards[0]" in stopped.message
    assert "If you trust its source, set dataset.allow_unsafe_types = true." in stopped.message
    loader["dataset"]["allow_unsafe_types"] = True
    assert read_job(loader, tmp_path / "2", steps=1).steps == [list(range(8))]
