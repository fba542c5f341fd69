"""What a mixture of streams comes to: how much of an epoch each is, against what was asked."""

from collections.abc import Sequence

from streaming import StreamingDataset
from torchtitan.tools.logging import logger

from examples.mosaic_streaming.order import Order, shares
from examples.mosaic_streaming.resume import table

HEAD = ["stream", "samples", "tokens", "share asked", "share in effect", "passes per epoch"]


def log_mixture(names: Sequence[str], dataset: StreamingDataset, order: Order, seq_len: int | None) -> None:
    """Log a table of a dataset's streams; the arguments are those of `mixture_rows`."""
    logger.info(f"Streams, and their part of an epoch:\n{table(HEAD, mixture_rows(names, dataset, order, seq_len))}")


def mixture_rows(names: Sequence[str], dataset: StreamingDataset, order: Order, seq_len: int | None) -> list[list[str]]:
    """A row for each stream: its size, and its part of an epoch.

    The share asked is the weight that `proportion`, `repeat` or `choose` comes to among those of all streams. That in
    effect also minds what the batching method leaves out.

    Args:
        names: of the streams.
        dataset: of these streams.
        order: the dataset's.
        seq_len: tokens that the model gets of a sample; none where samples differ in length.
    """
    assert dataset.num_canonical_nodes is not None
    choose = [int(stream.choose) for stream in dataset.streams]
    asked = [float(stream.proportion) for stream in dataset.streams]
    batches = (order.global_batch_size, order.local_batch_size)
    effect = shares(order.batching_method, choose, asked, dataset.num_canonical_nodes, *batches)
    rows = []
    for number, name in enumerate(names):
        samples = int(dataset.samples_per_stream[number])
        tokens = f"{samples * seq_len:,}" if seq_len else "-"
        passes = effect[number] * order.left(0) / samples
        rows.append([name, f"{samples:,}", tokens, f"{asked[number]:.2%}", f"{effect[number]:.2%}", f"{passes:.3f}"])
    return rows
