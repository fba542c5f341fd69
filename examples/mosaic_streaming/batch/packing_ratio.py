"""Chooses a number for `packing_ratio = "auto"`: the largest with which no token is dropped."""

from collections.abc import Iterator
from typing import Any, cast

from llmfoundry.data.packing import BinPackCollator
from streaming import StreamingDataset
from streaming.base.world import World
from torch.utils.data import DataLoader
from torchtitan.tools.logging import logger

from examples.mosaic_streaming.batch.collate import Collator
from examples.mosaic_streaming.batch.iterator import Items, read_in_workers
from examples.mosaic_streaming.config import MAX_RATIO, ResolvedLoader
from examples.mosaic_streaming.sampling import set_order

SAMPLES = 2_000
"""So many samples are packed on trial, at most."""
TENTHS = 10
"""A ratio has one decimal, as llm-foundry's."""
SAMPLES_PER_READ = 16


def choose_ratio(loader: DataLoader[Any], rows: int, config: ResolvedLoader) -> float:
    """Find the largest packing ratio, in tenths, with which batches of the first samples drop no token.

    It depends on the streams and the batch size alone, not on ranks. llm-foundry's own search
    (`auto_packing_ratio`, 0.22.0) reads other samples on each rank, and carries what doesn't fit to the next batch.

    Args:
        loader: a loader of single examples.
        rows: rows of a batch, per dp rank.
        config: the configuration of the loader.

    Raises:
        DataError: a sample can't be read, or makes no example.
    """
    examples = list(read_first(loader, rows, config))
    good, bad = TENTHS, TENTHS * min(MAX_RATIO, 1 + len(examples) // rows)
    while bad - good > 1:  # a larger batch might fit where a smaller one doesn't: not looked for
        ratio = (good + bad) // 2
        samples = int(rows * (ratio / TENTHS))  # as llm-foundry computes it
        fits = samples <= len(examples) and not dropped_tokens(examples, rows, samples, config.dataset["max_seq_len"])
        good, bad = (ratio, bad) if fits else (good, ratio)
    found = good / TENTHS
    logger.info(
        f'packing_ratio = "auto" is {found}: batches of {int(rows * found)} samples in {rows} rows leave nothing out '
        f"of the first {len(examples):,} samples."
    )
    return found


def read_first(loader: DataLoader[Any], rows: int, config: ResolvedLoader) -> Iterator[Any]:
    """Read the first samples of the first epoch, as single examples without padding."""
    dataset, source = loader.dataset, f"The streams are {config.sources}, set in {config.source}."
    assert isinstance(dataset, StreamingDataset)
    in_order = set_order(dataset, 1, rows)(dataset, World(1, 1, 1, 0), 0, 0).reshape(-1)
    items, collate = Items(dataset.__getitem__, in_order[:SAMPLES].tolist()), cast(Collator, loader.collate_fn)
    for batch in read_in_workers(items, SAMPLES_PER_READ, collate, max(1, loader.num_workers), source, config.source):
        padded = {key: batch[key] for key in ("input_ids", "labels", "attention_mask")}
        yield from BinPackCollator._trim_batch(padded)[1]


def dropped_tokens(examples: list[Any], rows: int, samples: int, max_seq_len: int) -> int:
    """Count the tokens that batches of so many samples drop."""
    packer = BinPackCollator(
        collator=lambda batch: batch,
        target_batch_size=rows,
        max_seq_len=max_seq_len,
        pad_token_id=0,
        padding_side="right",
        max_leftover_bins_to_keep=0,
        is_profiling=True,
    )
    for begin in range(0, len(examples) - samples + 1, samples):
        batch = [dict(example) for example in examples[begin : begin + samples]]
        packer._pack_trimmed_examples(batch, [len(example["input_ids"]) for example in batch])
    return int(packer.n_total_tokens - packer.n_packed_tokens)
