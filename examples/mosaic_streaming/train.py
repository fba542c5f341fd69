"""Train a TorchTitan model on Mosaic streams. `--help` shows how; the usage text is in `flags.py`.

Like TorchTitan's own `train.py`, but the model's TrainSpec reads Mosaic streams. What takes long to import is imported
where it is needed, so that `--help` and typing errors don't wait half a minute.
"""

import contextlib
import dataclasses
import io
import os
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from examples.mosaic_streaming import errors
from examples.mosaic_streaming.errors import SIGNALS, ConfigError, DataError, is_rank_0
from examples.mosaic_streaming.flags import parse_flags, read_toml, spell_booleans

if TYPE_CHECKING:
    from torchtitan.config import JobConfig
    from torchtitan.protocols.train_spec import TrainSpec
    from torchtitan.train import Trainer

    from examples.mosaic_streaming.dataloader import MosaicDataLoader

MODEL = "llama3_mosaic"
HELP = "All of its keys: python -m examples.mosaic_streaming.train -- --help"
PACKAGES = ("torchtitan", "llm-foundry", "mosaicml-streaming", "torch")
"""Whose versions the log opens with."""


def main(argv: list[str] | None = None) -> None:
    """Read the flags and both files, register the spec, train; a user's error ends in one line."""
    with errors.told_once():
        flags, titan_flags = parse_flags(sys.argv[1:] if argv is None else argv)
        if not (flags.config and flags.mosaic_config):  # `-- --help`
            load_job_config(titan_flags)
        read_toml(flags.config)  # before the slow imports; TorchTitan reads it again
        loader_config = read_toml(flags.mosaic_config)
        if "LOCAL_RANK" not in os.environ:
            raise ConfigError("Not started by torchrun. See --help.")
        job_config = load_job_config([f"--job.config_file={flags.config}", *titan_flags])
        check_job(job_config)
        register(loader_config, flags.mosaic_config)
        run(job_config)


def load_job_config(titan_flags: list[str]) -> "JobConfig":
    """TorchTitan's job config from its flags, which name the file.

    Raises:
        ConfigError: TorchTitan refuses the file or a flag.
    """
    from examples.mosaic_streaming import cpu

    cpu.prepare_torchtitan()
    from torchtitan.config import ConfigManager, JobConfig
    from torchtitan.tools.logging import init_logger

    init_logger()
    try:
        with contextlib.nullcontext() if is_rank_0() else contextlib.redirect_stderr(io.StringIO()):
            return ConfigManager().parse_args(spell_booleans(titan_flags, JobConfig))
    except ValueError as error:
        problem = str(error).splitlines()[0]
        raise ConfigError(f"TorchTitan refuses {titan_flags[0]}: {problem} {HELP}") from error
    except SystemExit as exit:
        if not exit.code:
            raise
        raise ConfigError(f"TorchTitan refuses a flag or a value, as said above. {HELP}") from exit


def check_job(job_config: "JobConfig") -> None:
    """Raise ConfigError for a job that would not do, on Mosaic streams, what it says."""
    if job_config.model.name != MODEL:
        raise ConfigError(f"model.name = {job_config.model.name!r} does not read Mosaic streams. Set it to {MODEL!r}.")
    if job_config.validation.enable:
        raise ConfigError("validation.enable = true: there is no validation on Mosaic streams yet. Set it to false.")
    if job_config.comm.mode != "default":
        raise ConfigError(f"comm.mode = {job_config.comm.mode!r} has no real ranks, which Mosaic streams need.")
    if job_config.checkpoint.create_seed_checkpoint:
        if (ranks := int(os.environ["WORLD_SIZE"])) != 1:
            raise ConfigError(
                f"checkpoint.create_seed_checkpoint on {ranks} ranks, but one has to save it, unsharded. "
                "Start with --nproc_per_node=1."
            )
        if not job_config.checkpoint.enable:
            raise ConfigError("checkpoint.create_seed_checkpoint needs checkpoint.enable = true.")


def mosaic_spec(spec: "TrainSpec", loader_config: dict[str, Any], path: str) -> "TrainSpec":
    """A TorchTitan spec that reads the streams of a loader configuration.

    Args:
        spec: any TrainSpec of a text model.
        loader_config: the loader TOML.
        path: the file it was read from, for messages.
    """
    from examples.mosaic_streaming import cpu
    from examples.mosaic_streaming.build import build_mosaic_dataloader
    from examples.mosaic_streaming.tokenizer import build_tokenizer

    def build_dataloader(**arguments: Any) -> "MosaicDataLoader":
        handle_signals(exit_on_signal)  # from here on there is something to close
        return build_mosaic_dataloader(loader_config=loader_config, loader_config_path=path, **arguments)

    return dataclasses.replace(
        spec,
        build_tokenizer_fn=build_tokenizer,
        build_dataloader_fn=build_dataloader,
        parallelize_fn=cpu.sum_gradients_with_gloo(spec.parallelize_fn),
    )


def register(loader_config: dict[str, Any], path: str) -> None:
    """Make `llama3_mosaic` known to TorchTitan."""
    from torchtitan.protocols.train_spec import get_train_spec, register_train_spec

    register_train_spec(MODEL, mosaic_spec(get_train_spec("llama3"), loader_config, path))


def run(job_config: "JobConfig") -> None:
    """Train, or write a seed checkpoint, and close everything; the exception that ends a run is the one raised."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.api import CheckpointException
    from torchtitan.tools.logging import logger
    from torchtitan.train import Trainer

    from examples.mosaic_streaming import cpu, resume

    if is_rank_0():
        logger.info(", ".join(f"{name} {version(name)}" for name in PACKAGES))
        if cpu.ACTIVE:
            logger.warning("No accelerator: TorchTitan runs on the CPU, which is for trying out and for tests.")
        if "dataloader" in job_config.checkpoint.exclude_from_loading:
            logger.warning(
                "checkpoint.exclude_from_loading has dataloader: the streams start from their beginning, again."
            )
    handle_signals(signal.SIG_DFL)  # a handler of Python's would wait until all ranks have met
    trainer = None
    try:
        trainer = Trainer(job_config)
        if job_config.checkpoint.create_seed_checkpoint:
            trainer.checkpointer.save(curr_step=0, last_step=True)
            logger.info("Created seed checkpoint")
        else:
            trainer.train()
    except BaseException as error:
        ignore_signals()
        lost = trainer.dataloader.lost_workers() if trainer and isinstance(error, RuntimeError) else ""
        with contextlib.suppress(Exception):
            close(trainer)
        if lost and not isinstance(error, DataError):
            raise DataError(lost) from error
        if isinstance(error, CheckpointException) and (missing := resume.explain_missing(str(error))):
            raise ConfigError(missing) from error
        raise
    close(trainer)
    errors.line.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    logger.info("Process group destroyed")


def close(trainer: "Trainer | None") -> None:
    """End the dataloader workers and close the trainer."""
    if trainer:
        try:
            trainer.dataloader.close()
        finally:
            trainer.close()


def exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    """Turn a signal into an exit, so that a run that is ended from outside closes everything, too."""
    ignore_signals()
    sys.exit(128 + number)


def ignore_signals() -> None:
    """Let nothing disturb the closing of a run: not another signal, nor the end of workers that got it as well.

    Source: torch's SIGCHLD handler raises when a worker ends early (torch 2.13, utils/data/_utils/signal_handling.py).
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    handle_signals(signal.SIG_IGN)


def handle_signals(handler: Callable[[int, FrameType | None], NoReturn] | signal.Handlers) -> None:
    """Have one handler for all signals that end a run."""
    for number in SIGNALS:
        signal.signal(number, handler)


if __name__ == "__main__":
    main()
