"""Converts llm-foundry's batches for TorchTitan: shifted once, padding masked, checked. All functions are pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX

from examples.mosaic_streaming.batch.documents import SEQUENCE_ID, positions
from examples.mosaic_streaming.errors import DataError

TitanBatch = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class BatchSpec:
    """What the batches of a loader have to look like.

    Attributes:
        rows: sequences in a batch, per dp rank (`training.local_batch_size`).
        seq_len: tokens in a sequence of the model (`training.seq_len`).
        max_seq_len: tokens in a row of the loader: `seq_len` or `seq_len + 1`.
        vocab_size: rows of the model's embedding.
        labels_are_ids: whether the labels are the ids, as for text. llm-foundry's own labels for text mask each id that
            equals `pad_id`, also a real EOS, so they are not used.
        source: the streams and the rank, for messages.
        documents: whether the model keeps attention within documents.
        positions: whether the model takes positions.
    """

    rows: int
    seq_len: int
    max_seq_len: int
    vocab_size: int
    pad_id: int | None
    eos_id: int | None
    labels_are_ids: bool
    source: str
    documents: bool = False
    positions: bool = False


def to_titan_batch(batch: Mapping[str, Any], spec: BatchSpec) -> TitanBatch:
    """Convert a batch of llm-foundry to one of TorchTitan.

    Args:
        batch: `input_ids: int32 or int64 [rows, max_seq_len]`; optional `labels`, `attention_mask` and `sequence_id` of
            the same shape. Other keys are ignored.
        spec: what the batch has to look like.

    Returns:
        `{"input": int64 [rows, seq_len]}` and `labels: int64 [rows, seq_len]`. `labels[:, t]` is the token after
        `input[:, t]`, or -100 if that is padding, not to be learned, or beyond a row of `seq_len` tokens. A model that
        keeps attention within documents also gets `sequence_id` and `positions`, of the same shape.

    Raises:
        DataError: a tensor is missing, the shape differs from `[rows, max_seq_len]`, or an id is not the model's.

    Source: llm-foundry's labels are not shifted, TorchTitan's are (llm-foundry 0.22.0 data/text_data.py,
    torchtitan 0.2.2 hf_datasets/text_datasets.py).
    """
    return convert(batch, spec)[0]


def convert(batch: Mapping[str, Any], spec: BatchSpec) -> tuple[TitanBatch, Tensor | None]:
    """Return what `to_titan_batch` returns, and where the rows are padding (`is_padding`)."""
    check_keys(batch, spec)
    ids = batch["input_ids"]
    check_shape(ids, spec)
    check_ids(ids, spec)
    padding = is_padding(ids, batch.get("attention_mask"), spec)
    targets = ids if spec.labels_are_ids else batch["labels"]
    if padding is not None:
        targets = targets.masked_fill(padding, IGNORE_INDEX)
    labels = targets[:, 1 : spec.seq_len + 1]
    if spec.max_seq_len == spec.seq_len:
        labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)
    inputs = {"input": to_int64(ids[:, : spec.seq_len])}
    labels = to_int64(labels)  # never the ids' own memory
    return (inputs | document_inputs(batch, padding, spec), labels), padding


def to_int64(tensor: Tensor) -> Tensor:
    """Make a contiguous copy. numpy takes half of torch's time."""
    return torch.from_numpy(tensor.numpy().astype(np.int64, order="C"))


def document_inputs(batch: Mapping[str, Any], padding: Tensor | None, spec: BatchSpec) -> dict[str, Tensor]:
    """The documents of the rows, and positions in them, for a model that asks for them.

    An example without `sequence_id` is one document: TorchTitan would take each EOS in a chat for an end. Plain text
    without it is left to TorchTitan.
    """
    sequence_id = batch.get(SEQUENCE_ID)
    if sequence_id is None and not spec.labels_are_ids:
        sequence_id = torch.zeros_like(batch["input_ids"]) if padding is None else -padding.long()
    if sequence_id is None or not spec.documents:
        return {}
    sequence_id = to_int64(sequence_id[:, : spec.seq_len])
    return {SEQUENCE_ID: sequence_id} | ({"positions": positions(sequence_id)} if spec.positions else {})


def is_padding(ids: Tensor, attention_mask: Tensor | None, spec: BatchSpec) -> Tensor | None:
    """Where rows are padding: where the attention mask is 0, or without a mask, the run of pad ids at a row's end.

    If EOS is also the padding token, the first EOS of that run counts as the end of the text.

    Returns:
        bool [rows, max_seq_len]; None for text without padding, which is most text.
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
    """Raise DataError unless a batch has all needed tensors, of one shape. A user's own loader may not make them."""
    needed = ("input_ids",) if spec.labels_are_ids else ("input_ids", "labels")
    missing = [key for key in needed if not isinstance(batch.get(key), Tensor)]
    if missing:
        raise DataError(
            f"A batch has no tensor {' nor '.join(missing)}, but: {', '.join(batch)}. Have the loader make them: ids, "
            f"and as labels the same ids, with {IGNORE_INDEX} for what is not to be learned. {spec.source}"
        )
    shapes = {key: list(batch[key].shape) for key in (*needed, "attention_mask", SEQUENCE_ID) if key in batch}
    if any(shape != shapes["input_ids"] for shape in shapes.values()):
        raise DataError(f"A batch has tensors of several shapes, expected one: {shapes}. {spec.source}")


def check_shape(ids: Tensor, spec: BatchSpec) -> None:
    """Raise DataError unless `ids` is `[rows, max_seq_len]`."""
    expected = (spec.rows, spec.max_seq_len)
    if tuple(ids.shape) == expected:
        return
    found = list(ids.shape)
    if ids.numel() == 0:
        raise DataError(f"Empty batch of shape {found}, expected {list(expected)}. {spec.source}")
    hint = ""
    if ids.ndim == 2 and ids.shape[1] == spec.seq_len < spec.max_seq_len:
        hint = (
            f" The samples have {spec.seq_len} tokens: set dataset.max_seq_len = {spec.seq_len} (the last label of "
            f"each is then -100), or write them with {spec.max_seq_len} tokens, so that each label is real."
        )
    raise DataError(
        f"Batch of shape {found}, expected {list(expected)} (training.local_batch_size, dataset.max_seq_len).{hint} "
        f"{spec.source}"
    )


def check_ids(ids: Tensor, spec: BatchSpec) -> None:
    """Raise DataError if an id has no row in the model's embedding."""
    array = ids.numpy()
    unsigned = array.view(np.dtype(f"u{array.itemsize}"))  # in which negative ids are beyond all others
    if unsigned.max() >= spec.vocab_size:
        low, high = array.min(), array.max()
        raise DataError(
            f"Token id {low if low < 0 else high} in a batch, the model knows 0 to {spec.vocab_size - 1}. The data was "
            f"made with another tokenizer, token_encoding_type is wrong, or model.flavor is. {spec.source}"
        )
