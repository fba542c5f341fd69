"""TorchTitan's validator over Mosaic streams: the same samples each round, each once in the average."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.components.validate import BaseValidator
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.distributed.context_parallel import prepare_context_parallel_input
from torchtitan.protocols.train_spec import get_train_spec
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from examples.mosaic_streaming.config.files import LoaderFile
from examples.mosaic_streaming.config.folders import is_url
from examples.mosaic_streaming.config.loader import Config, stream_folders
from examples.mosaic_streaming.errors import is_rank_0
from examples.mosaic_streaming.rounds import build_rounds, resolve_validation


class MosaicValidator(BaseValidator):
    """The mean loss of a model over the first samples of the validation streams, or over all of them.

    Each target counts once, whatever its batch: TorchTitan's own validator takes the mean of batches' means, and
    iterates a loader whose ranks may end at different times (torchtitan 0.2.2, components/validate.py).

    Args:
        job_config: the whole job; `validation` has batch size, sequence length, and batches of a round.
        dp_world_size: data-parallel degree, on TorchTitan's batch mesh.
        dp_rank: this rank on that mesh.
        tokenizer: TorchTitan's tokenizer.
        validation_file: configuration of the validation loader.
        train_file: that of the training loader.
        arguments: the rest of what TorchTitan gives a validator.

    Raises:
        ConfigError: the loader and the job don't fit together.
    """

    def __init__(
        self,
        *,
        job_config: JobConfig,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: HuggingFaceTokenizer,
        validation_file: LoaderFile,
        train_file: LoaderFile,
        **arguments: Any,
    ) -> None:
        super().__init__(job_config)
        self._tokenizer = tokenizer
        self._dims: ParallelDims = arguments["parallel_dims"]
        self._loss_fn = arguments["loss_fn"]
        self._context = arguments["validation_context"]
        self._amp = arguments["maybe_enable_amp"]
        self._metrics = arguments["metrics_processor"]
        self._schedule = arguments.get("pp_schedule")
        self._has_first_stage = arguments.get("pp_has_first_stage")
        self._has_last_stage = arguments.get("pp_has_last_stage")
        model = job_config.model
        attention = getattr(get_train_spec(model.name).model_args[model.flavor], "attn_type", "sdpa")
        self._masks = attention in ("flex", "varlen")
        replication = dist.get_world_size() // dp_world_size
        config = resolve_validation(job_config, replication, validation_file, train_file)
        seen = places(config["dataset"]) & places(train_file.config["dataset"])
        if seen and is_rank_0():
            logger.warning(
                f"Training reads the same as validation: {', '.join(sorted(seen))}. The loss will tell less."
            )
        self._rounds = build_rounds(job_config, dp_world_size, dp_rank, tokenizer, config, validation_file)

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Log the mean loss; the model's mode is training again afterwards.

        Raises:
            DataError: on all ranks, if there is nothing to take the mean of.
        """
        counted = count_of_experts(model_parts)
        for model in model_parts:
            model.eval()
        loss_sum = torch.zeros((), dtype=torch.float64)
        tokens = torch.zeros((), dtype=torch.int64)
        for inputs, labels in self._rounds:
            self._metrics.ntokens_since_last_log += labels.numel()
            tokens += (labels != IGNORE_INDEX).sum()
            inputs = {key: value.to(device_type) for key, value in inputs.items()}
            loss_sum += self._loss(inputs, labels.to(device_type), model_parts).item()
        loss_sum, tokens = loss_sum.to(torch.float32).to(device_type), tokens.to(device_type)
        total = self._total(tokens, "batch")
        if not total:
            raise self._rounds.no_loss_token()
        self._metrics.log_validation(loss=self._total(loss_sum, "loss", "pp") / total, step=step)
        for model in model_parts:
            model.train()
        for count, before in counted:
            count.copy_(before)

    def _loss(self, inputs: dict[str, Tensor], labels: Tensor, model_parts: list[nn.Module]) -> Tensor:
        """The loss of a batch, summed over this rank's targets; 0 on a pipeline's other stages than the last."""
        tokens, extra_inputs = inputs.pop("input"), inputs
        extra_kwargs: dict[str, Any] = {}
        if self._masks:
            extra_kwargs["attention_masks"] = model_parts[0].get_attention_masks(  # type: ignore[operator]
                input_batch=tokens, tokenizer=self._tokenizer, extra_inputs=extra_inputs
            )
        if self._dims.cp_enabled:
            balancer = self.job_config.parallelism.context_parallel_load_balancer
            tokens, labels, extra_kwargs = prepare_context_parallel_input(
                tokens, labels, extra_kwargs, self._dims.get_mesh("cp"), tokens.device, balancer
            )
        with self._context():
            if self._schedule is None:
                with self._amp:
                    loss: Tensor = self._loss_fn(model_parts[0](tokens, **extra_inputs, **extra_kwargs), labels)
                    return loss
            losses: list[Tensor] | None = [] if self._has_last_stage else None
            first = ((tokens,), extra_inputs) if self._has_first_stage else ((), {})
            target = labels if self._has_last_stage else None
            self._schedule.eval(
                *first[0], **first[1], **extra_kwargs, target=target, losses=losses, return_outputs=False
            )
            return torch.stack(losses).sum() if losses else torch.zeros(())

    def _total(self, number: Tensor, *meshes: str) -> float:
        """The sum over meshes, as far as there are such."""
        for name in meshes:
            if (mesh := self._dims.get_optional_mesh(name)) is not None:
                number = torch.tensor(dist_utils.dist_sum(number, mesh), dtype=number.dtype, device=number.device)
        return float(number)

    def lost_workers(self) -> str:
        """Which dataloader workers have ended with an error, and how."""
        return self._rounds.lost_workers()

    def close(self) -> None:
        """End the dataloader workers."""
        self._rounds.close()


def places(dataset: Config) -> set[str]:
    """Where streams' shards come from, each written in one way."""
    folders = stream_folders(dataset).values()
    return {folder.rstrip("/") if is_url(folder) else os.path.realpath(folder) for folder in folders}


def count_of_experts(model_parts: list[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """The buffers in which experts count their tokens, each with a copy.

    Source: they count in each forward pass, and the next optimizer step moves experts' biases by that (torchtitan
    0.2.2, models/moe/moe.py, components/optimizer.py): tokens of validation would change training.
    """
    buffers = [buffer for model in model_parts for buffer in model.named_buffers()]
    return [(buffer, buffer.clone()) for name, buffer in buffers if name.endswith("tokens_per_expert")]
