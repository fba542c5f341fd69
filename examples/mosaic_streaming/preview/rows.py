"""Rows as the model gets them: targets, context and padding, and where documents end."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX

from examples.mosaic_streaming.batch import SEQUENCE_ID, BatchSpec, ends, is_padding, to_titan_batch
from examples.mosaic_streaming.errors import DataError
from examples.mosaic_streaming.preview.job_data import JobData, NoRowError

KINDS = CONTEXT, TARGET, PADDING = "context", "target", "padding"
"""What a token of a row is: read but not learned, learned, or there to fill up."""

Document = dict[str, Any]
"""Its number of `tokens`, and its `spans` of one kind: `kind`, `begin` (a place in the row), `ids` and `text`."""


def rows_of(data: JobData, samples: Sequence[int]) -> list[dict[str, Any]]:
    """The rows that llm-foundry's collator and ours make of samples, as `show` reports them.

    With packing, the samples are those of a batch, and some may find no room. Raises what `JobData.collate` does, and
    NoRowError also where a row is none for the model.
    """
    batch = data.collate(samples)
    ids = batch["input_ids"]
    spec = dataclasses.replace(data.opened.spec, rows=len(ids))
    try:
        _, labels = to_titan_batch(batch, spec)
    except DataError as error:
        listed = ", ".join(map(str, samples))
        subject = f"Sample {listed} makes" if len(samples) == 1 else f"Samples {listed} make"
        raise NoRowError(f"{subject} no row for the model, and training would stop there: {error}") from error
    kinds, last = kinds_of(batch, labels, spec), last_tokens(batch, spec)
    by_tokens = defaultdict(list)  # samples with equal tokens can't be told apart
    for sample in samples if data.opened.order.packed else []:
        by_tokens[tuple(data.tokens(sample))].append(sample)
    rows = []
    for number in range(len(ids)):
        documents = documents_of(ids[number], kinds[number], last[number], data.decode)
        tokens = [[token for span in document["spans"] for token in span["ids"]] for document in documents]
        of_row = [by_tokens[tuple(one)].pop(0) for one in tokens] if by_tokens else [samples[number]]
        counts = {kind: int((kinds[number] == index).sum()) for index, kind in enumerate(KINDS)}
        located = [data.locate(sample) for sample in of_row]
        rows.append({"samples": located, "tokens": ids.shape[1], **counts, "documents": documents})
    return rows


def kinds_of(batch: Mapping[str, Any], labels: Tensor, spec: BatchSpec) -> Tensor:
    """The kind of each token, as an index of `KINDS`: int64 [rows, max_seq_len]; `labels` are TorchTitan's."""
    ids = batch["input_ids"]
    targets = torch.nn.functional.pad(labels != IGNORE_INDEX, (1, 0))[:, : spec.max_seq_len]
    kinds = torch.full_like(ids, KINDS.index(CONTEXT)).masked_fill(targets, KINDS.index(TARGET))
    padding = is_padding(ids, batch.get("attention_mask"), spec)
    return kinds if padding is None else kinds.masked_fill(padding, KINDS.index(PADDING))


def last_tokens(batch: Mapping[str, Any], spec: BatchSpec) -> Tensor:
    """The last token of each document, bool [rows, max_seq_len]: as llm-foundry says, else each EOS of a text."""
    ids = batch["input_ids"]
    if SEQUENCE_ID in batch:
        return ends(batch[SEQUENCE_ID])
    if spec.labels_are_ids and spec.eos_id is not None:
        return ids == spec.eos_id
    return torch.zeros_like(ids, dtype=torch.bool)


def documents_of(ids: Tensor, kinds: Tensor, last: Tensor, decode: Callable[[list[int]], str]) -> list[Document]:
    """The documents of a row, without padding; each tensor has the row's length."""
    numbers = torch.nn.functional.pad(last[:-1].long(), (1, 0)).cumsum(0).tolist()
    documents: dict[int, Document] = defaultdict(lambda: {"tokens": 0, "spans": []})
    begin = 0
    for (document, kind), group in itertools.groupby(zip(numbers, kinds.tolist(), strict=True)):
        end = begin + len(list(group))
        if KINDS[kind] != PADDING:
            tokens = ids[begin:end].tolist()
            documents[document]["tokens"] += len(tokens)
            span = {"kind": KINDS[kind], "begin": begin, "ids": tokens, "text": decode(tokens)}
            documents[document]["spans"].append(span)
        begin = end
    return list(documents.values())
