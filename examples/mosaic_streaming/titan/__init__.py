"""All that depends on TorchTitan's config and classes, with a package for each of its generations.

`train.py` calls `load_job`, `check_job`, `warnings_of_job` and `build_trainer`; after a failure `refusal`, and after a
signal `log_stop`. Preview also calls `make_job`, `settings_of`, `own_checkpoints` and `steps_with`. `mosaic` is for
users of TorchTitan 0.3: it makes a config of theirs read Mosaic streams. Beside these functions, everything else gets a
`Job`, and nothing else asks which TorchTitan is installed. Nothing slow is imported before a function is called.
"""

import argparse
import dataclasses
import importlib
from typing import Any

from examples.mosaic_streaming.config import Job
from examples.mosaic_streaming.distributed import AbortChannel
from examples.mosaic_streaming.titan.checkpoints import log_stop, own_checkpoints, steps_with
from examples.mosaic_streaming.titan.checks import check_start, warnings_of_job
from examples.mosaic_streaming.titan.loaded import LoadedJob, settings_of
from examples.mosaic_streaming.titan.refusals import refusal
from examples.mosaic_streaming.titan.versions import generation, names_as_given
from examples.mosaic_streaming.upstream.lazy_imports import import_llm_foundry


def _of_generation(module: str) -> Any:
    """A module of the package for the TorchTitan that is installed."""
    return importlib.import_module(f"{__name__}.{generation()}.{module}")


def load_job(flags: argparse.Namespace, titan_flags: list[str]) -> LoadedJob:
    """Read the files that the command line names (`parse_flags`); a ConfigError says what is wrong with them."""
    job = _of_generation("load").load_job(flags, titan_flags)
    return dataclasses.replace(job, position=getattr(flags, "mosaic_position", None))


def check_job(job: LoadedJob, world_size: int) -> None:
    """Raise ConfigError for a job that would not start on so many ranks, or not do what its config says."""
    check_start(job, world_size)
    _of_generation("job").check_job(job.job_config, world_size)


def build_trainer(job: LoadedJob, channel: AbortChannel) -> Any:
    """Build TorchTitan's Trainer, with the loaders of the job, which use the channel. All ranks call it together."""
    from examples.mosaic_streaming.titan.loaders import Loaders
    from examples.mosaic_streaming.upstream.workers import let_processes_outlive_signals

    let_processes_outlive_signals()
    job.import_custom()
    trainer = _of_generation("trainer").build_trainer(job.job_config, Loaders(job, channel))
    trainer.channel = channel
    return trainer


def make_job(job: LoadedJob, world_size: int, ranks_per_node: int) -> Job:
    """Make the `Job` that TorchTitan's config describes, on so many ranks; a ConfigError says what is wrong with it."""
    job.import_custom()
    return _of_generation("job").make_job(job.job_config, world_size, ranks_per_node)


def mosaic(config: Any, train: str, validation: str | None = None) -> Any:
    """Make a config of TorchTitan 0.3 read Mosaic streams; arguments and errors are those of `v0_3.trainer.mosaic`."""
    import_llm_foundry()  # which the module imports
    return _of_generation("trainer").mosaic(config, train, validation)
