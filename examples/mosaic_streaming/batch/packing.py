"""Chooses the ratio for `packing_ratio = "auto"`, and logs how many tokens packing drops."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from llmfoundry.data.packing import BinPackCollator
from streaming import StreamingDataset
from torch.utils.data import DataLoader
from torchtitan.tools.logging import logger

from examples.mosaic_streaming.batch.reading import DROPPED_TOKENS, PACKED_TOKENS, Collator, read_in_workers
from examples.mosaic_streaming.config import MAX_RATIO, ResolvedLoader
from examples.mosaic_streaming.errors import is_rank_0
from examples.mosaic_streaming.sampling import check_order, set_order

SAMPLES = 2_000  # the most that are read
WORKER_BATCH_SIZE = 16  # samples in a worker's batch
DROP_WARN_FRACTION = 0.01  # the log warns if a larger share of the data is left out
LOG_STEPS = {10**digits for digits in range(10)}
"""Steps after a start (1, 10, 100, …) at which the log says how much packing has dropped, as at each epoch's end."""


def choose_ratio(loader: DataLoader[Any], rows: int, config: ResolvedLoader) -> float:
    """Find the largest packing ratio, in tenths, with which batches of an epoch's first samples drop no token.

    It depends on the streams and the batch size alone, not on ranks. llm-foundry's own search (`auto_packing_ratio`,
    0.22.0) reads other samples on each rank, and carries what doesn't fit over to the next batch.

    `rows` are those of a batch, per dp rank. DataError if a sample can't be read, or makes no example.
    """
    lengths, max_seq_len = list(read_lengths(loader, rows, config)), config.dataset["max_seq_len"]
    good, bad = 10, 10 * min(MAX_RATIO, 1 + len(lengths) // rows)  # in tenths: llm-foundry's ratios have one decimal
    while bad - good > 1:  # bisection: a batch that fits where a smaller one doesn't may be missed
        ratio = (good + bad) // 2
        samples = int(rows * (ratio / 10))  # as llm-foundry calculates it
        fits = samples <= len(lengths) and not dropped_tokens(lengths, rows, samples, max_seq_len)
        good, bad = (ratio, bad) if fits else (good, ratio)
    found = good / 10
    logger.info(
        f'packing_ratio = "auto" is {found}: batches of {int(rows * found)} samples in {rows} rows drop none of the '
        f"first {len(lengths):,} samples' tokens."
    )
    return found


def read_lengths(loader: DataLoader[Any], rows: int, config: ResolvedLoader) -> Iterator[int]:
    """Tokens in each of the first epoch's first samples, without padding."""
    dataset, collator = loader.dataset, loader.collate_fn
    source = f"The streams are {config.sources}, set in {config.source}."
    assert isinstance(dataset, StreamingDataset) and isinstance(collator, Collator)
    order = set_order(dataset, config.batching_method(dataset), 1, rows)
    check_order(order, dataset, list(config.streams), config.source)
    ids = order.samples(dataset, 0, np.arange(min(SAMPLES, order.remaining(0)))).tolist()

    def make_batch(ids: list[int]) -> Any:
        return collator.make_batch([dataset[sample] for sample in ids])

    workers = max(1, loader.num_workers)
    for batch in read_in_workers(make_batch, ids, WORKER_BATCH_SIZE, workers, source, config.source):
        yield from batch["attention_mask"].sum(1).tolist()


def dropped_tokens(lengths: list[int], rows: int, samples: int, max_seq_len: int) -> int:
    """Tokens that batches of so many samples drop.

    Source: while it profiles, llm-foundry's packer looks at lengths alone, but its method that takes them is private
    (llm-foundry 0.22.0, data/packing.py).
    """
    packer = BinPackCollator(lambda x: x, rows, max_seq_len, 0, "right", max_leftover_bins_to_keep=0, is_profiling=True)
    for begin in range(0, len(lengths) - samples + 1, samples):
        packer._pack_trimmed_examples([{}] * samples, lengths[begin : begin + samples])
    return int(packer.n_total_tokens - packer.n_packed_tokens)


class PackingLog:
    """Counts the tokens of this rank that packing has dropped and kept since this start."""

    def __init__(self) -> None:
        self.dropped = self._packed = self._steps = 0

    def add(self, micro_batches: Sequence[Mapping[str, Any]]) -> None:
        """Count the batches of an optimizer step."""
        self.dropped += sum(one.get(DROPPED_TOKENS, 0) for one in micro_batches)
        self._packed += sum(one.get(PACKED_TOKENS, 0) for one in micro_batches)
        self._steps += 1
        if self._steps in LOG_STEPS:
            self.log()

    def log(self) -> None:
        """Log on rank 0 how many tokens have been dropped."""
        if not self._packed or not is_rank_0():
            return
        tokens = self.dropped + self._packed
        is_much = (share := self.dropped / tokens) > DROP_WARN_FRACTION
        logger.log(
            logging.WARNING if is_much else logging.INFO,
            f"Packing has left out {self.dropped:,} of {tokens:,} tokens of rank 0's samples ({share:.2%})."
            f"{' Lower dataset.packing_ratio.' if is_much else ''}",
        )
