"""Builds TorchTitan 0.2's Trainer."""

from torchtitan.config import JobConfig
from torchtitan.train import Trainer

from examples.mosaic_streaming.titan.loaders import Loaders
from examples.mosaic_streaming.titan.v0_2.spec import register


def build_trainer(job_config: JobConfig, loaders: Loaders) -> Trainer:
    """Register the job's model and build a Trainer of it. `loaders` builds what it reads."""
    register(job_config.model.name, loaders)
    return Trainer(job_config)
