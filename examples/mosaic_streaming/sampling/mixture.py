"""What a mixture of streams comes to: how much of an epoch each is, against what was asked."""

from collections.abc import Sequence
from typing import NamedTuple

from streaming import StreamingDataset
from torchtitan.tools.logging import logger

from examples.mosaic_streaming.errors import text_table
from examples.mosaic_streaming.sampling.order import Order, shares

HEAD = ["stream", "samples", "tokens", "share asked", "share in effect", "passes per epoch"]


class StreamShare(NamedTuple):
    """A stream, and its part of an epoch.

    Attributes:
        name: of the stream.
        samples: that it has.
        tokens: that the model gets of these; none where samples differ in length.
        share_asked: the weight that `proportion`, `repeat` or `choose` comes to among those of all streams.
        share: that in effect, which also minds what the batching method leaves out.
        passes: over the stream in an epoch.
    """

    name: str
    samples: int
    tokens: int | None
    share_asked: float
    share: float
    passes: float


def log_mixture(names: Sequence[str], dataset: StreamingDataset, order: Order, seq_len: int | None) -> None:
    """Log a table of a dataset's streams; the arguments are those of `stream_shares`."""
    rows = []
    for part in stream_shares(names, dataset, order, seq_len):
        tokens = "-" if part.tokens is None else f"{part.tokens:,}"
        share = [f"{part.share_asked:.2%}", f"{part.share:.2%}", f"{part.passes:.3f}"]
        rows.append([part.name, f"{part.samples:,}", tokens, *share])
    logger.info(f"Streams, and their part of an epoch:\n{text_table(HEAD, rows)}")


def stream_shares(
    names: Sequence[str], dataset: StreamingDataset, order: Order, seq_len: int | None
) -> list[StreamShare]:
    """Each stream's size, and its part of an epoch.

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
    parts = []
    for number, name in enumerate(names):
        samples = int(dataset.samples_per_stream[number])
        tokens = samples * seq_len if seq_len else None
        passes = effect[number] * order.remaining(0) / samples
        parts.append(StreamShare(name, samples, tokens, asked[number], effect[number], passes))
    return parts
