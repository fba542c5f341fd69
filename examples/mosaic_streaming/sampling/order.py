"""The order of samples: `Order` for training, `ValidationOrder` for validation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from streaming import StreamingDataset
from streaming.base.world import World

from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.sampling.blend import Blend, Stream
from examples.mosaic_streaming.sampling.hashing import Ints
from examples.mosaic_streaming.sampling.placement import assign_to_ranks
from examples.mosaic_streaming.upstream.sample_order import ONE_READER, epoch_in_order, install_order

BLOCK_ALGOS = ("py1e", "py1br")  # the shuffle algorithms that use `shuffle_block_size`
MAX_CANONICAL_NODES = 64
"""Default of `num_canonical_nodes`, unless the data is small. streaming's own is the machines of the first run."""
MAX_LEFT_OUT = 0.01  # share of an epoch's samples that this default may leave out
SHARE_DIGITS = 12  # decimals that count of a stream's share in a blend: equal ones are equal however they are given
ENDLESS = 1 << 40  # positions that a blend has, so to speak; no run reads as many


@dataclass(frozen=True)
class Order:
    """Which sample is at which position, and which samples stay together.

    A blend tells the samples at any positions, and its only epoch never ends. Otherwise, streaming puts a whole epoch
    in order, for a single reader, and calls this as a batching method, which assigns the samples to the readers.
    """

    batching_method: str  # "blend", or streaming's: "random", "per_stream", "stratified" or "device_per_stream"
    global_batch_size: int  # samples per optimizer step
    local_batch_size: int  # samples per dp rank and micro-batch
    epoch_samples: int  # that an epoch has without repeats; the rest of the streams' epoch is left out
    packed: bool = False  # whether the samples of a batch are packed together: with other neighbours, rows would differ
    first_epoch: int = 0  # to start in
    first_sample: int = 0  # samples of that epoch that have been read already
    skipped: tuple[tuple[int, int, int], ...] = ()  # whole batches that aren't read: epoch, begin and end in it
    end: tuple[int, int] | None = None  # epoch and sample in it where reading ends
    shares: tuple[float, ...] = ()  # of each stream, in an epoch or a blend
    blend: Blend | None = field(default=None, repr=False, compare=False)
    _last: dict[int, Ints] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def group_size(self) -> int:
        """Consecutive samples that stay in one batch of one rank."""
        return self.local_batch_size if self.packed or self.batching_method == "device_per_stream" else 1

    def remaining(self, sample_in_epoch: int) -> int:
        """Samples of an epoch that follow a position, in whole global batches."""
        return round_down(max(0, self.epoch_samples - sample_in_epoch), self.global_batch_size)

    def runs(self, epoch: int) -> list[range]:
        """Return the positions in an epoch that are read, of the first epoch only the rest."""
        begin = self.first_sample if epoch == self.first_epoch else 0
        end = begin + self.remaining(begin)
        if self.end and epoch >= self.end[0]:
            end = self.end[1] if epoch == self.end[0] else begin
        runs = []
        for _, first, last in [*(one for one in self.skipped if one[0] == epoch and one[2] > begin), (epoch, end, end)]:
            runs.append(range(begin, first))
            begin = last
        return [run for run in runs if run]

    def steps(self, epoch: int) -> Iterator[int]:
        """Yield the positions in an epoch at which the steps begin that read it."""
        for run in self.runs(epoch):
            yield from range(run.start, run.stop, self.global_batch_size)

    def __call__(self, dataset: StreamingDataset, world: World, epoch: int, sample_in_epoch: int) -> Ints:
        """Return the samples of an epoch that are read, as `assign_to_ranks` does."""
        assert sample_in_epoch == 0, "streaming's own way to resume is not used"
        runs, ordered = self.runs(epoch), epoch_in_order(dataset, self.batching_method, epoch)
        samples = np.concatenate([ordered[run.start : run.stop] for run in runs] or [ordered[:0]])
        assert samples.size == sum(map(len, runs)) and samples.min(initial=0) >= 0
        return assign_to_ranks(samples, world, self.local_batch_size, self.group_size)

    def samples(self, dataset: StreamingDataset, epoch: int, positions: Ints) -> Ints:
        """Return the ids of the samples at positions in an epoch, int64 [positions].

        Without a blend, the whole epoch is put in order, and kept until another one is.
        """
        if self.blend:
            return self.blend.samples(positions)
        if epoch not in self._last:
            self._last.clear()
            self._last[epoch] = epoch_in_order(dataset, self.batching_method, epoch)[: self.epoch_samples]
        return self._last[epoch][positions]

    def counts(self, dataset: StreamingDataset, epoch: int, begin: int, end: int) -> Ints:
        """Return how many samples of each stream are between two positions in an epoch, int64 [streams]."""
        if self.blend:
            return self.blend.counts(end) - self.blend.counts(begin)
        samples = self.samples(dataset, epoch, np.arange(begin, end))
        return np.bincount(stream_numbers(dataset, samples), minlength=len(dataset.streams))


@dataclass(frozen=True)
class ValidationOrder:
    """The order of a validation round's samples, which is the same in each round."""

    samples: int  # of a round; they need not fill the last global batch
    global_batch_size: int  # samples that all ranks together read at once
    local_batch_size: int  # samples per dp rank and batch

    def __call__(self, dataset: StreamingDataset, world: World, epoch: int, sample_in_epoch: int) -> Ints:
        """Return the samples of a round as `assign_to_ranks` does, with -1 where the last global batch is short."""
        samples = epoch_in_order(dataset, "random", 0)[: self.samples]
        assert samples.size == self.samples and samples.min(initial=0) >= 0
        missing = -self.samples % self.global_batch_size
        return assign_to_ranks(np.pad(samples, (0, missing), constant_values=-1), world, self.local_batch_size)


def set_order(
    dataset: StreamingDataset, method: str, local_batch_size: int, global_batch_size: int, packed: bool = False
) -> Order:
    """Make a dataset read its samples in an order that no rank, node, worker or micro-batch changes.

    Fills in `num_canonical_nodes` where the dataset has none. The arguments are explained in `Order`.

    Source: batching methods fill batches of `dataset.batch_size` (streaming 0.13.0, base/batching).
    """
    choose = [int(stream.choose) for stream in dataset.streams]
    proportions = tuple(float(stream.proportion) for stream in dataset.streams)
    sizes = (global_batch_size, local_batch_size)
    if dataset.num_canonical_nodes is None:
        dataset.num_canonical_nodes = default_canonical_nodes(method, choose)
    dataset._set_shuffle_block_size(ONE_READER)  # as the first iteration does, but that may be a worker's
    samples, shares, blend = ENDLESS, proportions, None
    if method == "blend" and any(choose):
        blend = make_blend(dataset, proportions)
    else:
        samples, shares = samples_of_epoch(method, choose, proportions, dataset.num_canonical_nodes, *sizes)
    dataset.batch_size = local_batch_size if method == "device_per_stream" else global_batch_size
    return start_at(dataset, Order(method, *sizes, samples, packed, shares=shares, blend=blend))


def make_blend(dataset: StreamingDataset, proportions: Sequence[float]) -> Blend:
    """Make the blend of a dataset's streams in the given proportions."""
    firsts = dataset.sample_offset_per_stream.tolist()
    shards = np.split(dataset.samples_per_shard, dataset.shard_offset_per_stream[1:])
    weights = [max(round(share * 10**SHARE_DIGITS), int(share > 0)) for share in proportions]
    streams = [Stream(*one, number) for number, one in enumerate(zip(firsts, shards, weights, strict=True))]
    assert dataset.num_canonical_nodes is not None
    block_size = dataset.shuffle * int(dataset.shuffle_block_size or 0)
    return Blend(streams, dataset.num_canonical_nodes, dataset.shuffle_seed, block_size)


def default_canonical_nodes(method: str, choose: Sequence[int]) -> int:
    """Return the largest power of two up to 64 that leaves out less than 1 % of an epoch's samples, given by stream."""
    groups = [sum(choose)] if method == "random" else choose
    nodes = MAX_CANONICAL_NODES  # of which "blend" leaves nothing out
    while method != "blend" and sum(samples % nodes for samples in groups) >= MAX_LEFT_OUT * sum(choose) and nodes > 1:
        nodes //= 2
    return nodes


def set_validation_order(dataset: StreamingDataset, local_batch_size: int, global_batch_size: int, count: int) -> None:
    """Make a dataset read the same first `count` samples of an epoch each time that it is iterated."""
    assert dataset.num_canonical_nodes == 1
    dataset.batch_size = global_batch_size
    install_order(dataset, ValidationOrder(count, global_batch_size, local_batch_size))


def size_of_round(epoch_size: int, global_batch_size: int, steps: int) -> tuple[int, int]:
    """Batches of all ranks together in a validation round, and samples; `steps` is `validation.steps`."""
    whole = -(-epoch_size // global_batch_size)
    batches = whole if steps == -1 else min(steps, whole)
    return batches, min(epoch_size, batches * global_batch_size)


def start_at(dataset: StreamingDataset, order: Order) -> Order:
    """Make a dataset that has not been iterated yet read in an order, and return that.

    Source: `StreamingDataset.load_state_dict` sometimes fails where several ranks of a node create its shared memory at
    once: "cannot mmap an empty file" (streaming 0.13.0, base/shared/memory.py).
    """
    dataset.next_epoch = order.first_epoch
    if not order.blend:
        install_order(dataset, order)
    dataset.order = order  # type: ignore[attr-defined]  # where `CheckedDataset` looks
    return order


def stream_numbers(dataset: StreamingDataset, samples: Ints) -> Ints:
    """Return the number of the stream that each sample belongs to; any shape."""
    return np.searchsorted(dataset.sample_offset_per_stream, samples, side="right") - 1


def samples_of_epoch(
    method: str, choose: Sequence[int], proportions: Sequence[float], nodes: int, global_batch: int, local_batch: int
) -> tuple[int, tuple[float, ...]]:
    """Count the samples that an epoch has without repeats, 0 where a stream fills no batch, and each stream's share.

    Source: what the methods of streaming 0.13.0, base/batching, leave out.
    """
    if method == "random":
        counts, samples = list(choose), round_down(sum(choose), nodes)
    else:
        counts = [round_down(chosen, nodes) for chosen in choose]
        if method == "stratified":
            exact = np.array(proportions) * global_batch  # of each stream in a batch; the largest fractions round up
            in_batch = exact.astype(np.int64)
            in_batch[np.argsort(exact - in_batch)[::-1][: global_batch - in_batch.sum()]] += 1
            batches = min(count // size if size else 0 for count, size in zip(counts, in_batch.tolist(), strict=True))
            counts = (batches * in_batch).tolist()
        else:
            batch = local_batch if method == "device_per_stream" else global_batch
            counts = [round_down(count, batch) for count in counts]
        samples = sum(counts) if all(counts) else 0
    return samples, tuple(count / max(1, sum(counts)) for count in counts)


def round_down(samples: int, multiple: int) -> int:
    """The largest multiple up to `samples`."""
    return samples - samples % multiple


def check_order(order: Order, dataset: StreamingDataset, names: Sequence[str], source: str) -> None:
    """Raise ConfigError if an epoch fills no global batch, or a stream's part of a shuffle block is too small.

    Source: each stream is shuffled in blocks of its share; with less than 2 samples, the algorithms that use blocks
    fail at the first batch or never end (streaming 0.13.0, base/batching, base/shuffle).
    """
    streams = list(zip(names, dataset.streams, strict=True))
    if order.remaining(0) == 0:
        samples = ", ".join(f"{name} {int(stream.choose):,}" for name, stream in streams)
        if not any(int(stream.choose) for _, stream in streams):
            raise ConfigError(f"The streams in {source} give no samples ({samples}). Raise `repeat` or `choose`.")
        nodes, each = dataset.num_canonical_nodes, "" if order.batching_method == "random" else " from each stream"
        raise ConfigError(
            f"An epoch fills no global batch of {order.global_batch_size} sequences. Of its samples in {source} "
            f"({samples}), dataset.num_canonical_nodes = {nodes} takes multiples of {nodes}{each}, and "
            f"dataset.batching_method = {order.batching_method!r} whole batches. Add data, `repeat` it, or lower the "
            "batch size or num_canonical_nodes."
        )
    block = dataset.shuffle_block_size
    by_stream = order.batching_method not in ("random", "blend") and dataset.shuffle_algo in BLOCK_ALGOS
    for name, stream in streams if by_stream and dataset.shuffle else []:
        if block is not None and int(block * stream.proportion) < 2:
            raise ConfigError(
                f"dataset.shuffle_block_size = {block} in {source} leaves stream {name} a block of less than 2 "
                f"samples, by its share of {stream.proportion:.2g} under dataset.batching_method = "
                f"{order.batching_method!r}. Raise it."
            )
