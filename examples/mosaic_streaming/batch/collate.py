"""Batches without what composer needs and TorchTitan doesn't: counts of tokens and, of text, a copy as labels.

llm-foundry 0.22.0 counts row by row, into a tensor for each, and casts each sample of text by itself (data/utils.py,
data/text_data.py). Without workers, that is most of its time; with workers, it is handing on so many tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from llmfoundry.data.text_data import ConcatenatedSequenceCollatorWrapper
from llmfoundry.data.utils import LossGeneratingTokensCollatorWrapper
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

from examples.mosaic_streaming.errors import DataError
from examples.mosaic_streaming.shards.dataset import CheckedDataset

PIPE_BYTES = 1 << 20
"""Up to which a worker hands a tensor on in its pipe. Beyond, it does as torch does, with a file in shared memory for
each, which takes 0.3 ms of either process: four times as long for 64 KB, half as long for 2 MB."""


class Pipe:
    """Hands on small tensors as arrays, which go through a worker's pipe; `as_tensors` makes them tensors again.

    Args:
        collator: of the batches.
    """

    def __init__(self, collator: Callable[[list[Any]], Mapping[str, Any]]) -> None:
        self._collator = collator

    def __call__(self, samples: list[Any]) -> Any:
        batch = self._collator(samples)
        if not isinstance(batch, Mapping):
            return batch
        small = {key for key, value in batch.items() if isinstance(value, torch.Tensor) and value.nbytes <= PIPE_BYTES}
        return {key: value.numpy() if key in small else value for key, value in batch.items()}


def as_tensors(batch: Any) -> dict[str, Any]:
    """A batch whose arrays are tensors.

    Raises:
        DataError: it is no dict, of a loader that a user has registered.
    """
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


def leave_out_unused(loader: DataLoader[Any], is_text: bool) -> None:
    """Have a loader make only what TorchTitan gets of a batch; collators that aren't llm-foundry's own stay.

    Args:
        loader: llm-foundry's, or one that a user has registered.
        is_text: whether it is llm-foundry's for text, whose labels are its ids.
    """
    dataset, collator = loader.dataset, cast(Any, loader.collate_fn)
    assert isinstance(dataset, CheckedDataset)
    if type(collator) is LossGeneratingTokensCollatorWrapper:
        loader.collate_fn = collator = collator.base_collator
    base = collator.base_collator if type(collator) is ConcatenatedSequenceCollatorWrapper else collator
    if not is_text or type(base) is not DataCollatorForLanguageModeling or base.mlm:
        return
    dataset.as_written = True
    if base is collator:
        loader.collate_fn = RowCollator(base)
    else:
        collator.base_collator = RowCollator(base)
