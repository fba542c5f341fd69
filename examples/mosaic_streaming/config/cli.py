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
    """An ArgumentParser that raises ConfigError, once on each rank, where the standard one prints and exits."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"{message}. See --help.")

    def add_files(self, required: bool) -> None:
        """Add the flags that name the configuration files."""
        self.add_argument("--config", required=required, metavar="JOB.toml", help="TorchTitan's job config")
        loader = "the Mosaic loader, for llm-foundry's build_dataloader"
        self.add_argument("--mosaic-config", required=required, metavar="LOADER.toml", help=loader)
        self.add_argument("--mosaic-validation-config", metavar="LOADER.toml", help="the same for validation")

    def parse(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Return our flags, with paths expanded, and TorchTitan's, which stand behind the first `--`.

        Raises:
            ConfigError: a flag is missing or unknown, or stands on the wrong side of `--`.
        """
        split = argv.index("--") if "--" in argv else len(argv)
        ours, titan = argv[:split], argv[split + 1 :]
        if any(flag.replace("-", "_").startswith("__job.config_file") for flag in titan):
            raise ConfigError("--job.config_file: give the job config with --config, before the `--`.")
        flags, rest = self.parse_known_args(ours)
        if rest:
            raise ConfigError(f"{' '.join(rest)}: not a flag of ours. TorchTitan's flags go behind a `--`. See --help.")
        for name in PATHS:
            if path := getattr(flags, name, None):
                setattr(flags, name, expand_path(path, f"--{name.replace('_', '-')}"))
        return flags, titan


def parse_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line of training as `Parser.parse` does; files needn't be given to ask for `--help`."""
    parser = Parser(
        prog="torchrun -m examples.mosaic_streaming.train",
        usage="%(prog)s --config JOB.toml --mosaic-config LOADER.toml [--mosaic-validation-config LOADER.toml] "
        "[-- TORCHTITAN FLAGS]",
        description=USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_files(required=not {"--help", "-h"} & {*argv})
    return parser.parse(argv)
