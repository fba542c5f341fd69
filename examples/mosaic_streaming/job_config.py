"""TorchTitan's job config: read as TorchTitan reads it, and refused where it would not do what it says."""

import contextlib
import io
import os
import re
from typing import TYPE_CHECKING

from examples.mosaic_streaming.errors import ConfigError, is_rank_0
from examples.mosaic_streaming.flags import spell_booleans

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

HELP = "All of its keys: python -m examples.mosaic_streaming.train -- --help"


def load_job_config(titan_flags: list[str]) -> "JobConfig":
    """TorchTitan's job config from its flags, which name the file.

    Raises:
        ConfigError: TorchTitan refuses the file or a flag.
    """
    from examples.mosaic_streaming import cpu

    cpu.prepare_torchtitan()
    from torchtitan.config import ConfigManager, JobConfig
    from torchtitan.tools.logging import init_logger

    init_logger()
    try:
        with contextlib.nullcontext() if is_rank_0() else contextlib.redirect_stderr(io.StringIO()):
            return ConfigManager().parse_args(spell_booleans(titan_flags, JobConfig))
    except (ValueError, AssertionError) as error:
        problem = str(error).partition("\n")[0]
        raise ConfigError(f"TorchTitan refuses {titan_flags[0]}: {problem} {HELP}") from error
    except SystemExit as exit:
        if not exit.code:
            raise
        raise ConfigError(f"TorchTitan refuses a flag or a value, as said above. {HELP}") from exit


def check_job(job_config: "JobConfig", validates: bool, world_size: int) -> None:
    """Raise ConfigError for a job that would not do, on Mosaic streams, what it says.

    Args:
        job_config: the whole job.
        validates: whether there is a configuration of the validation loader.
        world_size: processes.
    """
    if job_config.validation.enable and not validates:
        raise ConfigError(
            "validation.enable = true, but no validation streams are given. Name their file with "
            "--mosaic-validation-config PATH, before the `--`, or set validation.enable to false."
        )
    if job_config.comm.mode != "default":
        raise ConfigError(f"comm.mode = {job_config.comm.mode!r} has no real ranks, which Mosaic streams need.")
    if job_config.checkpoint.create_seed_checkpoint:
        if world_size != 1:
            raise ConfigError(
                f"checkpoint.create_seed_checkpoint on {world_size} ranks, but one has to save it, unsharded. "
                "Start with --nproc_per_node=1."
            )
        if not job_config.checkpoint.enable:
            raise ConfigError("checkpoint.create_seed_checkpoint needs checkpoint.enable = true.")
    checkpoint = job_config.checkpoint
    if checkpoint.enable:
        check_checkpoints(job_config)
    elif checkpoint.initial_load_path or checkpoint.initial_load_in_hf:
        raise ConfigError(
            "checkpoint.enable = false, so TorchTitan would begin with random weights, not those of "
            "checkpoint.initial_load_path. Set checkpoint.enable to true, or remove that and initial_load_in_hf."
        )


def check_checkpoints(job_config: "JobConfig") -> None:
    """Raise ConfigError for checkpoints that TorchTitan would fail to load or to save, or would not load.

    Source: TorchTitan doesn't look at `initial_load_path` where the checkpoint's folder exists, also without a finished
    step in it, as a job leaves it that is killed while it saves its first; nor at `load_step` where there is no folder.
    It counts a last step in Hugging Face's form among those to go on from, and can't (torchtitan 0.2.2,
    components/checkpoint.py).
    """
    checkpoint = job_config.checkpoint
    if checkpoint.last_save_in_hf and not checkpoint.last_save_model_only:
        raise ConfigError(
            "checkpoint.last_save_in_hf = true, but checkpoint.last_save_model_only = false: in Hugging Face's form "
            "TorchTitan saves models alone, and would stop when it is about to save. Set the second to true, or the "
            "first to false."
        )
    folder = os.path.join(job_config.job.dump_folder, checkpoint.folder)
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
    if begins and os.path.isdir(folder) and not whole:
        raise ConfigError(
            f"{folder} has no finished checkpoint, but as it exists, TorchTitan would begin with random weights, not "
            "those of checkpoint.initial_load_path. Remove that folder, or name another with --checkpoint.folder."
        )


def steps_with(folder: str, file: str) -> set[int]:
    """The steps in a folder that have a file, as TorchTitan reads their names."""
    found = {name: re.search(r"step-(\d+)", name) for name in (os.listdir(folder) if os.path.isdir(folder) else [])}
    return {int(step[1]) for name, step in found.items() if step and os.path.isfile(os.path.join(folder, name, file))}
