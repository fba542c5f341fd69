"""What validation on Mosaic streams adds to TorchTitan's validator: each loss token counts once in the mean."""

from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.utils import device_type

from examples.mosaic_streaming.validator import ValidationLoader


class MeanOverTokens:
    """Makes a TorchTitan validator take the mean loss over the validation streams, or over their first samples.

    Each loss token counts once, whatever its batch. TorchTitan's own validator takes the mean of batches' means in
    0.2.2, and its loader may end at different times on different ranks in both generations (components/validate.py). A
    generation's validator derives from this class first, and adds `loss_of`.
    """

    loader: ValidationLoader
    metrics_processor: Any
    parallel_dims: Any

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Log the mean loss of a round; all ranks call it at the same steps. DataError if there is no loss token."""
        for model in model_parts:
            model.eval()
        loss_sum = torch.zeros((), dtype=torch.float64)
        loss_tokens = torch.zeros((), dtype=torch.int64)
        for inputs, labels in self.loader:
            self.metrics_processor.ntokens_since_last_log += labels.numel()
            loss_tokens += (labels != IGNORE_INDEX).sum()
            inputs = {key: value.to(device_type) for key, value in inputs.items()}
            loss_sum += float(self.loss_of(inputs, labels.to(device_type), model_parts))
        total = self._total(loss_tokens.to(device_type), "batch")
        if not total:
            raise self.loader.no_loss_token_error()
        mean = self._total(loss_sum.to(torch.float32).to(device_type), "loss", "pp") / total
        self.metrics_processor.log_validation(loss=mean, step=step)
        for model in model_parts:
            model.train()

    def loss_of(self, inputs: dict[str, Tensor], labels: Tensor, model_parts: list[nn.Module]) -> Tensor:
        """The loss of a batch, summed over this rank's loss tokens; 0 on a pipeline's stages before the last."""
        raise NotImplementedError

    def _total(self, number: Tensor, *meshes: str) -> float:
        """The sum of a number over the ranks of these meshes; a mesh that this layout doesn't have is left out."""
        for name in meshes:
            if (mesh := self.parallel_dims.get_optional_mesh(name)) is not None:
                number = torch.tensor(dist_utils.dist_sum(number, mesh), dtype=number.dtype, device=number.device)
        return float(number)
