"""Checks the first samples of each stream: whether they are made for this loader, this model and its tokenizer."""

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from llmfoundry.data import SUPPORTED_MDS_ENCODING_TYPES
from numpy.typing import NDArray
from streaming.base.format import Reader
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase as Tokenizer

from examples.mosaic_streaming.batch.reading import read_in_workers
from examples.mosaic_streaming.batch.titan_batch import BatchSpec
from examples.mosaic_streaming.config import BatchShape, ResolvedLoader
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.shards import FORMS, CheckedDataset, columns_of, form_of

MAX_SAMPLES, MAX_BYTES = 32, 1 << 20  # limits to what is read of a stream; one sample is read in any case
MAX_SHARDS = 1_000  # how many shards of a stream are tried, in the search for one that is on this machine
MAX_WORKERS = 4  # processes that read several streams

PROBE = "def f(x):\n\treturn {'ä': 10**6}  # 你好, world\n"
"""A text for which tokenizers that differ in normalization, splitting or merges give different ids."""

MIN_IDS, MAX_IDS, MIN_IDS_OF_TEXT = 512, 16_384, 256
"""Fewer ids in all prove nothing, and about `MAX_IDS` are checked, but at least the last number of each text."""
ALLOWED_MISSES = 4  # ids of a text that may change: its ends are cut inside words, or a space is put before it
RIGHT, WRONG = 0.98, 0.95
"""Shares of ids that come back: from the first on they are the tokenizer's, below the second another's.

Measured with vocabularies of 2,048 to 16,000, on samples of 257 tokens of code and prose, without `ALLOWED_MISSES`: at
least 0.997 of a tokenizer's own; of another's 0.58 to 0.92 with byte-level BPE, and 0.31 to 0.97 with BPE as in
SentencePiece. Unigram and WordPiece often give back any ids (0.84 to 1.0). Random ids: 0.83 to 1.0.
"""
TEXT_REPEATS, TEXT_KINDS = 4, 64
"""In a text, two ids are the same this many times as often as random ones (measured: at least 11 times), and at least
this many ids differ."""


def check_first_samples(
    loader: DataLoader[Any], spec: BatchSpec, config: ResolvedLoader, tokenizer: Tokenizer, shape: BatchShape
) -> list[str]:
    """Refuse streams whose first samples are ids of another type, length or tokenizer; one rank calls it.

    Streams that are tokenized as they are read aren't checked. Returns warnings about those whose tokenizer can't be
    told. ConfigError if samples need another setting or have to be written anew, DataError if one can't be read.
    """
    dataset, warnings = loader.dataset, []
    assert isinstance(dataset, CheckedDataset)
    if config.name not in FORMS or not (firsts := first_samples(dataset, config.name)):
        return []

    def read(streams: list[list[int]]) -> dict[str, Any]:
        return {"samples": [dataset.stored(sample) for sample in streams[0]]}

    workers = min(MAX_WORKERS, len(firsts))
    batches = read_in_workers(read, list(firsts.values()), 1, workers, spec.source, config.source)
    dtype = config.dataset.get("token_encoding_type", "int64")  # llm-foundry's default
    for stream, batch in zip(firsts, batches, strict=True):
        samples, label = batch["samples"], config.labels[stream]
        check_types(samples, dtype, spec.vocab_size, label, config.source)
        texts = [ids for sample in samples for ids in ids_of(sample, dtype)]
        if config.name == "text":
            check_lengths([len(ids) for ids in texts], spec.max_seq_len, shape, label, config)
        warnings += check_round_trip(texts, tokenizer, label)
    return warnings


def first_samples(dataset: CheckedDataset, loader_name: str) -> dict[int, list[int]]:
    """The sample ids to check, by stream index; of a shard that is on this machine, if there is one."""
    found = {}
    for stream in range(dataset.num_streams):
        begin = int(dataset.shard_offset_per_stream[stream])
        shards = dataset.shards[begin : begin + int(dataset.shards_per_stream[stream])]
        chosen = next((index for index, shard in enumerate(shards[:MAX_SHARDS]) if is_here(shard)), 0)
        shard, first = shards[chosen], int(dataset.spanner.shard_bounds[begin + chosen])
        if {"tokens", "input_ids", "turns"} & set(form_of(columns_of(shard), loader_name)):
            sample_bytes = max(1, shard.file_pairs[0][0].bytes // shard.samples)
            count = min(shard.samples, max(1, min(MAX_SAMPLES, MAX_BYTES // sample_bytes)))
            found[stream] = list(range(first, first + count))
    return found


def is_here(shard: Reader) -> bool:
    """Whether a shard can be read without fetching or decompressing it."""
    return all(os.path.isfile(os.path.join(shard.dirname, shard.split, raw.basename)) for raw, _ in shard.file_pairs)


def ids_of(sample: dict[str, Any], dtype: str) -> list[NDArray[Any]]:
    """The ids of a sample, in parts that were tokenized separately: prompts and responses."""
    turns = sample.get("turns", [sample])
    parts = [turn[key] for turn in turns for key in ("tokens", "input_ids", "labels") if key in turn]
    arrays = [np.frombuffer(part, dtype) if isinstance(part, bytes) else np.asarray(part) for part in parts]
    return [array[array >= 0] for array in arrays]  # labels that aren't learned are negative


def check_types(samples: Sequence[dict[str, Any]], dtype: str, vocab_size: int, label: str, config_file: str) -> None:
    """Raise ConfigError unless ids are one-dimensional integers, and bytes are ids of the configured type."""
    column = "tokens" if "tokens" in samples[0] else "input_ids"
    stored = [sample[column] for sample in samples if column in sample]
    for array in stored:
        if isinstance(array, np.ndarray) and (array.ndim != 1 or array.dtype.kind not in "iu"):
            raise ConfigError(
                f"`{column}` of {label} are arrays of {array.dtype} and shape {list(array.shape)}, expected whole "
                "numbers in one dimension. Write the stream anew."
            )
    encoded = [content for content in stored if isinstance(content, bytes)]
    if not any(map(any, encoded)) or dtype in (fits := fitting_types(encoded, vocab_size, dtype)):
        return
    if fits:
        advice = f'With {" or ".join(fits)} they are: set dataset.token_encoding_type = "{fits[-1]}" in {config_file}.'
    else:
        advice = "Nor are they with any other: they were made with another tokenizer, or model.flavor is wrong."
    raise ConfigError(
        f"`{column}` of {label} are bytes, which are no ids of the model (0 to {vocab_size - 1:,}) with "
        f"dataset.token_encoding_type = {dtype!r} (by default int64). {advice}"
    )


def fitting_types(encoded: Sequence[bytes], vocab_size: int, configured: str) -> list[str]:
    """The widest types with which bytes are ids of a model; read as narrower ones, they have zeros between ids.

    Any bytes are ids of one byte, so of these types only the configured one counts.
    """
    fits = {}
    for name in SUPPORTED_MDS_ENCODING_TYPES:
        width = np.dtype(name).itemsize
        if (name == configured or width > 1) and not any(len(content) % width for content in encoded):
            ids = np.frombuffer(b"".join(encoded), name)
            if ids.min() >= 0 and ids.max() < vocab_size:
                fits[name] = width
    return [name for name, width in fits.items() if width == max(fits.values())]


def check_lengths(lengths: Sequence[int], row: int, shape: BatchShape, label: str, config: ResolvedLoader) -> None:
    """Raise ConfigError if samples of text don't fill a row of `row` tokens, or rows would cut off their ends."""
    low, high, section, source = min(lengths), max(lengths), shape.section, config.source
    if high == row or (high > row and config.may_cut):
        return
    # TorchTitan takes even lengths. A sample of odd length has one token more, so that all its labels are real.
    seq_len, ways = high - high % 2, []
    if seq_len != shape.seq_len:
        ways.append(f"{section}.seq_len = {seq_len}")
    if seq_len == high:
        ways.append(f"dataset.max_seq_len = {seq_len} in {source} (the last label of each is then -100)")
    cut = f", or set dataset.max_seq_len = {row} in {source} to leave out the rest" if high > row else ""
    raise ConfigError(
        f"Samples of {label} have {low if low == high else f'{low} to {high}'} tokens, but rows of {section}.seq_len = "
        f"{shape.seq_len} take {row} (dataset.max_seq_len). Set {' and '.join(ways)}, or write samples of {row} "
        f"tokens{cut}."
    )


def check_round_trip(texts: Sequence[NDArray[Any]], tokenizer: Tokenizer, label: str) -> list[str]:
    """Raise ConfigError for ids that another tokenizer than the model's wrote; return a warning if that can't be told.

    `texts` are ids, int64 [tokens], each of a sample or of a part of one. Decoded and encoded again, a tokenizer's own
    ids come back, and another's don't.
    """
    limit = max(MIN_IDS_OF_TEXT, MAX_IDS // max(1, len(texts)))
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    special = added | set(tokenizer.all_special_ids)
    runs = [
        list(run)
        for text in texts
        for is_special, run in itertools.groupby(text[:limit].tolist(), special.__contains__)
        if not is_special
    ]
    if (ids := sum(map(len, runs))) < MIN_IDS:
        return []
    share = 1 - sum(max(0, lost_ids(run, tokenizer) - ALLOWED_MISSES) for run in runs) / ids
    if share >= RIGHT:
        return []
    found = (
        f"Of the first {ids:,} ids of {label}, {share:.0%} come back when their text is encoded again by the tokenizer "
        f"in model.hf_assets_path = {tokenizer.name_or_path!r}, expected nearly all"
    )
    is_reversible = lost_ids(tokenizer.encode(PROBE, add_special_tokens=False), tokenizer) == 0
    if share < WRONG and is_reversible and are_like_text(runs, len(tokenizer)):
        raise ConfigError(
            f"{found}: another tokenizer wrote them. Set that one, or write the stream anew. As text: "
            f"{tokenizer.decode(max(runs, key=len)[:20], clean_up_tokenization_spaces=False)!r}."
        )
    return [f"{found}. Whether another one wrote them can't be told: see `preview show`."]


def lost_ids(ids: list[int], tokenizer: Tokenizer) -> int:
    """How many ids don't come back when their text is encoded.

    Each byte of a character that is cut, at either end, may become a replacement character, and isn't counted.
    """
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    again = tokenizer.encode(text, add_special_tokens=False)
    cut_bytes = len(text) - len(text.strip("\N{REPLACEMENT CHARACTER}"))
    return max(0, (Counter(ids) - Counter(again)).total() - cut_bytes)


def are_like_text(runs: Sequence[list[int]], vocab_size: int) -> bool:
    """Whether there are many different ids, some much more frequent than others, as words are."""
    counts = np.array([*Counter(token for run in runs for token in run).values()])
    total = counts.sum()
    same = (counts * (counts - 1)).sum() / (total * (total - 1))
    return len(counts) >= TEXT_KINDS and same * vocab_size > TEXT_REPEATS
