"""Explains a checkpoint that lacks what a start loads, where torch only names the key.

torch 2.13 raises CheckpointException with "Missing key in checkpoint state_dict: KEY." (distributed/checkpoint/
default_planner.py). A TorchTitan that says which checkpoints are model-only makes this needless.
"""

import re

MISSING_KEY = r"Missing key in checkpoint state_dict: ((dataloader|train_state|optimizer|lr_scheduler)\b.*)\."


def explain_missing(error: str) -> str | None:
    """Return what to do about a checkpoint that lacks what a run goes on from; None for any other error of DCP."""
    if not (key := re.search(MISSING_KEY, error)):
        return None
    other = "another version of torch or torchtitan"
    if key[2] == "dataloader":
        other = (
            "another loader: keep its model and optimizer and start the streams from their beginning with "
            "--checkpoint.exclude_from_loading=dataloader, for this one start"
        )
    return (
        f"The checkpoint has no {key[1]!r}. Either it is model-only, as TorchTitan writes a run's last one unless "
        "checkpoint.last_save_model_only = false: for this one start, load an earlier one with --checkpoint.load_step "
        "or begin a new run with its weights: --checkpoint.initial_load_path=<this checkpoint> and a "
        f"--checkpoint.folder that doesn't exist yet. Or it was written by {other}."
    )
