"""The command line and the two files it names, read before anything slow is imported."""

import argparse
import dataclasses
import tomllib
import typing
from typing import Any

from examples.mosaic_streaming.errors import ConfigError

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

They are listed by: python -m examples.mosaic_streaming.train -- --help
"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError where the standard one prints and exits, once on each rank."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"{message}. See --help.")


def parse_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split a command line into ours and TorchTitan's flags, which stand behind the first `--`.

    Returns:
        a namespace with `config` and `mosaic_config` (paths), and TorchTitan's flags.

    Raises:
        ConfigError: a flag is missing or unknown, or stands on the wrong side of `--`.
    """
    split = argv.index("--") if "--" in argv else len(argv)
    ours, titan = argv[:split], argv[split + 1 :]
    asks_titan = "--help" in titan or "-h" in titan
    parser = Parser(
        prog="torchrun -m examples.mosaic_streaming.train",
        usage="%(prog)s --config JOB.toml --mosaic-config LOADER.toml [-- TORCHTITAN FLAGS]",
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=not asks_titan, metavar="JOB.toml", help="TorchTitan's job config")
    parser.add_argument(
        "--mosaic-config",
        required=not asks_titan,
        metavar="LOADER.toml",
        help="the Mosaic loader, for llmfoundry.data.dataloader.build_dataloader",
    )
    flags, rest = parser.parse_known_args(ours)
    if rest:
        raise ConfigError(f"{' '.join(rest)}: not a flag of ours. TorchTitan's flags go behind a `--`. See --help.")
    if any(flag.replace("-", "_").startswith("__job.config_file") for flag in titan):
        raise ConfigError("--job.config_file: give the job config with --config, before the `--`.")
    return flags, titan


def read_toml(path: str) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        ConfigError: the file is missing or not TOML; the message has the path, and the line.
    """
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"Can't read {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error


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
