"""streaming calls what `shards` overrides in it, and fails as `shards` mends."""

import inspect
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import Stream, StreamingDataset
from streaming.base.dataset import _Iterator, _ShardState
from streaming.base.format.mds import MDSReader
from streaming.base.format.mds.encodings import _get_coder, mds_decode
from streaming.base.storage import CloudDownloader

from examples.mosaic_streaming.shards.dataset import CheckedDataset
from examples.mosaic_streaming.shards.reader import CheckedReader
from examples.mosaic_streaming.shards.stream import CheckedStream
from tests.support.ranks import run_rank_values
from tests.support.streams import write_stream

SAMPLES = 20
THREADS = ("_prepare_thread", "_ready_thread", "_each_sample_id")
DATASET = (*THREADS, "_get_work", "prepare_shard", "get_item", "on_exception", "__iter__", "__getitem__")
READER = ("get_sample_data", "decode_sample")
OVERRIDES = [
    *((StreamingDataset, CheckedDataset, name) for name in DATASET),
    (Stream, CheckedStream, "prepare_shard"),
    *((MDSReader, CheckedReader, name) for name in READER),
]


@pytest.mark.parametrize(("theirs", "ours", "name"), OVERRIDES)
def test_overridden_methods_have_the_known_parameters(theirs: type, ours: type, name: str) -> None:
    expected, found = (list(inspect.signature(getattr(owner, name)).parameters) for owner in (ours, theirs))
    assert len(found) == len(expected), f"streaming's {name} takes {found}: adapt {ours.__name__} in shards"


def read(kind: type[StreamingDataset], folder: Path) -> list[Any]:
    """The samples that a dataset reads from a stream in a cache of its own."""
    dataset = kind(remote=str(folder / "stream"), local=str(folder / "cache"), batch_size=1)
    return list(dataset)


def test_an_epoch_goes_through_the_overridden_methods(tmp_path: Path) -> None:
    write_stream(tmp_path / "stream", SAMPLES)
    calls: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return getattr(StreamingDataset, name)(self, *arguments, **options)

        return call

    kind = type("Counting", (StreamingDataset,), {name: counted(name) for name in DATASET})
    [(samples, found)] = run_rank_values(lambda: (len(read(kind, tmp_path)), dict(calls)))
    assert samples == SAMPLES
    assert set(found) == set(DATASET), "streaming reads in another way: see shards/dataset.py"
    assert [found[name] for name in THREADS] == [1, 1, 1] and found["get_item"] == SAMPLES


class Broken(StreamingDataset):
    """Can't fetch any shard."""

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        raise RuntimeError("no shard")


def test_an_error_in_a_thread_ends_an_epoch_early_and_without_an_error(tmp_path: Path) -> None:
    write_stream(tmp_path / "stream", SAMPLES)
    [samples] = run_rank_values(lambda: len(read(Broken, tmp_path)))
    assert samples == 0, "streaming's threads report errors: much of shards/dataset.py can go"


@pytest.mark.parametrize("kind", [Stream, StreamingDataset, MDSReader])
def test_class_of_an_instance_can_be_changed(kind: type) -> None:
    made: Any = object.__new__(kind)
    made.__class__ = type("Checked", (kind,), {})  # or `make_checked_dataset` and `make_checked` have to make new ones
    assert type(made) is not kind


def test_private_attributes_that_shards_uses_are_there() -> None:
    progress = _Iterator(np.arange(3))
    assert (progress.total, progress.prepare_index, progress.yield_index) == (3, 0, 0)
    assert not progress.should_exit() and callable(progress.on_exit)
    assert len({_ShardState.PREPARING, _ShardState.LOCAL}) == 2
    source = inspect.getsource(StreamingDataset)
    for name in ("_event", "_cache_filelock", "_shard_states", "_shm_prefix_int"):
        assert f"self.{name}" in source, f"streaming has no {name} any more: see shards/dataset.py"
    assert list(inspect.signature(CloudDownloader.download).parameters) == ["self", "remote", "local", "timeout"]
    assert isinstance(Stream(remote="/remote", local="/local")._downloader, CloudDownloader)


def test_columns_decode_through_private_functions_as_before() -> None:
    coder = _get_coder("str")
    assert coder is not None and coder.decode(b"a") == mds_decode("str", b"a") == "a"
