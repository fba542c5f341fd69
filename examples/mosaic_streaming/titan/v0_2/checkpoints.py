"""TorchTitan's checkpoints: their folders, what a start would load, and settings by which it would fail to."""

import os
import re
from typing import TYPE_CHECKING

from examples.mosaic_streaming.errors import ConfigError

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

STATES = {"model", "optimizer", "dataloader", "lr_scheduler", "train_state"}
"""TorchTitan's names for the parts of a checkpoint (torchtitan 0.2.2, components/checkpoint.py)."""


def check_checkpoints(job_config: "JobConfig") -> None:
    """Raise ConfigError for checkpoints that TorchTitan would fail to load or to save, or would not load.

    Source: TorchTitan doesn't look at `initial_load_path` where the checkpoint's folder exists, also without a finished
    step in it, as a job leaves it that is killed while it saves its first; nor at `load_step` where there is no folder.
    It counts a last step in Hugging Face's form among those to go on from, and can't (torchtitan 0.2.2,
    components/checkpoint.py).
    """
    checkpoint = job_config.checkpoint
    if not checkpoint.enable:
        if checkpoint.initial_load_path or checkpoint.initial_load_in_hf:
            raise ConfigError(
                "checkpoint.enable = false, so TorchTitan would begin with random weights, not those of "
                "checkpoint.initial_load_path. Set checkpoint.enable to true, or remove that and initial_load_in_hf."
            )
        return
    if checkpoint.keep_latest_k == 1:
        raise ConfigError(
            "checkpoint.keep_latest_k = 1, but TorchTitan keeps at least 2: a job may be killed while it saves the "
            "last. Set it to 2 or more, or to 0, which keeps all."
        )
    if unknown := set(checkpoint.exclude_from_loading) - STATES:
        raise ConfigError(
            f"checkpoint.exclude_from_loading has {', '.join(sorted(unknown))}, expected some of: "
            f"{', '.join(sorted(STATES))}."
        )
    if checkpoint.last_save_in_hf and not checkpoint.last_save_model_only:
        raise ConfigError(
            "checkpoint.last_save_in_hf = true, but checkpoint.last_save_model_only = false: in Hugging Face's form "
            "TorchTitan saves models alone, and would stop when it is about to save. Set the second to true, or the "
            "first to false."
        )
    folder = checkpoint_folder(job_config)
    whole = steps_with(folder, ".metadata")
    in_hf = steps_with(folder, "model.safetensors.index.json") - whole
    begins = checkpoint.initial_load_path or checkpoint.initial_load_in_hf
    if checkpoint.load_step not in {-1} | whole | in_hf:
        found = ", ".join(map(str, sorted(whole | in_hf))) or "none"
        raise ConfigError(f"checkpoint.load_step = {checkpoint.load_step}, but {folder} has finished steps: {found}.")
    step = checkpoint.load_step if checkpoint.load_step != -1 else max(whole | in_hf, default=-1)
    if step in in_hf:
        earlier = f"to go on from step {max(whole)}" if whole else "to begin anew: there is no other"
        raise ConfigError(
            f"{folder}/step-{step} is a model in Hugging Face's form (checkpoint.last_save_in_hf), which has nothing "
            f"that training goes on from. Move it out of {folder} {earlier}. Or begin a new run with its weights: "
            f"--checkpoint.initial_load_in_hf --checkpoint.initial_load_path={folder}/step-{step} and another "
            "--checkpoint.folder."
        )
    if begins and not os.path.exists(folder):
        check_initial_load(job_config)
    if begins and os.path.isdir(folder) and not whole:
        raise ConfigError(
            f"{folder} has no finished checkpoint, but as it exists, TorchTitan would begin with random weights, not "
            "those of checkpoint.initial_load_path. Remove that folder, or name another with --checkpoint.folder."
        )


def check_initial_load(job_config: "JobConfig") -> None:
    """Raise ConfigError unless there are weights where the job says that it begins with some.

    Source: without a path, TorchTitan takes weights in Hugging Face's form from `model.hf_assets_path`
    (torchtitan 0.2.2, components/checkpoint.py).
    """
    checkpoint, in_hf = job_config.checkpoint, job_config.checkpoint.initial_load_in_hf
    if in_hf and not checkpoint.initial_load_model_only:
        raise ConfigError(
            "checkpoint.initial_load_in_hf = true, but checkpoint.initial_load_model_only = false: in Hugging Face's "
            "form there are models alone. Set the second to true."
        )
    key = "checkpoint.initial_load_path" if checkpoint.initial_load_path else "model.hf_assets_path"
    path = checkpoint.initial_load_path or job_config.model.hf_assets_path
    if not os.path.isdir(path):
        raise ConfigError(f"{key} = {path!r}, but this machine has no such folder to begin with.")
    expected = "*.safetensors, for checkpoint.initial_load_in_hf" if in_hf else ".metadata, of a finished checkpoint"
    if not any(name.endswith(".safetensors") if in_hf else name == ".metadata" for name in os.listdir(path)):
        steps = steps_with(path, ".metadata")
        hint = f" Name a step of it, such as {os.path.join(path, f'step-{max(steps)}')}." if steps else ""
        raise ConfigError(f"{key} = {path!r}, but that folder has no {expected}.{hint}")


def checkpoint_folder(job_config: "JobConfig") -> str:
    """The folder of all checkpoints of a job."""
    return os.path.join(job_config.job.dump_folder, job_config.checkpoint.folder)


def next_start(job_config: "JobConfig", step: int) -> str:
    """Say what the same command would do after a run that ends too early.

    Args:
        job_config: TorchTitan's job config.
        step: the last step that was trained.
    """
    checkpoint = job_config.checkpoint
    if step >= job_config.training.steps:
        return "that was the last"
    if not checkpoint.enable:
        return "without checkpoints (checkpoint.enable), the same command begins anew"
    finished = steps_with(checkpoint_folder(job_config), ".metadata")
    if not finished:
        return "no checkpoint is finished: the same command begins anew"
    data = ""
    if "dataloader" in checkpoint.exclude_from_loading:
        data = (
            ", with the streams from their beginning again unless checkpoint.exclude_from_loading lets go of dataloader"
        )
    if checkpoint.load_step in (-1, max(finished)):
        return f"the same command goes on from the checkpoint of step {max(finished)}{data}"
    return (
        f"the same command goes on from the checkpoint of step {checkpoint.load_step} again, and without "
        f"checkpoint.load_step from that of step {max(finished)}{data}"
    )


def steps_with(folder: str, file: str) -> set[int]:
    """The steps in a folder whose own folder has a file. Names are read as TorchTitan reads them."""
    found = {name: re.search(r"step-(\d+)", name) for name in (os.listdir(folder) if os.path.isdir(folder) else [])}
    return {int(step[1]) for name, step in found.items() if step and os.path.isfile(os.path.join(folder, name, file))}
