"""Which samples a rank takes. Physical facts (who leads a node, barriers, shared memory) stay the machine's."""

from streaming.base.world import World


def sample_world(dp_rank: int, dp_world_size: int, ranks_per_node: int) -> World:
    """The world in which streaming shares out samples: one rank for each data-parallel rank.

    `replication` alone gives the same samples to consecutive ranks, which is wrong under pipeline parallelism, where
    the peers of a dp rank are `world_size / pp` apart.

    Args:
        dp_rank: on TorchTitan's batch mesh.
        dp_world_size: size of that mesh.
        ranks_per_node: processes on each machine; samples are shared out by node where that divides evenly.

    Source: `World.replicate` (streaming 0.13.0, base/world.py), with the rank given instead of derived.
    """
    num_nodes = dp_world_size // ranks_per_node if dp_world_size % ranks_per_node == 0 else 1
    return World(num_nodes, dp_world_size // num_nodes, 1, dp_rank)
