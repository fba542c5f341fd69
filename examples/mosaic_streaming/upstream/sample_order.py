"""Makes streaming read the samples that it is told to, in the order that it is told, and repeat none.

streaming 0.13.0 orders an epoch for the nodes, ranks, workers and batches that read it, and repeats samples to make
canonical nodes equally long. It looks partition algorithms and batching methods up by name in two tables
(base/partition/__init__.py, base/batching/__init__.py); here both get an entry. A streaming whose order depends on its
settings alone and holds no repeats makes this module needless.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.batching import batching_methods
from streaming.base.partition import algos, get_partitions_orig
from streaming.base.world import World

from examples.mosaic_streaming.upstream.patch import replace

ONE_READER = World(1, 1, 1, 0)
PARTITION_ALGO = "without_repeats"


def install_order(dataset: StreamingDataset, order: Callable[..., NDArray[np.int64]]) -> None:
    """Make a dataset read its epochs in an order, whose `repr` becomes its name in streaming's table.

    Called with the dataset, a World, the epoch and the first sample in it, the order returns the epoch's samples:
    int64 [nodes, ranks per node, workers per rank, batches, samples]; -1 is none.
    """
    algos[PARTITION_ALGO] = partition_without_repeats
    batching_methods[repr(order)] = order
    replace(dataset, "partition_algo", PARTITION_ALGO)
    replace(dataset, "batching_method", repr(order))


def epoch_in_order(dataset: StreamingDataset, batching_method: str, epoch: int) -> NDArray[np.int64]:
    """Return the samples of an epoch as one of streaming's batching methods orders them for a single reader, in 1D."""
    return batching_methods[batching_method](dataset, ONE_READER, epoch, 0).reshape(-1)


def set_reader_world(dataset: StreamingDataset, world: World) -> None:
    """Make a dataset read the samples of a given place in the world, whichever process it is in.

    Source: streaming reads samples by `_parallel_rank_world`, and knows the machine by another attribute (0.13.0,
    base/dataset.py).
    """
    replace(dataset, "_parallel_rank_world", world)


def reader_world(dataset: StreamingDataset) -> World:
    """Return the world in which a dataset reads samples."""
    return dataset._parallel_rank_world


def partition_without_repeats(
    num_samples: int,
    num_canonical_nodes: int,
    num_physical_nodes: int,
    ranks_per_node: int,
    workers_per_rank: int,
    batch_size: int,
    drop_first: int = 0,
    initial_physical_nodes: int | None = None,
) -> NDArray[np.int64]:
    """Partition as streaming does, without the samples that it repeats where canonical nodes differ in size.

    Canonical nodes take turns. From the first turn on in which one of them has no sample, all ids are -1.

    Source: "repeat the last ID to get even length" (streaming 0.13.0, base/partition/orig.py).
    """
    assert drop_first == 0
    world = (num_physical_nodes, ranks_per_node, workers_per_rank)
    partitions = get_partitions_orig(num_samples, num_canonical_nodes, *world, batch_size)
    in_turn = np.ascontiguousarray(partitions.transpose(3, 2, 0, 1, 4))
    in_turn.reshape(-1)[num_samples - num_samples % num_canonical_nodes :] = -1
    return in_turn.transpose(2, 3, 1, 0, 4)
