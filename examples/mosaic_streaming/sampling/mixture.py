"""How much of an epoch each stream of a mixture is, and how much was asked for."""

from collections.abc import Sequence
from typing import NamedTuple

from streaming import StreamingDataset
from torchtitan.tools.logging import logger

from examples.mosaic_streaming.errors import text_table
from examples.mosaic_streaming.sampling.order import Order


class StreamShare(NamedTuple):
    """A stream's size and its share of an epoch."""

    name: str
    samples: int  # of the stream
    tokens: int | None  # of the stream that the model gets; None where samples differ in length
    share_asked: float  # what `proportion`, `repeat` or `choose` comes to
    share: float  # in effect, after what the batching method leaves out
    passes: float  # over the stream in an epoch


def stream_shares(
    names: Sequence[str], dataset: StreamingDataset, order: Order, seq_len: int | None
) -> list[StreamShare]:
    """Return each stream's size and its share of an epoch.

    Args:
        seq_len: tokens that the model gets of a sample; None where samples differ in length.
    """
    found = []
    for name, stream, size, share in zip(names, dataset.streams, dataset.samples_per_stream, order.shares, strict=True):
        samples = int(size)
        tokens, passes = samples * seq_len if seq_len else None, share * order.remaining(0) / samples
        found.append(StreamShare(name, samples, tokens, float(stream.proportion), share, passes))
    return found


def log_mixture(names: Sequence[str], dataset: StreamingDataset, order: Order, seq_len: int | None) -> None:
    """Log the `stream_shares` as a table."""
    rows = []
    for name, samples, tokens, asked, share, passes in stream_shares(names, dataset, order, seq_len):
        shown_tokens = "-" if tokens is None else f"{tokens:,}"
        rows.append([name, f"{samples:,}", shown_tokens, f"{asked:.2%}", f"{share:.2%}", f"{passes:.3f}"])
    head = ["stream", "samples", "tokens", "share asked", "share in effect", "passes per epoch"]
    logger.info(f"Streams, and their part of an epoch:\n{text_table(head, rows)}")
