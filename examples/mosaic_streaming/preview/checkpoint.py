"""What a checkpoint says about the data, and how a start goes on from it, read without a job."""

import dataclasses
import os
from typing import Any, NamedTuple

from examples.mosaic_streaming.checkpoint import (
    STATE_KEY,
    History,
    Segment,
    State,
    append_segment,
    check_position,
    check_same_data,
    damaged_state_error,
    differences,
    read_checkpoint,
    unpack,
)
from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.preview.job_data import JobData
from examples.mosaic_streaming.titan import own_checkpoints, steps_with


class Checkpoint(NamedTuple):
    """A checkpoint of TorchTitan's; its `state` is None if it can't be read and a start leaves it out anyway."""

    folder: str
    step: int
    state: State | None

    def differences(self, data: JobData) -> list[list[str]]:
        """The settings that have changed since it was written: name, value then, value now."""
        return differences(self.state.data, data.opened.fingerprint) if self.state else []

    def check_same_data(self, data: JobData) -> None:
        """Raise ConfigError, as a start does, if it was written on other data."""
        if self.state:
            check_same_data(self.state.data, data.opened.fingerprint, data.opened.config.source)

    def history(self, data: JobData) -> History | None:
        """What its run has read up to its step; None if that was other data, or isn't known. DataError if damaged."""
        if not self.state or self.differences(data):
            return None
        state = self.state
        check_position(state, data.opened.dataset.epoch_size, data.opened.order)
        segments = moved(state.segments, self.step - state.steps)
        history = History(data.opened.order, segments)
        fits = all(history.remaining(0, segment.global_batch_size) for segment in segments)
        if not fits or history.position(self.step) != (self.step, state.epoch, state.sample_in_epoch):
            raise damaged_state_error(f"its position after {state.steps:,} steps is not that of {list(state.segments)}")
        read = history.samples(self.step)
        before = state.seen.samples - read if state.seen and read is not None else None
        if before and history.begins_anew:
            raise damaged_state_error(f"{before:,} samples more read than {state.steps:,} steps have")
        return dataclasses.replace(history, samples_before=before)


def moved(segments: tuple[Segment, ...], steps: int) -> tuple[Segment, ...]:
    """Segments that begin a number of steps later."""
    return tuple(segment._replace(step=segment.step + steps) for segment in segments)


def history_of_start(data: JobData, checkpoint: Checkpoint | None) -> History | None:
    """What a run has read and will read that a start with the job's settings begins, or goes on with.

    A given checkpoint is loaded even if `checkpoint.enable` is false. None if it was written on other data, so that the
    start would be refused.
    """
    if checkpoint is None:
        return data.new_run()
    order, excluded = data.opened.order, data.job.checkpoints.exclude_from_loading
    known = checkpoint.history(data)
    step = 0 if "train_state" in excluded else checkpoint.step
    if "dataloader" in excluded:
        here, known = Segment(step, 0, 0, order.global_batch_size), known if known and known.begins_anew else None
    elif known:
        _, epoch, sample = known.position(checkpoint.step)
        position = (epoch, sample) if order.remaining(sample) else (epoch + 1, 0)
        here = Segment(step, *position, order.global_batch_size)
    else:
        return None
    if not known:
        return History(order, (here,))
    segments = moved(known.segments, step - checkpoint.step)
    if "dataloader" in excluded or segments[-1].global_batch_size != order.global_batch_size:
        segments = append_segment(segments, here)
    return dataclasses.replace(known, segments=segments)


def known_history(data: JobData, checkpoint: Checkpoint | None, goes_on: bool = True) -> History:
    """What a run has read and, if it goes on with the job's settings, will read; ConfigError if that isn't known."""
    history = history_of_start(data, checkpoint) if goes_on or not checkpoint else checkpoint.history(data)
    if history:
        return history
    assert checkpoint
    checkpoint.check_same_data(data)
    raise ConfigError(f"--checkpoint {checkpoint.folder} has no dataloader state that can be read.")


def checkpoint_of_start(data: JobData, path: str | None) -> Checkpoint | None:
    """The checkpoint that a start loads: the one at `path` or, if the job's settings say how to load one, its own.

    The job's data is given the checkpoint's canonical nodes where a start would take them.

    ConfigError if there is none, or none with what a start loads; DataError if its state is damaged.
    """
    settings, excluded = data.job.checkpoints, set(data.job.checkpoints.exclude_from_loading)
    if not path and (settings.load_step != -1 or excluded & {"dataloader", "train_state"}):
        path = own_checkpoints(settings)
    if not path:
        return None
    folder = step_folder(path, settings.load_step)
    content: dict[str, Any] = {"dataloader": {STATE_KEY: ""}, "train_state": {"step": 0}}
    state = None
    try:
        read_checkpoint(folder, content, "--checkpoint")
        state = unpack(content["dataloader"])
    except (ConfigError, DataError):
        if "dataloader" not in excluded:
            raise
        read_checkpoint(folder, {"train_state": content["train_state"]}, "--checkpoint")
    step = int(content["train_state"]["step"])
    if settings.load_step not in (-1, step):
        raise ConfigError(
            f"--checkpoint {folder} is of step {step}, but a start loads checkpoint.load_step = {settings.load_step}. "
            "Name the same step in both, or give the folder of all steps."
        )
    if state and "dataloader" not in excluded:
        data.opened = data.opened.with_nodes_of(state.data)
    return Checkpoint(folder, step, state)


def step_folder(path: str, load_step: int) -> str:
    """The folder of the checkpoint that `load_step` chooses, unless `path` is one; ConfigError if there is none."""
    if os.path.isfile(os.path.join(path, ".metadata")):
        return path
    if not (steps := steps_with(path, ".metadata")):
        raise ConfigError(f"--checkpoint {path} is no finished checkpoint, and has none in it.")
    step = max(steps) if load_step == -1 else load_step
    if step not in steps:
        found = ", ".join(map(str, sorted(steps)))
        raise ConfigError(f"checkpoint.load_step = {load_step}, but --checkpoint {path} has finished steps: {found}.")
    return os.path.join(path, f"step-{step}")
