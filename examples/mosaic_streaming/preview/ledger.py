"""What a run has read of each stream up to a step, against the shares that were asked for."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.mosaic_streaming.checkpoint import History, Slice
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.preview.job_data import JobData

POINTS = 200
"""Of a curve, at most."""

Watched = Callable[[Iterable[int], str], Iterable[int]]
"""Shows how far one is in some numbers, while passing them on."""


def samples_of_streams(data: JobData, parts: Iterable[Slice], watched: Watched) -> NDArray[np.int64]:
    """Samples of each stream in parts of epochs, int64 [streams]."""
    counts = np.zeros(len(data.opened.names), np.int64)
    parts = list(parts)
    for number in watched(range(len(parts)), "epochs"):
        samples = data.in_order(parts[number].epoch)[parts[number].begin : parts[number].end]
        counts += np.bincount(data.stream_of(samples), minlength=counts.size)
    return counts


def before(history: History) -> list[Slice]:
    """What was read before the steps that are known, since the streams' beginning.

    Raises:
        ConfigError: that is not known, either.
    """
    first = history.segments[0]
    if first.epoch:
        raise ConfigError(
            f"What was read before epoch {first.epoch} is not known: the checkpoint, of an earlier version of this "
            "code, doesn't say in which batches. `ledger --step N` without --checkpoint counts for a run whose global "
            "batch has never changed."
        )
    return [Slice(first.step, 0, 0, first.sample_in_epoch, first.global_batch_size)] * bool(first.sample_in_epoch)


def ledger(data: JobData, history: History, until: int, watched: Watched) -> dict[str, Any]:
    """What has been asked of each stream and what it has given, up to a step.

    Shares are of samples, as `proportion` and the like are. Tokens are those that the model gets, none where samples
    differ in length.

    Raises:
        ConfigError: that is not known.
    """
    history.segment(until + 1)
    read = samples_of_streams(data, [*before(history), *history.slices(until=until)], watched)
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
    data: JobData, history: History, until: int, watched: Watched
) -> tuple[list[int], NDArray[np.float64]]:
    """The share of each stream in all that a run has read from the streams' beginning, at some steps up to one.

    Returns:
        the steps, and float64 [steps, streams].
    """
    after = history.segments[0].step
    steps = sorted({round(step) for step in np.linspace(after + 1, until, max(0, min(POINTS, until - after)))})
    counts, shares = samples_of_streams(data, before(history), quietly), []
    for step in watched(steps, "steps"):
        counts += samples_of_streams(data, history.slices(after, step), quietly)
        after = step
        shares.append(counts / counts.sum())
    return steps, np.array(shares)


def quietly(numbers: Iterable[int], text: str) -> Iterable[int]:
    """Shows nothing."""
    return numbers
