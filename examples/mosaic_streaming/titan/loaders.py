"""Builds the loaders of a job while TorchTitan builds its Trainer."""

from typing import Any

from torchtitan.tools.logging import logger

from examples.mosaic_streaming import checkpoint, distributed
from examples.mosaic_streaming.config import Job, resolve, warnings_of_validation
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
        self.job, config = job, resolve(self._loaded.train, job.training, job.layout.replication)
        if self._loaded.validation and job.validation:
            resolve_validation(self._loaded.validation, job, config)
        self.train = build_mosaic_dataloader(job, dp_rank, tokenizer, config, self._channel)
        if self._loaded.position:
            self._move_to(self._loaded.position)
        return self.train

    def _move_to(self, folder: str) -> None:
        """Let the streams go on from the position in another run's checkpoint, unless the job has one of its own."""
        own = self.job.checkpoints
        if "dataloader" not in own.exclude_from_loading and own_checkpoints(own):
            return
        content = distributed.on_rank_0(distributed.draw_number(), lambda: checkpoint.read_position(folder))
        self.train.load_state_dict(content)
        if is_rank_0():
            logger.info(f"The streams go on from the position in {folder}, a checkpoint of another run.")

    def build_validation(self, dp_rank: int, tokenizer: Any) -> ValidationLoader:
        """Build the validation loader, over streams of its own."""
        assert self._loaded.validation
        config = resolve_validation(self._loaded.validation, self.job, self.train.config)
        for warning in warnings_of_validation(config, self.train.config) if is_rank_0() else []:
            logger.warning(warning)
        return build_validation_loader(self.job, dp_rank, tokenizer, config)
