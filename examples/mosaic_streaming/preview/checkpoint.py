"""What a checkpoint says about the data, and how a start goes on from it, read without a job."""

import dataclasses
import os
from typing import Any, NamedTuple

from examples.mosaic_streaming import checkpoint as saved
from examples.mosaic_streaming.checkpoint import History, State
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
        return saved.data_differences(self.state, data.plan, data.fingerprints) if self.state else []

    def check_same_data(self, data: JobData) -> None:
        """Raise ConfigError, as a start does, if it was written on other data."""
        if self.state:
            saved.check_same_data(self.state, data.plan, data.fingerprints)

    def history(self, data: JobData, step: int, goes_on: bool = False) -> History | None:
        """What its run has read up to its step; None if that was other data, or isn't known. DataError if damaged.

        `step` is what that step is called. If the run goes on, then with the job's global batch and plan; ConfigError
        if it can't.
        """
        if not self.state or self.differences(data):
            return None
        state, now = self.state, data.stages[len(self.state.past)].opened
        saved.check_position(state, now.dataset.epoch_size, now.order)
        history = state.history(data.plan, data.orders, data.fingerprints, goes_on=False)
        fits = all(history.remaining(one["stage"] - 1, 0, one["global_batch_size"]) for one in history.report())
        at = (state.steps, len(state.past), state.epoch, state.sample_in_epoch)
        if not fits or history.position(state.steps) != at:
            raise saved.damaged_state_error(
                f"its position after {state.steps:,} steps is not that of {list(state.segments)}"
            )
        before = state.seen.samples - history.samples_between(None, state.steps) if state.seen else None
        if before and history.begins_anew:
            raise saved.damaged_state_error(f"{before:,} samples more read than {state.steps:,} steps have")
        if goes_on:
            history = state.history(data.plan, data.orders, data.fingerprints)
        return dataclasses.replace(history, samples_before=before, steps_before=step - state.steps)


def history_of_start(data: JobData, checkpoint: Checkpoint | None) -> History | None:
    """What a run has read and will read that a start with the job's settings begins, or goes on with.

    A given checkpoint is loaded even if `checkpoint.enable` is false. None if it was written on other data, so that the
    start would be refused.
    """
    if checkpoint is None:
        return data.new_run()
    excluded = data.job.checkpoints.exclude_from_loading
    step = 0 if "train_state" in excluded else checkpoint.step
    if "dataloader" not in excluded:
        return checkpoint.history(data, step, goes_on=True)
    known = checkpoint.history(data, step) if len(data.stages) == 1 and not data.plan.skips else None
    if not known or not known.begins_anew:
        return dataclasses.replace(data.new_run(), steps_before=step)
    here = saved.Segment(step - known.steps_before, 0, 0, data.opened.order.global_batch_size)
    return dataclasses.replace(known, segments=saved.append_segment(known.segments, here))


def known_history(data: JobData, checkpoint: Checkpoint | None, goes_on: bool = True) -> History:
    """What a run has read and, if it goes on with the job's settings, will read; ConfigError if that isn't known."""
    if not checkpoint:
        return data.new_run()
    history = history_of_start(data, checkpoint) if goes_on else checkpoint.history(data, checkpoint.step)
    if not history:
        checkpoint.check_same_data(data)
        raise ConfigError(f"--checkpoint {checkpoint.folder} has no dataloader state that can be read.")
    return history


def checkpoint_of_start(data: JobData, path: str | None) -> Checkpoint | None:
    """The checkpoint that a start loads: the one at `path` or, if the job's settings say how to load one, its own.

    The job's data is given the checkpoint's canonical nodes where a start would take them. ConfigError if there is no
    checkpoint, or none with what a start loads; DataError if its state is damaged.
    """
    settings, excluded = data.job.checkpoints, set(data.job.checkpoints.exclude_from_loading)
    if not path and (settings.load_step != -1 or excluded & {"dataloader", "train_state"}):
        path = own_checkpoints(settings)
    if not path:
        return None
    folder = step_folder(path, settings.load_step)
    content: dict[str, Any] = {"dataloader": {saved.STATE_KEY: ""}, "train_state": {"step": 0}}
    state = None
    try:
        saved.read_checkpoint(folder, content, "--checkpoint")
        state = saved.unpack(content["dataloader"])
    except (ConfigError, DataError):
        if "dataloader" not in excluded:
            raise
        saved.read_checkpoint(folder, {"train_state": content["train_state"]}, "--checkpoint")
    step = int(content["train_state"]["step"])
    if settings.load_step not in (-1, step):
        raise ConfigError(
            f"--checkpoint {folder} is of step {step}, but a start loads checkpoint.load_step = {settings.load_step}. "
            "Name the same step in both, or give the folder of all steps."
        )
    for stage, before in zip(data.stages, state.stages if state and "dataloader" not in excluded else [], strict=False):
        stage.opened = stage.opened.with_nodes_of(before)
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
