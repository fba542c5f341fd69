"""What the benchmarks read: the same tokens in the form that each loader takes, and the demo's text."""

import contextlib
import functools
import io
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.mosaic_streaming.make_demo_data import VOCAB_SIZE, sources
from tests.benchmarks.text import SHARD, write_jsonl, write_mds, write_rows
from tests.support.streams import FIRST_ID


@dataclass(frozen=True)
class Tokens:
    """Samples of `seq_len + 1` tokens.

    Attributes:
        folder: with them as an MDS stream, litdata's chunks and one array, int32 all.
        rows: of a batch.
        seq_len: of the model.
    """

    folder: Path
    rows: int
    seq_len: int

    @property
    def mds(self) -> Path:
        """An MDS stream."""
        return self.folder / "mds"

    @property
    def litdata(self) -> Path:
        """What `litdata.optimize` writes."""
        return self.folder / "litdata"

    @property
    def array(self) -> Path:
        """An array [samples, seq_len + 1]."""
        return self.folder / "tokens.npy"

    @property
    def shape(self) -> str:
        """Of a batch, for people."""
        return f"{self.rows} x {self.seq_len:,}"


def write_tokens(folder: Path, rows: int, seq_len: int, samples: int) -> Tokens:
    """Write random tokens in each form."""
    folder.mkdir(parents=True)
    tokens = Tokens(folder, rows, seq_len)
    array = np.random.default_rng(0).integers(FIRST_ID, VOCAB_SIZE, (samples, seq_len + 1), dtype=np.int32)
    np.save(tokens.array, array)
    write_mds(tokens.mds, array)
    with contextlib.suppress(ImportError):  # of the optional group `bench`
        write_litdata(tokens)
    return tokens


def write_litdata(tokens: Tokens) -> None:
    """Write the array as chunks of whole samples, as large as a shard."""
    import litdata
    from litdata.streaming.item_loader import TokensLoader

    length = tokens.seq_len + 1
    each = SHARD // 4 // length
    begins = range(0, len(np.load(tokens.array, mmap_mode="r")), each)
    logging.getLogger("litdata").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        litdata.optimize(
            fn=functools.partial(read_tokens, str(tokens.array), each),
            inputs=list(begins),
            output_dir=str(tokens.litdata),
            chunk_size=each * length,
            item_loader=TokensLoader(),
            num_workers=1,
            start_method="fork",
            verbose=False,
        )


def read_tokens(array: str, count: int, begin: int) -> "np.ndarray":  # type: ignore[type-arg]
    """So many samples of an array, one behind the other."""
    return np.load(array, mmap_mode="r")[begin : begin + count].reshape(-1).copy()


@dataclass(frozen=True)
class Text:
    """The demo's text, twice.

    Attributes:
        jsonl: a document in `text` of each line.
        mds: the same, in samples of `seq_len + 1` tokens.
        seq_len: of the model.
    """

    jsonl: Path
    mds: Path
    seq_len: int


def write_text(folder: Path, seq_len: int) -> Text:
    """Write the demo's text as JSONL and, tokenized as TorchTitan would, as a stream."""
    folder.mkdir(parents=True)
    text = Text(folder / "text.jsonl", folder / "mds", seq_len)
    write_rows(text.mds, write_jsonl(text.jsonl, sources("train")), seq_len)
    return text
