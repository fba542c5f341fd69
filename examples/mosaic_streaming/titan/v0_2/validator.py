"""TorchTitan's validator over Mosaic streams."""

from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.validate import BaseValidator, Validator
from torchtitan.config import JobConfig

from examples.mosaic_streaming.titan.validator import MeanOverTokens
from examples.mosaic_streaming.upstream.expert_counts import kept_expert_counts
from examples.mosaic_streaming.validator import ValidationLoader


class MosaicValidator(MeanOverTokens, Validator):
    """The mean loss of a model over the validation streams; `arguments` are what TorchTitan gives a validator."""

    def __init__(self, job_config: JobConfig, loader: ValidationLoader, **arguments: Any) -> None:
        BaseValidator.__init__(self, job_config)  # TorchTitan's `Validator` would build a loader of its own
        self.loader = loader
        self.pp_schedule = self.pp_has_first_stage = self.pp_has_last_stage = None  # unless they are given
        self.__dict__.update(arguments)

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        with kept_expert_counts(model_parts):
            super().validate(model_parts, step)

    def loss_of(self, inputs: dict[str, Tensor], labels: Tensor, model_parts: list[nn.Module]) -> Tensor:
        tokens, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(inputs, labels, model_parts)
        with self.validation_context():
            if self.pp_schedule is None:
                with self.maybe_enable_amp:
                    return self.loss_fn(model_parts[0](tokens, **extra_inputs, **extra_kwargs), labels)
            losses: list[Tensor] | None = [] if self.pp_has_last_stage else None
            args, inputs = ((tokens,), extra_inputs) if self.pp_has_first_stage else ((), {})
            target = labels if self.pp_has_last_stage else None
            self.pp_schedule.eval(*args, **inputs, **extra_kwargs, target=target, losses=losses, return_outputs=False)
            return torch.stack(losses).sum() if losses else torch.zeros(())
