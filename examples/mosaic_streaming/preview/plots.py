"""Draws pictures of what `preview` finds."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from examples.mosaic_streaming.errors import ConfigError

BINS = 40


def plot_lengths(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the lengths of the rows' documents, by stream; raise ConfigError if there are none."""
    lengths: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        for document in row.get("documents", []):
            lengths[row["samples"][0]["stream"]].append(document["tokens"])
    if not lengths:
        raise ConfigError(f"--plot {path}: these rows have no documents to draw.")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    bins = np.linspace(0, max(map(max, lengths.values())) + 1, BINS + 1)
    axes.hist(list(lengths.values()), bins.tolist(), label=list(lengths), histtype="barstacked")
    axes.set(xlabel="tokens of a document, as far as it lies in the row", ylabel="documents")
    axes.set_title(f"Documents of {len(rows):,} rows")
    axes.legend(frameon=False)
    save(figure, path)


def plot_shares(
    path: str, names: Sequence[str], steps: Sequence[int], shares: NDArray[np.float64], asked: Sequence[float]
) -> None:
    """Draw each stream's share of what was read, `shares` float64 [steps, streams], and the share that was asked."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        [line] = axes.plot(steps, shares[:, number], label=name)
        axes.axhline(asked[number], color=line.get_color(), linestyle=":", linewidth=1)
    axes.set(xlabel="step", ylabel="share of all samples read so far", ylim=(0, None))
    axes.set_title("Streams: read (solid) and asked for (dotted)")
    axes.legend(frameon=False)
    save(figure, path)


def save(figure: Figure, path: str) -> None:
    """Write a picture, in the format of the file's ending; raise ConfigError if that fails."""
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path} can't be written: {error}.") from error
