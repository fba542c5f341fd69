"""Makes TorchTitan 0.3's Trainer read Mosaic streams."""

import dataclasses
import functools
import os
from typing import Any

import torch.distributed as dist
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.decoder import Decoder
from torchtitan.observability import structured_logger
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.titan.checkpoints import WayOut
from examples.mosaic_streaming.titan.v0_3.job import make_job
from examples.mosaic_streaming.titan.v0_3.validator import MosaicValidator, StreamsConfig
from examples.mosaic_streaming.upstream import cpu

VALIDATION = ("enable", "freq", "steps", "local_batch_size", "seq_len")  # what a validator's Mosaic form keeps


def mosaic(config: Any, train: str | None, validation: str | None = None) -> Any:
    """Make a config of a text model read Mosaic streams: its training loader, and its validator if that is enabled.

    `config` is a Trainer.Config, TorchTitan's own or one made of it, and is left as it is. The result is of the same
    kind, and its Trainer derives from that of `config`. The others are paths of the loaders' files. ConfigError if the
    model doesn't read text.
    """
    spec, old = check_text_model(config.model_spec), config.validator
    kept = {key: getattr(old, key) for key in VALIDATION if hasattr(old, key)}
    changes = {
        "model_spec": dataclasses.replace(spec, parallelize_fn=cpu.sum_gradients_with_gloo(spec.parallelize_fn)),
        "dataloader": StreamsConfig(path=train),
        "validator": MosaicValidator.Config(dataloader=StreamsConfig(path=validation), **kept),
    }
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    kind: Any = type(config)
    return mosaic_config_of(kind)(**given | changes)


def check_text_model(spec: ModelSpec | None) -> ModelSpec:
    """Return the spec of a model that makes text of text; ConfigError if it is another."""
    if spec and isinstance(spec.model, Decoder.Config):
        return spec
    name = spec and f"{spec.name} {spec.flavor}"
    raise ConfigError(f"model_spec is {name}, which is no decoder of text; Mosaic streams need one.")


@functools.cache
def mosaic_config_of(kind: Any) -> Any:
    """Derive a config whose `build` makes a Trainer that reads Mosaic streams, from any kind of config of a Trainer.

    Source: a class with a `Config` of its own is what that builds (torchtitan 0.3.0, config/configurable.py).
    """
    trainer = kind._owner
    if issubclass(trainer, MosaicTrainer):
        return kind
    config: Any = dataclasses.dataclass(kw_only=True, slots=True)(type("Config", (kind,), {}))
    bases = (MosaicTrainer,) if trainer is Trainer else (MosaicTrainer, trainer)
    type(f"Mosaic{trainer.__name__}", bases, {"Config": config})
    return config


class MosaicTrainer(WayOut, Trainer):
    """TorchTitan's Trainer, with the loaders that `loaders` builds, before the model is built, and a way out."""

    def __init__(self, config: Trainer.Config, *, loaders: Any = None) -> None:
        from examples.mosaic_streaming.metrics import add_data_metrics

        if loaders is None:
            raise ConfigError(
                "A config with Mosaic streams is started by: torchrun -m examples.mosaic_streaming.train --module ... "
                "--config ..., which also closes what they need."
            )
        self._loaders = loaders
        super().__init__(config)
        add_data_metrics(self.metrics_processor, self.dataloader)

    def init_distributed(self) -> ParallelDims:
        """Initialize the ranks as TorchTitan does, and build the training loader, before there is a model."""
        from examples.mosaic_streaming.tokenizer import build_tokenizer

        dims, config = super().init_distributed(), self.config
        job = make_job(config, dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"]))
        dp_rank = dims.get_mesh("batch").get_local_rank() if dims.dp_enabled else 0
        tokenizer = build_tokenizer(config.hf_assets_path)
        loader = self._loaders.build(job, dp_rank, tokenizer)
        config.dataloader = dataclasses.replace(config.dataloader, _build=lambda: loader)
        build_validation = functools.partial(self._loaders.build_validation, dp_rank, tokenizer)
        held_out = dataclasses.replace(config.validator.dataloader, _build=build_validation)
        config.validator = dataclasses.replace(config.validator, dataloader=held_out)
        return dims


def build_trainer(config: Any, loaders: Any) -> Trainer:
    """Build the Trainer of a config that `mosaic` has made, as TorchTitan's own `main` does (0.3.0, train.py)."""
    if cpu.ACTIVE:
        cpu.prepare_config(config, keeps_precision="training.mixed_precision_param" in loaders.owners)
    structured_logger.init_structured_logger(
        source="training", output_dir=config.dump_folder, enable=config.debug.enable_structured_logging
    )
    return config.build(loaders=loaders)
