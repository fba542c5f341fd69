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

Validation reads streams of its own, with --mosaic-validation-config VALIDATION.toml and validation.enable = true.
Both loader files can also be llm-foundry training YAMLs: their `train_loader`, and their `eval_loader`.
--mosaic-config can also be a plan: its [[stage]] tables say which loader is read from which step on, and its [[skip]]
tables which batches are left out (docs/plans.md).

With TorchTitan 0.3, a job can also be a function that returns its config, as TorchTitan's own are:

  torchrun --nproc_per_node=1 -m examples.mosaic_streaming.train --module my.package --config my_function -- ...

TorchTitan's flags are listed by: python -m examples.mosaic_streaming.train -- --help
"""

PATHS = ("mosaic_config", "mosaic_validation_config", "mosaic_position", "checkpoint", "plot")  # flags that are paths


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError, once on each rank, where the standard one prints and exits."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"{message}. See --help.")

    def add_files(self, required: bool) -> None:
        """Add the flags that name the configuration files."""
        job = "TorchTitan's job config; with --module, the name of a function"
        self.add_argument("--config", required=required, metavar="JOB.toml", help=job)
        module = "Python module with a function that returns the job's config, or a folder of TorchTitan's models"
        self.add_argument("--module", help=f"{module} (TorchTitan 0.3)")
        loader = "the Mosaic loader, for llm-foundry's build_dataloader, or a plan; not needed with --module"
        self.add_argument("--mosaic-config", metavar="LOADER.toml", help=loader)
        self.add_argument("--mosaic-validation-config", metavar="LOADER.toml", help="the same for validation")

    def parse(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Return our flags, with paths expanded, and TorchTitan's, which stand behind the first `--`."""
        split = argv.index("--") if "--" in argv else len(argv)
        ours, titan = argv[:split], argv[split + 1 :]
        if any(flag.replace("-", "_").startswith("__job.config_file") for flag in titan):
            raise ConfigError("--job.config_file: give the job config with --config, before the `--`.")
        flags, rest = self.parse_known_args(ours)
        if rest:
            raise ConfigError(f"{' '.join(rest)}: not a flag of ours. TorchTitan's flags go behind a `--`. See --help.")
        if flags.config and not (flags.module or flags.mosaic_config):
            raise ConfigError("the following arguments are required: --mosaic-config. See --help.")
        for name in (*PATHS, *(() if flags.module else ("config",))):
            if path := getattr(flags, name, None):
                setattr(flags, name, expand_path(path, f"--{name.replace('_', '-')}"))
        return flags, titan


def parse_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line of training as `Parser.parse` does; files needn't be given to ask for `--help`."""
    prog, raw = "torchrun -m examples.mosaic_streaming.train", argparse.RawDescriptionHelpFormatter
    usage = "%(prog)s --config JOB.toml --mosaic-config LOADER.toml [--mosaic-validation-config LOADER.toml] "
    usage += "[--mosaic-position STEP_FOLDER] [-- TORCHTITAN FLAGS]"
    parser = Parser(prog=prog, usage=usage, description=USAGE, formatter_class=raw, allow_abbrev=False)
    parser.add_files(required=not {"--help", "-h"} & {*argv})
    position = "another run's checkpoint, whose position in the same streams a new run goes on from"
    parser.add_argument("--mosaic-position", metavar="STEP_FOLDER", help=position)
    return parser.parse(argv)
