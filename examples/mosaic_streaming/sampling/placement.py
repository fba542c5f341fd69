"""Which samples a rank takes. Physical facts (who leads a node, barriers, shared memory) stay the machine's."""

import numpy as np
from numpy.typing import NDArray
from streaming.base.world import World


def sample_world(dp_rank: int, dp_world_size: int, dp_ranks_per_node: int) -> World:
    """The world in which samples are shared out: one rank for each data-parallel rank.

    `replication` alone gives the same samples to consecutive ranks, which is wrong under pipeline parallelism, where
    the peers of a dp rank are `world_size / pp` apart.

    Args:
        dp_rank: on TorchTitan's batch mesh.
        dp_world_size: size of that mesh.
        dp_ranks_per_node: dp ranks that one machine feeds.

    Source: `World.replicate` (streaming 0.13.0, base/world.py), with the rank given instead of derived.
    """
    nodes = dp_world_size // dp_ranks_per_node if dp_world_size % dp_ranks_per_node == 0 else 1
    return World(nodes, dp_world_size // nodes, 1, dp_rank)


def dp_rank_of(rank: int, dp_world_size: int, peers: int) -> int:
    """The place of a rank on TorchTitan's batch mesh.

    Args:
        rank: of all processes, which are laid out as (pp, batch, cp, tp).
        dp_world_size: size of the batch mesh.
        peers: cp x tp degrees, ranks side by side that read the same.

    Source: torchtitan 0.2.2, distributed/parallel_dims.py.
    """
    return rank // peers % dp_world_size


def dp_ranks_per_node(world_size: int, dp_world_size: int, pp: int, local_world_size: int) -> int:
    """Data-parallel ranks that one machine feeds: the fewer they are, the fewer shards it has to fetch.

    Ranks are laid out as (pp, batch, cp, tp), so each pipeline stage is a row of dp ranks, and the cp x tp peers of one
    are neighbours.

    Args:
        world_size: processes.
        dp_world_size: size of TorchTitan's batch mesh.
        pp: pipeline-parallel degree.
        local_world_size: processes on each machine.

    Source: torchtitan 0.2.2, distributed/parallel_dims.py.
    """
    peers = world_size // pp // dp_world_size
    return min(dp_world_size, max(1, local_world_size // peers))


def deal(samples: NDArray[np.int64], world: World, local_batch_size: int, together: int = 1) -> NDArray[np.int64]:
    """Share out samples that are in order, so that each global batch takes the next ones, however many ranks read it.

    Node n gets samples n, n + num_nodes, …: in the order of "random" and "per_stream" batching, with
    `num_canonical_nodes` a multiple of the nodes, those are the samples of its own canonical nodes' shards.

    Args:
        samples: ids, int64 [whole global batches]; the global batch is a multiple of `local_batch_size` x dp ranks.
        world: nodes, ranks and workers that take samples.
        local_batch_size: samples per rank and batch.
        together: neighbours that stay in one batch; divides `local_batch_size`.

    Returns:
        int64 [nodes, ranks per node, workers per rank, batches per worker, local_batch_size], as streaming has it; -1
        where a worker has one batch less than others.
    """
    nodes, ranks, workers = world.num_nodes, world.ranks_per_node, world.workers_per_rank
    batches = samples.reshape(-1, ranks, nodes, together).transpose(2, 1, 0, 3)
    batches = batches.reshape(nodes, ranks, -1, local_batch_size)
    if missing := -batches.shape[2] % workers:
        batches = np.pad(batches, ((0, 0), (0, 0), (0, missing), (0, 0)), constant_values=-1)
    return batches.reshape(nodes, ranks, -1, workers, local_batch_size).transpose(0, 1, 3, 2, 4)
