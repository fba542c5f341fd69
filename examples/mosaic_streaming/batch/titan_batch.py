"""Converts an llm-foundry batch to TorchTitan's: shifted once, padding masked, checked. Pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX
from transformers import PreTrainedTokenizerBase as Tokenizer

from examples.mosaic_streaming.config import BatchShape, Job, ResolvedLoader
from examples.mosaic_streaming.errors import DataError

TitanBatch = tuple[dict[str, Tensor], Tensor]

SEQUENCE_ID = "sequence_id"
"""Key of llm-foundry's batches: each token's document in its row, -1 for padding; int64 [rows, seq_len]."""


@dataclass(frozen=True)
class BatchSpec:
    """What the batches of one loader are made of and have to look like."""

    rows: int  # sequences in a batch, per dp rank (`training.local_batch_size`)
    seq_len: int  # tokens in a sequence of the model (`training.seq_len`)
    max_seq_len: int  # tokens in a row of the loader: `seq_len` or `seq_len + 1`
    vocab_size: int  # rows of the model's embedding
    pad_id: int | None
    eos_id: int | None
    labels_are_ids: bool
    """Whether the labels are the ids, as for text, rather than labels that the loader chooses. llm-foundry's own labels
    for text mask every id that equals `pad_id`, real EOS too."""
    source: str  # the streams and the rank, for messages
    documents: bool = False  # whether the model keeps attention within documents
    positions: bool = False  # whether the model takes positions
    masks_by_positions: bool = False  # whether the model makes its masks of positions, which each batch then has


def spec_of(job: Job, shape: BatchShape, loader_config: ResolvedLoader, tokenizer: Tokenizer, who: str) -> BatchSpec:
    """Return what the batches of a loader have to look like. `who` reads them, for messages."""
    return BatchSpec(
        rows=shape.local_batch_size,
        seq_len=shape.seq_len,
        max_seq_len=loader_config.dataset["max_seq_len"],
        vocab_size=job.vocab_size,
        pad_id=tokenizer.pad_token_id,
        eos_id=tokenizer.eos_token_id,
        labels_are_ids=loader_config.name == "text",
        source=f"{who} reads {loader_config.sources}, set in {loader_config.source}.",
        documents=job.documents,
        positions=job.positions,
        masks_by_positions=job.masks_by_positions,
    )


def to_titan_batch(batch: Mapping[str, Any], spec: BatchSpec) -> TitanBatch:
    """Convert a batch of llm-foundry to one of TorchTitan.

    Args:
        batch: `input_ids: int32 or int64 [rows, max_seq_len]`, and optionally `labels`, `attention_mask` and
            `sequence_id` of the same shape. Other keys are dropped.

    Returns:
        `{"input": int64 [rows, seq_len]}` and `labels: int64 [rows, seq_len]`. `labels[:, t]` is the token that follows
        `input[:, t]`, or -100 if that is padding, not to be learned, or beyond a row of `seq_len` tokens. A model that
        keeps attention within documents also gets `sequence_id`, and `positions` if it takes them, of the same shape.
        One that makes its masks of positions gets `positions` alone, and always.

    DataError if a tensor is missing, the shape is not `[rows, max_seq_len]`, or an id is outside the vocabulary.

    Source: llm-foundry's labels are not shifted, TorchTitan's are (llm-foundry 0.22.0 data/text_data.py,
    torchtitan 0.2.2 hf_datasets/text_datasets.py).
    """
    return convert(batch, spec)[0]


def convert(batch: Mapping[str, Any], spec: BatchSpec) -> tuple[TitanBatch, Tensor | None]:
    """Do what `to_titan_batch` does, and return `is_padding` of the loader's rows as well."""
    check_keys(batch, spec)
    ids = batch["input_ids"]
    check_ids(ids, spec)
    padding = is_padding(ids, batch.get("attention_mask"), spec)
    unshifted = ids if spec.labels_are_ids else batch["labels"]
    if padding is not None:
        unshifted = unshifted.masked_fill(padding, IGNORE_INDEX)
    labels = unshifted[:, 1 : spec.seq_len + 1]
    if spec.max_seq_len == spec.seq_len:
        labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)
    inputs = {"input": copy_as_int64(ids[:, : spec.seq_len])}
    if (documents := documents_of(batch, padding, spec)) is not None:
        sequence_id = copy_as_int64(documents[:, : spec.seq_len])
        if not spec.masks_by_positions:
            inputs[SEQUENCE_ID] = sequence_id
        if spec.masks_by_positions or spec.positions:
            inputs["positions"] = positions(sequence_id)
    return (inputs, copy_as_int64(labels)), padding  # labels don't share memory with the ids


def copy_as_int64(tensor: Tensor) -> Tensor:
    """A contiguous copy; numpy makes it in half of torch's time."""
    return torch.from_numpy(tensor.numpy().astype(np.int64, order="C"))


def documents_of(batch: Mapping[str, Any], padding: Tensor | None, spec: BatchSpec) -> Tensor | None:
    """Each token's document in its row: int [rows, max_seq_len]; None where the model needs none, or finds them itself.

    A finetuning row without `sequence_id` is one document: TorchTitan would end one at each EOS of a chat. In a row of
    plain text without it, a document ends with EOS; a model with masks by `sequence_id` finds these itself.
    """
    ids, sequence_id = batch["input_ids"], batch.get(SEQUENCE_ID)
    if not spec.documents:
        return torch.zeros_like(ids) if spec.masks_by_positions else None
    if sequence_id is not None:
        return torch.as_tensor(sequence_id)
    if not spec.labels_are_ids:
        return torch.zeros_like(ids) if padding is None else -padding.long()
    if not spec.masks_by_positions:
        return None
    return torch.nn.functional.pad((ids == spec.eos_id).cumsum(1)[:, :-1], (1, 0))


def split_rows(batch: TitanBatch, parts: int) -> list[TitanBatch]:
    """Cut a batch into parts of equally many rows, in order."""
    if parts == 1:
        return [batch]
    inputs, labels = batch
    pieces = [tensor.chunk(parts) for tensor in (*inputs.values(), labels)]
    return [(dict(zip(inputs, part, strict=False)), part[-1]) for part in zip(*pieces, strict=True)]


def ends(sequence_id: Tensor) -> Tensor:
    """Mark the last token of each document: bool [rows, seq_len]."""
    return torch.nn.functional.pad(sequence_id[:, 1:] != sequence_id[:, :-1], (0, 1), value=True)


def positions(sequence_id: Tensor) -> Tensor:
    """Count each token's position in its document: int64 [rows, seq_len]."""
    begins = torch.nn.functional.pad(ends(sequence_id)[:, :-1], (1, 0), value=True)
    index = torch.arange(sequence_id.shape[1]).expand_as(sequence_id)
    return index - torch.where(begins, index, 0).cummax(1).values


def is_padding(ids: Tensor, attention_mask: Tensor | None, spec: BatchSpec) -> Tensor | None:
    """Mark padding: where the attention mask is 0 or, without a mask, the run of pad ids that ends a row.

    If the padding token is EOS, the first EOS of that run is taken as the end of the text. Text without padding, the
    usual case, gives None.
    """
    if attention_mask is not None:
        return attention_mask == 0
    if spec.pad_id is None or spec.pad_id not in ids.numpy()[:, -1].tolist():
        return None
    run = (ids == spec.pad_id).flip(1).cumprod(1).flip(1).bool()
    if spec.pad_id == spec.eos_id:
        run &= torch.nn.functional.pad(run[:, :-1], (1, 0), value=False)
    return run


def check_keys(batch: Mapping[str, Any], spec: BatchSpec) -> None:
    """Raise DataError unless a batch has the tensors it needs, all of one shape; a user's own loader may not."""
    needed = ("input_ids",) if spec.labels_are_ids else ("input_ids", "labels")
    if missing := [key for key in needed if not isinstance(batch.get(key), Tensor)]:
        raise DataError(
            f"A batch has no tensor {' nor '.join(missing)}, but: {', '.join(batch)}. Have the loader make them: ids, "
            f"and as labels the same ids, with {IGNORE_INDEX} for what is not to be learned. {spec.source}"
        )
    shapes = {key: list(batch[key].shape) for key in (*needed, "attention_mask", SEQUENCE_ID) if key in batch}
    if any(shape != shapes["input_ids"] for shape in shapes.values()):
        raise DataError(f"A batch has tensors of several shapes, expected one: {shapes}. {spec.source}")


def check_ids(ids: Tensor, spec: BatchSpec) -> None:
    """Raise DataError unless `ids` is `[rows, max_seq_len]`, and each id has a row in the model's embedding."""
    found, expected, hint = list(ids.shape), [spec.rows, spec.max_seq_len], spec.source
    if found != expected:
        if ids.ndim == 2 and ids.shape[1] == spec.seq_len < spec.max_seq_len:
            hint = (
                f"The samples have {spec.seq_len} tokens: set dataset.max_seq_len = {spec.seq_len} (the last label of "
                f"each is then -100), or write them with {spec.max_seq_len} tokens, so that each label is real. {hint}"
            )
        sizes = "training.local_batch_size, dataset.max_seq_len"
        raise DataError(f"Batch of shape {found}, expected {expected} ({sizes}). {hint}")
    array = ids.numpy()
    unsigned = array.view(np.dtype(f"u{array.itemsize}"))  # a negative id is larger than all others
    if unsigned.max() >= spec.vocab_size:
        low, high = array.min(), array.max()
        raise DataError(
            f"Token id {low if low < 0 else high} in a batch, the model knows 0 to {spec.vocab_size - 1}. The data was "
            f"made with another tokenizer, token_encoding_type is wrong, or model.flavor is. {spec.source}"
        )
