"""The pictures of `--plot`."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from examples.mosaic_streaming.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 40


def plot_lengths(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Draw how long the documents of each stream are, from a report of `show`."""
    lengths: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        for document in row.get("documents", []):
            lengths[row["samples"][0]["stream"]].append(document["tokens"])
    if not lengths:
        raise ConfigError(f"--plot {path}: these rows have no documents to draw.")
    bins = np.linspace(0, max(map(max, lengths.values())) + 1, BINS + 1)
    with picture(path, f"Documents of {len(rows):,} rows") as axes:
        axes.hist(list(lengths.values()), bins.tolist(), label=list(lengths), histtype="barstacked")
        axes.set(xlabel="tokens of a document, as far as it lies in the row", ylabel="documents")


def plot_shares(path: str, steps: Sequence[int], counts: NDArray[np.int64], streams: Sequence[dict[str, Any]]) -> None:
    """Draw each stream's share of the samples read so far, over steps, and the share asked for.

    `counts` are the samples read up to each step, int64 [steps, streams]; `streams` are those of `ledger_report`.
    """
    read = counts.sum(axis=1)
    steps, shares = np.array(steps)[read > 0], counts[read > 0] / read[read > 0, None]
    with picture(path, "Streams: read (solid) and asked for (dotted)") as axes:
        for number, stream in enumerate(streams):
            [curve] = axes.plot(steps, shares[:, number], label=stream["stream"])
            axes.axhline(stream["share_asked"], color=curve.get_color(), linestyle=":", linewidth=1)
        axes.set(xlabel="step", ylabel="share of all samples read so far", ylim=(0, None))


@contextlib.contextmanager
def picture(path: str, title: str) -> Iterator["Axes"]:
    """The axes of a picture, which is written in the format that the file's ending names."""
    from matplotlib.figure import Figure  # which takes a second to import

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    yield axes
    axes.set_title(title)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path} can't be written: {error}.") from error
