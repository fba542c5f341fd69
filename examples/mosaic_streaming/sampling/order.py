"""The order of an epoch's samples, which depends on the streams and their settings alone.

streaming 0.13.0 puts an epoch in order for the nodes, ranks, workers and batches that read it, with samples repeated
to fill up rows. Here it does so for one reader, without repeats; then the samples are dealt to those who read them.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.batching import batching_methods
from streaming.base.partition import algos, get_partitions_orig
from streaming.base.world import World

from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.sampling.placement import assign_to_ranks

PARTITION_ALGO = "without_repeats"

BY_BLOCKS = ("py1e", "py1br")
"""The shuffle algorithms that use `shuffle_block_size`."""


@dataclass(frozen=True)
class Order:
    """How the samples of each epoch follow each other, and who reads which; a batching method for streaming.

    Attributes:
        batching_method: streaming's, one of "random", "per_stream", "stratified", "device_per_stream".
        global_batch_size: samples per optimizer step.
        local_batch_size: samples per dp rank and batch.
        epoch_samples: samples of an epoch that can be read without repeats; the rest is left out.
        packed: whether the samples of a batch are packed group_size, so that other rows come of other neighbours.
        first_epoch: the epoch to start in.
        first_sample: samples of it that have been read already.
    """

    batching_method: str
    global_batch_size: int
    local_batch_size: int
    epoch_samples: int
    packed: bool = False
    first_epoch: int = 0
    first_sample: int = 0

    @property
    def group_size(self) -> int:
        """Samples that stay in one batch of one rank."""
        return self.local_batch_size if self.packed or self.batching_method == "device_per_stream" else 1

    def remaining(self, sample_in_epoch: int) -> int:
        """Samples of an epoch that follow a position, in whole global batches."""
        return round_down(max(0, self.epoch_samples - sample_in_epoch), self.global_batch_size)

    def __call__(self, dataset: StreamingDataset, world: World, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        """The samples of an epoch, or of the rest of the first one; the shape is in `assign_to_ranks`."""
        assert sample_in_epoch == 0, "streaming's own way to resume is not used"
        in_order = batching_methods[self.batching_method](dataset, World(1, 1, 1, 0), epoch, 0).reshape(-1)
        begin = self.first_sample if epoch == self.first_epoch else 0
        samples = in_order[begin : begin + self.remaining(begin)]
        assert samples.size == self.remaining(begin) and samples.min(initial=0) >= 0
        return assign_to_ranks(samples, world, self.local_batch_size, self.group_size)


@dataclass(frozen=True)
class ValidationOrder:
    """How the samples of a validation round follow each other, the same in each; a batching method for streaming.

    Attributes:
        samples: of a round; the last global batch may be short of some.
        global_batch_size: samples that all ranks group_size read at once.
        local_batch_size: samples per dp rank and batch.
    """

    samples: int
    global_batch_size: int
    local_batch_size: int

    def __call__(self, dataset: StreamingDataset, world: World, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        """The samples of a round; -1 fills the last global batch. The shape is in `assign_to_ranks`."""
        in_order = batching_methods["random"](dataset, World(1, 1, 1, 0), 0, 0).reshape(-1)[: self.samples]
        assert in_order.size == self.samples and in_order.min(initial=0) >= 0
        missing = -self.samples % self.global_batch_size
        return assign_to_ranks(np.pad(in_order, (0, missing), constant_values=-1), world, self.local_batch_size)


def set_order(dataset: StreamingDataset, local_batch_size: int, global_batch_size: int, packed: bool = False) -> Order:
    """Make a dataset read its samples in an order that no rank, node, worker or micro-batch changes.

    Source: streaming 0.13.0 finds partition algorithms by name in a table (base/partition/__init__.py); `batch_size` is
    what a batching method fills a batch with.
    """
    assert dataset.num_canonical_nodes is not None
    method = dataset.batching_method
    choose = [int(stream.choose) for stream in dataset.streams]
    proportions = [float(stream.proportion) for stream in dataset.streams]
    samples = epoch_samples(
        method, choose, proportions, dataset.num_canonical_nodes, global_batch_size, local_batch_size
    )
    algos[PARTITION_ALGO] = without_repeats
    dataset.partition_algo = PARTITION_ALGO
    dataset.batch_size = local_batch_size if method == "device_per_stream" else global_batch_size
    order = Order(method, global_batch_size, local_batch_size, samples, packed)
    install(dataset, order)
    return order


def global_batch(dataset: StreamingDataset, order: Order, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
    """The samples of the global batch at a position, in their order, int64 [global_batch_size].

    It puts the rest of the epoch in order for it, which takes a while where that is long.
    """
    alone = World(1, 1, 1, 0)
    dataset._set_shuffle_block_size(alone)  # as its first iteration does, which may be a worker's
    order = dataclasses.replace(order, first_epoch=epoch, first_sample=sample_in_epoch)
    return order(dataset, alone, epoch, 0).reshape(-1)[: order.global_batch_size]


def set_validation_order(
    dataset: StreamingDataset, local_batch_size: int, global_batch_size: int, samples: int
) -> None:
    """Make a dataset read the same first samples of an epoch, each time that it is iterated."""
    algos[PARTITION_ALGO] = without_repeats
    dataset.partition_algo = PARTITION_ALGO
    assert dataset.num_canonical_nodes == 1
    dataset.batch_size = global_batch_size
    install(dataset, ValidationOrder(samples, global_batch_size, local_batch_size))


def size_of_round(epoch_size: int, global_batch_size: int, steps: int) -> tuple[int, int]:
    """Batches of all ranks together in a validation round, and samples; `steps` is `validation.steps`."""
    whole = -(-epoch_size // global_batch_size)
    batches = whole if steps == -1 else min(steps, whole)
    return batches, min(epoch_size, batches * global_batch_size)


def start_at(dataset: StreamingDataset, order: Order, epoch: int, sample_in_epoch: int) -> Order:
    """Make a dataset that nobody has iterated yet start at a position.

    `StreamingDataset.load_state_dict` would do it, but it fails now and then where several ranks of a node create its
    shared memory at once: "cannot mmap an empty file" (streaming 0.13.0, base/shared/memory.py).
    """
    dataset.next_epoch = epoch
    order = dataclasses.replace(order, first_epoch=epoch, first_sample=sample_in_epoch)
    install(dataset, order)
    return order


def install(dataset: StreamingDataset, order: Order | ValidationOrder) -> None:
    """Set an order as the batching method of a dataset.

    Source: streaming 0.13.0 finds batching methods by name in a table (base/batching/__init__.py).
    """
    batching_methods[repr(order)] = order
    dataset.batching_method = repr(order)


def epoch_samples(
    batching_method: str,
    choose: Sequence[int],
    proportions: Sequence[float],
    num_canonical_nodes: int,
    global_batch_size: int,
    local_batch_size: int,
) -> int:
    """Samples that an epoch gives without repeats; 0 where a stream fills no batch.

    Args:
        batching_method: streaming's.
        choose: samples of each stream in an epoch.
        proportions: share of each stream in an epoch.
        num_canonical_nodes: as set.
        global_batch_size: sequences per optimizer step.
        local_batch_size: samples per dp rank and batch.

    Source: what the methods in streaming 0.13.0, base/batching, leave out.
    """
    if batching_method == "random":
        return round_down(sum(choose), num_canonical_nodes)
    sizes = [round_down(samples, num_canonical_nodes) for samples in choose]
    if batching_method == "stratified":
        parts = stream_parts(proportions, global_batch_size)
        steps = min(size // part if part else 0 for size, part in zip(sizes, parts, strict=True))
        return steps * global_batch_size
    batch = local_batch_size if batching_method == "device_per_stream" else global_batch_size
    return 0 if min(sizes) < batch else sum(round_down(size, batch) for size in sizes)


def shares(
    batching_method: str,
    choose: Sequence[int],
    proportions: Sequence[float],
    num_canonical_nodes: int,
    global_batch_size: int,
    local_batch_size: int,
) -> list[float]:
    """The share of each stream in the samples that an epoch gives; the arguments are those of `epoch_samples`."""
    parts: Sequence[float] = choose
    if batching_method == "stratified":
        parts = stream_parts(proportions, global_batch_size)
    elif batching_method != "random":
        batch = local_batch_size if batching_method == "device_per_stream" else global_batch_size
        parts = [round_down(round_down(samples, num_canonical_nodes), batch) for samples in choose]
    return [part / max(1, sum(parts)) for part in parts]


def round_down(samples: int, multiple: int) -> int:
    """The largest multiple up to `samples`."""
    return samples - samples % multiple


def stream_parts(proportions: Sequence[float], global_batch_size: int) -> list[int]:
    """Samples of each stream in a global batch under stratified batching (streaming 0.13.0, batching/stratified.py)."""
    exact = np.array(proportions) * global_batch_size
    parts = exact.astype(np.int64)
    parts[np.flip(np.argsort(exact - parts))[: global_batch_size - parts.sum()]] += 1
    return [int(part) for part in parts]


def without_repeats(
    num_samples: int,
    num_canonical_nodes: int,
    num_physical_nodes: int,
    ranks_per_node: int,
    workers_per_rank: int,
    batch_size: int,
    drop_first: int = 0,
    initial_physical_nodes: int | None = None,
) -> NDArray[np.int64]:
    """A partition algorithm: streaming's, without the samples that it repeats where canonical nodes differ in size.

    Canonical nodes take turns; from the first turn on for which one of them has no sample, all ids are -1. The
    arguments and the shape are those of `get_partitions_orig`.

    Source: "repeat the last ID to get even length" (streaming 0.13.0, base/partition/orig.py).
    """
    assert drop_first == 0
    world = (num_physical_nodes, ranks_per_node, workers_per_rank)
    parts = get_partitions_orig(num_samples, num_canonical_nodes, *world, batch_size)
    in_turn = np.ascontiguousarray(parts.transpose(3, 2, 0, 1, 4))
    in_turn.reshape(-1)[round_down(num_samples, num_canonical_nodes) :] = -1
    return in_turn.transpose(2, 3, 1, 0, 4)


def check_epoch(order: Order, dataset: StreamingDataset, names: list[str], source: str) -> None:
    """Raise ConfigError unless an epoch holds a whole global batch.

    Args:
        order: the dataset's.
        dataset: with its streams' samples an epoch.
        names: of the streams.
        source: the file that configures the loader.
    """
    if order.remaining(0) == 0:
        samples = [f"{name} {int(stream.choose):,}" for name, stream in zip(names, dataset.streams, strict=True)]
        nodes, each = dataset.num_canonical_nodes, "" if order.batching_method == "random" else " from each stream"
        raise ConfigError(
            f"An epoch fills no global batch of {order.global_batch_size} sequences. Of its samples in {source} "
            f"({', '.join(samples)}), dataset.num_canonical_nodes = {nodes} takes multiples of {nodes}{each}, and "
            f"dataset.batching_method = {order.batching_method!r} whole batches. Add data, `repeat` it, or lower the "
            "batch size or num_canonical_nodes."
        )


def check_blocks(order: Order, dataset: StreamingDataset, names: list[str], source: str) -> None:
    """Raise ConfigError where a stream's part of a shuffle block is no block.

    Args:
        order: the dataset's.
        dataset: with its streams' proportions.
        names: of the streams.
        source: the file that configures the loader.

    Source: each stream is shuffled by its share of the block; with less than 2 samples, algorithms that go by blocks
    fail at the first batch, or never end (streaming 0.13.0, base/batching, base/shuffle).
    """
    block = dataset.shuffle_block_size
    if (
        block is None
        or not dataset.shuffle
        or order.batching_method == "random"
        or dataset.shuffle_algo not in BY_BLOCKS
    ):
        return
    for name, stream in zip(names, dataset.streams, strict=True):
        if int(block * stream.proportion) < 2:
            raise ConfigError(
                f"dataset.shuffle_block_size = {block} in {source} leaves stream {name} a block of less than 2 "
                f"samples, by its share of {stream.proportion:.2g} under dataset.batching_method = "
                f"{order.batching_method!r}. Raise it."
            )
