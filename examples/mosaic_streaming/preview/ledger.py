"""What a run has read of each stream, against the shares that were asked for."""

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.mosaic_streaming.checkpoint import History, Slice, stream_keys
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.preview.job_data import JobData
from examples.mosaic_streaming.preview.progress import progress_bar

MAX_POINTS = 200
"""Of a curve over steps."""


def count_samples(data: JobData, history: History, until: int) -> tuple[list[int], NDArray[np.int64]]:
    """Some steps, and what a run has read of each stream in each stage up to them; ConfigError if that isn't known.

    The first step is the one before those that are known, the last is `until`. The counts are int64 [steps, stages,
    streams]; a stream has one number in all stages.
    """
    history.segment(until + 1)
    first, keys = history.segments[0], stream_keys(data.fingerprints)
    if first.epoch:
        raise ConfigError(
            f"What was read before epoch {first.epoch} is not known: the checkpoint was written by an earlier version "
            "of this code, which didn't record the batches. `ledger --step N` without --checkpoint counts for a run "
            "whose global batch has never changed."
        )
    points = np.linspace(history.first_step, until, min(MAX_POINTS, until - history.first_step) + 1)
    steps = list(map(round, points.tolist()))
    counts = np.zeros((len(steps), len(keys), 1 + max(map(max, keys))), np.int64)
    unrecorded = Slice(0, 0, 0, 0, 0, first.sample_in_epoch, first.global_batch_size)
    reads = [[unrecorded], *(history.slices(*pair) for pair in itertools.pairwise(steps))]
    for point, read in enumerate(progress_bar(reads, "Counting samples")):
        for piece in read:
            counts[point, piece.stage, keys[piece.stage]] += data.counts(piece, history)
    return steps, np.cumsum(counts, axis=0)


def asked_samples(data: JobData, counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """How many samples of each stream its shares come to, given what was read: float64, of the shape of `counts`."""
    shares = np.zeros(counts.shape[-2:])
    for stage, keys in zip(data.stages, stream_keys(data.fingerprints), strict=True):
        shares[stage.stage, keys] = [float(stream.proportion) for stream in stage.opened.dataset.streams]
    return counts.sum(axis=-1, keepdims=True) * shares


def ledger_report(data: JobData, history: History, until: int, counts: NDArray[np.int64]) -> dict[str, Any]:
    """What was asked of each stream and what it has given, up to a step.

    `counts` are the samples that each stream has given, int64 [stages, streams]. Shares are of samples, as `proportion`
    and the like are. Tokens are those that the model gets; there are none where samples differ in length.
    """
    sizes = [stage.opened.tokens_of_a_sample or 0 for stage in data.stages]
    units = {"samples": [1] * len(sizes)} | ({"tokens": sizes} if all(sizes) else {})
    asked, keys, streams = asked_samples(data, counts), stream_keys(data.fingerprints), []
    total = int(counts.sum())
    for key, read in enumerate(counts.sum(axis=0).tolist()):
        number = next(number for number, of_stage in enumerate(keys) if key in of_stage)
        opened, place = data.stages[number].opened, keys[number].index(key)
        section = {
            "stream": opened.names[place],
            "share_asked": float(asked[:, key].sum() / total if total else opened.dataset.streams[place].proportion),
            "share": read / max(1, total),
            "passes": read / int(opened.dataset.samples_per_stream[place]),
        }
        for unit, size in units.items():
            expected, given = round(float(asked[:, key] @ size), 6), int(counts[:, key] @ size)
            section |= {f"{unit}_asked": expected, unit: given, f"{unit}_difference": given - expected}
        streams.append(section)
    since = history.first_step if history.begins_anew else 0
    return history.position(until)._asdict() | {"since_step": since, "streams": streams}
