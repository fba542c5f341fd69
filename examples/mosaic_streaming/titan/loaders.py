"""Builds the loaders of a job while TorchTitan builds its Trainer."""

from typing import Any

from torchtitan.tools.logging import logger

from examples.mosaic_streaming import checkpoint, distributed
from examples.mosaic_streaming.config import Job, resolve_stages, warnings_of_plan, warnings_of_validation
from examples.mosaic_streaming.dataloader import MosaicDataLoader, build_mosaic_dataloader
from examples.mosaic_streaming.distributed import AbortChannel
from examples.mosaic_streaming.errors import is_rank_0
from examples.mosaic_streaming.titan.checkpoints import own_checkpoints
from examples.mosaic_streaming.titan.loaded import LoadedJob
from examples.mosaic_streaming.validator import ValidationLoader, build_validation_loader, resolve_validation


class Loaders:
    """The training loader of a job and, where it validates, the validation loader.

    TorchTitan doesn't show the training loader to what it builds later, so it is kept here.
    """

    job: Job  # once the training loader is built
    train: MosaicDataLoader  # once it is built

    def __init__(self, loaded: LoadedJob, channel: AbortChannel) -> None:
        self._loaded, self._channel = loaded, channel
        self.owners = loaded.owners  # of TorchTitan's settings; others are defaults

    def build(self, job: Job, dp_rank: int, tokenizer: Any) -> MosaicDataLoader:
        """Build the training loader. Errors in the configuration of the validation loader are found here, early."""
        self._channel.exit_on_signals()  # from here on there is something to close
        plan = self._loaded.train
        self.job, self._configs = job, resolve_stages(plan, job, self._loaded.position)
        if self._loaded.validation and job.validation:
            resolve_validation(self._loaded.validation, job, self._configs)
        for warning in warnings_of_plan(plan, job, self._loaded.position) if is_rank_0() else []:
            logger.warning(warning)
        self.train = build_mosaic_dataloader(job, dp_rank, tokenizer, plan, self._configs, self._channel)
        folder, own = self._loaded.position, job.checkpoints  # of another run, unless this one goes on from its own
        if folder and ("dataloader" in own.exclude_from_loading or not own_checkpoints(own)):
            content = distributed.on_rank_0(lambda: checkpoint.read_position(folder))
            self.train.load_state_dict(content)
            self.train.is_new_run = True
            if is_rank_0():
                logger.info(f"The streams go on from the position in {folder}, a checkpoint of another run.")
        return self.train

    def build_validation(self, dp_rank: int, tokenizer: Any) -> ValidationLoader:
        """Build the validation loader, over streams of its own."""
        assert self._loaded.validation
        config = resolve_validation(self._loaded.validation, self.job, self._configs)
        for warning in warnings_of_validation(config, self._configs) if is_rank_0() else []:
            logger.warning(warning)
        return build_validation_loader(self.job, dp_rank, tokenizer, config)
