"""TrainSpecs that read Mosaic streams, made on demand from TorchTitan's own: `llama3_mosaic` from `llama3`."""

import dataclasses
import os
from typing import Any

import torch.distributed as dist
from torchtitan.components.metrics import MetricsProcessor, build_metrics_processor
from torchtitan.config import JobConfig
from torchtitan.hf_datasets.text_datasets import build_text_dataloader
from torchtitan.models import _supported_models
from torchtitan.protocols import train_spec
from torchtitan.protocols.train_spec import TrainSpec, get_train_spec, register_train_spec
from torchtitan.tools.logging import logger

from examples.mosaic_streaming.config import Job, LoaderFile, resolve, warnings_of_validation
from examples.mosaic_streaming.dataloader import MosaicDataLoader, build_mosaic_dataloader
from examples.mosaic_streaming.distributed import AbortChannel
from examples.mosaic_streaming.errors import ConfigError, is_rank_0
from examples.mosaic_streaming.metrics import log_data
from examples.mosaic_streaming.titan.v0_2.documents import within_documents
from examples.mosaic_streaming.titan.v0_2.job import make_job
from examples.mosaic_streaming.titan.v0_2.validator import MosaicValidator
from examples.mosaic_streaming.tokenizer import build_tokenizer
from examples.mosaic_streaming.upstream import cpu
from examples.mosaic_streaming.validator import build_validation_loader, resolve_validation

SUFFIX = "_mosaic"

registered: dict[str, TrainSpec] = {}
"""Our own, by their names."""


def register(
    name: str,
    train: LoaderFile,
    validation: LoaderFile | None,
    channel: AbortChannel,
) -> None:
    """Make the Mosaic form of a text model known to TorchTitan, in place of an earlier one of ours.

    Args:
        name: `model.name`, one of TorchTitan's text models with `_mosaic` behind it.
        train: the loader's configuration.
        validation: that of the validation loader.
        channel: tells all ranks why one stops.

    Raises:
        ConfigError: there is no such model, or it doesn't read text.
    """
    made = mosaic_spec(text_spec(name), train, validation, channel)
    if name in registered and train_spec._extra_train_specs.get(name) is registered[name]:
        del train_spec._extra_train_specs[name]  # TorchTitan has no other way to register a name again
    register_train_spec(name, made)
    registered[name] = made


def text_spec(name: str) -> TrainSpec:
    """TorchTitan's own spec of a Mosaic model.

    Raises:
        ConfigError: there is no such model, or it doesn't read text.
    """
    if not name.endswith(SUFFIX):
        hint = f"Set it to {name + SUFFIX!r}." if reads_text(name) else f"One that does: {', '.join(text_models())}."
        raise ConfigError(f"model.name = {name!r} does not read Mosaic streams. {hint}")
    base = name.removesuffix(SUFFIX)
    if not reads_text(base):
        raise ConfigError(
            f"model.name = {name!r}, but TorchTitan has no text model {base!r}. Expected one of: "
            f"{', '.join(text_models())}."
        )
    return get_train_spec(base)


def reads_text(name: str) -> bool:
    """Whether TorchTitan has a model of this name, with its text loader."""
    try:
        return get_train_spec(name).build_dataloader_fn is build_text_dataloader
    except (ValueError, ImportError):  # not known, or without packages that it needs
        return False


def text_models() -> list[str]:
    """The Mosaic names of TorchTitan's built-in text models."""
    return [name + SUFFIX for name in sorted(_supported_models) if reads_text(name)]


def mosaic_spec(
    spec: TrainSpec,
    train: LoaderFile,
    validation: LoaderFile | None,
    channel: AbortChannel,
) -> TrainSpec:
    """A TorchTitan spec that reads the streams of a loader configuration.

    Args:
        spec: any TrainSpec of a text model.
        train: the loader's configuration.
        validation: that of the validation loader.
        channel: tells all ranks why one stops.
    """

    built: list[tuple[Job, MosaicDataLoader]] = []
    """TorchTitan doesn't show the loader to what it builds later (torchtitan 0.2.2, train.py)."""

    def build_loader(dp_rank: int, tokenizer: Any, job_config: JobConfig, **arguments: Any) -> MosaicDataLoader:
        channel.exit_on_signals()  # from here on there is something to close
        job = make_job(job_config, dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"]))
        config = resolve(train, job.training, job.layout.replication)
        if validation and job.validation:  # before a model is built
            resolve_validation(validation, job, config)
        loader = build_mosaic_dataloader(job, dp_rank, tokenizer, config, channel)
        built.append((job, loader))
        return loader

    def build_metrics(*arguments: Any) -> MetricsProcessor:
        build = spec.build_metrics_processor_fn or build_metrics_processor
        return log_data(build(*arguments), built[-1][1])

    def build_validator(dp_rank: int, tokenizer: Any, **arguments: Any) -> MosaicValidator:
        job, loader = built[-1]
        assert validation is not None
        config = resolve_validation(validation, job, loader.config)
        for warning in warnings_of_validation(config, loader.config) if is_rank_0() else []:
            logger.warning(warning)
        rounds = build_validation_loader(job, dp_rank, tokenizer, config)
        return MosaicValidator(loader=rounds, tokenizer=tokenizer, **arguments)

    return dataclasses.replace(
        spec,
        model_cls=within_documents(spec.model_cls),
        build_tokenizer_fn=lambda job_config: build_tokenizer(job_config.model.hf_assets_path),
        build_dataloader_fn=build_loader,
        build_validator_fn=build_validator,
        build_metrics_processor_fn=build_metrics,
        parallelize_fn=cpu.sum_gradients_with_gloo(spec.parallelize_fn),
    )
