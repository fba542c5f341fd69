"""Reads parts of a checkpoint of TorchTitan's, of either generation, without a job."""

import logging
import os
import warnings
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from examples.mosaic_streaming.checkpoint.state import STATE_KEY, pack, unpack
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.upstream.missing_keys import explain_missing

FLAG = "--mosaic-position"  # names the folder whose position is read


def read_checkpoint(folder: str, content: dict[str, Any], flag: str) -> None:
    """Fill in `content`, states by their keys with values of the right types, from the folder of one step.

    Raises:
        ConfigError: a key is missing, or can't be read.
    """
    logging.disable(logging.WARNING)  # torch logs the traceback of what is one line here
    try:
        with warnings.catch_warnings(action="ignore"):  # that there is no process group
            dcp.load(content, checkpoint_id=folder, no_dist=True)
    except CheckpointException as error:
        [root_cause, *_] = [cause for cause, _ in error.failures.values()]
        words = [type(root_cause).__name__, *str(root_cause).strip().splitlines()[:1]]
        reason = f"it can't be read: {': '.join(words)}. Name an earlier one."
        raise ConfigError(f"{flag} {folder}: {explain_missing(str(error)) or reason}") from error
    finally:
        logging.disable(logging.NOTSET)


def read_position(folder: str) -> dict[str, str]:
    """The state of the loader in the folder of one step, as a run has it that begins there.

    Raises:
        ConfigError: there is no such checkpoint, or no such state in it.
        DataError: the state is damaged.
    """
    if not os.path.isfile(os.path.join(folder, ".metadata")):
        raise ConfigError(f"{FLAG} {folder} is no finished checkpoint. Expected a step's folder, such as step-500.")
    content = {"dataloader": {STATE_KEY: ""}}
    read_checkpoint(folder, content, FLAG)
    return pack(unpack(content["dataloader"]))
