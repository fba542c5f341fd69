"""The command line and the two files it names, read before anything slow is imported."""

import argparse
import dataclasses
import difflib
import os
import re
import sys
import tomllib
import typing
from typing import Any, NamedTuple

from examples.mosaic_streaming.errors import ConfigError, is_rank_0

USAGE = """\
Train a TorchTitan model on Mosaic streams.

  torchrun --nproc_per_node=1 -m examples.mosaic_streaming.train \\
    --config examples/mosaic_streaming/configs/mosaic_job.toml \\
    --mosaic-config examples/mosaic_streaming/configs/mosaic_dataloader.toml

TorchTitan's own flags go behind a `--`:

  torchrun --nproc_per_node=1 -m examples.mosaic_streaming.train \\
    --config examples/mosaic_streaming/configs/mosaic_job.toml \\
    --mosaic-config examples/mosaic_streaming/configs/mosaic_dataloader.toml -- \\
    --training.steps=20 --metrics.enable_tensorboard=true

Validation reads streams of its own, with --mosaic-validation-config VALIDATION.toml and --validation.enable=true.
Both loader files can also be llm-foundry training YAMLs: their `train_loader`, and their `eval_loader`.

TorchTitan's flags are listed by: python -m examples.mosaic_streaming.train -- --help
"""

PATHS = ("config", "mosaic_config", "mosaic_validation_config", "checkpoint", "plot")
"""Flags of training and preview that are paths."""


class LoaderFile(NamedTuple):
    """A loader's configuration, and the file it was read from."""

    config: dict[str, Any]
    path: str


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError where the standard one prints and exits, once on each rank."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"{message}. See --help.")


def parse_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split a command line into ours and TorchTitan's flags, which stand behind the first `--`.

    Returns:
        a namespace with `config`, `mosaic_config` and `mosaic_validation_config` (paths), and TorchTitan's flags.

    Raises:
        ConfigError: a flag is missing or unknown, or stands on the wrong side of `--`.
    """
    ours, titan = split_flags(argv)
    parser = Parser(
        prog="torchrun -m examples.mosaic_streaming.train",
        usage="%(prog)s --config JOB.toml --mosaic-config LOADER.toml [--mosaic-validation-config LOADER.toml] "
        "[-- TORCHTITAN FLAGS]",
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_files(parser, required=not {"--help", "-h"} & set(titan))
    return parse_known(parser, ours), titan


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """A command line's flags before and behind the first `--`.

    Raises:
        ConfigError: TorchTitan's name the job config.
    """
    split = argv.index("--") if "--" in argv else len(argv)
    ours, titan = argv[:split], argv[split + 1 :]
    if any(flag.replace("-", "_").startswith("__job.config_file") for flag in titan):
        raise ConfigError("--job.config_file: give the job config with --config, before the `--`.")
    return ours, titan


def add_files(parser: argparse.ArgumentParser, required: bool) -> None:
    """Let a parser know the flags that name the files."""
    parser.add_argument("--config", required=required, metavar="JOB.toml", help="TorchTitan's job config")
    parser.add_argument(
        "--mosaic-config",
        required=required,
        metavar="LOADER.toml",
        help="the Mosaic loader, for llmfoundry.data.dataloader.build_dataloader",
    )
    parser.add_argument("--mosaic-validation-config", metavar="LOADER.toml", help="the same for validation")


def parse_known(parser: argparse.ArgumentParser, ours: list[str]) -> argparse.Namespace:
    """Parse the flags before the `--`.

    Raises:
        ConfigError: one of them is unknown.
    """
    flags, rest = parser.parse_known_args(ours)
    if rest:
        raise ConfigError(f"{' '.join(rest)}: not a flag of ours. TorchTitan's flags go behind a `--`. See --help.")
    for name in PATHS:
        if path := getattr(flags, name, None):
            setattr(flags, name, expand_path(path, f"--{name.replace('_', '-')}"))
    return flags


def expand_path(path: str, place: str) -> str:
    """A path or URL with `~` and variables of the environment written out, which Python would take for names.

    Args:
        path: as it is given.
        place: where, for the message.

    Raises:
        ConfigError: there is no such user or variable.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded.startswith("~") or re.search(r"\$\w|\$\{", expanded):
        raise ConfigError(f"{place} = {path!r}: there is no such user, or variable in the environment.")
    return expanded


def read_toml(path: str) -> dict[str, Any]:
    """Parse a TOML file, also one that begins with a byte order mark, as Windows' editors write.

    Raises:
        ConfigError: the file is missing or not TOML; the message has the path, and the line.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return tomllib.loads(file.read())
    except OSError as error:
        raise ConfigError(f"Can't read {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error


def read_loaders(train: str, validation: str | None) -> tuple[LoaderFile, LoaderFile | None]:
    """Parse the files of the training loader and of the validation loader, if there is one.

    A file that ends in `.yaml` or `.yml` is an llm-foundry training YAML, of which its `train_loader` or its
    `eval_loader` is read; rank 0 prints once which of its sections nothing reads.

    Raises:
        ConfigError: a file is missing, can't be parsed, or has no such section.
    """
    paths = {"train_loader": train} | ({"eval_loader": validation} if validation else {})
    loaders = {section: read_loader(path, section) for section, path in paths.items()}
    for path in filter(is_yaml, dict.fromkeys(paths.values())):
        read = [section for section in paths if paths[section] == path]
        ignored = [str(section) for section in read_yaml(path) if section not in read]
        if ignored and is_rank_0():
            print(f"{path}: read {', '.join(read)}, ignored {', '.join(ignored)}.", file=sys.stderr, flush=True)
    return loaders["train_loader"], loaders.get("eval_loader")


def is_yaml(path: str) -> bool:
    """Whether a loader's file is an llm-foundry training YAML."""
    return path.endswith((".yaml", ".yml"))


def read_loader(path: str, section: str) -> LoaderFile:
    """Parse a loader's TOML file, or its section of an llm-foundry training YAML, interpolations resolved.

    Raises:
        ConfigError: the file is missing, can't be parsed, or has no such section.
    """
    if not is_yaml(path):
        return LoaderFile(read_toml(path), path)
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    content = read_yaml(path)
    found = [str(key) for key in content]
    try:
        loader = content.get(section)
        loader = OmegaConf.to_container(loader, resolve=True) if OmegaConf.is_config(loader) else loader
    except OmegaConfBaseException as error:
        raise ConfigError(f"{section} in {path}: {' '.join(str(error).split())}.") from error
    if isinstance(loader, list) and len(loader) == 1:  # as llm-foundry has several evaluations
        [loader] = loader
    if not isinstance(loader, dict):
        near = difflib.get_close_matches(section, found, n=1)
        has = (
            f"has {len(loader)} of them"
            if isinstance(loader, list)
            else f"has: {', '.join(near or found) or 'nothing'}"
        )
        raise ConfigError(f"{path}: expected one `{section}`, as in an llm-foundry training YAML, but it {has}.")
    loader.pop("label", None)  # the name of an evaluation
    return LoaderFile(without_nulls(loader), path)


def without_nulls(section: dict[str, Any]) -> dict[str, Any]:
    """A section without what is null in it, which means the default."""
    return {
        key: without_nulls(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value is not None
    }


def read_yaml(path: str) -> Any:
    """Parse a YAML file to OmegaConf's form of its sections.

    Raises:
        ConfigError: the file is missing or not YAML.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content: Any = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"Can't read {path}: {error.strerror or error}.") from error
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    return content if OmegaConf.is_dict(content) else OmegaConf.create()


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
