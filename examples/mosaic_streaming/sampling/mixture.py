"""How much of the samples each stream of a mixture is, how much was asked for, and how often it has been read."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from streaming import StreamingDataset
from torchtitan.tools.logging import logger

from examples.mosaic_streaming.errors import text_table
from examples.mosaic_streaming.sampling.order import Order


class StreamShare(NamedTuple):
    """A stream's size and its share of an epoch, or of all samples where there are no epochs."""

    name: str
    samples: int  # of the stream
    tokens: int | None  # of the stream that the model gets; None where samples differ in length
    share_asked: float  # what `proportion`, `repeat` or `choose` comes to
    share: float  # in effect, after what the batching method leaves out
    passes: float | None  # over the stream in an epoch; None where there are no epochs


def stream_shares(names: list[str], dataset: StreamingDataset, order: Order, seq_len: int | None) -> list[StreamShare]:
    """Return each stream's size and its share; `seq_len` is in tokens of a sample, and None where samples differ."""
    found = []
    sizes = dataset.samples_per_stream.tolist()
    for name, stream, samples, share in zip(names, dataset.streams, sizes, order.shares, strict=True):
        tokens = samples * seq_len if seq_len else None
        passes = None if order.blend else share * order.remaining(0) / samples
        found.append(StreamShare(name, samples, tokens, float(stream.proportion), share, passes))
    return found


def log_mixture(names: list[str], dataset: StreamingDataset, order: Order, seq_len: int | None) -> None:
    """Log the `stream_shares` as a table."""
    head, of = ["stream", "samples", "tokens", "share asked", "share in effect", "passes per epoch"], "an epoch"
    if order.blend:
        head, of = [*head[:3], "share", "samples of all in a pass"], "all samples"
    rows = []
    for name, samples, tokens, asked, share, passes in stream_shares(names, dataset, order, seq_len):
        row = [name, f"{samples:,}", "-" if tokens is None else f"{tokens:,}", f"{asked:.2%}"]
        if passes is None:
            rows.append([*row, f"{samples / share:,.0f}" if share else "-"])
        else:
            rows.append([*row, f"{share:.2%}", f"{passes:.3f}"])
    logger.info(f"Streams, and their part of {of}:\n{text_table(head, rows)}")


def passes_of(
    names: Sequence[str], dataset: StreamingDataset, order: Order, end: int, begin: int | None = None
) -> dict[str, float]:
    """Return how often each stream of a blend has been read at a position, in all or since another position."""
    assert order.blend
    before = order.blend.read_before if begin is None else 0
    passes = (before + order.counts(dataset, 0, begin or 0, end)) / dataset.samples_per_stream
    return dict(zip(names, passes.tolist(), strict=True))


def passes_text(passes: Mapping[str, float]) -> str:
    """Say how often each stream has been read."""
    return ", ".join(f"{name} {times:.2f}" for name, times in passes.items())
