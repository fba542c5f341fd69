"""Builds TorchTitan 0.2's Trainer of a TrainSpec that reads Mosaic streams: `llama3_mosaic`, from its own `llama3`."""

import dataclasses
import os
from typing import Any

import torch.distributed as dist
from torchtitan.components.metrics import MetricsProcessor, build_metrics_processor
from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import TrainSpec
from torchtitan.train import Trainer

from examples.mosaic_streaming.dataloader import MosaicDataLoader
from examples.mosaic_streaming.metrics import add_data_metrics
from examples.mosaic_streaming.titan.checkpoints import WayOut
from examples.mosaic_streaming.titan.loaders import Loaders
from examples.mosaic_streaming.titan.v0_2.job import make_job
from examples.mosaic_streaming.titan.v0_2.models import base_spec, within_documents
from examples.mosaic_streaming.titan.v0_2.validator import MosaicValidator
from examples.mosaic_streaming.tokenizer import build_tokenizer
from examples.mosaic_streaming.upstream import cpu
from examples.mosaic_streaming.upstream.train_specs import register_again


def mosaic_spec(spec: TrainSpec, loaders: Loaders) -> TrainSpec:
    """Make a spec that reads Mosaic streams from any spec of a text model; `loaders` builds the loaders."""

    def build_dataloader(dp_rank: int, tokenizer: Any, job_config: JobConfig, **others: Any) -> MosaicDataLoader:
        job = make_job(job_config, dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"]))
        return loaders.build(job, dp_rank, tokenizer)

    def build_metrics(*arguments: Any) -> MetricsProcessor:
        build = spec.build_metrics_processor_fn or build_metrics_processor
        return add_data_metrics(build(*arguments), loaders.train)

    def build_validator(dp_rank: int, tokenizer: Any, **arguments: Any) -> MosaicValidator:
        loader = loaders.build_validation(dp_rank, tokenizer)
        return MosaicValidator(loader=loader, tokenizer=tokenizer, **arguments)

    return dataclasses.replace(
        spec,
        model_cls=within_documents(spec.model_cls),
        build_tokenizer_fn=lambda job_config: build_tokenizer(job_config.model.hf_assets_path),
        build_dataloader_fn=build_dataloader,  # TorchTitan calls it first, then the next two
        build_metrics_processor_fn=build_metrics,
        build_validator_fn=build_validator,
        parallelize_fn=cpu.sum_gradients_with_gloo(spec.parallelize_fn),
    )


class MosaicTrainer(WayOut, Trainer):
    """TorchTitan's Trainer, with a way out after each step."""


def build_trainer(job_config: JobConfig, loaders: Loaders) -> MosaicTrainer:
    """Register the Mosaic form of the job's model, in place of an earlier one, and build a Trainer of it."""
    name = job_config.model.name
    register_again(name, mosaic_spec(base_spec(name), loaders))
    return MosaicTrainer(job_config)
