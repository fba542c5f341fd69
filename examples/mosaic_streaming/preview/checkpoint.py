"""What a checkpoint says of the data, and how a start goes on from it, read without a job."""

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
    """What a failure to read a checkpoint comes down to, in a sentence."""
    [failure, *_] = [cause for cause, _ in error.failures.values()]
    return f"{type(failure).__name__}: {str(failure).strip().splitlines()[0]}."


class Saved(NamedTuple):
    """A checkpoint's folder, step and dataloader state; none where a start that leaves it out can't read it."""

    folder: str
    step: int
    state: State | None

    def differences(self, data: JobData) -> list[list[str]]:
        """What is not as it was when the checkpoint was written: setting, value then, value now."""
        return differences(self.state.data, data.opened.fingerprint) if self.state else []

    def history(self, data: JobData) -> History | None:
        """What its run has read, up to its step; none where that was other data, or isn't known.

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
    """What a run has read and will read that a start with the job's settings begins, or goes on with.

    Args:
        data: the streams.
        saved: the checkpoint that it loads, also where `checkpoint.enable` is false; none for a run that begins.

    Returns:
        none where the start would be refused, as the checkpoint was written on other data.
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
    """The folder of a job's own checkpoints, if there are finished ones that a start would load."""
    folder = job.checkpoints.folder
    return folder if job.checkpoints.enable and steps_with(folder, ".metadata") else None


def checkpoint_of_start(job: Job, path: str | None) -> Saved | None:
    """The checkpoint that a start loads.

    Args:
        job: that starts.
        path: what the user has named; without, the job's own where its settings say how to load them.

    Raises:
        ConfigError, DataError: as `read_checkpoint`.
    """
    settings = job.checkpoints
    if not path and (settings.load_step != -1 or {"dataloader", "train_state"} & {*settings.exclude_from_loading}):
        path = own_checkpoints(job)
    return read_checkpoint(path, settings) if path else None


def read_checkpoint(path: str, settings: Checkpoints) -> Saved:
    """Read a checkpoint of TorchTitan's, or of several in a folder the one that a start loads.

    Args:
        path: of its folder, or of that of all steps.
        settings: of the job; `load_step` chooses, and what `exclude_from_loading` has needn't be there.

    Raises:
        ConfigError: there is none, or it has no dataloader state.
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
    """The folder of a checkpoint, given that or the one of all steps.

    Raises:
        ConfigError: there is none.
    """
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
    """Fill in what a checkpoint has for these keys.

    Raises:
        ConfigError: one is missing, or can't be read.
    """
    logging.disable(logging.WARNING)  # tracebacks of what is said in a line here
    try:
        with warnings.catch_warnings(action="ignore"):  # that there is no process group
            dcp.load(content, checkpoint_id=folder, no_dist=True)
    except CheckpointException as error:
        reason = explain_missing(str(error)) or f"it can't be read: {root_cause(error)} Name an earlier one."
        raise ConfigError(f"--checkpoint {folder}: {reason}") from error
    finally:
        logging.disable(logging.NOTSET)
