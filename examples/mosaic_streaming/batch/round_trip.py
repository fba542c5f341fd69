"""Tells whether ids are of a tokenizer: its own come back when their text is encoded again, another's don't."""

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
"""Numbers of ids: fewer than the first say nothing; at most the second are checked; at least the third of each text."""
CUT = 4
"""So many ids of a text may differ: words are cut at its ends, and some tokenizers put a space before it."""
RIGHT, WRONG = 0.98, 0.95
"""Shares of ids that come back: from the first on they are the tokenizer's, below the second another's.

Measured with vocabularies of 2,048 to 16,000, on samples of 257 tokens of code and prose, `CUT` not counted: at least
0.997 of its own; of another tokenizer's 0.58 to 0.92 with byte-level BPE, and 0.31 to 0.97 with BPE of SentencePiece's
form. Unigram and WordPiece often take any ids (0.84 to 1.0). Random ids: 0.83 to 1.0.
"""
NO_TEXT = "\N{REPLACEMENT CHARACTER}"
LIKE_TEXT, KINDS = 4, 64
"""Two ids of a text are the same more often than random ids by this factor (11 and more were seen). A text has at least
so many different ids."""


def check_round_trip(texts: Sequence[NDArray[Any]], tokenizer: PreTrainedTokenizerBase, label: str) -> list[str]:
    """Refuse ids that another tokenizer wrote.

    Args:
        texts: the ids of samples, or of parts of samples, int64 [tokens] each.
        tokenizer: the model's tokenizer.
        label: what their stream is called in messages.

    Returns:
        a warning, if it can't be decided.

    Raises:
        ConfigError: another tokenizer wrote them.
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
    """Split ids at special tokens."""
    run: list[int] = []
    for token in [*ids, None]:
        if token is not None and token not in special:
            run.append(token)
        elif run:
            yield run
            run = []


def lost(ids: list[int], tokenizer: PreTrainedTokenizerBase, may_miss: int = 0) -> int:
    """Count the ids that don't come back when their text is encoded, beyond those that may be missing.

    Each byte of a character that is cut, at either end, may become a `NO_TEXT`.
    """
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    again = tokenizer.encode(text, add_special_tokens=False)
    may_miss += len(text) - len(text.strip(NO_TEXT))
    return max(0, (Counter(ids) - Counter(again)).total() - may_miss)


def are_like_text(runs: Sequence[list[int]], vocabulary: int) -> bool:
    """Whether there are many different ids, some of them far more frequent than others, as words are."""
    counts = np.array([*Counter(token for run in runs for token in run).values()])
    total = counts.sum()
    same = (counts * (counts - 1)).sum() / (total * (total - 1))
    return len(counts) >= KINDS and same * vocabulary > LIKE_TEXT
