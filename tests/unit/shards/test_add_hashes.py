"""Hashes are added to a stream's index, and nothing else is touched."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import xxhash
from streaming import JSONWriter, MDSWriter
from streaming.base.compression import decompress

from examples.mosaic_streaming.shards.add_hashes import INDEX, main
from tests.support.ranks import Rank, run_rank_values, run_ranks
from tests.support.streams import build_loader, loader_config, read_samples, write_stream


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The files of a folder, with their times; of the index, none."""
    found = [path for path in folder.iterdir() if path.name != INDEX]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def index_of(folder: Path) -> dict[str, Any]:
    """The content of a stream's index."""
    content: dict[str, Any] = json.loads((folder / INDEX).read_text())
    return content


def run(*flags: object) -> Rank:
    """The command, in a process of its own."""
    [rank] = run_ranks(lambda: main([*map(str, flags)]))
    assert "Traceback" not in rank.output
    return rank


def test_stream_without_hashes_is_read_with_them_afterwards(tmp_path: Path) -> None:
    stream = write_stream(tmp_path / "stream", 40, hashes=())
    os.chmod(stream / INDEX, 0o640)
    before, index = files_of(stream), index_of(stream)
    rank = run(stream)
    assert rank.code == 0 and 'at each start, set validate_hash = "xxh64"' in rank.output
    assert files_of(stream) == before and (stream / INDEX).stat().st_mode & 0o777 == 0o640
    after = index_of(stream)
    for shard in after["shards"]:
        content = (stream / shard["raw_data"]["basename"]).read_bytes()
        assert shard["raw_data"].pop("hashes") == {"xxh64": xxhash.xxh64(content).hexdigest()}
        shard["raw_data"]["hashes"] = {}
    assert after == index
    run(stream)
    [samples] = run_rank_values(lambda: read_samples(build_loader(loader_config(stream, validate_hash="xxh64")), 3))
    assert samples == [[0, 1], [2, 3], [4, 5]]


def test_files_of_compressed_and_of_other_formats_have_hashes_of_both_forms(tmp_path: Path) -> None:
    with MDSWriter(out=str(tmp_path / "a"), columns={"text": "str"}, compression="zstd:3", hashes=["xxh64"]) as writer:
        writer.write({"text": "a" * 1000})
    with JSONWriter(out=str(tmp_path / "b"), columns={"text": "str"}) as writer:
        writer.write({"text": "a"})
    for name in ("a", "b"):
        assert run(tmp_path / name, "--hash=sha1").code == 0
    [shard] = index_of(tmp_path / "a")["shards"]
    packed = (tmp_path / "a" / shard["zip_data"]["basename"]).read_bytes()
    assert shard["zip_data"]["hashes"]["sha1"] == hashlib.sha1(packed).hexdigest()
    assert shard["raw_data"]["hashes"]["sha1"] == hashlib.sha1(decompress("zstd:3", packed)).hexdigest()
    assert set(shard["raw_data"]["hashes"]) == {"sha1", "xxh64"}
    [shard] = index_of(tmp_path / "b")["shards"]
    for kind in ("raw_data", "raw_meta"):
        content = (tmp_path / "b" / shard[kind]["basename"]).read_bytes()
        assert shard[kind]["hashes"] == {"sha1": hashlib.sha1(content).hexdigest()}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "shard.00001.mds is missing."),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "shard.00001.mds has 971 bytes, expected 972."),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"?"), "shard.00001.mds is damaged: its xxh64 is "),
        (lambda file: file.with_name(INDEX).write_text("{}"), "it is not a streaming index of version 2"),
    ],
)
def test_what_is_not_as_the_index_says_gets_no_hash(tmp_path: Path, damage: Any, message: str) -> None:
    """The stream has hashes already, which are not written over."""
    stream = write_stream(tmp_path / "stream", 100)
    damage(stream / "shard.00001.mds")
    names, index = os.listdir(stream), (stream / INDEX).read_bytes()
    rank = run(stream)
    assert rank.code == 1 and rank.output.startswith(f"DataError: {stream}/index.json can't get hashes: ")
    assert message in rank.output
    assert (os.listdir(stream), (stream / INDEX).read_bytes()) == (names, index)


def test_folder_without_an_index_is_refused_with_those_below_it(tmp_path: Path) -> None:
    write_stream(tmp_path / "train", 8)
    assert f"No index.json in {tmp_path}, but in {tmp_path}/train: name one of these." in run(tmp_path).output
    assert "--hash md6, expected one of: " in run(tmp_path / "train", "--hash=md6").output


def test_template_has_the_hash_of_the_demo_alone_and_says_how_to_add_others() -> None:
    """What a user replaces by a stream of llm-foundry's converters, which write no hashes."""
    template = Path("examples/mosaic_streaming/configs/mosaic_dataloader.toml").read_text()
    replaced = template[: template.index("in place of the three lines above")].splitlines()[-5:]
    assert [line.split(" = ")[0] for line in replaced[:3]] == ["local", "split", "validate_hash"]
    assert template.replace("\n".join(replaced[:3]), "").count("\nvalidate_hash") == 0
    assert "examples.mosaic_streaming.shards.add_hashes FOLDER" in template
