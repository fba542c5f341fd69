"""Tripwires for llm-foundry's packing (0.22.0, data/packing.py), whose counters and private method `batch/` uses.

When one fails, adapt `Collator` in batch/reading.py, or `dropped_tokens` in batch/packing.py.
"""

import inspect
from typing import Any

import torch
from llmfoundry.data.packing import BinPackCollator
from torch import Tensor

ROWS, ROW = 2, 8


def packer(**options: Any) -> BinPackCollator:
    """One that carries nothing over."""
    return BinPackCollator(lambda batch: batch, ROWS, ROW, 0, "right", max_leftover_bins_to_keep=0, **options)


def examples(lengths: list[int]) -> dict[str, Tensor]:
    """Padded examples of these lengths."""
    mask = (torch.arange(ROW) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": 5 * mask, "labels": 5 * mask, "attention_mask": mask}


def test_counters_add_up_over_batches_and_can_be_reset() -> None:
    """After a batch, they say what it packed and what it dropped."""
    packs: Any = packer()
    for lengths, packed, total in (([5, 5, 4, 3], 13, 17), ([6, 2], 21, 25)):
        batch = packs(examples(lengths))
        assert batch["input_ids"].shape == (ROWS, ROW)
        assert (packs.n_packed_tokens, packs.n_total_tokens) == (packed, total), "llm-foundry counts otherwise now"
    packs.n_packed_tokens = packs.n_total_tokens = 0
    packs(examples([3, 2]))
    assert (packs.n_packed_tokens, packs.n_total_tokens) == (5, 5)


def test_leftovers_are_kept_only_if_asked_for() -> None:
    assert packer().max_leftover_bins_to_keep == 0
    default = inspect.signature(BinPackCollator).parameters["max_leftover_bins_to_keep"].default
    assert default is None, "None keeps all: `use_fast_collator` refuses whatever isn't 0"
    packs = packer()
    packs(examples([8, 8, 8]))
    assert packs._leftover_bins == [], "what is dropped doesn't come back in the next batch"


def test_while_profiling_only_lengths_count() -> None:
    lengths = [5, 5, 4, 3]
    profiled: Any = packer(is_profiling=True)
    profiled._pack_trimmed_examples([{}] * len(lengths), lengths)
    packed: Any = packer()
    packed(examples(lengths))
    assert profiled.n_total_tokens - profiled.n_packed_tokens == packed.n_total_tokens - packed.n_packed_tokens == 4


def test_examples_have_an_attention_mask_whose_sum_is_their_length() -> None:
    """`choose_ratio` takes their lengths from it, as the packer does."""
    assert BinPackCollator._trim_batch(examples([5, 3]))[0] == examples([5, 3])["attention_mask"].sum(1).tolist()
