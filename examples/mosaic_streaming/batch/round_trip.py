"""Tells whether a tokenizer wrote some ids: decoded and encoded again, its own come back, another tokenizer's don't."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from examples.mosaic_streaming.errors import ConfigError

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


def check_round_trip(texts: Sequence[NDArray[Any]], tokenizer: PreTrainedTokenizerBase, label: str) -> list[str]:
    """Raise ConfigError for ids that another tokenizer than the model's wrote; return a warning if that can't be told.

    `texts` are ids, int64 [tokens], each of a sample or of a part of one.
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
    ids = sum(map(len, runs))
    if ids < MIN_IDS:
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


def lost_ids(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
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
