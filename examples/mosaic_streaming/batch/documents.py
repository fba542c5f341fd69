"""Attention that stays within a document: llm-foundry's `sequence_id` as TorchTitan's masks and positions."""

import torch
from torch import Tensor

SEQUENCE_ID = "sequence_id"
"""Of llm-foundry's batches: which document of its row each token is of, -1 where it is padding."""


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
