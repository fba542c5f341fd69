"""TorchTitan 0.2's text models, and their attention: llm-foundry's `sequence_id` becomes TorchTitan's masks."""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.hf_datasets.text_datasets import build_text_dataloader
from torchtitan.protocols.model import BaseModelArgs, ModelProtocol
from torchtitan.protocols.train_spec import TrainSpec, get_train_spec

from examples.mosaic_streaming.titan.checks import check_model

if TYPE_CHECKING:
    from examples.mosaic_streaming.sampling import Layout


def base_spec(name: str) -> TrainSpec:
    """TorchTitan's own spec of a Mosaic model; a ConfigError says which models there are."""
    return get_train_spec(check_model(name, reads_text))


def reads_text(name: str) -> bool:
    """Whether TorchTitan has a model of this name that uses its text loader."""
    try:
        return get_train_spec(name).build_dataloader_fn is build_text_dataloader
    except (ValueError, ImportError):  # unknown, or without packages that it needs
        return False


def within_documents(model_cls: type[ModelProtocol]) -> type[ModelProtocol]:
    """Derive a model whose attention masks follow the batch's `sequence_id`, where there is one.

    Source: TorchTitan makes masks from the input's EOS tokens (torchtitan 0.2.2, models/attention.py), which chats and
    prompts have anywhere. It is given marks instead of tokens, and makes the same kind of mask from them. TorchTitan's
    validator asks every model for masks, and takes a TypeError for an answer (components/validate.py).
    """
    from examples.mosaic_streaming.batch import SEQUENCE_ID, ends  # which imports llm-foundry

    def get_attention_masks(
        self: Any, input_batch: Tensor, tokenizer: BaseTokenizer, extra_inputs: dict[str, Tensor] | None = None
    ) -> Any:
        if not takes_masks(self.model_args):
            raise TypeError("attention of this flavor takes no masks")
        sequence_id = (extra_inputs or {}).pop(SEQUENCE_ID, None)  # the model's `forward` doesn't take it
        if sequence_id is not None:
            assert tokenizer.eos_id is not None
            input_batch = torch.where(ends(sequence_id), tokenizer.eos_id, tokenizer.eos_id + 1)
        return model_cls.get_attention_masks(self, input_batch, tokenizer, extra_inputs)

    return type(model_cls.__name__, (model_cls,), {"get_attention_masks": get_attention_masks})


def takes_masks(model_args: BaseModelArgs) -> bool:
    """Whether a flavor's attention takes masks, as TorchTitan's Trainer tells it (torchtitan 0.2.2, train.py)."""
    return getattr(model_args, "attn_type", "sdpa") in ("flex", "varlen")


def masks_documents(model_args: BaseModelArgs) -> bool:
    """Whether attention of a flavor can be kept within documents."""
    return takes_masks(model_args) and getattr(model_args, "attn_mask_type", "") == "block_causal"


def takes_positions(model_cls: type[ModelProtocol], layout: "Layout") -> bool:
    """Whether a model can be given positions.

    Where it can't, positions continue through the whole row. With rotary embeddings, which know distances alone, that
    is the same. Under pp only the first stage would get positions, cp makes its own, and tp doesn't expect any
    (torchtitan 0.2.2, train.py, distributed/context_parallel.py, models/*/infra).
    """
    is_whole = all(layout.degrees[name] == 1 for name in ("pp", "cp", "tp"))
    return is_whole and "positions" in inspect.signature(model_cls.forward).parameters
