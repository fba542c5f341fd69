"""Opens indexes of many shards and samples in a fraction of the time and memory.

streaming 0.13.0 copies each shard's entry of an index deeply, though nothing else uses it (base/format/mds/reader.py):
with 500,000 shards that takes half a minute. To tell the shard of a sample, it makes an array of all samples, of 8 GB
for a billion (base/spanner.py). A streaming that does neither makes this module needless.
"""

import bisect
import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming.base import dataset
from streaming.base.format.mds import reader
from streaming.base.spanner import Spanner

from examples.mosaic_streaming.upstream.patch import replaced


class SmallSpanner(Spanner):
    """Tells the shard of a sample from the shards' bounds alone."""

    def __init__(self, shard_sizes: NDArray[np.int64], span_size: int = 1 << 10) -> None:
        self.shard_sizes, self.num_samples = shard_sizes, int(shard_sizes.sum())
        self.shard_bounds = np.concatenate([np.zeros(1, np.int64), shard_sizes.cumsum()])
        self._bounds: list[int] = self.shard_bounds.tolist()

    def __getitem__(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"Invalid sample index `{index}`: 0 <= {index} < {self.num_samples}")
        shard = bisect.bisect_right(self._bounds, index) - 1
        return shard, int(index - self._bounds[shard])


@contextlib.contextmanager
def large_indexes() -> Iterator[None]:
    """A context in which datasets are made; what entries of an index have in common, the shards share."""
    known: dict[str, Any] = {}

    def entry(shard: dict[str, Any], *_: Any) -> dict[str, Any]:
        lists = {key: known.setdefault(repr(value), value) for key, value in shard.items() if isinstance(value, list)}
        return shard | lists

    with replaced(reader, "deepcopy", entry), replaced(dataset, "Spanner", SmallSpanner):
        yield


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """A context without garbage collection, which looks at all objects again and again while many are made."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
