"""What a checkpoint says of the data, read without a job."""

import dataclasses
import logging
import os
import warnings
from typing import Any, NamedTuple

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.job_config import steps_with
from examples.mosaic_streaming.offline import Offline, Position
from examples.mosaic_streaming.resume import STATE_KEY, State, check_position, differences, explain_missing, unpack


def innermost(error: CheckpointException) -> str:
    """What a failure to read a checkpoint comes down to, in a sentence."""
    [failure, *_] = [cause for cause, _ in error.failures.values()]
    return f"{type(failure).__name__}: {str(failure).strip().splitlines()[0]}."


class Saved(NamedTuple):
    """A checkpoint's folder, step and dataloader state."""

    folder: str
    step: int
    state: State

    def position(self, offline: Offline) -> Position:
        """Where the next batch is, with the present global batch.

        Raises:
            DataError: there is no such place.
        """
        check_position(self.state, offline.streams.dataset.epoch_size)
        here = Position(self.step, self.state.epoch, self.state.sample_in_epoch)
        is_read = offline.streams.order.left(here.sample_in_epoch) == 0
        return Position(self.step, here.epoch + 1, 0) if is_read else here

    def as_written(self, offline: Offline) -> Offline:
        """The streams with the global batch of the run that wrote it, in place of the present one."""
        order = dataclasses.replace(offline.streams.order, global_batch_size=self.state.global_batch_size)
        return dataclasses.replace(offline, streams=dataclasses.replace(offline.streams, order=order))

    def differences(self, offline: Offline) -> list[list[str]]:
        """What is not as it was when the checkpoint was written: setting, value then, value now."""
        return differences(self.state.data, offline.streams.data)


def read_checkpoint(path: str) -> Saved:
    """Read a checkpoint of TorchTitan's, or of several in a folder the last.

    Raises:
        ConfigError: there is none, or it has no dataloader state.
        DataError: the state is damaged.
    """
    folder = path
    if not os.path.isfile(os.path.join(path, ".metadata")):
        if not (steps := steps_with(path, ".metadata")):
            raise ConfigError(f"--checkpoint {path} is no finished checkpoint, and has none in it.")
        folder = os.path.join(path, f"step-{max(steps)}")
    content: dict[str, Any] = {"dataloader": {STATE_KEY: ""}, "train_state": {"step": 0}}
    logging.disable(logging.WARNING)  # tracebacks of what is said in a line here
    try:
        with warnings.catch_warnings(action="ignore"):  # that there is no process group
            dcp.load(content, checkpoint_id=folder, no_dist=True)
    except CheckpointException as error:
        reason = explain_missing(str(error)) or f"it can't be read: {innermost(error)} Name an earlier one."
        raise ConfigError(f"--checkpoint {folder}: {reason}") from error
    finally:
        logging.disable(logging.NOTSET)
    return Saved(folder, int(content["train_state"]["step"]), unpack(content["dataloader"]))
