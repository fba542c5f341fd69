"""What `upstream/sample_order.py` relies on in streaming: its tables, private names and repeats."""

import inspect
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base import batching, partition
from streaming.base.partition import get_partitions_orig
from streaming.base.world import World

from examples.mosaic_streaming.upstream import sample_order
from examples.mosaic_streaming.upstream.sample_order import (
    ONE_READER,
    epoch_in_order,
    install_order,
    partition_without_repeats,
    reader_world,
    set_reader_world,
)
from tests.support.ranks import run_rank_values
from tests.support.streams import FIRST_ID, write_stream


class Backwards:
    """An order: all samples from the last to the first, for two ranks in turn; it notes how it has been called."""

    calls: list[tuple[Any, ...]] = []  # noqa: RUF012

    def __repr__(self) -> str:
        return "backwards"

    def __call__(self, dataset: StreamingDataset, world: World, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        self.calls.append((world.num_ranks, world.workers_per_rank, epoch, sample_in_epoch))
        samples = np.arange(dataset.num_samples)[::-1]
        return samples.reshape(1, -1, 2, 1, 1).transpose(0, 2, 3, 1, 4)


def read(dataset: StreamingDataset) -> list[int]:
    return [int(np.frombuffer(sample["tokens"].tobytes(), np.int32)[0]) - FIRST_ID for sample in dataset]


def test_streaming_reads_in_an_order_of_its_table_at_the_place_that_is_set(tmp_path: Path) -> None:
    def run() -> Any:
        dataset = StreamingDataset(local=str(write_stream(tmp_path, 12)), batch_size=1, num_canonical_nodes=1)
        install_order(dataset, Backwards())
        set_reader_world(dataset, World(1, 2, 1, 1))
        assert reader_world(dataset).rank == 1
        return read(dataset), read(dataset), Backwards.calls

    [(first, second, calls)] = run_rank_values(run)
    changed = "streaming no longer takes an order from `batching_methods`, or a rank from `_parallel_rank_world`"
    assert first == second == [10, 8, 6, 4, 2, 0], changed
    assert calls == [(2, 1, 0, 0), (2, 1, 1, 0)], changed


def test_streaming_orders_an_epoch_for_one_reader_by_our_partition_algorithm(tmp_path: Path) -> None:
    def run() -> Any:
        dataset = StreamingDataset(local=str(write_stream(tmp_path, 10)), batch_size=1, num_canonical_nodes=4)
        assert dataset.shuffle_block_size is None
        install_order(dataset, Backwards())
        dataset._set_shuffle_block_size(ONE_READER)
        samples = epoch_in_order(dataset, "random", 0)
        return samples.tolist(), dataset.shuffle_block_size

    [(samples, block)] = run_rank_values(run)
    assert samples == [0, 2, 5, 7, 1, 3, 6, 8, -1, -1, -1, -1], "streaming no longer looks partitions up in `algos`"
    assert block == 1_000_000, "the default of `shuffle_block_size`, which is a part of the fingerprint, has changed"


def test_partition_of_streaming_has_the_arguments_of_ours() -> None:
    ours, theirs = (inspect.signature(function) for function in (partition_without_repeats, get_partitions_orig))
    called = [*inspect.signature(partition.get_partitions).parameters][1:]
    assert [*ours.parameters] == [*theirs.parameters] == called, "streaming partitions with other arguments"
    called = [*inspect.signature(batching.generate_work).parameters][1:]
    assert called == ["dataset", "world", "epoch", "sample_in_epoch"], "a batching method gets other arguments"


def test_streaming_still_repeats_samples_where_canonical_nodes_differ_in_size() -> None:
    theirs = get_partitions_orig(10, 4, 1, 1, 1, 1).reshape(-1).tolist()
    assert sorted(theirs) != list(range(10)), "it repeats none: `partition_without_repeats` is needless"
    assert theirs[:8] == [0, 2, 5, 7, 1, 3, 6, 8], "canonical nodes no longer take turns"
    assert len(theirs) == 12 and {*theirs[8:]} <= {*range(10)}


def test_dataset_without_the_attributes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_order, "algos", {})
    monkeypatch.setattr(sample_order, "batching_methods", {})
    dataset: Any = types.SimpleNamespace(partition_algo="orig", _set_shuffle_block_size=id)
    with pytest.raises(RuntimeError, match=r"SimpleNamespace\.batching_method is gone"):
        install_order(dataset, Backwards())
    with pytest.raises(RuntimeError, match=r"SimpleNamespace\._parallel_rank_world is gone"):
        set_reader_world(dataset, ONE_READER)
