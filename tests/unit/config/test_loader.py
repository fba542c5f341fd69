"""What is filled into a loader's configuration, and what is refused, with which words."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
from llmfoundry.data import StreamingTextDataset
from streaming import StreamingDataset
from streaming.base.storage import CloudDownloader, LocalDownloader

from examples.mosaic_streaming.config.loader import ResolvedLoader
from examples.mosaic_streaming.config.warnings import warnings_of_timeouts
from examples.mosaic_streaming.errors import ConfigError
from tests.support import streams as support
from tests.support.streams import write_stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stream(tmp_path_factory.mktemp("data") / "train", samples=4).parent


@pytest.fixture
def config(folder: Path) -> dict[str, Any]:
    return {"name": "text", "dataset": {"local": str(folder), "split": "train", "shuffle": True}}


def resolved(config: dict[str, Any]) -> dict[str, Any]:
    return support.resolved(config, replication=4).config


def refuse(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(config)


def test_derived_keys_are_filled_in_a_copy(config: dict[str, Any]) -> None:
    given = copy.deepcopy(config)
    complete = resolved(config)
    assert config == given
    derived = {"max_seq_len": 17, "replication": 4}
    assert complete["dataset"] == {**given["dataset"], **derived}
    assert complete["drop_last"] is True


@pytest.mark.parametrize("max_seq_len", [16, 17])
def test_right_values_of_derived_keys_are_kept(config: dict[str, Any], max_seq_len: int) -> None:
    config["dataset"] |= {"max_seq_len": max_seq_len, "replication": 4}
    config["device_batch_size"] = 8
    complete = resolved(config)
    assert complete["dataset"]["max_seq_len"] == max_seq_len
    assert "device_batch_size" not in complete


@pytest.mark.parametrize("number", [0, -1, "many", 1.5, True])
def test_num_canonical_nodes_that_is_no_number_is_refused(config: dict[str, Any], number: object) -> None:
    config["dataset"]["num_canonical_nodes"] = number
    refuse(
        config, f"dataset.num_canonical_nodes = {number!r} in loader.toml, expected a whole number, from 1 to 65,536"
    )


def test_proportion_that_some_streams_lack_is_told_with_their_names(config: dict[str, Any], folder: Path) -> None:
    streams = {"web": {"local": str(folder), "proportion": 0.7}, "code": {"local": str(folder)}}
    config["dataset"] = {"streams": streams, "split": "train"}
    refuse(config, r"some streams have a `proportion` \(web 0.7\), and some have none \(code\)")


def test_key_of_the_dataset_is_told_its_place(config: dict[str, Any]) -> None:
    refuse(config | {"name": "finetuning", "packing_ratio": 2}, r"packing_ratio \(it belongs in \[dataset\]\)")


def test_what_torch_refuses_without_workers_is_put_right(config: dict[str, Any]) -> None:
    config |= {"num_workers": 0, "prefetch_factor": 4, "persistent_workers": True, "timeout": 30}
    complete = resolved(config)
    assert complete["timeout"] == 0
    assert complete["prefetch_factor"] is None
    assert complete["persistent_workers"] is False
    config["num_workers"] = 2
    complete = resolved(config)
    assert complete["timeout"] == 30
    assert complete["prefetch_factor"] == 4
    assert complete["persistent_workers"] is True


def test_each_key_of_the_upstream_text_dataset_is_known(config: dict[str, Any]) -> None:
    parameters = {
        **inspect.signature(StreamingDataset).parameters,
        **inspect.signature(StreamingTextDataset).parameters,
    }
    others = {"local", "remote", "streams", "tokenizer", "kwargs", "batch_size", "max_seq_len", "replication", "self"}
    given = {key: parameter.default for key, parameter in parameters.items() if key not in others}
    config["dataset"] = {**given, "remote": "s3://bucket/data", "shuffle": True}
    config |= {"drop_last": False, "pin_memory": False, "timeout": 0}
    assert resolved(config)["dataset"].items() >= (given | {"shuffle": True}).items()


@pytest.mark.parametrize("streams", [["s3://bucket/web"], {"web": "s3://bucket/web"}])
def test_streams_that_are_no_sections_are_refused(config: dict[str, Any], streams: object) -> None:
    config["dataset"]["streams"] = streams
    refuse(config, r"dataset.streams in loader.toml is not made of sections \[dataset.streams.NAME\]")


@pytest.mark.parametrize(
    ("key", "valid"),
    [
        ("shuffle_algo", "py1br, py1e, py1s, py2s, naive"),
        ("partition_algo", "orig, relaxed"),
        ("batching_method", "random, stratified, per_stream, device_per_stream, blend"),
        ("sampling_method", "balanced, fixed"),
    ],
)
def test_unknown_word_is_refused_with_the_valid_ones(config: dict[str, Any], key: str, valid: str) -> None:
    config["dataset"][key] = "py2"
    refuse(config, f"dataset.{key} = 'py2' in loader.toml, expected one of: .*{valid}\\.")
    for word in valid.split(", "):
        config["dataset"][key] = word
        assert resolved(config)["dataset"][key] == word


def test_finetuning_from_a_local_folder_alone_is_refused_with_the_way_out(config: dict[str, Any]) -> None:
    config["dataset"]["decoder_only_format"] = True
    refuse(config | {"name": "finetuning"}, "dataset in loader.toml has no `remote`.*Give the stream's folder as")


def test_unknown_keys_are_refused_all_at_once_with_the_nearest(config: dict[str, Any], folder: Path) -> None:
    config |= {"num_worker": 2}
    config["dataset"] = {"shufle": True, "streams": {"web": {"local": str(folder), "split": "train", "porportion": 1}}}
    refuse(
        config,
        r"loader.toml.*num_worker \(did you mean num_workers\?\); dataset.shufle \(did you mean shuffle\?\); "
        r"dataset.streams.web.porportion \(did you mean proportion\?\)",
    )


def test_unknown_key_with_nothing_near_gets_the_valid_ones(config: dict[str, Any]) -> None:
    refuse(config | {"zzz": 1}, r"zzz \(valid: .*num_workers.*timeout\)")


def test_unknown_loader_is_refused_with_the_valid_names(config: dict[str, Any]) -> None:
    refuse(config | {"name": "txt"}, r"name = 'txt' in loader.toml, expected one of: .*finetuning.*text")
    del config["name"]
    refuse(config, "loader.toml has no `name`, expected one of")


def test_missing_dataset_section_is_refused() -> None:
    refuse({"name": "text"}, r"loader.toml has no \[dataset\] section")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_seq_len", 2048, r"dataset.max_seq_len = 2048 in loader.toml, but training.seq_len = 16 allows 17 or 16"),
        ("replication", 2, r"dataset.replication = 2 in loader.toml, but .* 4. Remove the key: it is derived"),
        ("batch_size", 8, r"dataset.batch_size = 8 in loader.toml. Remove .*training.local_batch_size = 8"),
    ],
)
def test_what_the_job_config_owns_is_refused(config: dict[str, Any], key: str, value: int, message: str) -> None:
    config["dataset"][key] = value
    refuse(config, message)


def test_another_device_batch_size_is_refused(config: dict[str, Any]) -> None:
    refuse(
        config | {"device_batch_size": 4}, r"device_batch_size = 4 .* training.local_batch_size is 8. Remove the key"
    )


def test_stream_without_index_is_refused_with_its_path_and_the_demo_command(config: dict[str, Any]) -> None:
    config["dataset"]["split"] = "trian"
    refuse(config, r"No index.json in .*/trian .*python -m examples.mosaic_streaming.make_demo_data")


def test_cache_limit_with_a_stream_that_has_no_remote_is_refused(config: dict[str, Any], folder: Path) -> None:
    config["dataset"]["cache_limit"] = "1gb"
    refuse(
        config,
        "cache_limit in loader.toml, but dataset has no `remote` beside its `local`: streaming would delete its only",
    )
    both = {"a": {"remote": str(folder), "local": "/tmp/a"}, "b": {"local": str(folder)}}
    config["dataset"] = {"split": "train", "cache_limit": "1gb", "streams": both}
    refuse(config, "but b has no `remote`")
    both["b"] |= {"remote": str(folder), "local": "/tmp/b"}
    assert resolved(config)["dataset"]["cache_limit"] == "1gb"


def test_stream_without_a_place_is_refused(config: dict[str, Any]) -> None:
    config["dataset"] = {"streams": {"web": {"proportion": 1.0}}}
    refuse(config, "web in loader.toml has no `local` or `remote`")


def test_remote_url_needs_no_index_on_this_machine(config: dict[str, Any]) -> None:
    config["dataset"] |= {"remote": "s3://bucket/data", "local": "/nowhere"}
    assert resolved(config)["dataset"]["remote"] == "s3://bucket/data"


@pytest.mark.parametrize(
    "remote",
    ["dbfs:/Volumes/main/web", "dbfs:/web", "s3://bucket/web", "hf://datasets/web", "/data/web", "web", "./a:b"],
)
def test_folder_and_url_are_told_apart_as_streaming_does(config: dict[str, Any], remote: str) -> None:
    config["dataset"] = {"remote": remote, "local": "/nowhere"}
    if isinstance(CloudDownloader.get(remote), LocalDownloader):
        refuse(config, f"No index.json in {remote} ")
    else:
        assert resolved(config)["dataset"]["remote"] == remote


def test_local_folder_is_one_however_it_is_called(config: dict[str, Any]) -> None:
    config["dataset"] = {"local": "data:v2/web"}
    refuse(config, "No index.json in data:v2/web ")


@pytest.mark.parametrize(
    ("remote", "warns"), [("dbfs:/Volumes/main/web", True), ("s3://bucket/web", True), ("/data/web", False)]
)
def test_store_that_ranks_would_not_wait_for_is_warned_of(remote: str, warns: bool) -> None:
    stream = {"remote": remote, "local": "/cache", "download_retry": 3, "download_timeout": 60}
    loader = ResolvedLoader({"name": "text", "dataset": stream}, "x.toml", False)
    assert any("3 (download_retry) x 60 s" in line for line in warnings_of_timeouts(loader, 100)) is warns
