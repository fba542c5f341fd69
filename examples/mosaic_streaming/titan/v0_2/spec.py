"""TrainSpecs that read Mosaic streams, made on demand from TorchTitan's own: `llama3_mosaic` from `llama3`."""

import dataclasses
import os
from typing import Any

import torch.distributed as dist
from torchtitan.components.metrics import MetricsProcessor, build_metrics_processor
from torchtitan.config import JobConfig
from torchtitan.hf_datasets.text_datasets import build_text_dataloader
from torchtitan.protocols.train_spec import TrainSpec, get_train_spec
from torchtitan.tools.logging import logger

from examples.mosaic_streaming.config import Job, LoaderFile, resolve, warnings_of_validation
from examples.mosaic_streaming.dataloader import MosaicDataLoader, build_mosaic_dataloader
from examples.mosaic_streaming.distributed import AbortChannel
from examples.mosaic_streaming.errors import ConfigError, is_rank_0
from examples.mosaic_streaming.metrics import add_data_metrics
from examples.mosaic_streaming.titan.v0_2.documents import within_documents
from examples.mosaic_streaming.titan.v0_2.job import make_job
from examples.mosaic_streaming.titan.v0_2.validator import MosaicValidator
from examples.mosaic_streaming.tokenizer import build_tokenizer
from examples.mosaic_streaming.upstream import cpu
from examples.mosaic_streaming.upstream.train_specs import model_names, register_again
from examples.mosaic_streaming.validator import build_validation_loader, resolve_validation

SUFFIX = "_mosaic"


def register(name: str, train: LoaderFile, validation: LoaderFile | None, channel: AbortChannel) -> None:
    """Register the Mosaic form of a text model with TorchTitan, in place of an earlier one of ours.

    Args:
        name: `model.name`: the name of one of TorchTitan's text models, with `_mosaic` behind it.
        train: the configuration of the training loader.
        validation: the configuration of the validation loader, if there is one.
        channel: tells all ranks why one of them stops.

    Raises:
        ConfigError: there is no such model, or it doesn't read text.
    """
    register_again(name, mosaic_spec(base_spec(name), train, validation, channel))


def base_spec(name: str) -> TrainSpec:
    """TorchTitan's own spec of a Mosaic model; a ConfigError says which models there are."""
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
    """Whether TorchTitan has a model of this name that uses its text loader."""
    try:
        return get_train_spec(name).build_dataloader_fn is build_text_dataloader
    except (ValueError, ImportError):  # unknown, or without packages that it needs
        return False


def text_models() -> list[str]:
    """The Mosaic names of TorchTitan's built-in text models."""
    return [name + SUFFIX for name in model_names() if reads_text(name)]


def mosaic_spec(spec: TrainSpec, train: LoaderFile, validation: LoaderFile | None, channel: AbortChannel) -> TrainSpec:
    """Make a spec that reads Mosaic streams from any spec of a text model; the other arguments are `register`'s."""
    builders = Builders(spec, train, validation, channel)
    return dataclasses.replace(
        spec,
        model_cls=within_documents(spec.model_cls),
        build_tokenizer_fn=lambda job_config: build_tokenizer(job_config.model.hf_assets_path),
        build_dataloader_fn=builders.build_dataloader,
        build_validator_fn=builders.build_validator,
        build_metrics_processor_fn=builders.build_metrics,
        parallelize_fn=cpu.sum_gradients_with_gloo(spec.parallelize_fn),
    )


class Builders:
    """What TorchTitan's Trainer calls to build a loader, then the metrics, then a validator.

    TorchTitan doesn't show the loader to what it builds later (torchtitan 0.2.2, train.py), so it is kept here.

    Args:
        spec: the spec of the text model.
        train: the configuration of the training loader.
        validation: the configuration of the validation loader, if there is one.
        channel: tells all ranks why one of them stops.
    """

    job: Job
    loader: MosaicDataLoader

    def __init__(
        self, spec: TrainSpec, train: LoaderFile, validation: LoaderFile | None, channel: AbortChannel
    ) -> None:
        self._spec, self._train, self._validation, self._channel = spec, train, validation, channel

    def build_dataloader(self, dp_rank: int, tokenizer: Any, job_config: JobConfig, **others: Any) -> MosaicDataLoader:
        """Build the training loader. Errors in the configuration of the validation loader are found here, early."""
        self._channel.exit_on_signals()  # from here on there is something to close
        self.job = make_job(job_config, dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"]))
        config = resolve(self._train, self.job.training, self.job.layout.replication)
        if self._validation and self.job.validation:
            resolve_validation(self._validation, self.job, config)
        self.loader = build_mosaic_dataloader(self.job, dp_rank, tokenizer, config, self._channel)
        return self.loader

    def build_metrics(self, *arguments: Any) -> MetricsProcessor:
        """Build the model's own metrics processor, and let it log what the loader has read."""
        build = self._spec.build_metrics_processor_fn or build_metrics_processor
        return add_data_metrics(build(*arguments), self.loader)

    def build_validator(self, dp_rank: int, tokenizer: Any, **arguments: Any) -> MosaicValidator:
        """Build the validator, over streams of its own."""
        assert self._validation
        config = resolve_validation(self._validation, self.job, self.loader.config)
        for warning in warnings_of_validation(config, self.loader.config) if is_rank_0() else []:
            logger.warning(warning)
        loader = build_validation_loader(self.job, dp_rank, tokenizer, config)
        return MosaicValidator(loader=loader, tokenizer=tokenizer, **arguments)
