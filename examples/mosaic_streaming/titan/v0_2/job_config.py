"""Reads TorchTitan's job config, the way TorchTitan does."""

import contextlib
import dataclasses
import importlib
import io
import tempfile
from typing import TYPE_CHECKING, Any

from examples.mosaic_streaming.config import flat, read_toml
from examples.mosaic_streaming.errors import ConfigError, is_rank_0
from examples.mosaic_streaming.titan.v0_2.job_values import wrong_job_values
from examples.mosaic_streaming.titan.v0_2.refusals import first_line, keep_traceback

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

CONFIG_FILE = "--job.config_file="
JOB_KEYS = (
    *("model.name", "model.flavor", "model.hf_assets_path", "training.local_batch_size", "training.global_batch_size"),
    *("training.seq_len", "training.steps", "parallelism.pipeline_parallel_degree"),
    *("parallelism.data_parallel_replicate_degree", "parallelism.data_parallel_shard_degree"),
    *("parallelism.context_parallel_degree", "parallelism.tensor_parallel_degree"),
    *("checkpoint.enable", "checkpoint.last_save_model_only", "validation.enable"),
)
"""The keys of the job config that decide what is read and how."""
HELP = "All of its keys: python -m examples.mosaic_streaming.train -- --help"


def load_job_config(titan_flags: list[str]) -> "JobConfig":
    """Read the job config from TorchTitan's flags, which name the file.

    Raises:
        ConfigError: TorchTitan refuses the file or a flag, or would do so later.
    """
    from examples.mosaic_streaming.upstream import cpu

    cpu.prepare_torchtitan()
    from torchtitan.config import ConfigManager, JobConfig
    from torchtitan.tools.logging import init_logger

    class Manager(ConfigManager):
        """TorchTitan's manager, which reads the file as we do."""

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
    """Respell `--section.key=true` and `=false` as `--section.key` and `--section.no-key`, as TorchTitan wants them.

    A key that `job_config`, TorchTitan's dataclass, has and that isn't boolean is left alone.
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
    """Parse a job config; raise ConfigError for a value where a section belongs, which TorchTitan would ignore."""
    sections = read_toml(path)
    for name, value in sections.items():
        if not isinstance(value, dict):
            raise ConfigError(f"{name} = {value!r} in {path}, expected a section, [{name}], with its keys below.")
    return sections


def import_custom(job_config: "JobConfig") -> None:
    """Import the user's module, which may register a model. TorchTitan does so, too, but later.

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


def settings_of(job_config: "JobConfig", path: str, titan_flags: list[str]) -> list[dict[str, Any]]:
    """List the settings that decide what is read and how: `setting`, `value`, and the `owner` who has set it.

    Args:
        job_config: TorchTitan's job config.
        path: the path of its file.
        titan_flags: TorchTitan's flags on the command line.
    """
    in_file, job = flat(read_toml(path)), flat(dataclasses.asdict(job_config))
    rows = []
    for key in JOB_KEYS:
        owner = path if key in in_file else "TorchTitan's default"
        owner = "command line" if is_given(key, titan_flags) else owner
        rows.append({"setting": key, "value": job[key], "owner": owner})
    return rows


def is_given(key: str, titan_flags: list[str]) -> bool:
    """Whether one of TorchTitan's flags sets a key."""
    section, _, name = key.rpartition(".")
    names = [flag.partition("=")[0].replace("-", "_") for flag in titan_flags]
    return f"__{key}" in names or f"__{section}.no_{name}" in names
