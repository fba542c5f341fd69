"""What a run reads again: in an epoch or a blend, and from one stage to the next."""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from examples.mosaic_streaming import sampling
from examples.mosaic_streaming.checkpoint import History, Slice, stream_keys
from examples.mosaic_streaming.preview.job_data import JobData
from examples.mosaic_streaming.preview.progress import progress_bar

EXACT = 20_000_000
"""Samples of an epoch up to which the first repeat is looked for. Beyond, only a lower bound is given."""


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
    keys, read = stream_keys(data.fingerprints), [np.zeros(0, np.int64)] * 2
    for piece in progress_bar(history.slices(until=data.job.steps), "Comparing the stages"):
        dataset, ids = data.stages[piece.stage].opened.dataset, data.samples(piece, history)
        numbers = sampling.stream_numbers(dataset, ids)
        of_streams = ids + np.array(keys[piece.stage])[numbers] * EXACT - dataset.sample_offset_per_stream[numbers]
        read[piece.stage > 0] = np.union1d(read[piece.stage > 0], of_streams)
    return np.intersect1d(read[0], read[1]).size
