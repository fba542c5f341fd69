"""What a run has read, counted where batches are handed out."""

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.tools.utils import device_type

from examples.mosaic_streaming.batch import BatchSpec
from examples.mosaic_streaming.shards import FetchCounts


class ConsumedCounts(NamedTuple):
    """What all ranks together have read, in whole optimizer steps."""

    samples: int = 0
    tokens: int = 0  # positions of the model's rows, with padding
    loss_tokens: int | None = None  # None as long as nobody has counted them


class Progress(NamedTuple):
    """Where a run is."""

    epoch: int  # of the streams
    epoch_share: float  # of the epoch that has been read
    passes: dict[str, float] | None  # over each stream, where there are no epochs
    seen: ConsumedCounts  # since the run's first step, or since its streams began anew
    padding: float  # share of this rank's inputs since the last call of `take_padding`
    fetched: FetchCounts  # by this rank's machine since this start
    cache: int  # bytes of shards in this machine's caches
    stage: int  # of the plan, counted from 1
    skipped_batches: int  # global batches that were left out since the streams began


class ConsumptionCounter:
    """Counts what a loader hands out.

    Each rank knows samples and tokens of all ranks without a collective. Loss tokens are summed over ranks only by
    `count_loss_tokens`. In between they are estimated from the samples: exact where all labels are loss tokens.
    """

    def __init__(self) -> None:
        self.resume_from(ConsumedCounts())

    def count_for(self, spec: BatchSpec, samples_per_batch: int) -> None:
        """Count batches of a form from now on; with packing, one is made of more samples than its rows."""
        self._spec, self._samples_per_batch = spec, samples_per_batch

    def resume_from(self, before: ConsumedCounts) -> None:
        """Start counting anew, on top of what was read before this start."""
        self._before = before
        # Samples with counted loss tokens, and these tokens: before this start, and up to the last sum over ranks.
        self._known = self._counted = (0, 0) if before.loss_tokens is None else (before.samples, before.loss_tokens)
        # Since this start: samples and tokens of all ranks in whole steps, and loss tokens of this rank.
        self._samples = self._tokens = self._loss_tokens = 0
        # Positions of this rank's inputs since the last call of `take_padding`, and how many of them were padding.
        self._inputs = self._padding = 0

    def add(self, labels: Tensor, padding: Tensor | None) -> int:
        """Count a batch of this rank, and return its loss tokens.

        `labels` are int64 [rows, seq_len], `padding` is bool [rows, max_seq_len], or None for text, which has none.
        """
        spec = self._spec
        self._inputs += labels.numel()
        if padding is None and spec.labels_are_ids:
            loss_tokens = spec.rows * (spec.max_seq_len - 1)
        else:  # in numpy, which takes some microseconds, a third of torch's time
            loss_tokens = int(np.count_nonzero(labels.numpy() != IGNORE_INDEX))
        self._loss_tokens += loss_tokens
        if padding is not None:
            self._padding += np.count_nonzero(padding[:, : spec.seq_len].numpy())
        return loss_tokens

    def add_step(self, samples: int) -> None:
        """Count an optimizer step of all ranks."""
        self._samples += samples
        self._tokens += self.tokens(samples)

    def count_loss_tokens(self, peers: int) -> None:
        """Sum loss tokens over ranks, `peers` of which read the same samples, in one small collective."""
        total = torch.tensor(self._loss_tokens, device=device_type)
        dist.all_reduce(total)
        samples, loss_tokens = self._known
        self._counted = (samples + self._samples, loss_tokens + int(total) // peers)

    def seen(self) -> ConsumedCounts:
        """Return what all ranks have read, since the run's first step or since its streams began anew."""
        samples = self._before.samples + self._samples
        tokens = self._before.tokens + self._tokens
        counted, loss_tokens = self._counted
        return ConsumedCounts(samples, tokens, loss_tokens * samples // counted if counted else None)

    def tokens(self, samples: int) -> int:
        """Return the positions of the rows that so many samples make."""
        return samples // self._samples_per_batch * self._spec.rows * self._spec.seq_len

    def take_padding(self) -> float:
        """Return the share of padding in this rank's inputs since the last call."""
        share = self._padding / max(1, self._inputs)
        self._inputs = self._padding = 0
        return share
