"""The one collator of every loader: llm-foundry's, without the work that only composer needs.

llm-foundry 0.22.0 counts tokens row by row, into a tensor for each, casts each sample of text by itself, and copies ids
as labels (data/utils.py, data/text_data.py). That is most of a loader's time without workers. With workers, most of the
time goes into handing over so many tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from llmfoundry.data.packing import BinPackCollator
from llmfoundry.data.text_data import ConcatenatedSequenceCollatorWrapper
from llmfoundry.data.utils import LossGeneratingTokensCollatorWrapper
from numpy.typing import NDArray
from torch.utils.data import DataLoader, get_worker_info
from transformers import DataCollatorForLanguageModeling

from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.shards import CheckedDataset, Failure

DROPPED_TOKENS, PACKED_TOKENS = "dropped_tokens", "packed_tokens"
"""Keys of a packed batch: how many tokens of its samples were dropped for want of room, and how many were kept."""

PIPE_BYTES = 1 << 20
"""The largest tensor that a worker sends through its pipe. torch puts a larger one into a file in shared memory, which
takes 0.3 ms in either process: four times as long as the pipe for 64 KB, half as long for 2 MB."""


class Collator:
    """Makes batches of samples. In a worker, it makes sure that batches and errors reach the training process.

    Args:
        make_batch: llm-foundry's collator, or a user's own.
    """

    def __init__(self, make_batch: Callable[[Any], Any]) -> None:
        self._make_batch = make_batch

    def __call__(self, samples: Any) -> Any:
        """Make a batch. In a worker, small tensors become arrays, and an error becomes a Failure."""
        if get_worker_info() is None:
            return self.collate(samples)
        try:
            return to_arrays(self.collate(samples))
        except Exception as error:
            return Failure.of(error)

    def collate(self, samples: Any) -> Any:
        """Make a batch; of packed samples, with `DROPPED_TOKENS` and `PACKED_TOKENS`."""
        for sample in samples if isinstance(samples, list) else [samples]:
            if isinstance(sample, Failure):
                raise DataError(sample.reason)
        packer = self._make_batch
        if not isinstance(packer, BinPackCollator):
            return self._make_batch(samples)
        packer.n_packed_tokens = packer.n_total_tokens = 0
        batch: dict[str, Any] = packer(samples)
        packed = packer.n_packed_tokens
        return batch | {DROPPED_TOKENS: packer.n_total_tokens - packed, PACKED_TOKENS: packed}

    @property
    def packs(self) -> bool:
        """Whether a row is made of several samples."""
        return isinstance(self._make_batch, BinPackCollator)


def to_arrays(batch: Any) -> Any:
    """Turn the small tensors of a batch into arrays, which go through a worker's pipe."""
    if not isinstance(batch, Mapping):
        return batch
    small = {key for key, value in batch.items() if isinstance(value, torch.Tensor) and value.nbytes <= PIPE_BYTES}
    return {key: value.numpy() if key in small else value for key, value in batch.items()}


def to_tensors(batch: Any) -> dict[str, Any]:
    """Turn the arrays of a batch back into tensors.

    Raises:
        DataError: the batch could not be made, or a user's own loader made something else than a dict.
    """
    if isinstance(batch, Failure):
        raise DataError(batch.reason)
    if not isinstance(batch, Mapping):
        raise DataError(f"A batch of the loader is a {type(batch).__name__}, expected a dict of tensors.")
    return {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in batch.items()}


class RowCollator:
    """Stacks samples of text that are stored as tokens. All others go to llm-foundry's collator."""

    def __init__(self, collator: DataCollatorForLanguageModeling) -> None:
        self._collator = collator

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Make a batch; of stored tokens, only `input_ids: int32 or int64 [rows, tokens]`."""
        if not isinstance(samples[0], np.ndarray):  # tokenized on the fly
            return self._collator(samples)
        if len({sample.shape for sample in samples}) > 1 or samples[0].ndim != 1:
            return self._collator([torch.from_numpy(sample.astype(np.int64)) for sample in samples])
        return {"input_ids": torch.from_numpy(stack(samples))}


def stack(samples: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Stack rows of one length in a type that torch computes with: int32 where it holds all ids, else int64."""
    narrow = all(np.can_cast(dtype, np.int32) for dtype in {sample.dtype for sample in samples})
    dtype = np.int32 if narrow else np.int64
    return np.concatenate(samples, dtype=dtype, casting="unsafe").reshape(len(samples), -1)


def use_fast_collator(loader: DataLoader[Any], is_text: bool) -> None:
    """Give a loader this project's collator, which keeps a user's own collator inside.

    Args:
        loader: llm-foundry's loader, or a user's own.
        is_text: whether it is llm-foundry's loader for text, whose labels are its ids.

    Raises:
        ConfigError: the loader packs, and keeps what doesn't fit for later batches.
    """
    dataset, collate = loader.dataset, cast(Any, loader.collate_fn)
    assert isinstance(dataset, CheckedDataset)
    if type(collate) is LossGeneratingTokensCollatorWrapper:
        collate = collate.base_collator
    base = collate.base_collator if type(collate) is ConcatenatedSequenceCollatorWrapper else collate
    if is_text and type(base) is DataCollatorForLanguageModeling and not base.mlm:
        dataset.keep_dtype = True
        if base is collate:
            collate = RowCollator(base)
        else:
            collate.base_collator = RowCollator(base)
    if isinstance(collate, BinPackCollator) and collate.max_leftover_bins_to_keep != 0:
        raise ConfigError(
            "The loader packs with a BinPackCollator that keeps what didn't fit in the memory of its worker, where a "
            "restart loses it. Give it max_leftover_bins_to_keep=0."
        )
    loader.collate_fn = Collator(collate)
