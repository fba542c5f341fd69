"""Keeps attention within documents: what llm-foundry's `sequence_id` means for masks and positions."""

import torch
from torch import Tensor

SEQUENCE_ID = "sequence_id"
"""The key of llm-foundry's batches that says which document of its row each token is of; -1 is padding."""


def ends(sequence_id: Tensor) -> Tensor:
    """Mark the last token of each document: int64 [rows, seq_len] to bool of the same shape."""
    return torch.nn.functional.pad(sequence_id[:, 1:] != sequence_id[:, :-1], (0, 1), value=True)


def positions(sequence_id: Tensor) -> Tensor:
    """Number the tokens within each document, from 0: int64 [rows, seq_len] to int64 of the same shape."""
    begins = torch.nn.functional.pad(ends(sequence_id)[:, :-1], (1, 0), value=True)
    index = torch.arange(sequence_id.shape[1]).expand_as(sequence_id)
    return index - torch.where(begins, index, 0).cummax(1).values
