"""Which rank reads which samples. Who leads a node, barriers and shared memory remain those of the machine."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from streaming.base.world import World


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
        peers = self.degrees["cp"] * self.degrees["tp"]
        per_node = min(dp, max(1, self.ranks_per_node // peers))
        nodes = dp // per_node if dp % per_node == 0 else 1
        return World(nodes, dp // nodes, 1, dp_rank)


def assign_to_ranks(
    samples: NDArray[np.int64], world: World, local_batch_size: int, group_size: int = 1
) -> NDArray[np.int64]:
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
