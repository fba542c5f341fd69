"""What a run reads: how much of each stream, against the shares that were asked for, and what again."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.mosaic_streaming import sampling
from examples.mosaic_streaming.checkpoint import History, Slice, stream_keys
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.preview.job_data import JobData
from examples.mosaic_streaming.preview.progress import progress_bar

MAX_POINTS = 200  # of a curve over steps
EXACT = 20_000_000  # samples of an epoch up to which the first repeat is looked for; beyond, a lower bound is given


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


def first_repeat(data: JobData, history: History) -> tuple[int | None, bool]:
    """The first step that reads a sample again, None if unknown, and whether that is exact: it may be a later one."""
    if not history.begins_anew:
        return None, False
    pairs = (pair for pair in itertools.pairwise(history.slices()) if pair[0].stage == pair[1].stage)
    steps = (new.step for old, new in pairs if new.epoch != old.epoch or new.begin < old.end)
    again = next(steps, sampling.ENDLESS)
    pieces = list(itertools.takewhile(lambda piece: piece.step < again, history.slices()))
    found = [(again + 1, True)]
    for stage in data.stages:
        if own := [piece for piece in pieces if piece.stage == stage.stage]:
            found.append(repeat_of_stage(stage, history, own, again + 1))
    step = min(step for step, _ in found)
    # What was skipped is read for the first time in a second pass.
    return step, not data.plan.skips and all(exact for first, exact in found if first == step)


def repeat_of_stage(data: JobData, history: History, pieces: Sequence[Slice], again: int) -> tuple[int, bool]:
    """The first step of a stage that reads a sample again, `again` at the latest, and whether that is exact.

    Step `again` is the first of a second epoch, or after the streams began anew; `pieces` are read before.
    """
    dataset, order, stage = data.opened.dataset, history.orders[data.stage], data.plan.stages[data.stage]
    if order.blend:
        if data.stage and (stage.restart or not data.stages[0].opened.order.blend):
            return pieces[0].step + 1, False
        left = enumerate((dataset.samples_per_stream - order.blend.read_before).tolist())
        ends = [order.blend.position(number, count) for number, count in left if count >= 0 and order.shares[number]]
        repeat = min(ends, default=sampling.ENDLESS)
        for piece in pieces:
            if repeat < piece.end:
                return piece.step + max(0, repeat - piece.begin) // piece.global_batch_size + 1, True
        return again, True
    if dataset.epoch_size > EXACT:
        choices = zip(dataset.streams, dataset.samples_per_stream, strict=True)
        is_chosen_often = any(int(stream.choose) > size for stream, size in choices)
        return history.first_step + 1 if is_chosen_often else again, False
    seen = np.zeros(dataset.num_samples, bool)
    for piece in progress_bar(pieces, "Looking for the first repeat"):
        read = data.samples(piece, history)
        repeats = np.flatnonzero(seen[read] | is_repeat(read, dataset.num_samples))
        if repeats.size:
            return piece.step + int(repeats[0]) // piece.global_batch_size + 1, True
        seen[read] = True
    return again, True


def is_repeat(samples: NDArray[np.int64], num_samples: int) -> NDArray[np.bool_]:
    """Which samples have an equal one to their left; ids are below `num_samples`."""
    first = np.zeros(num_samples, np.int64)
    first[samples[::-1]] = np.arange(samples.size)[::-1]
    return first[samples] != np.arange(samples.size)


def in_common(data: JobData, history: History) -> int | None:
    """How many samples the first stage has read that later stages read again, as streams begin anew behind it."""
    if sum(stage.opened.dataset.num_samples for stage in data.stages) > EXACT:
        return None
    keys, sizes = stream_keys(data.fingerprints), dict[int, int]()
    for stage in data.stages:
        sizes |= zip(keys[stage.stage], stage.opened.dataset.samples_per_stream.tolist(), strict=True)
    begins = np.cumsum([0, *(sizes[key] for key in range(len(sizes)))])
    read = np.zeros((2, begins[-1]), bool)  # by the first stage, and by later ones
    for piece in progress_bar(history.slices(until=data.job.steps), "Comparing the stages"):
        dataset, ids = data.stages[piece.stage].opened.dataset, data.samples(piece, history)
        numbers = sampling.stream_numbers(dataset, ids)
        of_streams = ids - dataset.sample_offset_per_stream[numbers]
        read[int(piece.stage > 0), begins[np.array(keys[piece.stage])[numbers]] + of_streams] = True
    return int(read.all(axis=0).sum())
