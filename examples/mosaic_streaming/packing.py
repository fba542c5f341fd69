"""Several examples in a row: how many samples make a batch, and what a batch leaves out. llm-foundry packs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from llmfoundry.data.packing import BinPackCollator
from streaming import StreamingDataset
from streaming.base.batching import batching_methods
from streaming.base.world import World
from torch.utils.data import DataLoader, Dataset
from torchtitan.tools.logging import logger

from examples.mosaic_streaming.errors import is_rank_0

LEFT_OUT, PACKED = "tokens_left_out", "tokens_packed"
"""Keys of a batch: of its samples' tokens, how many found no room in its rows, and how many did."""

PROFILE_SAMPLES = 2_000
"""That "auto" looks at, at most."""
PROFILE_RATIOS = 20
"""Ratios that "auto" tries, up to a token in 100, as llm-foundry does."""


class CountingPacker:
    """llm-foundry's packing, with the tokens that it leaves out counted in each batch.

    Args:
        packer: one that keeps nothing from batch to batch, so that a batch depends on its samples alone.
    """

    def __init__(self, packer: BinPackCollator) -> None:
        assert packer.max_leftover_bins_to_keep == 0
        self._packer = packer

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        packer = self._packer
        packer.n_packed_tokens = packer.n_total_tokens = 0
        batch: dict[str, Any] = packer(samples)
        packed = packer.n_packed_tokens
        return batch | {LEFT_OUT: packer.n_total_tokens - packed, PACKED: packed}


def count_left_out(loader: DataLoader[Any]) -> bool:
    """Have a loader count what its packing leaves out; return whether it packs."""
    collator: Any = (
        loader.collate_fn
    )  # which counts targets, around the one that packs (llm-foundry 0.22.0, data/utils.py)
    packer = getattr(collator, "base_collator", None)
    if not isinstance(packer, BinPackCollator):
        return False
    collator.base_collator = CountingPacker(packer)
    return True


class Picked(Dataset[Any]):
    """Some samples of a streaming dataset."""

    def __init__(self, dataset: StreamingDataset, samples: Sequence[int]) -> None:
        self._dataset, self._samples = dataset, samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: int) -> Any:
        return self._dataset[int(self._samples[number])]


def choose_ratio(loader: DataLoader[Any], rows: int, max_seq_len: int) -> float:
    """The largest packing ratio that leaves nothing out of the samples that come first.

    It depends on the streams and the batch size alone, not on ranks. llm-foundry's own search
    (`auto_packing_ratio`, 0.22.0) reads other samples on each rank, and carries what doesn't fit to the next batch.

    Args:
        loader: of single examples.
        rows: of a batch, per dp rank.
        max_seq_len: tokens in a row.
    """
    found = [1.0]
    if is_rank_0():
        examples = list(read_first(loader))
        ratios = sorted({round(float(ratio), 1) for ratio in np.linspace(1, max(1, max_seq_len / 100), PROFILE_RATIOS)})
        for ratio in ratios:
            if int(rows * ratio) > len(examples) or left_out(examples, rows, int(rows * ratio), max_seq_len):
                break
            found = [ratio]
        logger.info(
            f'packing_ratio = "auto": {found[0]}, which leaves nothing out of the first {len(examples):,} samples.'
        )
    dist.broadcast_object_list(found)
    return found[0]


def read_first(loader: DataLoader[Any]) -> Iterator[Any]:
    """The first samples of the first epoch, as single examples without padding; read in another process.

    A process that has fetched shards must not be forked.
    """
    dataset = loader.dataset
    assert isinstance(dataset, StreamingDataset)
    dataset._set_shuffle_block_size(World(1, 1, 1, 0))  # as its first iteration will
    in_order = batching_methods[dataset.batching_method](dataset, World(1, 1, 1, 0), 0, 0).reshape(-1)
    picked = Picked(dataset, in_order[in_order >= 0][:PROFILE_SAMPLES].tolist())
    collate: Callable[[list[Any]], dict[str, Any]] = loader.collate_fn
    for batch in DataLoader(picked, batch_size=16, num_workers=1, collate_fn=collate):
        rows = {key: batch[key] for key in ("input_ids", "labels", "attention_mask")}
        yield from BinPackCollator._trim_batch(rows)[1]


def left_out(examples: list[Any], rows: int, samples: int, max_seq_len: int) -> int:
    """Tokens that batches of so many samples leave out."""
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
