"""Which samples a rank reads. The physical facts (who leads a node, barriers, shared memory) stay the machine's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from streaming.base.world import World


@dataclass(frozen=True)
class Layout:
    """The ranks of a job, laid out as (pp, dp, cp, tp).

    Attributes:
        world_size: processes.
        ranks_per_node: processes on each machine.
        degrees: of parallelism: pp, dp_replicate, dp_shard, cp, tp. Their product is the world size.

    Source: torchtitan 0.2.2, distributed/parallel_dims.py.
    """

    world_size: int
    ranks_per_node: int
    degrees: Mapping[str, int]

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
        """The place of a rank on TorchTitan's batch mesh."""
        return rank // (self.degrees["cp"] * self.degrees["tp"]) % self.dp_world_size

    def readers(self) -> list[list[int]]:
        """The ranks that read what each dp rank reads."""
        found: list[list[int]] = [[] for _ in range(self.dp_world_size)]
        for rank in range(self.world_size):
            found[self.dp_rank(rank)].append(rank)
        return found

    def world(self, dp_rank: int = 0) -> "World":
        """The world in which samples are assigned, as a dp rank sees it: one rank for each dp rank.

        `replication` alone gives the same samples to consecutive ranks. That is wrong under pipeline parallelism, where
        the peers of a dp rank are `world_size / pp` apart. A machine feeds the dp ranks of one pipeline stage: the
        fewer they are, the fewer shards it has to fetch.

        Source: `World.replicate` (streaming 0.13.0, base/world.py), with the rank given instead of derived.
        """
        from streaming.base.world import World

        dp = self.dp_world_size
        peers = self.degrees["cp"] * self.degrees["tp"]
        per_node = min(dp, max(1, self.ranks_per_node // peers))
        nodes = dp // per_node if dp % per_node == 0 else 1
        return World(nodes, dp // nodes, 1, dp_rank)


def assign_to_ranks(
    samples: NDArray[np.int64], world: "World", local_batch_size: int, group_size: int = 1
) -> NDArray[np.int64]:
    """Assign ordered samples to nodes, ranks and workers, such that batch k doesn't depend on how many there are.

    Node n gets samples n, n + num_nodes, …: in the order of "random" and "per_stream" batching, with
    `num_canonical_nodes` a multiple of the nodes, those are the samples of its own canonical nodes' shards.

    Args:
        samples: ids, int64 [whole global batches]; a global batch is a multiple of `local_batch_size` x dp ranks.
        world: nodes, ranks and workers that take samples.
        local_batch_size: samples per rank and batch.
        group_size: consecutive samples that are kept in one rank's batch; divides `local_batch_size`.

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
