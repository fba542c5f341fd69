"""TorchTitan's checkpoints: what a start would load, or fail to, and what a run saves that a signal ends."""

import itertools
import os
import re
import shlex
import signal
from concurrent import futures
from typing import Any

from examples.mosaic_streaming.config import Checkpoints, is_url
from examples.mosaic_streaming.distributed import AbortChannel
from examples.mosaic_streaming.errors import ConfigError, is_rank_0
from examples.mosaic_streaming.titan.loaded import LoadedJob

SAVE_SECONDS = 20.0
"""How long a background checkpoint may take to finish after a signal. torchrun kills a rank after 30 s."""
STATES = {"model", "optimizer", "dataloader", "lr_scheduler", "train_state"}
"""TorchTitan's names for the parts of a checkpoint (torchtitan 0.2.2 and 0.3.0, components/checkpoint.py)."""


def check_checkpoints(checkpoint: Any, folder: str, assets: str) -> None:
    """Raise ConfigError for checkpoints that TorchTitan would fail to load or to save, or would not load.

    Folders in a remote store are not looked at: neither that of all checkpoints, nor that of the model's assets.

    Source: TorchTitan 0.2.2 doesn't look at `load_step` where there is no folder. Both generations count a last step in
    Hugging Face's form among those to go on from, and can't (components/checkpoint.py, components/checkpointer/dcp.py).
    """
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
        given, known = (", ".join(sorted(names)) for names in (unknown, STATES))
        raise ConfigError(f"checkpoint.exclude_from_loading has {given}, expected some of: {known}.")
    if checkpoint.last_save_in_hf and not checkpoint.last_save_model_only:
        raise ConfigError(
            "checkpoint.last_save_in_hf = true, but checkpoint.last_save_model_only = false: in Hugging Face's form "
            "TorchTitan saves models alone, and would stop when it is about to save. Set the second to true, or the "
            "first to false."
        )
    if is_url(folder):
        return
    whole = steps_with(folder, ".metadata")
    in_hf = steps_with(folder, "model.safetensors.index.json") - whole
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
    if (checkpoint.initial_load_path or checkpoint.initial_load_in_hf) and not whole:
        check_initial_load(checkpoint, assets)
    going_back(checkpoint, folder)


def check_initial_load(checkpoint: Any, assets: str) -> None:
    """Raise ConfigError unless there are weights where the job says that it begins with some.

    Source: without a path, TorchTitan takes weights in Hugging Face's form from `model.hf_assets_path`
    (torchtitan 0.2.2, components/checkpoint.py).
    """
    in_hf = checkpoint.initial_load_in_hf
    if in_hf and not checkpoint.initial_load_model_only:
        raise ConfigError(
            "checkpoint.initial_load_in_hf = true, but checkpoint.initial_load_model_only = false: in Hugging Face's "
            "form there are models alone. Set the second to true."
        )
    key = "checkpoint.initial_load_path" if checkpoint.initial_load_path else "model.hf_assets_path"
    path = checkpoint.initial_load_path or assets
    if is_url(path):
        return
    if not os.path.isdir(path):
        raise ConfigError(f"{key} = {path!r}, but this machine has no such folder to begin with.")
    expected = "*.safetensors, for checkpoint.initial_load_in_hf" if in_hf else ".metadata, of a finished checkpoint"
    if not any(name.endswith(".safetensors") if in_hf else name == ".metadata" for name in os.listdir(path)):
        steps = steps_with(path, ".metadata")
        hint = f" Name a step of it, such as {os.path.join(path, f'step-{max(steps)}')}." if steps else ""
        raise ConfigError(f"{key} = {path!r}, but that folder has no {expected}.{hint}")


def checkpoints_of(checkpoint: Any, folder: str) -> Checkpoints:
    """What a `Job` knows of the section of the job config; `folder` is that of all checkpoints."""
    excluded = tuple(checkpoint.exclude_from_loading)
    return Checkpoints(checkpoint.enable, folder, checkpoint.load_step, excluded, checkpoint.last_save_model_only)


def own_checkpoints(checkpoints: Checkpoints) -> str | None:
    """The folder of a job's own checkpoints, if a start would load one of them."""
    return checkpoints.folder if checkpoints.enable and steps_with(checkpoints.folder, ".metadata") else None


def going_back(checkpoint: Any, folder: str) -> list[str]:
    """What a start from an earlier step (`load_step`) warns of, with the command that moves later ones away.

    ConfigError if it would lose what it saves: TorchTitan keeps the highest steps (torchtitan 0.2.2 and 0.3.0).
    """
    saves = checkpoint.enable and not checkpoint.load_only and not is_url(folder)
    steps = sorted(step for step in steps_with(folder, "") if saves and -1 < checkpoint.load_step < step)
    if not steps:
        return []
    place = next(place for number in itertools.count(1) if not os.path.exists(place := f"{folder}/abandoned-{number}"))
    gaps, (place, source) = {b - a for a, b in itertools.pairwise(steps)}, map(shlex.quote, (place, folder))
    listed = ",".join(map(str, steps)) if len(gaps) > 1 else f"{steps[0]}..{steps[-1]}..{max(gaps, default=1)}"
    told = (
        f"checkpoint.load_step = {checkpoint.load_step} goes back, but {folder} has later steps, up to {steps[-1]}: "
        "a start without it goes on from the last, and checkpoint.keep_latest_k counts them as the latest. To move "
        f"them away: mkdir {place} && mv {source}/step-{{{listed}}} {place}"
    )
    if 0 < (kept := checkpoint.keep_latest_k) <= len(steps):
        raise ConfigError(f"With checkpoint.keep_latest_k = {kept}, each new checkpoint would be deleted. {told}")
    return [told]


class WayOut:
    """What makes a Trainer stop after the same step on all ranks, with a checkpoint, when `channel` is told to."""

    channel: AbortChannel
    step: int
    checkpointer: Any
    model_parts: Any

    def should_continue_training(self) -> bool:
        """Whether another step follows. TorchTitan asks before each, once the one before is saved and validated."""
        goes_on: bool = super().should_continue_training()  # type: ignore[misc]  # a Trainer has it
        if goes_on and self.checkpointer.enable and not self.checkpointer.load_only:
            self.channel.begin_step(self.step + 1, self._save)
        return goes_on

    def _save(self) -> None:
        """Save the whole state, unless TorchTitan just has, and wait until that is finished.

        Source: TorchTitan saves a last step in the foreground, and whole where these settings are off (torchtitan
        0.2.2, components/checkpoint.py; 0.3.0, components/checkpointer/dcp.py). It never saves after validation, which
        leaves some parameters gathered (torch 2.15, distributed/fsdp).
        """
        from torch.distributed.fsdp import FSDPModule

        saver, step = self.checkpointer, self.step
        if step % saver.interval and not (step == 1 and saver.enable_first_step_checkpoint):
            for module in (module for part in self.model_parts for module in part.modules()):
                if isinstance(module, FSDPModule):
                    module.reshard()
            saver.last_save_model_only = saver.last_save_in_hf = False
            saver.save(step, last_step=True)
        if saver.save_future:
            saver.save_future.result()


def log_stop(trainer: Any, job: LoadedJob, number: signal.Signals) -> None:
    """Log on rank 0 how far a run has come that a signal ends, and what the same command would do next."""
    from torchtitan.tools.logging import logger

    if is_rank_0():
        if saving := getattr(trainer.checkpointer, "save_future", None):  # only where checkpoints are saved
            futures.wait([saving], SAVE_SECONDS)
        # `trainer.step` counts the step in progress; the schedule counts those that have changed the model.
        step = max(trainer.step - 1, trainer.lr_schedulers.schedulers[0].last_epoch)
        place = f"after step {step}" if step else "before the first step"
        logger.info(f"Stopped by {number.name} {place}; {next_start(job, step)}.")


def next_start(job: LoadedJob, step: int) -> str:
    """Say what the same command would do after a run that ends too early, with `step` as its last."""
    checkpoint, folder = job.job_config.checkpoint, job.checkpoint_folder
    if step >= job.job_config.training.steps:
        return "that was the last"
    if not checkpoint.enable:
        return "without checkpoints (checkpoint.enable), the same command begins anew"
    if is_url(folder):
        return f"the same command goes on from the last checkpoint in {folder}"
    if not (finished := steps_with(folder, ".metadata")):
        return "no checkpoint is finished: the same command begins anew"
    data = (
        ", with the streams from their beginning again unless checkpoint.exclude_from_loading lets go of dataloader"
    ) * ("dataloader" in checkpoint.exclude_from_loading)
    if checkpoint.load_step in (-1, max(finished)):
        return f"the same command goes on from the checkpoint of step {max(finished)}{data}"
    return (
        f"the same command goes on from the checkpoint of step {checkpoint.load_step} again, and without "
        f"checkpoint.load_step from that of step {max(finished)}{data}"
    )


def steps_with(folder: str, file: str) -> set[int]:
    """The steps in a folder whose own folder has a file. Names are read as TorchTitan reads them."""
    found = {name: re.search(r"step-(\d+)", name) for name in (os.listdir(folder) if os.path.isdir(folder) else [])}
    return {int(step[1]) for name, step in found.items() if step and os.path.exists(os.path.join(folder, name, file))}
