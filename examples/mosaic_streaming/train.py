"""Train a TorchTitan model on Mosaic streams. `--help` shows how; the usage text is in `config/cli.py`.

It does what TorchTitan's own `train.py` does, but the model's loaders read Mosaic streams. Packages that take long
to import are imported where they are needed, so that `--help` and typos don't wait half a minute.
"""

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from examples.mosaic_streaming import titan
from examples.mosaic_streaming.config import parse_flags
from examples.mosaic_streaming.distributed import AbortChannel, handle_signals
from examples.mosaic_streaming.errors import ConfigError, DataError, is_rank_0
from examples.mosaic_streaming.upstream.lazy_imports import import_llm_foundry

if TYPE_CHECKING:
    from torchtitan.train import Trainer

PACKAGES = ("torchtitan", "llm-foundry", "mosaicml-streaming", "torch")  # the log opens with their versions


def main(argv: list[str] | None = None) -> None:
    """Read the flags and the files, build the Trainer, and train. A user's error ends in one line."""
    gc.disable()  # which makes imports take a quarter less time; TorchTitan's trainer collects garbage itself
    channel = AbortChannel()  # tells all ranks why one of them stops
    with channel.report_errors_once():
        handle_signals(signal.SIG_DFL)  # a signal ends the process at once, until there is a loader to close
        flags, titan_flags = parse_flags(sys.argv[1:] if argv is None else argv)
        if flags.config and "LOCAL_RANK" not in os.environ:  # without --config: `-- --help`
            raise ConfigError("Not started by torchrun. See --help.")
        with titan.names_as_given(in_code=bool(flags.module)):
            job = titan.load_job(flags, titan_flags)
            titan.check_job(job, int(os.environ["WORLD_SIZE"]))
            import_llm_foundry()  # before anything else does, which would take several times as long
            run(job, channel)


def run(job: titan.LoadedJob, channel: AbortChannel, build: Callable[..., "Trainer"] = titan.build_trainer) -> None:
    """Build the Trainer with `build`, train, or write a seed checkpoint, and close everything.

    An error while closing never hides the exception that has ended the run.
    """
    import torch.distributed as dist
    from torchtitan.tools.logging import logger

    from examples.mosaic_streaming.upstream.rendezvous import fresh_rendezvous

    if is_rank_0():
        logger.info(", ".join(f"{name} {version(name)}" for name in PACKAGES))
        if job.description:
            logger.info(f"Starting job: {job.description}")
        for warning in titan.warnings_of_job(job):
            logger.warning(warning)
    handle_signals(signal.SIG_DFL)  # llm-foundry's import has set handlers, which would wait until all ranks have met
    trainer = None
    try:
        try:
            with fresh_rendezvous():
                trainer = build(job, channel)
            if job.job_config.checkpoint.create_seed_checkpoint:
                trainer.checkpointer.save(curr_step=0, last_step=True)
                logger.info("Created seed checkpoint")
            else:
                trainer.train()
        finally:
            channel.begin_shutdown()  # in the outer `try`: a signal that comes before raises SystemExit
    except BaseException as error:
        if channel.stopped_by:
            channel.close()  # what fails from here on only follows from the signal
        explained = explain(error, trainer, job)  # while the workers still live
        with contextlib.suppress(Exception):
            close(trainer)
        if channel.stopped_by and trainer and not channel.reason:  # with a reason printed, the signal is torchrun's
            titan.log_stop(trainer, job, channel.stopped_by)
        if channel.is_saved:
            dist.destroy_process_group()
        if explained:
            raise explained from error
        raise
    close(trainer)
    channel.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    logger.info("Process group destroyed")


def explain(error: BaseException, trainer: "Trainer | None", job: titan.LoadedJob) -> ConfigError | DataError | None:
    """Turn an exception that a dead worker, a checkpoint or a setting has caused into a user's error, if it is one."""
    from examples.mosaic_streaming.upstream.missing_keys import explain_missing

    is_plain = isinstance(error, RuntimeError) and not isinstance(error, DataError)
    lost = [loader.lost_workers() for loader in loaders(trainer)] if trainer and is_plain else []
    if any(lost):
        return DataError(" ".join(filter(None, lost)))
    reason = explain_missing(str(error))
    if not reason and not (trainer and trainer.dataloader.has_started):
        reason = titan.refusal(error, job)
    return ConfigError(reason) if reason else None


def loaders(trainer: "Trainer") -> list[Any]:
    """The training loader and, where there is one, the validation loader."""
    validator = getattr(trainer, "validator", None)
    return [trainer.dataloader, *([validator.loader] if validator else [])]


def close(trainer: "Trainer | None") -> None:
    """End the dataloader workers and close the trainer."""
    if trainer:
        try:
            for loader in loaders(trainer):
                loader.close()
        finally:
            trainer.close()


if __name__ == "__main__":
    main()
