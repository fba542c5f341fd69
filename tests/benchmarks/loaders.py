"""Batches a second: ours, next to what a user would pick instead."""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from llmfoundry.data.dataloader import build_dataloader
from streaming import StreamingDataset
from torch.utils.data import DataLoader
from torchtitan.hf_datasets.text_datasets import build_text_dataloader
from transformers import AutoTokenizer

from examples.mosaic_streaming.sampling.order import MAX_CANONICAL_NODES
from examples.mosaic_streaming.tokenizer import build_tokenizer
from tests.benchmarks import zephon
from tests.benchmarks.data import Text, Tokens
from tests.benchmarks.jsonl import name_jsonl
from tests.benchmarks.measure import Comparison
from tests.benchmarks.text import write_mds
from tests.support.ranks import run_rank_values
from tests.support.streams import TOKENIZER, build_loader, job, loader_config

REPEATS, SECONDS = 6, 0.3
"""Turns of each loader, and how long one is."""
EPOCH = 1_000_000
"""Samples of an epoch: streams are read again and again, without ends that a real epoch has once in days."""
MANY = 1 << 16
"""Bytes of a shard, where there are many."""
WARM_UP = 20
"""Batches before the first turn."""
DRAINED, DRAINED_OF_ZEPHON = 0.05, 0.3
"""Seconds that are read first in each turn: what workers or threads had ready meanwhile doesn't count. Zephon's have up
to 3,000 rows."""

ZEPHON = "Zephon"

Epochs = Callable[[], Iterable[Any]]


def ours(tokens: Tokens, workers: int, **dataset: Any) -> Epochs:
    """This project's loader, also with other settings of `dataset`."""
    return functools.partial(
        build_loader, config_of(tokens, workers, **dataset), job(tokens.rows, seq_len=tokens.seq_len)
    )


def config_of(tokens: Tokens, workers: int, **dataset: Any) -> dict[str, Any]:
    """The configuration of this project's loader."""
    settings = {"shuffle": True, "epoch_size": EPOCH, "num_canonical_nodes": MAX_CANONICAL_NODES} | dataset
    settings = {key: value for key, value in settings.items() if value is not None}
    return loader_config(tokens.mds, workers, **settings)


def llm_foundry(tokens: Tokens, workers: int) -> Epochs:
    """llm-foundry's loader as it is, with the same configuration."""
    dataset = {
        "local": str(tokens.mds),
        "shuffle": True,
        "epoch_size": EPOCH,
        "num_canonical_nodes": MAX_CANONICAL_NODES,
        "max_seq_len": tokens.seq_len + 1,
    }
    config = {"name": "text", "dataset": dataset, "drop_last": True, "pin_memory": False, "num_workers": workers}
    if not workers:
        config |= {"prefetch_factor": None, "persistent_workers": False}
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    return lambda: build_dataloader(config, tokenizer, tokens.rows).dataloader


def streaming(tokens: Tokens, workers: int) -> Epochs:
    """A StreamingDataset with the least that makes a batch."""
    settings: dict[str, Any] = {"shuffle": True, "epoch_size": EPOCH, "num_canonical_nodes": MAX_CANONICAL_NODES}

    def build() -> Iterable[Any]:
        dataset = StreamingDataset(local=str(tokens.mds), batch_size=tokens.rows, **settings)
        return DataLoader(dataset, tokens.rows, collate_fn=stack_tokens, num_workers=workers)

    return build


def stack_tokens(samples: list[dict[str, Any]]) -> torch.Tensor:
    """The least that makes a batch of samples."""
    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]))


def litdata(tokens: Tokens, workers: int) -> Epochs:
    """litdata on the same tokens; its epochs are as short as the data."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.item_loader import TokensLoader

    def build() -> Iterable[Any]:
        dataset = StreamingDataset(
            str(tokens.litdata), item_loader=TokensLoader(tokens.seq_len + 1), shuffle=True, drop_last=True
        )
        return StreamingDataLoader(dataset, batch_size=tokens.rows, num_workers=workers)

    return build


def zephon_threads(tokens: Tokens, workers: int) -> Epochs:
    """Zephon on the same stream, with as many threads that fetch."""
    return zephon.read_tokens(tokens.mds, len(np.load(tokens.array, mmap_mode="r")), tokens.rows, workers)


def array(tokens: Tokens, workers: int) -> Epochs:
    """Rows of a memory-mapped array: nothing can be faster."""
    rows = np.load(tokens.array, mmap_mode="r")
    random = np.random.default_rng(0)
    return lambda: (torch.from_numpy(rows[random.integers(0, len(rows), tokens.rows)]) for _ in itertools.count())


def titan(text: Text, workers: int) -> Epochs:
    """TorchTitan's own text loader, which tokenizes."""
    config = job(8, seq_len=text.seq_len)
    config.training.dataset = name_jsonl()
    config.training.dataset_path = str(text.jsonl)
    return functools.partial(
        build_text_dataloader,
        dp_world_size=1,
        dp_rank=0,
        tokenizer=build_tokenizer(config.model.hf_assets_path),
        job_config=config,
    )


class Turns:
    """A loader that is read for some time now and then; its epochs follow each other.

    Args:
        build: the loader.
        workers: whose prefetched batches, and the first ones of an epoch, don't count.
    """

    def __init__(self, build: Epochs, workers: int) -> None:
        self._loader = build()
        self._ahead = 2 * workers + 1
        self._batches: Iterator[Any] = iter(self._loader)
        for _ in range(WARM_UP):
            next(self._batches)

    def take(self, seconds: float, drained: float) -> float:
        """Batches a second, after so many seconds that don't count."""
        wait_for_threads()
        self._skip()
        self._read(drained)
        return self._read(seconds)

    def _read(self, seconds: float) -> float:
        batches, taken = 0, 0.0
        while taken < seconds:
            begin = end = time.perf_counter()
            for _ in self._batches:
                batches += 1
                if (end := time.perf_counter()) - begin + taken > seconds:
                    break
            else:
                self._batches = iter(self._loader)
                self._skip()
            taken += end - begin
        return batches / taken

    def _skip(self) -> None:
        for _ in range(self._ahead):
            next(self._batches, None)


def wait_for_threads() -> None:
    """Wait until those of the loader that was read before have nothing left to do."""
    for _ in range(50):
        before = time.process_time()
        time.sleep(0.02)
        if time.process_time() - before < 0.004:
            return


def read_in_turns(
    loaders: dict[str, Epochs], workers: int, repeats: int, seconds: float, drained: float
) -> dict[str, list[float]]:
    """Batches a second of each loader in each turn; they live in one process, and one is read at a time."""
    torch.set_num_threads(1)
    turns = {name: Turns(build, workers) for name, build in loaders.items()}
    rates: dict[str, list[float]] = {name: [] for name in turns}
    for repeat in range(repeats):
        for name in list(turns) if repeat % 2 else reversed(turns):
            rates[name].append(turns[name].take(seconds, drained))
    return rates


def compare(tokens: Tokens, workers: int) -> list[Comparison]:
    """Our loader and the others on the same tokens."""
    others = {"llm-foundry": llm_foundry, "StreamingDataset": streaming}
    others |= {"litdata": litdata} if tokens.litdata.exists() else {}
    others |= {ZEPHON: zephon_threads} if zephon.IS_INSTALLED and workers <= 2 else {}
    others |= {} if workers else {"memory-mapped array": array}
    aims = {"llm-foundry": 0.98 if workers > 1 else 3 if workers else 2, "litdata": 1, ZEPHON: 1}
    what = f"batches of {tokens.shape}, {workers} {'worker' if workers == 1 else 'workers'}"
    return [
        in_turns(what, name, ours(tokens, workers), other(tokens, workers), workers, aims.get(name))
        for name, other in others.items()
    ]


def compare_shards(tokens: Tokens) -> list[Comparison]:
    """The same where rows come from many shards, more than stay open; no workers."""
    many = Tokens(tokens.folder / "many", tokens.rows, tokens.seq_len)
    write_mds(many.mds, np.load(tokens.array, mmap_mode="r"), MANY)
    shards = len(list(many.mds.glob("*.mds")))
    what = f"batches of {many.shape}, 0 workers, {shards:,} shards"
    others = {"llm-foundry": llm_foundry, "StreamingDataset": streaming}
    return [in_turns(what, name, ours(many, 0), other(many, 0), 0, None) for name, other in others.items()]


def in_turns(
    what: str,
    name: str,
    one: Epochs,
    other: Epochs,
    workers: int,
    aim: float | None,
    repeats: int | None = None,
    seconds: float | None = None,
) -> Comparison:
    """Our loader and one other, alone in a process: the threads of any other would take turns, too."""
    drained = DRAINED_OF_ZEPHON if name == ZEPHON else DRAINED
    loaders = {"ours": one, name: other}
    read = functools.partial(read_in_turns, loaders, workers, repeats or REPEATS, seconds or SECONDS, drained)
    [rates] = run_rank_values(read, timeout=300)
    return Comparison(what, name, rates["ours"], rates[name], "batches/s", at_least=aim)


def compare_text(text: Text) -> Comparison:
    """Our loader on tokens and TorchTitan's on the same text, 8 rows, no workers."""
    stream = Tokens(text.mds.parent, 8, text.seq_len)
    what = f"batches of {stream.shape} of the demo's text, 0 workers"
    return in_turns(what, "TorchTitan's loader", ours(stream, 0), titan(text, 0), 0, 10)
