"""A text in both forms: JSON lines, which TorchTitan's own loader reads, and a stream of the tokens that it makes."""

import functools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from streaming import MDSWriter
from tokenizers import Tokenizer

from examples.mosaic_streaming.make_demo_data import SPECIAL_TOKENS, TOKENIZER

SHARD = 1 << 22
"""Bytes of a shard."""


def load_tokenizer() -> tuple[Tokenizer, int, int]:
    """The debug tokenizer, and its ids for BOS and EOS."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    bos, eos = (tokenizer.token_to_id(SPECIAL_TOKENS[name]) for name in ("bos_token", "eos_token"))
    return tokenizer, bos, eos


def write_jsonl(file: Path, texts: Iterable[str], wanted: float = math.inf) -> list[int]:
    """Write texts as `text` of JSON lines, until they have as many tokens as wanted.

    Returns:
        their tokens, with BOS and EOS around each text, as TorchTitan's loader puts them.
    """
    tokenizer, bos, eos = load_tokenizer()
    encode = functools.cache(lambda text: [bos, *tokenizer.encode(text, add_special_tokens=False).ids, eos])
    ids: list[int] = []
    with file.open("w") as lines:
        for text in texts:
            if len(ids) >= wanted:
                break
            lines.write(json.dumps({"text": text}) + "\n")
            ids += encode(text)
    return ids


def write_rows(folder: Path, ids: Sequence[int], seq_len: int, shard: int = SHARD) -> None:
    """Write a stream of as many samples of `seq_len + 1` tokens as there are, in shards of so many bytes."""
    whole = len(ids) // (seq_len + 1) * (seq_len + 1)
    write_mds(folder, np.array(ids[:whole], np.int32).reshape(-1, seq_len + 1), shard)


def write_mds(folder: Path, samples: np.ndarray, shard: int = SHARD) -> None:  # type: ignore[type-arg]
    """Write a stream of samples, int32 [samples, tokens], in shards of so many bytes."""
    columns = {"tokens": "ndarray:int32"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=shard, hashes=["xxh64"]) as writer:
        for sample in samples:
            writer.write({"tokens": sample})
