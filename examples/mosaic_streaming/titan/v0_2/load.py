"""Reads TorchTitan 0.2's job config, the way TorchTitan does."""

import argparse
import ast
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.mosaic_streaming.config import flat, refuse
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.titan.flags import explain_parsing, spell_boolean
from examples.mosaic_streaming.titan.job_values import unknown_key, wrong_job_values
from examples.mosaic_streaming.titan.loaded import LoadedJob, owners_of, read_files, read_sections, settings_given
from examples.mosaic_streaming.titan.versions import OWN_FLAGS, RENAMED, check_flags

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

CONFIG_FILE = "--job.config_file="
NOT_HERE = {
    "module": "It belongs to 0.3: give the job's file with --config, before the `--`.",
    **dict.fromkeys(("config", *OWN_FLAGS), "Give it before the `--`."),
    **dict.fromkeys(("dataloader", "validator.dataloader"), "Streams are set in the file of --mosaic-config."),
}
"""Flags of TorchTitan 0.3 that 0.2 has no other name for."""


def load_job(flags: argparse.Namespace, titan_flags: list[str]) -> LoadedJob:
    """Read the files that the command line names; a ConfigError says what is wrong with a file or a flag."""
    if flags.module:
        raise ConfigError(f"--module {flags.module}: not a flag of TorchTitan 0.2. {NOT_HERE['module']}")
    check_flags(titan_flags, {new: old for old, new in RENAMED.items()}, "0.2", NOT_HERE)
    if not flags.config:  # `-- --help`
        load_job_config(titan_flags)
    in_file = flat(read_sections(flags.config))  # before the slow imports; TorchTitan reads it again
    if not any(key.endswith("_module") for key in settings_given(in_file, titan_flags)):  # which may add keys
        known = job_keys()
        refuse([unknown_key(key, flags.config, known) for key in in_file if key not in known])
    loaders = read_files(flags.mosaic_config, flags.mosaic_validation_config, in_file, titan_flags)
    config = load_job_config([f"{CONFIG_FILE}{flags.config}", *titan_flags])
    folders, custom = (config.job.dump_folder, checkpoint_folder(config)), config.experimental.custom_import
    owners = owners_of(in_file, flags.config, titan_flags)
    return LoadedJob(config, *loaders, config.validation.enable, *folders, owners, custom_import=custom)


def load_job_config(titan_flags: list[str]) -> "JobConfig":
    """Read the job config from TorchTitan's flags, which name the file; ConfigError for what it would refuse."""
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
    with explain_parsing(titan_flags[0]):
        job_config = Manager().parse_args([spell_boolean(flag, JobConfig()) for flag in titan_flags])
    refuse(wrong_job_values(job_config))
    return job_config


def job_keys() -> set[str]:
    """The keys of a job's file. They are read in TorchTitan's source, as its import takes seconds."""
    package = Path(getattr(importlib.util.find_spec("torchtitan"), "origin", "")).parent
    source = ast.parse((package / "config/job_config.py").read_text())
    classes = {node.name: node.body for node in source.body if isinstance(node, ast.ClassDef)}

    def keys_in(name: str, prefix: str) -> Iterator[str]:
        for field in classes[name]:
            if isinstance(field, ast.AnnAssign):
                key, kind = prefix + ast.unparse(field.target), ast.unparse(field.annotation)
                yield from keys_in(kind, f"{key}.") if kind in classes else [key]

    return set(keys_in("JobConfig", ""))


def checkpoint_folder(job_config: "JobConfig") -> str:
    """The folder of all checkpoints of a job."""
    return os.path.join(job_config.job.dump_folder, job_config.checkpoint.folder)
