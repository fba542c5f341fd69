"""Describes rows as the model gets them: what is learned, only read, or padding, and where documents end."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX

from examples.mosaic_streaming.batch import SEQUENCE_ID, BatchSpec, ends, is_padding, to_titan_batch
from examples.mosaic_streaming.errors import DataError
from examples.mosaic_streaming.preview.job_data import JobData, NoRowError

KINDS = CONTEXT, TARGET, PADDING = "context", "target", "padding"
"""What a token of a row can be: read but not learned, learned, or padding."""


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one document and one kind.

    Attributes:
        kind: one of `KINDS`.
        begin: the first token's place in the row.
        ids: the ids of the tokens.
        text: the decoded tokens.
    """

    kind: str
    begin: int
    ids: list[int]
    text: str


@dataclass(frozen=True)
class Row:
    """A row of a batch: its samples in their order, the spans of its documents, and its padding tokens."""

    samples: list[int]
    documents: list[list[Span]]
    padding: int

    def count(self, kind: str) -> int:
        """The number of tokens of a kind."""
        spans = [span for document in self.documents for span in document if span.kind == kind]
        return self.padding if kind == PADDING else sum(len(span.ids) for span in spans)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each document."""
        return [sum(len(span.ids) for span in document) for document in self.documents]


def rows_of(data: JobData, samples: Sequence[int]) -> list[Row]:
    """Make the rows that a training batch would have of samples. With packing, some samples may find no room.

    Raises:
        DataError: a sample can't be read.
        NoRowError: a sample makes no row, or none for the model.
    """
    batch = data.collate(samples)
    ids = batch["input_ids"]
    spec = dataclasses.replace(data.opened.spec, rows=len(ids))
    try:
        _, labels = to_titan_batch(batch, spec)
    except DataError as error:
        raise NoRowError(f"{named(samples)} no row for the model, and training would stop there: {error}") from error
    kinds, last = kinds_of(batch, labels, spec), last_tokens(batch, spec)
    left = defaultdict(list)  # samples by their tokens, of which several may have the same
    for sample in samples if data.opened.order.packed else []:
        left[tuple(data.tokens(sample))].append(sample)
    rows = []
    for number in range(len(ids)):
        documents = documents_of(ids[number], kinds[number], last[number], data.decode)
        padding = int((kinds[number] == KINDS.index(PADDING)).sum())
        tokens = [tuple(token for span in document for token in span.ids) for document in documents if left]
        rows.append(Row([left[key].pop(0) for key in tokens] or [samples[number]], documents, padding))
    return rows


def named(samples: Sequence[int]) -> str:
    """Samples as the subject of a sentence, with its verb."""
    return f"Sample {samples[0]} makes" if len(samples) == 1 else f"Samples {', '.join(map(str, samples))} make"


def kinds_of(batch: Mapping[str, Any], labels: Tensor, spec: BatchSpec) -> Tensor:
    """The kind of each token, as an index of `KINDS`: int64 [rows, max_seq_len]. Labels are int64 [rows, seq_len]."""
    ids = batch["input_ids"]
    targets = torch.nn.functional.pad(labels != IGNORE_INDEX, (1, 0))[:, : spec.max_seq_len]
    kinds = torch.full_like(ids, KINDS.index(CONTEXT)).masked_fill(targets, KINDS.index(TARGET))
    padding = is_padding(ids, batch.get("attention_mask"), spec)
    return kinds if padding is None else kinds.masked_fill(padding, KINDS.index(PADDING))


def last_tokens(batch: Mapping[str, Any], spec: BatchSpec) -> Tensor:
    """Mark the last tokens of documents, bool [rows, max_seq_len]: by `sequence_id`, or else in text by EOS."""
    ids = batch["input_ids"]
    if SEQUENCE_ID in batch:
        return ends(batch[SEQUENCE_ID])
    if spec.labels_are_ids and spec.eos_id is not None:
        return ids == spec.eos_id
    return torch.zeros_like(ids, dtype=torch.bool)


def documents_of(ids: Tensor, kinds: Tensor, last: Tensor, decode: Callable[[list[int]], str]) -> list[list[Span]]:
    """The documents of a row, each in spans of one kind, without padding. Each tensor has the row's length."""
    numbers = torch.nn.functional.pad(last[:-1].long(), (1, 0)).cumsum(0).tolist()
    documents: dict[int, list[Span]] = {}
    pairs = list(zip(numbers, kinds.tolist(), strict=True))
    for (document, kind), group in itertools.groupby(range(len(pairs)), key=pairs.__getitem__):
        places = list(group)
        if KINDS[kind] != PADDING:
            tokens = ids[places].tolist()
            documents.setdefault(document, []).append(Span(KINDS[kind], places[0], tokens, decode(tokens)))
    return list(documents.values())
