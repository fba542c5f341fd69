"""A job as the command line names it: TorchTitan's config, and the files of the loaders."""

import importlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from examples.mosaic_streaming.config import LoaderFile, Plan, check_assets, check_files, read_loaders, read_toml
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.titan.job_values import leaves
from examples.mosaic_streaming.titan.versions import RENAMED

DATA_SETTINGS = (
    *("model.name", "model.flavor", "model.hf_assets_path", "training.local_batch_size", "training.global_batch_size"),
    *("training.seq_len", "training.steps", "parallelism.pipeline_parallel_degree"),
    *("parallelism.data_parallel_replicate_degree", "parallelism.data_parallel_shard_degree"),
    *("parallelism.context_parallel_degree", "parallelism.tensor_parallel_degree"),
    *("checkpoint.enable", "checkpoint.last_save_model_only", "validation.enable"),
)
"""The settings of a job that decide what is read and how, by their names in a job's file."""


@dataclass(frozen=True)
class LoadedJob:
    """A job that can be checked, built and looked at."""

    job_config: Any  # TorchTitan's: a JobConfig in 0.2, a Trainer.Config in 0.3
    train: Plan
    validation: LoaderFile | None
    validates: bool  # whether TorchTitan's config asks for validation
    dump_folder: str  # that the job writes to
    checkpoint_folder: str  # of all its checkpoints
    owners: Mapping[str, str]  # who has set a key, by its name in TorchTitan's config; others are defaults
    default_owner: str = "TorchTitan's default"
    custom_import: str = ""  # a module of the user's, which may register models and loaders
    description: str = ""  # which TorchTitan 0.2 logs by itself
    position: str | None = None  # another run's checkpoint, whose position the streams go on from

    def import_custom(self) -> None:
        """Import the user's module, if there is one. TorchTitan 0.2 does so, too, but later; 0.3 doesn't."""
        if self.custom_import:
            import_module([self.custom_import], "experimental.custom_import =")


def settings_of(job: LoadedJob) -> list[dict[str, Any]]:
    """List the settings that decide what is read: `setting`, `value`, and the `owner` who has set it."""
    values, rows = {key: value for key, value, *_ in leaves(job.job_config)}, []
    if spec := getattr(job.job_config, "model_spec", None):  # in 0.3
        values |= {"model.name": spec.name, "model.flavor": spec.flavor}
    for setting in DATA_SETTINGS:
        name = setting if setting in values else RENAMED[setting]
        owner = job.owners.get(name, job.default_owner)
        rows.append({"setting": setting, "value": values[name], "owner": owner})
    return rows


def owners_of(keys: Mapping[str, Any], path: str, titan_flags: Sequence[str]) -> dict[str, str]:
    """Who has set each setting: the job's file with these keys, or TorchTitan's flags on the command line."""
    return dict.fromkeys(keys, path) | dict.fromkeys(values_of_flags(titan_flags), "command line")


def values_of_flags(titan_flags: Sequence[str]) -> dict[str, str]:
    """The settings that TorchTitan's flags change, and their values as texts."""
    found = {}
    for flag, after in itertools.zip_longest(titan_flags, titan_flags[1:], fillvalue="--"):
        name, equals, value = flag.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        plain = re.sub(r"(^|\.)no_", r"\1", name)  # `section.no_key`
        value = value if equals else "true" if after.startswith("--") else after
        if flag.startswith("--"):
            found[plain] = value if plain == name else "false"
    return found


def read_files(
    train: str, validation: str | None, keys: Mapping[str, Any], titan_flags: Sequence[str]
) -> tuple[Plan, LoaderFile | None]:
    """Read the loaders' files as `read_loaders` does, and check what can be checked before TorchTitan is imported.

    `keys` are those of the job's file. Loaders that code of the user's may register are only checked later.
    """
    settings = settings_given(keys, titan_flags)
    if "model.tokenizer_path" not in settings and isinstance(assets := settings.get("hf_assets_path"), str):
        check_assets(assets)  # 0.2 takes the former instead
    plan, held_out = read_loaders(train, validation)
    if not any("custom" in key for key in settings):
        check_files(plan, held_out if str(settings.get("validator.enable")).lower() == "true" else None)
    return plan, held_out


def settings_given(keys: Mapping[str, Any], titan_flags: Sequence[str]) -> dict[str, Any]:
    """The settings of a job's file, changed by TorchTitan's flags, by their names in 0.3."""
    return {RENAMED.get(key, key): value for key, value in (dict(keys) | values_of_flags(titan_flags)).items()}


def read_sections(path: str) -> dict[str, Any]:
    """Parse a job config; raise ConfigError for a value where a section belongs, which TorchTitan would ignore."""
    sections = read_toml(path)
    for name, value in sections.items():
        if not isinstance(value, dict):
            raise ConfigError(f"{name} = {value!r} in {path}, expected a section, [{name}], with its keys below.")
    return sections


def import_module(candidates: Sequence[str], setting: str) -> ModuleType:
    """Import the first of these modules that there is. If there is none, a ConfigError names `setting` and the last."""
    for name in candidates:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):  # one that it needs
                raise
            missing = error
    raise ConfigError(
        f"{setting} {candidates[-1]!r}, but Python finds no module {missing.name!r}. Start the job where it can be "
        "imported, or name its folder in PYTHONPATH."
    ) from missing
