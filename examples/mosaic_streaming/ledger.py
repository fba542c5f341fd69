"""What a run has read of each stream up to a step, against the shares that were asked for."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.mosaic_streaming.offline import BEGINNING, Offline, Position

POINTS = 200
"""Of a curve, at most."""

Watched = Callable[[Iterable[int], str], Iterable[int]]
"""Shows how far one is in some numbers, while passing them on."""


def samples_between(offline: Offline, begin: Position, end: Position, watched: Watched) -> NDArray[np.int64]:
    """Samples of each stream that a run reads from one position to another, int64 [streams]."""
    counts = np.zeros(len(offline.streams.names), np.int64)
    for epoch in watched(range(begin.epoch, end.epoch + 1), "epochs"):
        first = begin.sample_in_epoch if epoch == begin.epoch else 0
        last = end.sample_in_epoch if epoch == end.epoch else offline.streams.order.left(0)
        if first < last:  # or an epoch would be put in order for nothing
            counts += np.bincount(offline.stream_of(offline.in_order(epoch)[first:last]), minlength=counts.size)
    return counts


def ledger(offline: Offline, until: Position, watched: Watched) -> dict[str, Any]:
    """What has been asked of each stream and what it has given, before a position.

    Shares are of samples, as `proportion` and the like are. Tokens are those that the model gets, none where samples
    differ in length.
    """
    read = samples_between(offline, BEGINNING, until, watched)
    tokens = offline.streams.tokens_of_a_sample
    dataset, streams = offline.streams.dataset, []
    for number, name in enumerate(offline.streams.names):
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
    return until._asdict() | {"streams": streams}


def shares_over_steps(offline: Offline, until: Position, watched: Watched) -> tuple[list[int], NDArray[np.float64]]:
    """The share of each stream in all that a run has read from its beginning, at some steps up to a position.

    Returns:
        the steps, and float64 [steps, streams].
    """
    steps = sorted({round(step) for step in np.linspace(1, until.step, min(POINTS, until.step))})
    counts, before, shares = np.zeros(len(offline.streams.names), np.int64), BEGINNING, []
    for step in watched(steps, "steps"):
        now = offline.position(step)
        counts += samples_between(offline, before, now, lambda epochs, text: epochs)
        before = now
        shares.append(counts / counts.sum())
    return steps, np.array(shares)
