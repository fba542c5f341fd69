"""What a run has read since its first step, counted where batches are handed out."""

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
    """What all ranks together have read, in whole optimizer steps.

    Attributes:
        samples: of the streams.
        tokens: positions of the model's rows, padding too.
        targets: labels that are learned; none where nobody has counted them yet.
    """

    samples: int = 0
    tokens: int = 0
    targets: int | None = None


class Progress(NamedTuple):
    """Where a run is.

    Attributes:
        epoch: of the streams.
        share: of the epoch that has been read, 0 to 1.
        seen: since the run's first step, or since its streams began anew.
        padding: share of this rank's inputs, since the last look.
        fetched: by this rank's machine, since this start.
        cache: bytes of shards that this machine's caches hold.
    """

    epoch: int
    share: float
    seen: ConsumedCounts
    padding: float
    fetched: FetchCounts
    cache: int


class ConsumptionCounter:
    """Counts what a loader hands out.

    Samples and tokens are known on each rank. Targets are summed over ranks by `count_targets` alone; in between, they
    are taken to have grown as samples have: exact where all labels are real.

    Args:
        spec: of the loader's batches.
        samples_per_batch: that a rank's batch is made of; with packing, more than its rows.
    """

    def __init__(self, spec: BatchSpec, samples_per_batch: int) -> None:
        self._spec = spec
        self._samples_per_batch = samples_per_batch
        self.resume_from(ConsumedCounts())

    def resume_from(self, before: ConsumedCounts) -> None:
        """Begin anew, after what has been read before this start."""
        self._before = before
        self._known = self._counted = (0, 0) if before.targets is None else (before.samples, before.targets)
        """Samples whose targets have been counted, and these: before this start, and up to the last sum over ranks."""
        self._samples = self._targets = 0
        """Since the start: of all ranks, in whole steps; and of this rank."""
        self._inputs = self._padding = 0
        """Positions of this rank's inputs since the last look, and how many of them were padding."""

    def add(self, labels: Tensor, padding: Tensor | None) -> int:
        """Count a batch of this rank: some microseconds, of which numpy takes a third of torch's.

        Args:
            labels: int64 [rows, seq_len].
            padding: where its rows are that, bool [rows, max_seq_len]; none where text has none.

        Returns:
            its targets.
        """
        spec = self._spec
        self._inputs += labels.numel()
        if padding is None and spec.labels_are_ids:
            targets = spec.rows * (spec.max_seq_len - 1)
        else:
            targets = int(np.count_nonzero(labels.numpy() != IGNORE_INDEX))
        self._targets += targets
        if padding is not None:
            self._padding += np.count_nonzero(padding[:, : spec.seq_len].numpy())
        return targets

    def add_step(self, samples: int) -> None:
        """Count an optimizer step of all ranks."""
        self._samples += samples

    def count_targets(self, peers: int) -> None:
        """Sum targets over ranks, in one small collective.

        Args:
            peers: ranks that read the same.
        """
        total = torch.tensor(self._targets, device=device_type)
        dist.all_reduce(total)
        samples, targets = self._known
        self._counted = (samples + self._samples, targets + int(total) // peers)

    def seen(self) -> ConsumedCounts:
        """What all ranks have read since the run's first step, or since its streams began anew.

        It is the same on each rank, without a collective.
        """
        samples = self._before.samples + self._samples
        tokens = self._before.tokens + self.tokens(self._samples)
        counted, targets = self._counted
        return ConsumedCounts(samples, tokens, targets * samples // counted if counted else None)

    def tokens(self, samples: int) -> int:
        """The positions of the rows that so many samples make."""
        return samples // self._samples_per_batch * self._spec.rows * self._spec.seq_len

    def take_padding(self) -> float:
        """The share of this rank's inputs, since the last look, that was padding."""
        share = self._padding / max(1, self._inputs)
        self._inputs = self._padding = 0
        return share
