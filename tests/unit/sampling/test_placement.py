"""Who takes which samples: for any layout, against TorchTitan's own mesh, without any dataset."""

from typing import Any

import numpy as np
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from streaming.base.world import World
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchtitan.distributed import ParallelDims

from examples.mosaic_streaming.sampling.placement import Layout, assign_to_ranks
from tests.support.ranks import dp_ranks_of, run_rank_values
from tests.support.titan import IS_0_2

EXPERTS = {"ep": 1} | ({"etp": 1} if IS_0_2 else {})
DEGREES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, int]:
    """Degrees of a layout of up to 512 ranks, processes on each machine, and one of the ranks."""
    left, layout = 512, {}
    for name in draw(st.permutations(DEGREES)):
        layout[name] = draw(st.sampled_from([d for d in (1, 2, 3, 4, 6, 8, 16, 32, 64) if d <= left]))
        left //= layout[name]
    world_size = int(np.prod(list(layout.values())))
    layout["local_world_size"] = draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if world_size % n == 0]))
    layout["rank"] = draw(st.integers(0, world_size - 1))
    return layout


def worlds_of(layout: dict[str, int]) -> list[World]:
    """The world of samples of every rank."""
    dp_ranks = dp_ranks_of(layout)
    made = Layout(len(dp_ranks), layout["local_world_size"], layout)
    return [made.world(dp_rank) for dp_rank in dp_ranks]


def test_dp_ranks_are_those_of_torchtitans_mesh() -> None:
    """So that the tests below, and the datasets in `test_order`, are about TorchTitan's layouts."""

    @settings(max_examples=60, deadline=None, database=None)
    @given(layouts())
    def check(layout: dict[str, int]) -> None:
        dp_ranks = dp_ranks_of(layout)
        dist.init_process_group("fake", store=FakeStore(), rank=layout["rank"], world_size=len(dp_ranks))
        try:
            dims = ParallelDims(**{name: layout[name] for name in DEGREES}, **EXPERTS, world_size=len(dp_ranks))
            dims.build_mesh()
            batch = dims.get_optional_mesh("batch")
            mine = (batch.size(), batch.get_local_rank()) if batch else (1, 0)
            assert mine == (max(dp_ranks) + 1, dp_ranks[layout["rank"]])
            peers = dims._global_meshes["dataloading"].mesh.transpose(0, 1).reshape(mine[0], -1).tolist()
            assert peers == [[r for r, of in enumerate(dp_ranks) if of == dp] for dp in range(mine[0])]
        finally:
            dist.destroy_process_group()

    run_rank_values(check)


@settings(max_examples=300, deadline=None)
@given(layouts(), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.booleans())
def test_peers_take_the_same_samples_and_dp_ranks_together_each_global_batch_once(
    layout: dict[str, int], local_batch_size: int, accumulation: int, workers: int, per_device: bool
) -> None:
    steps, worlds, dp_ranks = 3, worlds_of(layout), dp_ranks_of(layout)
    global_batch_size = local_batch_size * (max(dp_ranks) + 1) * accumulation
    in_order = np.arange(steps * global_batch_size)
    taken: dict[int, Any] = {}
    for world, dp_rank in zip(worlds, dp_ranks, strict=True):
        shape = World(world.num_nodes, world.ranks_per_node, max(1, workers), 0)
        if not taken:
            dealt = assign_to_ranks(in_order, shape, local_batch_size, local_batch_size if per_device else 1)
        # DataLoader takes a batch of each worker in turn.
        batches = dealt[world.node, world.rank_of_node].transpose(1, 0, 2).reshape(-1, local_batch_size)
        batches = batches[batches[:, 0] >= 0].reshape(steps, -1)
        assert taken.setdefault(dp_rank, batches.tolist()) == batches.tolist()
    for step in range(steps):
        samples = sorted(sample for batches in taken.values() for sample in batches[step])
        assert samples == in_order[step * global_batch_size : (step + 1) * global_batch_size].tolist()


@settings(max_examples=300, deadline=None)
@given(layouts())
def test_machine_reads_from_no_more_canonical_nodes_than_its_share(layout: dict[str, int]) -> None:
    """With one canonical node for each node of samples, a machine fetches the shards of its own alone."""
    worlds = worlds_of(layout)
    dp, per_node = worlds[0].num_ranks, worlds[0].ranks_per_node
    size = layout["local_world_size"]
    samples = assign_to_ranks(np.arange(4 * dp), World(worlds[0].num_nodes, per_node, 1, 0), 1)
    for first in range(0, len(worlds), size):
        machine = worlds[first : first + size]
        canonical = {s % worlds[0].num_nodes for w in machine for s in samples[w.node, w.rank_of_node].ravel().tolist()}
        dp_ranks = {world.rank for world in machine}
        spans = len({rank // per_node for rank in dp_ranks})
        assert len(canonical) == spans
        if dp % per_node == 0 and len(dp_ranks) == per_node and min(dp_ranks) % per_node == 0:
            assert spans == 1


def test_samples_of_a_device_batch_stay_together() -> None:
    dealt = assign_to_ranks(np.arange(24), World(2, 2, 1, 0), 3, group_size=3)
    assert dealt[0, 0, 0].tolist() == [[0, 1, 2], [12, 13, 14]]
    assert dealt[1, 1, 0].tolist() == [[9, 10, 11], [21, 22, 23]]


def test_example_of_eight_machines() -> None:
    """tp 8: each machine feeds one dp rank, so each is a node of samples."""
    alone = dict.fromkeys(DEGREES, 1)
    assert Layout(64, 8, alone | {"dp_shard": 8, "tp": 8}).world(5).num_nodes == 8
    assert Layout(64, 8, alone | {"dp_shard": 32, "pp": 2}).world().ranks_per_node == 8
    assert Layout(8, 8, alone | {"dp_shard": 2, "pp": 4}).world().ranks_per_node == 2
