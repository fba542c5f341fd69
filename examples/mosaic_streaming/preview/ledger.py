"""Counts what a run has read of each stream, against the shares that were asked for."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.mosaic_streaming.checkpoint import History, Slice
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.preview.job_data import JobData

CURVE_POINTS = 200
"""A curve has at most so many points."""

ProgressBar = Callable[[Iterable[int], str], Iterable[int]]
"""Iterates numbers and shows a progress bar."""


def samples_of_streams(data: JobData, parts: Iterable[Slice], progress_bar: ProgressBar) -> NDArray[np.int64]:
    """Count the samples of each stream in parts of epochs, int64 [streams]."""
    counts = np.zeros(len(data.opened.names), np.int64)
    parts = list(parts)
    for number in progress_bar(range(len(parts)), "epochs"):
        samples = data.in_order(parts[number].epoch)[parts[number].begin : parts[number].end]
        counts += np.bincount(data.stream_of(samples), minlength=counts.size)
    return counts


def before(history: History) -> list[Slice]:
    """What was read before the known steps, since the streams' beginning; raise ConfigError if that isn't known."""
    first = history.segments[0]
    if first.epoch:
        raise ConfigError(
            f"What was read before epoch {first.epoch} is not known: the checkpoint, of an earlier version of this "
            "code, doesn't say in which batches. `ledger --step N` without --checkpoint counts for a run whose global "
            "batch has never changed."
        )
    return [Slice(first.step, 0, 0, first.sample_in_epoch, first.global_batch_size)] * bool(first.sample_in_epoch)


def ledger(data: JobData, history: History, until: int, progress_bar: ProgressBar) -> dict[str, Any]:
    """Say what was asked of each stream and what it has given, up to a step.

    Shares are of samples, as `proportion` and the like are. Tokens are those that the model gets; there are none where
    samples differ in length.

    Raises:
        ConfigError: what was read is not known.
    """
    history.segment(until + 1)
    read = samples_of_streams(data, [*before(history), *history.slices(until=until)], progress_bar)
    tokens = data.opened.tokens_of_a_sample
    dataset, streams = data.opened.dataset, []
    for number, name in enumerate(data.opened.names):
        asked = float(dataset.streams[number].proportion) * int(read.sum())
        delivered = int(read[number])
        section = {
            "stream": name,
            "share_asked": float(dataset.streams[number].proportion),
            "share": delivered / max(1, int(read.sum())),
            "samples_asked": asked,
            "samples": delivered,
            "samples_difference": delivered - asked,
            "passes": delivered / int(dataset.samples_per_stream[number]),
        }
        if tokens:
            section |= {"tokens_asked": asked * tokens, "tokens": delivered * tokens}
            section |= {"tokens_difference": (delivered - asked) * tokens}
        streams.append(section)
    since = {"since_step": history.segments[0].step if history.begins_anew else 0}
    return history.position(until)._asdict() | since | {"streams": streams}


def shares_over_steps(
    data: JobData, history: History, until: int, progress_bar: ProgressBar
) -> tuple[list[int], NDArray[np.float64]]:
    """The share of each stream in all that a run has read: at some steps, float64 [steps, streams]."""
    after = history.segments[0].step
    steps = sorted({round(step) for step in np.linspace(after + 1, until, max(0, min(CURVE_POINTS, until - after)))})
    counts, shares = samples_of_streams(data, before(history), no_progress_bar), []
    for step in progress_bar(steps, "steps"):
        counts += samples_of_streams(data, history.slices(after, step), no_progress_bar)
        after = step
        shares.append(counts / counts.sum())
    return steps, np.array(shares)


def no_progress_bar(numbers: Iterable[int], text: str) -> Iterable[int]:
    """Iterate numbers and show nothing."""
    return numbers
