"""The pictures of `--plot`."""

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from examples.mosaic_streaming.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 40
Counts = NDArray[np.int64] | NDArray[np.float64]


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


def plot_shares(
    path: str, steps: Sequence[int], read: Counts, asked: Counts, names: Sequence[str], stages: Mapping[int, str]
) -> None:
    """Draw each stream's share of the samples read so far, over steps, and the share asked for.

    `read` and `asked` are as `count_samples` and `asked_samples` give them; `stages` are the files of all but the first
    stage, by the step before they begin.
    """
    total = read.sum(axis=(1, 2))
    known, places = total > 0, np.array(steps)[total > 0]
    with picture(path, "Streams: read (solid) and asked for (dotted)") as axes:
        for number, name in enumerate(names):
            of_read, of_asked = (counts[known, :, number].sum(axis=1) / total[known] for counts in (read, asked))
            [curve] = axes.plot(places, of_read, label=name)
            axes.plot(places, of_asked, color=curve.get_color(), linestyle=":", linewidth=1)
        for step, file in stages.items():
            if steps[0] <= step <= steps[-1]:
                axes.axvline(step, color="gray", linewidth=1)
                name, place = f" {os.path.basename(file)}", axes.get_xaxis_transform()
                axes.text(step, 0.98, name, transform=place, va="top", fontsize="small")
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
