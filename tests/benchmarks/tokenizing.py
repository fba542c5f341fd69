"""Text that is tokenized as it is read: the CPU time of a batch, next to tokenizers alone and to other loaders."""

import functools
import itertools
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llmfoundry.data.dataloader import build_dataloader
from streaming import MDSWriter
from transformers import AutoTokenizer

from examples.mosaic_streaming.make_demo_data import sources
from tests.benchmarks import zephon
from tests.benchmarks.loaders import ZEPHON, Epochs, in_turns, wait_for_threads
from tests.benchmarks.measure import Comparison
from tests.benchmarks.text import SHARD, load_tokenizer
from tests.support.ranks import run_rank_values
from tests.support.streams import TOKENIZER, build_loader, job

ROWS, SEQ_LEN = 8, 2048
TURNS, BATCHES = 6, 16
"""Turns of each loader, and batches of one: a multiple of the 64 samples that Zephon tokenizes at once."""
SECONDS = 0.6
"""Of a turn where rates are compared."""
SAMPLES = ROWS * BATCHES * (TURNS + 4)
"""Of a stream: what is read, also ahead."""
CHARACTERS, SPREAD = 6600, 0.8
"""Of the median document, which fills a row; and how lengths are spread: half are longer, one in 12 is three times as
long, and one in 12 a third."""
PROMPT, RESPONSE, RATIO = 400, 1200, 3.0
"""Characters of the median prompt and response; and examples for each row where they are packed."""


@dataclass(frozen=True)
class Documents:
    """Samples in the order in which they are read.

    Attributes:
        mds: a stream of them.
        samples: by column.
        seq_len: of the model.
    """

    mds: Path
    samples: list[dict[str, str]]
    seq_len: int


def write_documents(folder: Path, columns: dict[str, int], count: int, seq_len: int) -> Documents:
    """Cut the demo's text into samples whose columns have so many characters, more or less, and write a stream."""
    text, random = "".join(sources("train")), np.random.default_rng(0)
    lengths = [random.lognormal(np.log(median), SPREAD, count).astype(int) + 1 for median in columns.values()]
    cuts = np.cumsum(np.stack(lengths, 1).reshape(-1)).reshape(count, -1) % len(text)
    samples = [
        {name: text[max(0, cut - length) : cut] for name, cut, length in zip(columns, row, each, strict=True)}
        for row, each in zip(cuts.tolist(), zip(*lengths, strict=True), strict=True)
    ]
    with MDSWriter(out=str(folder), columns=dict.fromkeys(columns, "str"), size_limit=SHARD) as writer:
        for sample in samples:
            writer.write(sample)
    return Documents(folder, samples, seq_len)


def config_of(documents: Documents, workers: int, **dataset: Any) -> dict[str, Any]:
    """The configuration of our loader and of llm-foundry's, in the order in which samples were written."""
    is_text = "text" in documents.samples[0]
    settings = {"remote": str(documents.mds), "local": str(documents.mds), "shuffle": False, "num_canonical_nodes": 1}
    settings |= {} if is_text else {"decoder_only_format": True}
    return {
        "name": "text" if is_text else "finetuning",
        "num_workers": workers,
        "dataset": settings | dataset,
    }


def ours(documents: Documents, workers: int = 0, **dataset: Any) -> Epochs:
    """This project's loader."""
    return functools.partial(
        build_loader, config_of(documents, workers, **dataset), job(ROWS, seq_len=documents.seq_len)
    )


def llm_foundry(documents: Documents, **dataset: Any) -> Epochs:
    """llm-foundry's loader as it is, with the same configuration."""
    config = config_of(documents, 0, max_seq_len=documents.seq_len + 1, **dataset)
    config |= {"drop_last": True, "pin_memory": False, "prefetch_factor": None, "persistent_workers": False}
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    return lambda: build_dataloader(config, tokenizer, ROWS).dataloader


def tokenizers(documents: Documents) -> Epochs:
    """The library alone: the ids of as many texts, which are in memory; it cuts them to the same length."""

    def build() -> Iterable[Any]:
        tokenizer, _, _ = load_tokenizer()
        tokenizer.enable_truncation(documents.seq_len + 1)
        texts = [sample["text"] for sample in documents.samples]
        batches = (texts[begin : begin + ROWS] for begin in range(0, len(texts), ROWS))
        return ([row.ids for row in tokenizer.encode_batch(batch)] for batch in batches)

    return build


def zephon_text(documents: Documents) -> Epochs:
    """Zephon on the same stream in the same order."""
    return zephon.read_text(documents.mds, len(documents.samples), ROWS, documents.seq_len + 1, str(TOKENIZER))


def milliseconds(batches: Iterator[Any], count: int) -> float:
    """CPU time of a batch in this process, with what its threads do."""
    wait_for_threads()
    begin = time.process_time()
    assert sum(1 for _ in itertools.islice(batches, count)) == count
    wait_for_threads()
    return 1000 * (time.process_time() - begin) / count


def spend_in_turns(loaders: dict[str, Epochs], turns: int) -> dict[str, list[float]]:
    """CPU time of a batch of each loader in each turn: the same batches of both, in one thread."""
    torch.set_num_threads(1)
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    readers = {name: iter(build()) for name, build in loaders.items()}
    for reader in readers.values():
        milliseconds(reader, 2)
    spent: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(turns):
        for name in list(readers) if turn % 2 else reversed(readers):
            spent[name].append(milliseconds(readers[name], BATCHES))
    return spent


def compare_cpu(what: str, name: str, one: Epochs, other: Epochs, aim: float | None = None) -> Comparison:
    """Our loader and one other, alone in a process."""
    read = functools.partial(spend_in_turns, {"ours": one, name: other}, TURNS)
    [spent] = run_rank_values(read, timeout=300)
    return Comparison(what, name, spent["ours"], spent[name], "ms of CPU", at_most=aim)


def compare(folder: Path) -> Iterator[Comparison]:
    """A column `text`, without workers and with them; and finetuning on `prompt` and `response`."""
    shape = f"{ROWS} x {SEQ_LEN:,}"
    documents = write_documents(folder / "text", {"text": CHARACTERS}, SAMPLES, SEQ_LEN)
    what = f"a batch of {shape}, `text`, 0 workers"
    yield compare_cpu(what, "tokenizers", ours(documents), tokenizers(documents), 1.15)
    yield compare_cpu(what, "llm-foundry", ours(documents), llm_foundry(documents))
    if zephon.IS_INSTALLED:
        yield compare_cpu(what, ZEPHON, ours(documents), zephon_text(documents))
    for workers in (1, 2):
        what = f"batches of {shape}, `text`, {workers} {'worker' if workers == 1 else 'workers'}"
        both = ours(documents, workers), ours(documents)
        yield in_turns(what, "0 workers", *both, workers, None, seconds=SECONDS)
    examples = write_documents(
        folder / "examples", {"prompt": PROMPT, "response": RESPONSE}, int(SAMPLES * RATIO), SEQ_LEN
    )
    packings: dict[str, dict[str, Any]] = {"": {}, ", packed": {"packing_ratio": RATIO}}
    for packing, settings in packings.items():
        what = f"a batch of {shape}, finetuning{packing}, 0 workers"
        yield compare_cpu(what, "llm-foundry", ours(examples, **settings), llm_foundry(examples, **settings))
