"""One collator for every loader: llm-foundry's, without what only composer needs.

llm-foundry 0.22.0 counts tokens row by row, into a tensor for each, casts each sample of text by itself, and copies ids
as labels (data/utils.py, data/text_data.py). Without workers, that is most of its time. With workers, most of it is
handing on so many tensors.
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
"""Keys of a packed batch: how many tokens of its samples found no room in its rows, and how many did."""

PIPE_BYTES = 1 << 20
"""The largest tensor that a worker sends through its pipe. For a larger one, torch makes a file in shared memory. That
takes 0.3 ms in either process: four times as long as the pipe for 64 KB, half as long for 2 MB."""


class Collator:
    """Makes a batch of samples, in a worker such that it and any error reach the training process.

    Args:
        make_batch: llm-foundry's collator, or one that a user has registered.
    """

    def __init__(self, make_batch: Callable[[Any], Any]) -> None:
        self._make_batch = make_batch

    def __call__(self, samples: Any) -> Any:
        """A batch; in a worker, small tensors are arrays, and an error is a Failure."""
        if get_worker_info() is None:
            return self.collate(samples)
        try:
            return to_arrays(self.collate(samples))
        except Exception as error:
            return Failure.of(error)

    def collate(self, samples: Any) -> Any:
        """A batch, of packed samples with what has found no room.

        Raises:
            DataError: a sample couldn't be read in this worker.
        """
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
    """A batch whose small tensors are arrays, which go through a worker's pipe."""
    if not isinstance(batch, Mapping):
        return batch
    small = {key for key, value in batch.items() if isinstance(value, torch.Tensor) and value.nbytes <= PIPE_BYTES}
    return {key: value.numpy() if key in small else value for key, value in batch.items()}


def to_tensors(batch: Any) -> dict[str, Any]:
    """A batch whose arrays are tensors.

    Raises:
        DataError: it could not be made, or it is no dict, of a loader that a user has registered.
    """
    if isinstance(batch, Failure):
        raise DataError(batch.reason)
    if not isinstance(batch, Mapping):
        raise DataError(f"A batch of the loader is a {type(batch).__name__}, expected a dict of tensors.")
    return {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in batch.items()}


class RowCollator:
    """Stacks samples of text that are tokens as they were written; others are left to llm-foundry's collator.

    Args:
        collator: llm-foundry's, for text without masked language modeling.
    """

    def __init__(self, collator: DataCollatorForLanguageModeling) -> None:
        self._collator = collator

    def __call__(self, samples: Sequence[Any]) -> Any:
        """A batch; of tokens, `input_ids: int32 or int64 [rows, tokens]` alone."""
        if not isinstance(samples[0], np.ndarray):  # tokenized on the fly
            return self._collator(samples)
        if len({sample.shape for sample in samples}) > 1 or samples[0].ndim != 1:
            return self._collator([torch.from_numpy(sample.astype(np.int64)) for sample in samples])
        return {"input_ids": torch.from_numpy(stack(samples))}


def stack(samples: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Rows of one length in a type that torch reckons with: int32 where it holds all ids, or int64."""
    narrow = all(np.can_cast(dtype, np.int32) for dtype in {sample.dtype for sample in samples})
    dtype = np.int32 if narrow else np.int64
    return np.concatenate(samples, dtype=dtype, casting="unsafe").reshape(len(samples), -1)


def use_fast_collator(loader: DataLoader[Any], is_text: bool) -> None:
    """Give a loader the one collator of this project; what isn't llm-foundry's own is kept inside of it.

    Args:
        loader: llm-foundry's, or one that a user has registered.
        is_text: whether it is llm-foundry's for text, whose labels are its ids.

    Raises:
        ConfigError: a loader that a user has registered packs, and keeps what didn't fit.
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
    check_packer(collate)
    loader.collate_fn = Collator(collate)


def check_packer(collate: Any) -> None:
    """Raise ConfigError for packing that keeps samples from batch to batch: then a batch depends on those before it."""
    if isinstance(collate, BinPackCollator) and collate.max_leftover_bins_to_keep != 0:
        raise ConfigError(
            "The loader packs with a BinPackCollator that keeps what didn't fit in the memory of its worker, where a "
            "restart loses it. Give it max_leftover_bins_to_keep=0."
        )
