"""TorchTitan's job config: read as TorchTitan reads it, and refused where it would not do what it says."""

import contextlib
import dataclasses
import importlib
import io
import os
import re
import tempfile
from typing import TYPE_CHECKING, Any

from examples.mosaic_streaming.config.files import read_toml
from examples.mosaic_streaming.errors import ConfigError, is_rank_0
from examples.mosaic_streaming.titan.v0_2.job_values import wrong_job_values
from examples.mosaic_streaming.titan.v0_2.refusals import first_line, keep_traceback

if TYPE_CHECKING:
    from torchtitan.config import JobConfig
    from torchtitan.distributed import ParallelDims

CONFIG_FILE = "--job.config_file="
STATES = {"model", "optimizer", "dataloader", "lr_scheduler", "train_state"}
"""Of a checkpoint, as TorchTitan calls them (torchtitan 0.2.2, components/checkpoint.py)."""
HELP = "All of its keys: python -m examples.mosaic_streaming.train -- --help"


def load_job_config(titan_flags: list[str]) -> "JobConfig":
    """TorchTitan's job config from its flags, which name the file.

    Raises:
        ConfigError: TorchTitan refuses the file or a flag, or would do so later.
    """
    from examples.mosaic_streaming.upstream import cpu

    cpu.prepare_torchtitan()
    from torchtitan.config import ConfigManager, JobConfig
    from torchtitan.tools.logging import init_logger

    class Manager(ConfigManager):
        """TorchTitan's, that reads the file as we do."""

        def _maybe_load_toml(self, args: list[str]) -> dict[str, Any] | None:
            if args and args[0].startswith(CONFIG_FILE):
                return read_sections(args[0].removeprefix(CONFIG_FILE))
            return super()._maybe_load_toml(args)

    init_logger()
    try:
        with contextlib.nullcontext() if is_rank_0() else contextlib.redirect_stderr(io.StringIO()):
            job_config = Manager().parse_args(spell_booleans(titan_flags, JobConfig))
    except ConfigError:
        raise
    except (ValueError, AssertionError) as error:
        problem = next(iter(str(error).splitlines()), repr(error)).rstrip(".")
        raise ConfigError(f"TorchTitan refuses {titan_flags[0]}: {problem}. {HELP}") from error
    except SystemExit as exit:
        if not exit.code:
            raise
        raise ConfigError(f"TorchTitan refuses a flag or a value, as said above. {HELP}") from exit
    except Exception as error:  # of a module that the file names, too
        file = keep_traceback(error, tempfile.gettempdir())
        raise ConfigError(
            f"TorchTitan refuses {titan_flags[0]}: {first_line(error)}. The whole traceback is in {file}."
        ) from error
    if wrong := wrong_job_values(job_config):
        raise ConfigError(" ".join(wrong))
    return job_config


def spell_booleans(titan_flags: list[str], job_config: type) -> list[str]:
    """Respell `--section.key=true` and `=false` as `--section.key` and `--section.no-key`, the way TorchTitan wants it.

    Args:
        titan_flags: flags for TorchTitan.
        job_config: TorchTitan's config dataclass, to leave alone a key that it has and that isn't boolean.
    """
    return [_spell_boolean(flag, job_config) for flag in titan_flags]


def _spell_boolean(flag: str, job_config: type) -> str:
    name, _, value = flag.partition("=")
    if not name.startswith("--") or value.lower() not in ("true", "false"):
        return flag
    *sections, key = name.removeprefix("--").split(".")
    type_: Any = job_config
    for part in [*sections, key]:
        fields = (
            {field.name: field.type for field in dataclasses.fields(type_)} if dataclasses.is_dataclass(type_) else {}
        )
        type_ = fields.get(part.replace("-", "_"), bool)  # a section that a custom config module adds
    if type_ is not bool:
        return flag
    return "--" + ".".join([*sections, key if value.lower() == "true" else f"no-{key}"])


def read_sections(path: str) -> dict[str, Any]:
    """Parse a job config.

    Raises:
        ConfigError: it can't be read, or has a value where a section belongs, which TorchTitan would not mind.
    """
    sections = read_toml(path)
    for name, value in sections.items():
        if not isinstance(value, dict):
            raise ConfigError(f"{name} = {value!r} in {path}, expected a section, [{name}], with its keys below.")
    return sections


def import_custom(job_config: "JobConfig") -> None:
    """Import the module that may register a model, as TorchTitan does, too.

    Raises:
        ConfigError: there is no such module.
    """
    name = job_config.experimental.custom_import
    try:
        if name:
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):  # one that it needs
            raise
        raise ConfigError(
            f"experimental.custom_import = {name!r}, but Python finds no module {error.name!r}. Start the job where it "
            "can be imported, or name its folder in PYTHONPATH."
        ) from error


def check_job(job_config: "JobConfig", validates: bool, world_size: int) -> None:
    """Raise ConfigError for a job that would not start, or not do, on Mosaic streams, what it says.

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
    parallel_dims(job_config, world_size)
    checkpoint = job_config.checkpoint
    if checkpoint.enable:
        check_checkpoints(job_config)
    elif checkpoint.initial_load_path or checkpoint.initial_load_in_hf:
        raise ConfigError(
            "checkpoint.enable = false, so TorchTitan would begin with random weights, not those of "
            "checkpoint.initial_load_path. Set checkpoint.enable to true, or remove that and initial_load_in_hf."
        )


def parallel_dims(job_config: "JobConfig", world_size: int) -> "ParallelDims":
    """The degrees of parallelism on so many ranks, as TorchTitan reckons.

    Raises:
        ConfigError: they don't fit those.
    """
    from torchtitan.distributed import ParallelDims

    parallelism = job_config.parallelism
    try:
        dims = ParallelDims(
            dp_replicate=parallelism.data_parallel_replicate_degree,
            dp_shard=parallelism.data_parallel_shard_degree,
            cp=parallelism.context_parallel_degree,
            tp=parallelism.tensor_parallel_degree,
            pp=parallelism.pipeline_parallel_degree,
            ep=parallelism.expert_parallel_degree,
            etp=parallelism.expert_tensor_parallel_degree,
            world_size=world_size,
        )
    except AssertionError as error:
        names = (
            "data_parallel_replicate",
            "data_parallel_shard",
            "context_parallel",
            "tensor_parallel",
            "pipeline_parallel",
        )
        degrees = {f"{name}_degree": getattr(parallelism, f"{name}_degree") for name in names}
        given = ", ".join(f"{name} = {degree}" for name, degree in degrees.items() if degree not in (1, -1))
        problem = str(error) or f"{given} multiply to more"
        raise ConfigError(
            f"TorchTitan refuses the degrees of [parallelism] in the job config on {world_size} ranks: {problem}."
        ) from error
    if dims.ep > 1 and dims.dp_shard * dims.cp * dims.tp % (dims.ep * dims.etp):
        raise ConfigError(
            f"parallelism.expert_parallel_degree = {dims.ep} (x expert_tensor_parallel_degree = {dims.etp}) does not "
            f"divide dp_shard({dims.dp_shard}) * cp({dims.cp}) * tp({dims.tp}), the ranks that share out the experts."
        )
    return dims


def check_checkpoints(job_config: "JobConfig") -> None:
    """Raise ConfigError for checkpoints that TorchTitan would fail to load or to save, or would not load.

    Source: TorchTitan doesn't look at `initial_load_path` where the checkpoint's folder exists, also without a finished
    step in it, as a job leaves it that is killed while it saves its first; nor at `load_step` where there is no folder.
    It counts a last step in Hugging Face's form among those to go on from, and can't (torchtitan 0.2.2,
    components/checkpoint.py).
    """
    checkpoint = job_config.checkpoint
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
    """Raise ConfigError unless there are weights to begin with where the job says.

    Source: those in Hugging Face's form are taken from `model.hf_assets_path`, if no path is given (torchtitan 0.2.2,
    components/checkpoint.py).
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
    """Where all checkpoints of a job are."""
    return os.path.join(job_config.job.dump_folder, job_config.checkpoint.folder)


def next_start(job_config: "JobConfig", step: int) -> str:
    """What the same command would do after a run that ends too early.

    Args:
        job_config: the whole job.
        step: the last one that was trained.
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
    """The steps in a folder that have a file, as TorchTitan reads their names."""
    found = {name: re.search(r"step-(\d+)", name) for name in (os.listdir(folder) if os.path.isdir(folder) else [])}
    return {int(step[1]) for name, step in found.items() if step and os.path.isfile(os.path.join(folder, name, file))}
