"""The command line, which is parsed before anything slow is imported."""

import argparse
import typing

from examples.mosaic_streaming.config.files import expand_path
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

Validation reads streams of its own, with --mosaic-validation-config VALIDATION.toml and --validation.enable=true.
Both loader files can also be llm-foundry training YAMLs: their `train_loader`, and their `eval_loader`.

TorchTitan's flags are listed by: python -m examples.mosaic_streaming.train -- --help
"""

PATHS = ("config", "mosaic_config", "mosaic_validation_config", "checkpoint", "plot")
"""Flags of training and preview that are paths."""


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
