"""Reads a job of TorchTitan 0.3: a file, or a function that returns a config, and TorchTitan's flags."""

import argparse
from typing import Any

from examples.mosaic_streaming.config import flat, read_loaders, refuse
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.titan.flags import explain_parsing, spell_boolean
from examples.mosaic_streaming.titan.job_values import wrong_job_values
from examples.mosaic_streaming.titan.loaded import LoadedJob, import_module, owners_of, read_files, read_sections
from examples.mosaic_streaming.titan.versions import GONE, IN_FILE, RENAMED, check_flags
from examples.mosaic_streaming.upstream.lazy_imports import import_llm_foundry


def load_job(flags: argparse.Namespace, titan_flags: list[str]) -> LoadedJob:
    """Read the files that the command line names, or call its function; a ConfigError says what is wrong with them."""
    check_flags(titan_flags, RENAMED, "0.3", {key: reason for key, (_, reason) in GONE.items()} | IN_FILE)
    in_file, paths = {}, (flags.mosaic_config, flags.mosaic_validation_config)
    source, owner = flags.config, "TorchTitan's default"
    if source and not flags.module:  # before the slow imports
        in_file = flat(read_sections(source))
        loaders = read_files(*paths, in_file, titan_flags)
    description, custom = in_file.pop("job.description", ""), in_file.pop("experimental.custom_import", "")
    from examples.mosaic_streaming.upstream import cpu  # which imports torch

    cpu.prepare_torchtitan()
    from torchtitan.tools.logging import init_logger, logger

    import_llm_foundry()  # which the modules below import
    from examples.mosaic_streaming.titan.v0_3.job import checkpoint_folder
    from examples.mosaic_streaming.titan.v0_3.trainer import mosaic
    from examples.mosaic_streaming.titan.v0_3.translate import translate

    init_logger()
    logger.addFilter(lambda record: "initial_load_model_only=True has no effect" not in str(record.msg))  # a default
    if flags.module:
        source = owner = f"{flags.module}.{flags.config}"
        given = call(flags.module, flags.config)
        old = (getattr(given.dataloader, "path", None), getattr(given.validator.dataloader, "path", None))
        paths = (paths[0] or old[0], paths[1] or old[1])
        if not paths[0]:
            raise ConfigError(f"{source} reads no Mosaic streams: name their file in mosaic(), or --mosaic-config.")
        loaders = read_loaders(*paths)
    else:
        with explain_parsing(source):
            given = translate(in_file if source else {"model.name": "llama3_mosaic"}, source)  # for `-- --help`
    owners = owners_of({RENAMED.get(key, key): value for key, value in in_file.items()}, source, titan_flags)
    config = parse(mosaic(given, *paths), titan_flags, source)
    refuse(wrong_job_values(config))
    folder, of_file = checkpoint_folder(config), {"custom_import": custom, "description": description}
    return LoadedJob(config, *loaders, config.validator.enable, config.dump_folder, folder, owners, owner, **of_file)


def call(module: str, function: str) -> Any:
    """The config that a function of a module returns, or of its `config_registry`.

    Source: TorchTitan takes any ImportError for a module that is missing (torchtitan 0.3.0, config/manager.py).
    """
    from torchtitan.trainer import Trainer

    from examples.mosaic_streaming.upstream.model_registry import model_names

    name = f"torchtitan.models.{module}" if module in model_names() else module
    found = import_module([f"{name}.config_registry", name], "--module")
    if not callable(make := getattr(found, function, None)):
        own = {key: value for key, value in vars(found).items() if getattr(value, "__module__", "") == found.__name__}
        has = [key for key, value in own.items() if callable(value) and key[0].islower()]
        raise ConfigError(f"--config {function}: no function of {found.__name__}, which has: {', '.join(has)}.")
    if not isinstance(config := make(), Trainer.Config):
        raise ConfigError(f"{module}.{function} returns a {type(config).__name__}, expected a Trainer.Config.")
    return config


def parse(config: Any, titan_flags: list[str], source: str) -> Any:
    """Parse TorchTitan's flags, which change a config; a ConfigError says which it refuses."""
    from torchtitan.config import ConfigManager

    class Manager(ConfigManager):
        """TorchTitan's manager, which gets the config from us."""

        def _load_config(self, args: list[str]) -> tuple[object, list[str]]:
            return config, args

    with explain_parsing(source):
        return Manager().parse_args([spell_boolean(flag, config) for flag in titan_flags])
