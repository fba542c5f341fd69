"""Which rank reads which samples. Who leads a node, barriers and shared memory remain those of the machine."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from streaming.base.world import World

from examples.mosaic_streaming.sampling.hashing import Ints

PIECE = 16_384  # positions that `WorkerSamples` works out at a time, at least


@dataclass(frozen=True)
class Layout:
    """The ranks of a job, laid out as (pp, dp, cp, tp).

    Source: torchtitan 0.2.2, distributed/parallel_dims.py.
    """

    world_size: int  # processes
    ranks_per_node: int  # processes on each machine
    degrees: Mapping[str, int]  # pp, dp_replicate, dp_shard, cp, tp; their product is the world size

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.world_size // self.ranks_per_node

    @property
    def dp_world_size(self) -> int:
        """The size of TorchTitan's batch mesh."""
        return self.degrees["dp_replicate"] * self.degrees["dp_shard"]

    @property
    def replication(self) -> int:
        """Ranks that receive the same samples."""
        return self.world_size // self.dp_world_size

    def dp_rank(self, rank: int) -> int:
        """Return the position of a rank on TorchTitan's batch mesh."""
        return rank // (self.degrees["cp"] * self.degrees["tp"]) % self.dp_world_size

    def readers(self) -> list[list[int]]:
        """Return, for each dp rank, the ranks that read its samples."""
        dp_ranks = [self.dp_rank(rank) for rank in range(self.world_size)]
        return [[rank for rank, own in enumerate(dp_ranks) if own == dp] for dp in range(self.dp_world_size)]

    def world(self, dp_rank: int = 0) -> World:
        """Return the world in which samples are assigned, as a dp rank sees it: it has one rank per dp rank.

        A node of it has the dp ranks that one machine feeds in one pipeline stage: the fewer they are, the fewer shards
        a machine fetches. streaming's own `replication` gives the same samples to consecutive ranks, which is wrong
        under pipeline parallelism: there the peers of a dp rank are `world_size / pp` apart.

        Source: like `World.replicate` (streaming 0.13.0, base/world.py), but with the rank given.
        """
        dp = self.dp_world_size
        per_node = min(dp, max(1, self.ranks_per_node // (self.degrees["cp"] * self.degrees["tp"])))
        nodes = dp // per_node if dp % per_node == 0 else 1
        return World(nodes, dp // nodes, 1, dp_rank)


def assign_to_ranks(samples: Ints, world: World, local_batch_size: int, group_size: int = 1) -> Ints:
    """Assign ordered samples to nodes, ranks and workers, so that batch k doesn't depend on how many there are.

    Node n gets samples n, n + num_nodes, and so on. With "random" and "per_stream" batching and a multiple of the nodes
    as `num_canonical_nodes`, those are the samples of its own canonical nodes' shards.

    Args:
        samples: ids of whole global batches, int64 [samples].
        local_batch_size: samples per rank and batch; times the ranks, it divides a global batch.
        group_size: consecutive samples that stay in one rank's batch; divides `local_batch_size`.

    Returns:
        int64 [nodes, ranks per node, workers per rank, batches per worker, local_batch_size], as streaming has it; -1
        where a worker has one batch less than others.
    """
    nodes, ranks, workers = world.num_nodes, world.ranks_per_node, world.workers_per_rank
    batches = samples.reshape(-1, ranks, nodes, group_size).transpose(2, 1, 0, 3)
    batches = batches.reshape(nodes, ranks, -1, local_batch_size)
    if missing := -batches.shape[2] % workers:
        batches = np.pad(batches, ((0, 0), (0, 0), (0, missing), (0, 0)), constant_values=-1)
    return batches.reshape(nodes, ranks, -1, workers, local_batch_size).transpose(0, 1, 3, 2, 4)


class WorkerSamples:
    """The samples of one worker in a blend, worked out in pieces; it is what streaming uses of an array.

    Args:
        samples: tells the ids of the samples at positions, both int64 [positions].
        runs: the positions that all workers read together.

    The others are those of `assign_to_ranks`.
    """

    def __init__(
        self, samples: Callable[[Ints], Ints], runs: list[range], world: World, local_batch_size: int, group_size: int
    ) -> None:
        readers = world.num_ranks * world.workers_per_rank
        size = -(-PIECE // (readers * local_batch_size)) * local_batch_size  # of a worker's piece
        ends = np.cumsum([len(run) for run in runs], dtype=np.int64)
        shifts = np.array([run.stop for run in runs], np.int64) - ends  # of a run's positions, from those without gaps
        batches, more = divmod(sum(map(len, runs)) // (world.num_ranks * local_batch_size), world.workers_per_rank)
        self._length, self._size = (batches + (world.worker_of_rank < more)) * local_batch_size, size

        @functools.lru_cache(4)
        def piece(number: int) -> Ints:
            positions = np.arange(number * size * readers, (number + 1) * size * readers)
            assigned = assign_to_ranks(positions, world, local_batch_size, group_size)
            own = assigned[world.node, world.rank_of_node, world.worker_of_rank].reshape(-1)
            own = own[: max(0, self._length - number * size)]
            return samples(own + shifts[np.searchsorted(ends, own, "right")])

        self._piece = piece

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        pieces = -(-self._length // self._size)
        return itertools.chain.from_iterable(self._piece(number).tolist() for number in range(pieces))

    def __getitem__(self, at: Any) -> Any:
        if not isinstance(at, slice):
            return self._piece(at // self._size)[at % self._size]
        first, stop = at.start // self._size, max(at.start, min(at.stop, self._length))
        pieces = [self._piece(number) for number in range(first, stop // self._size + 1)]
        return np.concatenate(pieces)[at.start - first * self._size : stop - first * self._size]
