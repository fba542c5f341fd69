"""TorchTitan's validator over Mosaic streams, and the configs that build the loaders."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.validate import BaseValidator, Validator

from examples.mosaic_streaming.batch import split_rows
from examples.mosaic_streaming.titan.validator import MeanOverTokens


@dataclass(kw_only=True, slots=True)
class StreamsConfig(BaseDataLoader.Config):
    """A loader of the Mosaic streams that the file `path` configures. MosaicTrainer sets what `build` calls."""

    dataset: Annotated[str, tyro.conf.Suppress] = ""
    dataset_path: Annotated[str | None, tyro.conf.Suppress] = None
    path: Annotated[str | None, tyro.conf.Suppress] = None
    _build: Annotated[Callable[[], Any] | None, tyro.conf.Suppress] = None

    def build(self, **runtime: Any) -> Any:
        """Return the loader."""
        assert self._build
        return self._build()


class MosaicValidator(MeanOverTokens, Validator):
    """The mean loss of a model over the validation streams, whose loader `config.dataloader` builds."""

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        """TorchTitan's settings, and the shape of batches, which is that of training unless it is given."""

        dataloader: StreamsConfig = field(default_factory=StreamsConfig)
        local_batch_size: int | None = None
        """Sequences of a validation batch, per data-parallel rank."""
        seq_len: int | None = None
        """Tokens of a sequence."""

        def build(self, **runtime: Any) -> Any:
            """Build the validator, also from arguments that have the names of settings."""
            return MosaicValidator(self, **runtime)

    def __init__(self, config: Config, **runtime: Any) -> None:
        BaseValidator.__init__(self, config)  # TorchTitan's `Validator` would ask for a loader of its own kind
        self.__dict__.update(runtime)
        self.loader = config.dataloader.build()

    def loss_of(self, inputs: dict[str, Tensor], labels: Tensor, model_parts: list[nn.Module]) -> Tensor:
        if self.pp_schedule is None:
            tokens, labels, kwargs = self.post_dataloading_process(inputs, labels, model_parts)
            with self.validation_context():
                return self.loss_fn(model_parts[0](tokens, **kwargs), labels)[0]
        count = len(labels) // self.parallelism.pipeline_parallel_microbatch_size
        parts = split_rows((inputs, labels), count)
        processed = [self.post_dataloading_process(*part, model_parts) for part in parts]
        losses: list[Tensor] | None = [] if self.pp_has_last_stage else None
        with self.validation_context():
            self.pp_schedule.eval(
                arg_mbs=[(tokens,) for tokens, _, _ in processed] if self.pp_has_first_stage else None,
                kwarg_mbs=[kwargs for _, _, kwargs in processed],
                target_mbs=[target for _, target, _ in processed] if self.pp_has_last_stage else None,
                losses=losses,
            )
        return torch.stack(losses).sum() if losses else torch.zeros(())
