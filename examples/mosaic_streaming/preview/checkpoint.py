"""Reads checkpoints without a job: what one says of the data, and how a start would go on from it."""

import dataclasses
import logging
import os
import warnings
from typing import Any, NamedTuple

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from examples.mosaic_streaming.checkpoint import (
    STATE_KEY,
    History,
    Segment,
    State,
    append_segment,
    check_position,
    damaged,
    differences,
    unpack,
)
from examples.mosaic_streaming.config import Checkpoints, Job
from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.preview.job_data import JobData
from examples.mosaic_streaming.titan import steps_with
from examples.mosaic_streaming.upstream.missing_keys import explain_missing


def root_cause(error: CheckpointException) -> str:
    """The root cause of a failure to read a checkpoint, in a sentence."""
    [failure, *_] = [cause for cause, _ in error.failures.values()]
    return f"{type(failure).__name__}: {str(failure).strip().splitlines()[0]}."


class Saved(NamedTuple):
    """A checkpoint: its folder, step and dataloader state. The state may be None if a start leaves it out."""

    folder: str
    step: int
    state: State | None

    def differences(self, data: JobData) -> list[list[str]]:
        """What has changed since the checkpoint was written: setting, value then, value now."""
        return differences(self.state.data, data.opened.fingerprint) if self.state else []

    def history(self, data: JobData) -> History | None:
        """What its run has read up to its step; None if that was other data, or isn't known.

        Raises:
            DataError: the state is damaged.
        """
        if not self.state or self.differences(data):
            return None
        state, order = self.state, data.opened.order
        check_position(state, data.opened.dataset.epoch_size)
        shift = self.step - state.steps
        segments = tuple(segment._replace(step=segment.step + shift) for segment in state.segments)
        history = History(order, segments)
        fits = all(history.remaining(0, segment.global_batch_size) for segment in segments)
        if not fits or history.position(self.step) != (self.step, state.epoch, state.sample_in_epoch):
            raise damaged(f"after {state.steps:,} steps, its position is not that of {list(state.segments)}")
        read = history.samples(self.step)
        before = state.seen.samples - read if state.seen and read is not None else None
        if before and history.begins_anew:
            raise damaged(f"{before:,} samples more read than {state.steps:,} steps have")
        return dataclasses.replace(history, samples_before=before)


def history_of_start(data: JobData, saved: Saved | None) -> History | None:
    """What a run has read and will read if it is started now, with the job's settings.

    Args:
        data: the streams.
        saved: the checkpoint to load, also if `checkpoint.enable` is false; None for a run that begins.

    Returns:
        None if the start would be refused, because the checkpoint was written on other data.
    """
    if saved is None:
        return data.from_beginning()
    order, excluded = data.opened.order, data.job.checkpoints.exclude_from_loading
    known = saved.history(data)
    step = 0 if "train_state" in excluded else saved.step
    if "dataloader" in excluded:
        here, known = Segment(step, 0, 0, order.global_batch_size), known if known and known.begins_anew else None
    elif known:
        _, epoch, sample = known.position(saved.step)
        place = (epoch, sample) if order.remaining(sample) else (epoch + 1, 0)
        here = Segment(step, *place, order.global_batch_size)
    else:
        return None
    if not known:
        return History(order, (here,))
    segments = tuple(segment._replace(step=segment.step + step - saved.step) for segment in known.segments)
    if "dataloader" in excluded or segments[-1].global_batch_size != order.global_batch_size:
        segments = append_segment(segments, here)
    return dataclasses.replace(known, segments=segments)


def own_checkpoints(job: Job) -> str | None:
    """The folder of a job's own checkpoints, if a start would load one of them."""
    folder = job.checkpoints.folder
    return folder if job.checkpoints.enable and steps_with(folder, ".metadata") else None


def checkpoint_of_start(job: Job, path: str | None) -> Saved | None:
    """Read the checkpoint that a start loads; errors are those of `read_checkpoint`.

    Args:
        job: the job that starts.
        path: the path that the user has named; None for the job's own, if its settings say how to load one.
    """
    settings = job.checkpoints
    if not path and (settings.load_step != -1 or {"dataloader", "train_state"} & {*settings.exclude_from_loading}):
        path = own_checkpoints(job)
    return read_checkpoint(path, settings) if path else None


def read_checkpoint(path: str, settings: Checkpoints) -> Saved:
    """Read one of TorchTitan's checkpoints, or the one of several that a start loads.

    Args:
        path: the folder of the checkpoint, or of all steps.
        settings: the job's settings: `load_step` chooses one, and what `exclude_from_loading` names may be missing.

    Raises:
        ConfigError: there is no checkpoint, or it has no dataloader state.
        DataError: the state is damaged.
    """
    folder = step_folder(path, settings.load_step)
    content: dict[str, Any] = {"dataloader": {STATE_KEY: ""}, "train_state": {"step": 0}}
    state = None
    try:
        load(folder, content)
        state = unpack(content["dataloader"])
    except (ConfigError, DataError):
        if "dataloader" not in settings.exclude_from_loading:
            raise
        load(folder, {"train_state": content["train_state"]})
    step = int(content["train_state"]["step"])
    if settings.load_step not in (-1, step):
        raise ConfigError(
            f"--checkpoint {folder} is of step {step}, but a start loads checkpoint.load_step = {settings.load_step}. "
            "Name one step in both, or give the folder of all steps."
        )
    return Saved(folder, step, state)


def step_folder(path: str, load_step: int) -> str:
    """The folder of a checkpoint, given that or the folder of all steps; raise ConfigError if there is none."""
    if os.path.isfile(os.path.join(path, ".metadata")):
        return path
    if not (steps := steps_with(path, ".metadata")):
        raise ConfigError(f"--checkpoint {path} is no finished checkpoint, and has none in it.")
    step = max(steps) if load_step == -1 else load_step
    if step not in steps:
        found = ", ".join(map(str, sorted(steps)))
        raise ConfigError(f"checkpoint.load_step = {load_step}, but --checkpoint {path} has finished steps: {found}.")
    return os.path.join(path, f"step-{step}")


def load(folder: str, content: dict[str, Any]) -> None:
    """Fill in the values that a checkpoint has for these keys; raise ConfigError if that fails."""
    logging.disable(logging.WARNING)  # which would print tracebacks
    try:
        with warnings.catch_warnings(action="ignore"):  # of a missing process group
            dcp.load(content, checkpoint_id=folder, no_dist=True)
    except CheckpointException as error:
        reason = explain_missing(str(error)) or f"it can't be read: {root_cause(error)} Name an earlier one."
        raise ConfigError(f"--checkpoint {folder}: {reason}") from error
    finally:
        logging.disable(logging.NOTSET)
