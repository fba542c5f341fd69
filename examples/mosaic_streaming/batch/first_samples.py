"""Checks the first samples of each stream against the loader, the tokenizer and the model."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from llmfoundry.data import SUPPORTED_MDS_ENCODING_TYPES
from numpy.typing import NDArray
from streaming.base.format import Reader
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from examples.mosaic_streaming.batch.collate import Collator
from examples.mosaic_streaming.batch.iterator import Items, read_in_workers
from examples.mosaic_streaming.batch.round_trip import check_round_trip
from examples.mosaic_streaming.batch.titan_batch import BatchSpec
from examples.mosaic_streaming.config import BatchShape, ResolvedLoader
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.shards import FORMS, CheckedDataset, columns_of, form_of

SAMPLES, BYTES = 32, 1 << 20
"""At most so many samples and bytes of a stream are read, but at least one sample."""
MAX_SHARDS = 1_000
"""So many shards of a stream are looked for on this machine."""
WORKERS = 4
"""Processes that read, if there are several streams."""


def check_first_samples(
    loader: DataLoader[Any],
    spec: BatchSpec,
    config: ResolvedLoader,
    tokenizer: PreTrainedTokenizerBase,
    shape: BatchShape,
) -> list[str]:
    """Refuse streams whose first samples have ids of another type, length or tokenizer. One rank calls it.

    Streams that are tokenized as they are read are not checked.

    Args:
        loader: llm-foundry's loader over the streams.
        spec: what the batches have to look like.
        config: the configuration of the loader.
        tokenizer: the model's tokenizer, as transformers has it.
        shape: the size of the model's batches.

    Returns:
        warnings of what can't be decided.

    Raises:
        ConfigError: the samples need another setting, or have to be written anew.
        DataError: a sample can't be read.
    """
    dataset, warnings = loader.dataset, []
    assert isinstance(dataset, CheckedDataset)
    firsts = first_samples(dataset, config.name) if config.name in FORMS else {}
    dtype = config.dataset.get("token_encoding_type", "int64")  # as llm-foundry has it
    for number, samples in read(dataset, firsts, spec.source, config.source):
        label = config.labels[number]
        check_types(samples, dtype, spec.vocab_size, label, config.source)
        texts = [ids for sample in samples for ids in ids_of(sample, dtype)]
        if config.name == "text":
            check_lengths([len(ids) for ids in texts], spec.max_seq_len, shape, label, config)
        warnings += check_round_trip(texts, tokenizer, label)
    return warnings


def first_samples(dataset: CheckedDataset, loader: str) -> dict[int, list[int]]:
    """Choose the samples to check, by the number of their stream; from a shard on this machine, if there is one."""
    found = {}
    for number in range(dataset.num_streams):
        begin = int(dataset.shard_offset_per_stream[number])
        shards = dataset.shards[begin : begin + int(dataset.shards_per_stream[number])]
        chosen = next((at for at, shard in enumerate(shards[:MAX_SHARDS]) if is_here(shard)), 0)
        shard, first = shards[chosen], int(dataset.spanner.shard_bounds[begin + chosen])
        if {"tokens", "input_ids", "turns"} & set(form_of(columns_of(shard), loader)):
            size = max(1, shard.file_pairs[0][0].bytes // shard.samples)
            count = min(shard.samples, max(1, min(SAMPLES, BYTES // size)))
            found[number] = list(range(first, first + count))
    return found


def is_here(shard: Reader) -> bool:
    """Whether a shard can be read without fetching or unpacking it."""
    return all(os.path.isfile(os.path.join(shard.dirname, shard.split, raw.basename)) for raw, _ in shard.file_pairs)


def read(
    dataset: CheckedDataset, samples: dict[int, list[int]], source: str, path: str
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Read samples, as they are stored, by the number of their stream."""
    if not samples:
        return
    stored = Items(lambda ids: {"samples": [dataset.stored(sample) for sample in ids]}, list(samples.values()))
    batches = read_in_workers(stored, None, Collator(lambda stream: stream), min(WORKERS, len(samples)), source, path)
    for number, batch in zip(samples, batches, strict=True):
        yield number, batch["samples"]


def ids_of(sample: dict[str, Any], dtype: str) -> list[NDArray[Any]]:
    """The ids of a sample, in parts that were tokenized apart: an example's prompts and responses."""
    turns = sample.get("turns", [sample])
    parts = [turn[key] for turn in turns for key in ("tokens", "input_ids", "labels") if key in turn]
    arrays = [np.frombuffer(part, dtype) if isinstance(part, bytes) else np.asarray(part) for part in parts]
    return [array[array >= 0] for array in arrays]  # negative labels aren't learned


def check_types(samples: Sequence[dict[str, Any]], dtype: str, vocab_size: int, label: str, path: str) -> None:
    """Raise ConfigError unless ids are rows of whole numbers, and bytes have the type of `token_encoding_type`."""
    column = "tokens" if "tokens" in samples[0] else "input_ids"
    stored = [sample[column] for sample in samples if column in sample]
    for array in stored:
        if isinstance(array, np.ndarray) and (array.ndim != 1 or array.dtype.kind not in "iu"):
            raise ConfigError(
                f"`{column}` of {label} are arrays of {array.dtype} and shape {list(array.shape)}, expected whole "
                "numbers in one dimension. Write the stream anew."
            )
    content = [one for one in stored if isinstance(one, bytes)]
    if not any(map(any, content)) or dtype in (fits := fitting(content, vocab_size, dtype)):
        return
    way = (
        f'With {" or ".join(fits)} they are: set dataset.token_encoding_type = "{fits[-1]}" in {path}.'
        if fits
        else "Nor are they with any other: they were made with another tokenizer, or model.flavor is wrong."
    )
    raise ConfigError(
        f"`{column}` of {label} are bytes, which are no ids of the model (0 to {vocab_size - 1:,}) with "
        f"dataset.token_encoding_type = {dtype!r} (by default int64). {way}"
    )


def fitting(content: Sequence[bytes], vocab_size: int, told: str) -> list[str]:
    """The types with which bytes are ids of a model: the widest, as narrower ones would put zeros between the ids.

    Any bytes are ids of one byte, so such a type fits only if it was set.
    """
    fits = {}
    for name in SUPPORTED_MDS_ENCODING_TYPES:
        dtype = np.dtype(name)
        if (name == told or dtype.itemsize > 1) and not any(len(one) % dtype.itemsize for one in content):
            ids = np.frombuffer(b"".join(content), dtype)
            if ids.min() >= 0 and ids.max() < vocab_size:
                fits[name] = dtype.itemsize
    return [name for name, width in fits.items() if width == max(fits.values())]


def check_lengths(lengths: Sequence[int], row: int, shape: BatchShape, label: str, config: ResolvedLoader) -> None:
    """Raise ConfigError for samples of text, of these lengths in tokens, that fill no row or would be cut."""
    low, high, section, source = min(lengths), max(lengths), shape.section, config.source
    if high == row or (high > row and config.may_cut):
        return
    # TorchTitan takes even lengths: an odd one is a sample's whose labels are all real.
    seq_len, ways = high - high % 2, []
    if seq_len != shape.seq_len:
        ways.append(f"{section}.seq_len = {seq_len}")
    if seq_len == high:
        ways.append(f"dataset.max_seq_len = {seq_len} in {source} (the last label of each is then -100)")
    cut = ", and would leave out the rest" if high > row else ""
    keep = f", or set dataset.max_seq_len = {row} in {source} to leave it out" if high > row else ""
    raise ConfigError(
        f"Samples of {label} have {low if low == high else f'{low} to {high}'} tokens, but rows of {section}.seq_len = "
        f"{shape.seq_len} take {row} (dataset.max_seq_len){cut}. Set {' and '.join(ways)}, or write samples of {row} "
        f"tokens{keep}."
    )
