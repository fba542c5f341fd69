"""Whether ids are of a tokenizer: its own come back when their text is encoded again, another's don't."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from examples.mosaic_streaming.errors import ConfigError

PROBE = "def f(x):\n\treturn {'ä': 10**6}  # 你好, world\n"
"""A text on which two tokenizers that differ in normalization, splitting or merges give different ids."""

FEWEST, MOST, PIECE = 512, 16_384, 256
"""Ids: fewer don't tell, more aren't looked at, and so many of each text at least."""
CUT = 4
"""Ids of a text that may be others: words are cut at its ends, and some tokenizers put a space before it."""
RIGHT, WRONG = 0.98, 0.95
"""Shares of ids that come back: above the first they are the tokenizer's, below the second another's.

Measured with vocabularies of 2,048 to 16,000, on samples of 257 tokens of code and prose, `CUT` not counted: at least
0.997 of its own; of another tokenizer's 0.58 to 0.92 with byte-level BPE, and 0.31 to 0.97 with BPE of SentencePiece's
form. Unigram and WordPiece often take any ids (0.84 to 1.0). Random ids: 0.83 to 1.0.
"""
NO_TEXT = "\N{REPLACEMENT CHARACTER}"
LIKE_TEXT, KINDS = 4, 64
"""How many times as often as ids drawn at random two ids of a text are the same (11 times and more were seen), and how
many different ids it has at least."""


def check_round_trip(texts: Sequence[NDArray[Any]], tokenizer: PreTrainedTokenizerBase, label: str) -> list[str]:
    """Refuse ids that are text of another tokenizer.

    Args:
        texts: ids, int64 [tokens], each of a sample or of a part of one.
        tokenizer: the model's.
        label: what their stream is called in messages.

    Returns:
        a warning, where it can't be told.

    Raises:
        ConfigError: they are.
    """
    piece = max(PIECE, MOST // max(1, len(texts)))
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    runs = [run for text in texts for run in runs_of(text[:piece].tolist(), special | set(tokenizer.all_special_ids))]
    ids = sum(map(len, runs))
    if ids < FEWEST or (share := 1 - sum(lost(run, tokenizer, CUT) for run in runs) / ids) >= RIGHT:
        return []
    found = (
        f"Of the first {ids:,} ids of {label}, {share:.0%} come back when their text is encoded again by the tokenizer "
        f"in model.hf_assets_path = {tokenizer.name_or_path!r}, expected nearly all"
    )
    gives_back = lost(tokenizer.encode(PROBE, add_special_tokens=False), tokenizer) == 0
    if share < WRONG and gives_back and are_like_text(runs, len(tokenizer)):
        raise ConfigError(
            f"{found}: another tokenizer wrote them. Set that one, or write the stream anew. As text: "
            f"{tokenizer.decode(max(runs, key=len)[:20], clean_up_tokenization_spaces=False)!r}."
        )
    return [f"{found}. Whether another one wrote them can't be told: see `preview show`."]


def runs_of(ids: Iterable[int], special: set[int]) -> Iterator[list[int]]:
    """The ids between special ones."""
    run: list[int] = []
    for token in [*ids, None]:
        if token is not None and token not in special:
            run.append(token)
        elif run:
            yield run
            run = []


def lost(ids: list[int], tokenizer: PreTrainedTokenizerBase, may_miss: int = 0) -> int:
    """How many ids don't come back when their text is encoded, beside those that may be missing.

    Of a character that is cut, at either end, each byte may become one of `NO_TEXT`.
    """
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    again = tokenizer.encode(text, add_special_tokens=False)
    may_miss += len(text) - len(text.strip(NO_TEXT))
    return max(0, (Counter(ids) - Counter(again)).total() - may_miss)


def are_like_text(runs: Sequence[list[int]], vocabulary: int) -> bool:
    """Whether there are many ids, of which some are as much more frequent than others as words are."""
    counts = np.array([*Counter(token for run in runs for token in run).values()])
    total = counts.sum()
    same = (counts * (counts - 1)).sum() / (total * (total - 1))
    return len(counts) >= KINDS and same * vocabulary > LIKE_TEXT
