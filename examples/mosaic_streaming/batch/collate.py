"""One collator for every loader: llm-foundry's, without the work that only Composer needs.

llm-foundry 0.22.0 counts tokens row by row, each count a tensor of its own, casts each text sample separately, and
copies ids as labels (data/utils.py, data/text_data.py). Without workers, this takes most of a loader's time. With
workers, passing so many tensors between processes does.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from llmfoundry.data.packing import BinPackCollator
from llmfoundry.data.text_data import ConcatenatedSequenceCollatorWrapper
from llmfoundry.data.utils import LossGeneratingTokensCollatorWrapper
from torch.utils.data import DataLoader, get_worker_info
from transformers import DataCollatorForLanguageModeling

from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.shards import CheckedDataset, as_data_error

DROPPED_TOKENS, PACKED_TOKENS = "dropped_tokens", "packed_tokens"
"""Keys of a packed batch: how many tokens of its samples were dropped, and how many are in its rows."""

PIPE_BYTES = 1 << 20
"""The largest tensor that a worker sends through its pipe. For a larger one, torch creates a file in shared memory,
which takes 0.3 ms in each process: four times as long as the pipe for 64 KB, half as long for 2 MB."""


class Collator:
    """Makes batches with llm-foundry's collator or a user's; a worker's errors reach the training process."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate
        self.packs = isinstance(collate, BinPackCollator)  # a row holds several samples

    def __call__(self, samples: list[Any]) -> Any:
        """Return a batch; in a worker, its small tensors are arrays, and an error takes its place."""
        if get_worker_info() is None:
            return self._make_batch(samples)
        try:
            return to_arrays(self._make_batch(samples))
        except Exception as error:
            return as_data_error(error)

    def _make_batch(self, samples: list[Any]) -> Any:
        """A batch, with token counts if it is packed. Raises DataError if this worker couldn't read a sample."""
        if error := next((sample for sample in samples if isinstance(sample, DataError)), None):
            raise error
        batch = self._collate(samples)
        if isinstance(packer := self._collate, BinPackCollator):
            packed, total = packer.n_packed_tokens, packer.n_total_tokens
            packer.n_packed_tokens = packer.n_total_tokens = 0  # it would add them up over all batches
            batch |= {DROPPED_TOKENS: total - packed, PACKED_TOKENS: packed}
        return batch


def to_arrays(batch: Any) -> Any:
    """Replace a batch's small tensors by arrays, which are pickled into the worker's pipe."""
    if not isinstance(batch, Mapping):
        return batch
    small = {key for key, value in batch.items() if isinstance(value, torch.Tensor) and value.nbytes <= PIPE_BYTES}
    return {key: value.numpy() if key in small else value for key, value in batch.items()}


def to_tensors(batch: Any) -> dict[str, Any]:
    """Turn arrays back into tensors; raise DataError for a failed batch, or one of a user's loader that is no dict."""
    if isinstance(batch, DataError):
        raise batch
    if not isinstance(batch, Mapping):
        raise DataError(f"A batch of the loader is a {type(batch).__name__}, expected a dict of tensors.")
    return {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in batch.items()}


def collate_rows(collate: DataCollatorForLanguageModeling, samples: Sequence[Any]) -> Any:
    """Stack token arrays of one length as `input_ids` alone; `collate`, llm-foundry's, pads or stacks all else."""
    if not isinstance(samples[0], np.ndarray):  # tokenized on the fly
        return collate(samples)
    if len({sample.shape for sample in samples}) > 1 or samples[0].ndim != 1:
        return collate([torch.from_numpy(sample.astype(np.int64)) for sample in samples])
    is_narrow = all(np.can_cast(dtype, np.int32) for dtype in {sample.dtype for sample in samples})
    dtype = np.int32 if is_narrow else np.int64  # types that torch can compute with
    rows = np.concatenate(samples, dtype=dtype, casting="unsafe").reshape(len(samples), -1)
    return {"input_ids": torch.from_numpy(rows)}


def use_fast_collator(loader: DataLoader[Any], is_text: bool) -> None:
    """Give a loader this project's `Collator`, which keeps inside it what isn't llm-foundry's own.

    ConfigError if a loader that a user has registered packs, and carries samples over to the next batch.
    """
    dataset, collate = loader.dataset, cast(Any, loader.collate_fn)
    assert isinstance(dataset, CheckedDataset)
    if type(collate) is LossGeneratingTokensCollatorWrapper:
        collate = collate.base_collator
    has_documents = type(collate) is ConcatenatedSequenceCollatorWrapper
    base = collate.base_collator if has_documents else collate
    if is_text and type(base) is DataCollatorForLanguageModeling and not base.mlm:
        dataset.keep_dtype = True
        rows = functools.partial(collate_rows, base)
        if has_documents:
            collate.base_collator = rows
        else:
            collate = rows
    if isinstance(collate, BinPackCollator) and collate.max_leftover_bins_to_keep != 0:
        raise ConfigError(
            "The loader's BinPackCollator carries samples that didn't fit over to its next batch, and a restart loses "
            "them. Give it max_leftover_bins_to_keep=0."
        )
    loader.collate_fn = Collator(collate)
