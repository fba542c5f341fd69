"""Attention that stays within a document: llm-foundry's `sequence_id` as TorchTitan's masks and positions."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.protocols.model import BaseModelArgs, ModelProtocol

from examples.mosaic_streaming.errors import ConfigError

SEQUENCE_ID = "sequence_id"
"""Of llm-foundry's batches: which document of its row each token is of, -1 where it is padding."""


def within_documents(model_cls: type[ModelProtocol]) -> type[ModelProtocol]:
    """A model whose attention masks follow the batch's `sequence_id`, where there is one.

    Source: TorchTitan makes masks from the input's EOS tokens (torchtitan 0.2.2, models/attention.py), which chats and
    prompts have anywhere. It is given marks instead of tokens, and makes the same kind of mask from them.
    """

    def get_attention_masks(
        self: Any, input_batch: Tensor, tokenizer: BaseTokenizer, extra_inputs: dict[str, Tensor] | None = None
    ) -> Any:
        sequence_id = (extra_inputs or {}).pop(SEQUENCE_ID, None)  # the model's `forward` doesn't take it
        if sequence_id is not None:
            assert tokenizer.eos_id is not None
            input_batch = torch.where(ends(sequence_id), tokenizer.eos_id, tokenizer.eos_id + 1)
        return model_cls.get_attention_masks(self, input_batch, tokenizer, extra_inputs)

    return type(model_cls.__name__, (model_cls,), {"get_attention_masks": get_attention_masks})


def ends(sequence_id: Tensor) -> Tensor:
    """Where the last token of each document is.

    Args:
        sequence_id: int64 [rows, seq_len].

    Returns:
        bool, of that shape.
    """
    return torch.nn.functional.pad(sequence_id[:, 1:] != sequence_id[:, :-1], (0, 1), value=True)


def positions(sequence_id: Tensor) -> Tensor:
    """Each token's position in its document.

    Args:
        sequence_id: int64 [rows, seq_len].

    Returns:
        int64, of that shape.
    """
    begins = torch.nn.functional.pad(ends(sequence_id)[:, :-1], (1, 0), value=True)
    index = torch.arange(sequence_id.shape[1]).expand_as(sequence_id)
    return index - torch.where(begins, index, 0).cummax(1).values


def masks_documents(model_args: BaseModelArgs) -> bool:
    """Whether attention of a flavor can be kept within documents."""
    attention = getattr(model_args, "attn_type", "sdpa")
    return attention in ("flex", "varlen") and getattr(model_args, "attn_mask_type", "") == "block_causal"


def takes_positions(model_cls: type[ModelProtocol], degrees: Mapping[str, int]) -> bool:
    """Whether a model can be given positions.

    Where it can't, they go on along the row. With rotary embeddings, which know distances alone, that is the same.

    Args:
        model_cls: the model's class.
        degrees: of parallelism, by name. Under pp only the first stage would get positions, cp makes its own, and tp
            doesn't expect any (torchtitan 0.2.2, train.py, distributed/context_parallel.py, models/*/infra).
    """
    return "positions" in inspect.signature(model_cls.forward).parameters and all(
        degrees[name] == 1 for name in ("pp", "cp", "tp")
    )


def check_attention(model_args: BaseModelArgs, flavor: str, pp: int) -> None:
    """Raise ConfigError for a flavor whose masks TorchTitan would get wrong.

    Source: pipeline stages cut the masks of varlen attention, which are cumulative lengths, into equal parts: those of
    the second micro-batch don't begin at 0 (torch 2.13, distributed/pipelining/microbatch.py).
    """
    if pp > 1 and getattr(model_args, "attn_type", "sdpa") == "varlen":
        raise ConfigError(
            f"model.flavor = {flavor!r} has varlen attention, whose masks pipeline parallelism "
            f"(parallelism.pipeline_parallel_degree = {pp}) cuts wrongly. Choose a flavor with flex attention, or FSDP."
        )


def check_eos(model_args: BaseModelArgs, flavor: str, eos_id: int | None, path: str) -> None:
    """Raise ConfigError for a flavor that keeps attention within documents, and a tokenizer without an EOS.

    Args:
        model_args: the flavor's.
        flavor: its name.
        eos_id: of TorchTitan's tokenizer, from which its masks tell where documents end.
        path: `model.hf_assets_path`.
    """
    if masks_documents(model_args) and eos_id is None:
        raise ConfigError(
            f"model.flavor = {flavor!r} keeps attention within documents, which end with EOS, but the tokenizer in "
            f"model.hf_assets_path = {path!r} has none. Set `eos_token` in its tokenizer_config.json."
        )


def no_masks(documents: str, model: str, flavors: Mapping[str, BaseModelArgs], flavor: str) -> str:
    """What it means that a flavor doesn't keep attention within documents, and which flavors do.

    Args:
        documents: what the rows are made of.
        model: its name.
        flavors: of the model.
        flavor: the one in use.
    """
    masking = [name for name, model_args in flavors.items() if masks_documents(model_args)]
    hint = f"These flavors do, on a GPU: {', '.join(masking)}." if masking else "No flavor of this model does."
    return (
        f"Rows are made of {documents}, and model.flavor = {flavor!r} of {model} does not keep attention within them: "
        f"each token also sees those before it in its row. {hint}"
    )
