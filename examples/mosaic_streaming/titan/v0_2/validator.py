"""TorchTitan's validator over Mosaic streams: each loss token counts once in the mean."""

from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.validate import BaseValidator, Validator
from torchtitan.config import JobConfig
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.utils import device_type

from examples.mosaic_streaming.upstream.expert_counts import kept_expert_counts
from examples.mosaic_streaming.validator import ValidationLoader


class MosaicValidator(Validator):
    """The mean loss of a model over the validation streams, or over their first samples.

    Each loss token counts once, whatever its batch. TorchTitan's own validator takes the mean of batches' means, and
    its loader may end at different times on different ranks (torchtitan 0.2.2, components/validate.py).

    Args:
        job_config: the whole job.
        loader: of the validation streams.
        arguments: the rest of what TorchTitan gives a validator.
    """

    def __init__(self, job_config: JobConfig, loader: ValidationLoader, **arguments: Any) -> None:
        BaseValidator.__init__(self, job_config)  # TorchTitan's `Validator` would build a loader of its own
        self.validation_dataloader = loader
        self.pp_schedule = self.pp_has_first_stage = self.pp_has_last_stage = None  # unless they are given
        self.__dict__.update(arguments)

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Log the mean loss of a round. All ranks call it at the same steps.

        Raises:
            DataError: a batch can't be read, or the round has no loss token.
        """
        for model in model_parts:
            model.eval()
        loss_sum = torch.zeros((), dtype=torch.float64)
        loss_tokens = torch.zeros((), dtype=torch.int64)
        with kept_expert_counts(model_parts):
            for inputs, labels in self.loader:
                self.metrics_processor.ntokens_since_last_log += labels.numel()
                loss_tokens += (labels != IGNORE_INDEX).sum()
                inputs = {key: value.to(device_type) for key, value in inputs.items()}
                loss_sum += self._loss(inputs, labels.to(device_type), model_parts).item()
        total = self._total(loss_tokens.to(device_type), "batch")
        if not total:
            raise self.loader.no_loss_token_error()
        mean = self._total(loss_sum.to(torch.float32).to(device_type), "loss", "pp") / total
        self.metrics_processor.log_validation(loss=mean, step=step)
        for model in model_parts:
            model.train()

    @property
    def loader(self) -> ValidationLoader:
        """The loader of the validation streams."""
        assert isinstance(self.validation_dataloader, ValidationLoader)
        return self.validation_dataloader

    def _loss(self, inputs: dict[str, Tensor], labels: Tensor, model_parts: list[nn.Module]) -> Tensor:
        """The loss of a batch, summed over this rank's loss tokens; 0 on a pipeline's stages before the last."""
        tokens, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(inputs, labels, model_parts)
        with self.validation_context():
            if self.pp_schedule is None:
                with self.maybe_enable_amp:
                    loss: Tensor = self.loss_fn(model_parts[0](tokens, **extra_inputs, **extra_kwargs), labels)
                    return loss
            losses: list[Tensor] | None = [] if self.pp_has_last_stage else None
            first = ((tokens,), extra_inputs) if self.pp_has_first_stage else ((), {})
            target = labels if self.pp_has_last_stage else None
            self.pp_schedule.eval(
                *first[0], **first[1], **extra_kwargs, target=target, losses=losses, return_outputs=False
            )
            return torch.stack(losses).sum() if losses else torch.zeros(())

    def _total(self, number: Tensor, *meshes: str) -> float:
        """The sum of a number over the ranks of these meshes; a mesh that this layout doesn't have is left out."""
        for name in meshes:
            if (mesh := self.parallel_dims.get_optional_mesh(name)) is not None:
                number = torch.tensor(dist_utils.dist_sum(number, mesh), dtype=number.dtype, device=number.device)
        return float(number)
