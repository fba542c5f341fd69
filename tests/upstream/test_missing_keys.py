"""What torch says of a checkpoint that lacks a key is still what `upstream/missing_keys.py` knows."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from examples.mosaic_streaming.upstream.missing_keys import explain_missing


def message_of_torch(folder: Path, state: dict[str, Any]) -> str:
    """What torch says if a checkpoint that has only a model is asked for a state."""
    with warnings.catch_warnings(action="ignore"):  # that there is no process group
        dcp.save({"model": {"weight": torch.ones(2)}}, checkpoint_id=folder, no_dist=True)
        with pytest.raises(CheckpointException) as error:
            dcp.load(state, checkpoint_id=folder, no_dist=True)
    return str(error.value)


@pytest.mark.parametrize(
    ("state", "key", "wrote_it"),
    [
        ({"dataloader": {"mosaic": ""}}, "dataloader.mosaic", "another loader: keep its model"),
        ({"train_state": {"step": 0}}, "train_state.step", "another version of torch or torchtitan."),
        ({"optimizer": {"lr": torch.ones(1)}}, "optimizer.lr", "another version of torch or torchtitan."),
        ({"lr_scheduler": {"last_epoch": 0}}, "lr_scheduler.last_epoch", "another version of torch or torchtitan."),
    ],
)
def test_missing_state_is_explained(tmp_path: Path, state: dict[str, Any], key: str, wrote_it: str) -> None:
    error = message_of_torch(tmp_path, state)
    told = explain_missing(error)
    assert told, f"torch says it in other words, which explain_missing has to know: {error}"
    assert told.startswith(f"The checkpoint has no {key!r}. Either it is model-only, ")
    assert "--checkpoint.load_step" in told and f"Or it was written by {wrote_it}" in told


def test_other_missing_key_is_not_explained(tmp_path: Path) -> None:
    error = message_of_torch(tmp_path, {"model": {"other": torch.ones(2)}})
    assert "model.other" in error and explain_missing(error) is None
