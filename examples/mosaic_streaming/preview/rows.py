"""Rows as the model gets them: what is learned, what is only read, what is padding, and where documents end."""

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
"""What a token of a row is: read but not learned, learned, there to fill up."""


@dataclass(frozen=True)
class Span:
    """Tokens that follow each other, of one document and one kind.

    Attributes:
        kind: one of `KINDS`.
        begin: the first one's place in the row.
        ids: of the tokens.
        text: they decode to.
    """

    kind: str
    begin: int
    ids: list[int]
    text: str


@dataclass(frozen=True)
class Row:
    """A row of a batch.

    Attributes:
        samples: that it is made of, in their order.
        documents: their spans.
        padding: tokens that fill it up.
    """

    samples: list[int]
    documents: list[list[Span]]
    padding: int

    def count(self, kind: str) -> int:
        """Its tokens of a kind."""
        spans = [span for document in self.documents for span in document if span.kind == kind]
        return self.padding if kind == PADDING else sum(len(span.ids) for span in spans)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [sum(len(span.ids) for span in document) for document in self.documents]


def rows_of(data: JobData, samples: Sequence[int]) -> list[Row]:
    """The rows that llm-foundry's collator and ours make of samples.

    Args:
        data: the streams.
        samples: their ids; with packing, those of a batch, of which some may find no room.

    Raises:
        DataError: a sample can't be read.
        NoRowError: one makes no row, or none for the model.
    """
    batch = data.collate(samples)
    ids = batch["input_ids"]
    form = dataclasses.replace(data.opened.spec, rows=len(ids))
    try:
        _, labels = to_titan_batch(batch, form)
    except DataError as error:
        raise NoRowError(f"{named(samples)} no row for the model, and training would stop there: {error}") from error
    kinds, last = kinds_of(batch, labels, form), last_tokens(batch, form)
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


def kinds_of(batch: Mapping[str, Any], labels: Tensor, form: BatchSpec) -> Tensor:
    """The kind of each token, as an index of `KINDS`.

    Args:
        batch: of llm-foundry.
        labels: int64 [rows, seq_len], what the model has to say behind each token.
        form: what the batch looks like.

    Returns:
        int64 [rows, max_seq_len].
    """
    ids = batch["input_ids"]
    targets = torch.nn.functional.pad(labels != IGNORE_INDEX, (1, 0))[:, : form.max_seq_len]
    kinds = torch.full_like(ids, KINDS.index(CONTEXT)).masked_fill(targets, KINDS.index(TARGET))
    padding = is_padding(ids, batch.get("attention_mask"), form)
    return kinds if padding is None else kinds.masked_fill(padding, KINDS.index(PADDING))


def last_tokens(batch: Mapping[str, Any], form: BatchSpec) -> Tensor:
    """Where documents end: as llm-foundry says or, in text of which it says nothing, behind each EOS.

    Returns:
        bool [rows, max_seq_len].
    """
    ids = batch["input_ids"]
    if SEQUENCE_ID in batch:
        return ends(batch[SEQUENCE_ID])
    if form.labels_are_ids and form.eos_id is not None:
        return ids == form.eos_id
    return torch.zeros_like(ids, dtype=torch.bool)


def documents_of(ids: Tensor, kinds: Tensor, last: Tensor, decode: Callable[[list[int]], str]) -> list[list[Span]]:
    """The documents of a row, each in spans of one kind, without padding; each tensor has the row's length."""
    numbers = torch.nn.functional.pad(last[:-1].long(), (1, 0)).cumsum(0).tolist()
    documents: dict[int, list[Span]] = {}
    pairs = list(zip(numbers, kinds.tolist(), strict=True))
    for (document, kind), group in itertools.groupby(range(len(pairs)), key=pairs.__getitem__):
        places = list(group)
        if KINDS[kind] != PADDING:
            tokens = ids[places].tolist()
            documents.setdefault(document, []).append(Span(KINDS[kind], places[0], tokens, decode(tokens)))
    return list(documents.values())
