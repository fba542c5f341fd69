"""Data that isn't what the settings say is refused at the start, by the first samples of each stream."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from streaming import MDSWriter
from torchtitan.tools.logging import init_logger

from examples.mosaic_streaming.batch.first_samples import check_lengths, check_types
from examples.mosaic_streaming.config import BatchShape
from examples.mosaic_streaming.distributed.abort import AbortChannel
from examples.mosaic_streaming.errors import ConfigError
from tests.support.ranks import run_ranks
from tests.support.reading import write_turns
from tests.support.store import running_store
from tests.support.streams import (
    SEQ_LEN,
    build_loader,
    job,
    loader_config,
    mixture,
    read_samples,
    resolved,
    sample_tokens,
    write_stream,
)

SAMPLES = 40
VOCAB_SIZE = 2048


def start(config: dict[str, Any], world_size: int = 1, reads: bool = False, seq_len: int = SEQ_LEN) -> str:
    """What the ranks of a job print that builds a loader, and may read a batch; one line, where it fails."""

    def run() -> None:
        init_logger()
        channel = AbortChannel()
        with channel.report_errors_once():
            loader = build_loader(config, job(2, seq_len=seq_len), channel=channel)
            if reads:
                read_samples(loader, 1)
            loader.close()
            channel.close()

    ranks = run_ranks(run, world_size)
    output = "".join(rank.output for rank in ranks)
    failed = [line for line in output.splitlines() if line.startswith(("ConfigError", "DataError"))]
    assert len(failed) == any(rank.code for rank in ranks) and "Traceback" not in output, output
    assert not any(rank.left for rank in ranks)
    return failed[0] if failed else output


def as_bytes(dtype: str, length: int = SEQ_LEN + 1) -> list[dict[str, Any]]:
    """Token samples as bytes of a type."""
    return [{"tokens": sample_tokens(sample, length).astype(dtype).tobytes()} for sample in range(SAMPLES)]


def refusal(samples: list[dict[str, Any]], dtype: str) -> str:
    """What is said of samples whose bytes are taken for a type, or nothing."""
    try:
        check_types(samples, dtype, VOCAB_SIZE, "stream 'a'", "loader.toml")
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("written", "configured", "fits"),
    [
        ("int64", "uint16", "int64 or uint64"),
        ("int64", "int32", "int64 or uint64"),
        ("uint16", "int64", "int16 or uint16"),
        ("uint32", "int64", "int32 or uint32"),
        ("uint32", "uint16", "int32 or uint32"),
        ("uint16", "int32", "int16 or uint16"),
        ("int64", "int64", ""),
        ("uint16", "int16", ""),
        ("uint32", "uint32", ""),
    ],
)
@pytest.mark.parametrize("length", [SEQ_LEN + 1, SEQ_LEN])
def test_bytes_of_another_type_are_refused_with_those_that_fit(
    written: str, configured: str, fits: str, length: int
) -> None:
    """With 17 tokens, lengths tell it in part of the cases, with 16 only the ids."""
    said = refusal(as_bytes(written, length), configured)
    if not fits:
        assert said == ""
        return
    assert said.startswith("`tokens` of stream 'a' are bytes, which are no ids of the model (0 to 2,047) with "), said
    assert f"dataset.token_encoding_type = {configured!r} (by default int64)" in said
    assert f'With {fits} they are: set dataset.token_encoding_type = "{fits.split()[-1]}" in loader.toml.' in said


def test_bytes_that_are_ids_of_no_type_are_of_another_tokenizer() -> None:
    samples = [{"tokens": np.arange(60_000, 60_000 + SEQ_LEN + 1).astype(np.uint16).tobytes()}] * 4
    assert "Nor are they with any other: they were made with another tokenizer" in refusal(samples, "uint16")


@pytest.mark.parametrize("array", [np.ones((1, SEQ_LEN + 1), np.int32), np.ones(SEQ_LEN + 1, np.float32)])
def test_arrays_that_are_no_rows_of_ids_are_refused(array: NDArray[Any]) -> None:
    assert "expected whole numbers in one dimension" in refusal([{"tokens": array}], "int64")


def test_start_takes_the_type_from_the_configuration_and_int64_by_default(tmp_path: Path) -> None:
    with MDSWriter(out=str(tmp_path), columns={"tokens": "bytes"}, size_limit=2048) as writer:
        for sample in as_bytes("uint16"):
            writer.write(sample)
    said = start(loader_config(tmp_path))
    assert said.startswith("ConfigError: `tokens` of the stream in loader.toml are bytes, which are no ids"), said
    assert "ConfigError" not in start(loader_config(tmp_path, token_encoding_type="uint16"), reads=True)


def test_type_is_told_of_examples_for_instruction_tuning(tmp_path: Path) -> None:
    with MDSWriter(out=str(tmp_path / "a"), columns=dict.fromkeys(("input_ids", "labels"), "bytes")) as writer:
        for sample in range(SAMPLES):
            tokens = sample_tokens(sample).astype(np.uint16)
            writer.write({"input_ids": tokens[:4].tobytes(), "labels": tokens[4:].tobytes()})
    dataset = {"remote": str(tmp_path / "a"), "local": str(tmp_path / "a"), "num_canonical_nodes": 1}
    config: dict[str, Any] = {"name": "finetuning", "dataset": dataset}
    assert "`input_ids` of the stream in loader.toml are bytes" in start(config)
    dataset["token_encoding_type"] = "uint16"
    assert "ConfigError" not in start(config, reads=True)


@pytest.mark.parametrize("world_size", [1, 2])
def test_stream_of_another_length_is_named_on_all_ranks_before_the_first_batch(tmp_path: Path, world_size: int) -> None:
    streams = {"long": {"local": str(write_stream(tmp_path / "long", 20, length=2 * SEQ_LEN + 1))}}
    streams["right"] = {"local": str(write_stream(tmp_path / "right", 20))}
    told = f"stream 'long' in loader.toml have {2 * SEQ_LEN + 1} tokens, but rows of training.seq_len = {SEQ_LEN} take"
    assert told in start(mixture(streams), world_size)


@pytest.mark.parametrize(
    ("lengths", "row", "ways"),
    [
        (
            [33],
            17,
            "Set training.seq_len = 32, or write samples of 17 tokens, or set dataset.max_seq_len = 17 in loader",
        ),
        (
            [16],
            17,
            "Set dataset.max_seq_len = 16 in loader.toml (the last label of each is then -100), or write samples of 17",
        ),
        (
            [9, 12],
            17,
            "Set training.seq_len = 12 and dataset.max_seq_len = 12 in loader.toml (the last label of each is then -10",
        ),
        ([17, 3], 17, ""),
    ],
)
def test_lengths_that_fill_no_row_are_told_with_each_way_out(lengths: list[int], row: int, ways: str) -> None:
    config = resolved({"name": "text", "dataset": {"remote": "s3://bucket/a", "local": "/nowhere"}})
    told = ""
    try:
        check_lengths(lengths, row, BatchShape("training", 2, SEQ_LEN), "stream 'a'", config)
    except ConfigError as error:
        told = str(error)
    assert ways in told and bool(told) == bool(ways), told
    low, high = min(lengths), max(lengths)
    assert not ways or f"have {low if low == high else f'{low} to {high}'} tokens, but rows of training.seq_len" in told


def test_longer_sample_behind_the_first_ones_stops_the_run_with_its_name(tmp_path: Path) -> None:
    with MDSWriter(out=str(tmp_path), columns={"tokens": "ndarray:int32"}) as writer:
        for sample in range(SAMPLES):
            writer.write({"tokens": sample_tokens(sample, SEQ_LEN + 1 + (sample == SAMPLES - 1))})
    said = start(loader_config(tmp_path), reads=True)
    assert "Error: " not in said

    def read() -> None:
        channel = AbortChannel()
        with channel.report_errors_once():
            read_samples(build_loader(loader_config(tmp_path), channel=channel), SAMPLES // 2)

    [rank] = run_ranks(read)
    assert f"Sample {SAMPLES - 1} in shard.00000.mds of the stream in loader.toml can't be read: it has" in rank.output
    assert f"set dataset.max_seq_len = {SEQ_LEN + 1} to leave out the rest" in rank.output


def test_streams_are_looked_at_in_a_store_and_no_shard_is_fetched_twice(tmp_path: Path, monkeypatch: Any) -> None:
    with running_store() as store:
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        remote = store.upload(write_stream(tmp_path / "stream", SAMPLES), "text")
        config = loader_config(tmp_path / "cache", remote=remote, shuffle=True)
        assert "tokens, but rows" in start(config, seq_len=SEQ_LEN * 2)
        looked = [request["path"] for request in store.requests() if request["path"].endswith(".mds")]
        assert {os.path.basename(path) for path in looked} == {"shard.00000.mds"}
        store.clear()
        assert "Error: " not in start(config, 2, reads=True)
        assert not [request for request in store.requests() if "shard.00000" in request["path"]]


def columns(folder: Path, **values: tuple[str, Any]) -> dict[str, str]:
    """A stream with these columns: of each, its encoding and its value in each sample."""
    with MDSWriter(out=str(folder), columns={name: kind for name, (kind, _) in values.items()}) as writer:
        for _ in range(8):
            writer.write({name: value for name, (_, value) in values.items()})
    return {"remote": str(folder), "local": str(folder)}


def ids(tokens: Sequence[int]) -> tuple[str, Any]:
    """A column with the same tokens in each sample."""
    return "ndarray:int32", np.array(tokens, np.int32)


TOKENS = ids(range(20, 20 + SEQ_LEN + 1))
TEXT = ("str", "import os\n" * 20)
TURNS = [{"input_ids": [20, 21], "labels": [22, 23]}]


def test_streams_of_different_columns_are_not_mixed(tmp_path: Path) -> None:
    streams = {"a": columns(tmp_path / "a", tokens=TOKENS), "b": columns(tmp_path / "b", text=TEXT)}
    said = start(mixture(streams), 2)
    assert "stream 'a' in loader.toml has `tokens` (ndarray:int32); stream 'b' in loader.toml has `text` (str)" in said
    same = {"a": columns(tmp_path / "c", tokens=TOKENS), "b": columns(tmp_path / "d", tokens=TOKENS, source=TEXT)}
    assert "Error: " not in start(mixture(same, num_canonical_nodes=1), reads=True)


def test_shards_of_a_stream_that_differ_are_named(tmp_path: Path) -> None:
    """As merging the indexes of two folders makes them."""
    for name, column in (("a", {"tokens": TOKENS}), ("b", {"text": TEXT})):
        columns(tmp_path / name, **column)
    shards = []
    for name in ("a", "b"):
        index = (tmp_path / name / "index.json").read_text().replace("shard.0", f"{name}/shard.0")
        shards.append(re.fullmatch(r'\{"shards": \[(.*)\], "version": 2\}', index)[1])  # type: ignore[index]
    (tmp_path / "index.json").write_text(f'{{"shards": [{", ".join(shards)}], "version": 2}}')
    said = start(loader_config(tmp_path))
    assert "the stream in loader.toml, a/shard.00000.mds, has `tokens` (ndarray:int32)" in said
    assert "the stream in loader.toml, b/shard.00000.mds, has `text` (str)" in said


def test_examples_of_different_forms_are_mixed(tmp_path: Path) -> None:
    streams = {
        "turns": columns(tmp_path / "a", turns=("json", TURNS)),
        "texts": columns(tmp_path / "b", prompt=("str", "import"), response=("str", " os")),
        "ids": columns(tmp_path / "c", input_ids=ids([30, 31]), labels=ids([32, 33])),
    }
    config = {"name": "finetuning", "dataset": {"streams": streams, "num_canonical_nodes": 1, "shuffle": True}}

    def read() -> set[int]:
        batches = iter(build_loader(config, job(8)))
        return {int(row[0]) for _ in range(3) for row in next(batches)[0]["input"]}

    [rank] = run_ranks(read)
    assert rank.code == 0 and len(rank.value) == 3 and {20, 30} < rank.value, rank.output


@pytest.mark.parametrize(
    ("loader", "values", "message"),
    [
        ("text", {"x": TEXT}, "has `x` (str), but the text loader reads `text` or `tokens`: write it with these"),
        ("text", {"turns": ("json", TURNS)}, 'reads `text` or `tokens`: set name = "finetuning" in loader.toml.'),
        ("text", {"tokens": TEXT}, "has `tokens` (str), but the text loader reads that column as ndarray or bytes of"),
        ("text", {"tokens": ("ndarray:float32", np.ones(17, np.float32))}, "has `tokens` (ndarray:float32), but"),
        ("finetuning", {"tokens": TOKENS}, 'set name = "text" in loader.toml.'),
        ("finetuning", {"prompt": TEXT, "response": TEXT, "id": TEXT}, "`prompt` and `response` alone"),
        ("finetuning", {"messages": TEXT}, "has `messages` (str), but the finetuning loader reads that column as json"),
    ],
)
def test_stream_that_the_loader_does_not_read_is_refused(
    tmp_path: Path, loader: str, values: dict[str, Any], message: str
) -> None:
    said = start({"name": loader, "dataset": columns(tmp_path, **values) | {"num_canonical_nodes": 1}})
    assert said.startswith("ConfigError: the stream in loader.toml has ") and message in said, said


def test_examples_are_not_taken_for_text(tmp_path: Path) -> None:
    """Few random ids, in which no tokenizer shows."""
    dataset = {"remote": str(write_turns(tmp_path / "a", 40)), "local": str(tmp_path / "a"), "num_canonical_nodes": 1}
    said = start({"name": "finetuning", "dataset": dataset}, reads=True)
    assert "Error: " not in said and "can't be told" not in said
