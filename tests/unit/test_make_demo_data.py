"""The demo streams and the debug tokenizer: the same every time, and what they say they are."""

import filecmp
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from streaming.base.format import reader_from_json
from transformers import AutoTokenizer

from examples.mosaic_streaming.config.files import read_toml
from examples.mosaic_streaming.make_demo_data import SEQ_LEN, TOKENIZER, make_demo_data, sources, train_tokenizer
from tests.support.ranks import run_rank_values

CONFIGS = Path("examples/mosaic_streaming/configs")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "demo"
    run_rank_values(lambda: make_demo_data(out))
    return out


def tokens(stream: Path) -> NDArray[np.int32]:
    """All tokens of a stream: int32 [samples, tokens], read shard by shard without a dataset."""
    import json

    shards = json.loads((stream / "index.json").read_text())["shards"]
    assert all("xxh64" in shard["raw_data"]["hashes"] for shard in shards)
    readers = [reader_from_json(str(stream), None, shard) for shard in shards]
    return np.stack([reader[i]["tokens"] for reader in readers for i in range(len(reader))])


@pytest.mark.long
def test_streams_are_the_sources_tokenized_with_eos_behind_each(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    for split in ("train", "val"):
        expected = np.concatenate([[*tokenizer.encode(text), tokenizer.eos_token_id] for text in sources(split)])
        found = tokens(demo / split)
        assert found.shape[1] == SEQ_LEN + 1
        assert found.ravel().tolist() == expected[: found.size].tolist()
        assert expected.size - found.size <= SEQ_LEN
    assert tokens(demo / "train").size >= 1_000_000


def test_no_module_is_in_both_splits() -> None:
    train, val = sources("train"), sources("val")
    assert len(train) + len(val) == len(sources())
    assert min(len(train), len(val)) > 0


@pytest.mark.long
def test_second_run_does_nothing_and_a_cut_one_starts_again(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = demo / "train/index.json"
    written = index.stat().st_mtime_ns
    make_demo_data(demo)
    assert "is up to date" in capsys.readouterr().out
    assert index.stat().st_mtime_ns == written
    (demo / "made_from.json").write_text("{}")  # as of another Python
    run_rank_values(lambda: make_demo_data(demo))
    assert index.stat().st_mtime_ns != written


def test_folder_of_other_data_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/index.json").write_text("somebody's")
    with pytest.raises(SystemExit, match=f"{tmp_path} holds no demo data"):
        make_demo_data(tmp_path)
    assert (tmp_path / "train/index.json").read_text() == "somebody's"


@pytest.mark.long
def test_same_streams_every_time(demo: Path, tmp_path: Path) -> None:
    run_rank_values(lambda: make_demo_data(tmp_path / "again"))
    for split in ("train", "val"):
        files = [path.name for path in (demo / split).iterdir()]
        _, different, unreadable = filecmp.cmpfiles(demo / split, tmp_path / "again" / split, files, shallow=False)
        assert not different + unreadable


@pytest.mark.long
def test_tokenizer_script_makes_the_same_tokenizer_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run_rank_values(lambda name=name: train_tokenizer(tmp_path / name))  # type: ignore[misc]
    assert filecmp.cmp(tmp_path / "a/tokenizer.json", tmp_path / "b/tokenizer.json", shallow=False)
    assert filecmp.cmp(tmp_path / "a/tokenizer_config.json", TOKENIZER / "tokenizer_config.json", shallow=False)


def test_documented_configs_fit_the_demo_data() -> None:
    assert read_toml(str(CONFIGS / "mosaic_job.toml"))["training"]["seq_len"] == SEQ_LEN
    assert read_toml(str(CONFIGS / "mosaic_dataloader.toml"))["dataset"]["local"] == "data/demo"
