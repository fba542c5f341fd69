"""What a run has read of each stream, against the shares that were asked for."""

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.mosaic_streaming.checkpoint import History, Slice
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.preview.job_data import JobData
from examples.mosaic_streaming.preview.progress import progress_bar

MAX_POINTS = 200
"""Of a curve over steps."""


def count_samples(data: JobData, history: History, until: int) -> tuple[list[int], NDArray[np.int64]]:
    """Some steps, and what a run has read of each stream up to them, int64 [steps, streams]; ConfigError if unknown.

    The first is the one before those that are known, the last is `until`.
    """
    history.segment(until + 1)
    first = history.segments[0]
    if first.epoch:
        raise ConfigError(
            f"What was read before epoch {first.epoch} is not known: the checkpoint was written by an earlier version "
            "of this code, which didn't record the batches. `ledger --step N` without --checkpoint counts for a run "
            "whose global batch has never changed."
        )
    points = np.linspace(first.step, until, min(MAX_POINTS, until - first.step) + 1)
    steps = list(map(round, points.tolist()))
    unrecorded = Slice(first.step, 0, 0, first.sample_in_epoch, first.global_batch_size)
    reads = [[unrecorded], *(history.slices(*pair) for pair in itertools.pairwise(steps))]
    counts = [np.sum(list(map(data.counts, read)), axis=0) for read in progress_bar(reads, "Counting samples")]
    return steps, np.cumsum(counts, axis=0)


def ledger_report(data: JobData, history: History, until: int, counts: NDArray[np.int64]) -> dict[str, Any]:
    """What was asked of each stream and what it has given, up to a step.

    `counts` are the samples that each stream has given, int64 [streams]. Shares are of samples, as `proportion` and the
    like are. Tokens are those that the model gets; there are none where samples differ in length.
    """
    tokens, total, dataset = data.opened.tokens_of_a_sample, int(counts.sum()), data.opened.dataset
    units, streams = {"samples": 1} | ({"tokens": tokens} if tokens else {}), []
    for number, name in enumerate(data.opened.names):
        share, samples = float(dataset.streams[number].proportion), int(counts[number])
        section = {"stream": name, "share_asked": share, "share": samples / max(1, total)}
        section["passes"] = samples / int(dataset.samples_per_stream[number])
        for unit, size in units.items():
            asked, given = round(share * total * size, 6), samples * size
            section |= {f"{unit}_asked": asked, unit: given, f"{unit}_difference": given - asked}
        streams.append(section)
    since = history.segments[0].step if history.begins_anew else 0
    return history.position(until)._asdict() | {"since_step": since, "streams": streams}
