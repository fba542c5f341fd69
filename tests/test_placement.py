"""Which samples a rank takes, without any dataset."""

import pytest

from examples.mosaic_streaming.placement import sample_world


@pytest.mark.parametrize(
    ("dp_world_size", "ranks_per_node", "nodes"),
    [(1, 1, 1), (2, 2, 1), (2, 4, 1), (16, 8, 2), (4, 8, 1), (12, 8, 1)],
)
def test_each_data_parallel_rank_is_one_rank_of_the_world(dp_world_size: int, ranks_per_node: int, nodes: int) -> None:
    worlds = [sample_world(dp_rank, dp_world_size, ranks_per_node) for dp_rank in range(dp_world_size)]
    assert [world.rank for world in worlds] == list(range(dp_world_size))
    assert {(world.num_ranks, world.num_nodes) for world in worlds} == {(dp_world_size, nodes)}
    places = {(world.node, world.rank_of_node) for world in worlds}
    assert len(places) == dp_world_size
    assert all(world.rank_of_node < world.ranks_per_node for world in worlds)
