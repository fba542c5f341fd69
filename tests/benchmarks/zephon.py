"""Zephon (https://github.com/datologyai/zephon, 0.2.0), as its guide uses it; of the optional group `bench`."""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

IS_INSTALLED = find_spec("zephon") is not None
DEPTH = 32
"""Batches that it has ready: what it chooses itself on 16 cores. With its 8 of two cores, it is slower."""


def source(folder: Path, chunk: int, **order: Any) -> Any:
    """The samples of a stream, again and again, ordered in chunks of so many: it has to have as many."""
    from zephon.io import Dataset
    from zephon.work import MixtureSpec, StaticMixtureWorkSource

    datasets, mixture = [Dataset.from_path("stream", str(folder))], MixtureSpec({"stream": 1.0})
    return StaticMixtureWorkSource(datasets, mixture, chunk_size=chunk, exhausted_policy="repeat", **order)


def read_tokens(folder: Path, samples: int, rows: int, workers: int) -> Callable[[], Iterable[Any]]:
    """Batches of tokens, shuffled, fetched by so many threads. Its other runners are slower."""

    def build() -> Iterable[Any]:
        from zephon import Pipeline

        shuffled = source(folder, min(16_384, samples), shuffle_within_shard=True, shuffle_block_size="auto")
        runner = "threads" if workers else "inline"
        pipeline = Pipeline(shuffled).fetch(max(1, workers)).batch(rows).options(runner=runner, prefetch_batches=DEPTH)
        return (batch.to_training() for batch in pipeline)

    return build


def read_text(folder: Path, samples: int, rows: int, length: int, tokenizer: str) -> Callable[[], Iterable[Any]]:
    """Batches of the column `text`, in order: rows of ids, cut and padded to a length, without threads."""
    settings = {"max_length": length, "truncation": True, "padding": "max_length", "special_tokens": "none"}

    def build() -> Iterable[Any]:
        from zephon import Pipeline

        pipeline = Pipeline(source(folder, samples, shuffle_shards=False))
        pipeline = pipeline.tokenize(tokenizer_id=tokenizer, field="text", **settings).batch(rows)
        return (batch.to_training() for batch in pipeline.options(runner="inline"))

    return build
