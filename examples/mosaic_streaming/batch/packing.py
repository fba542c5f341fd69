"""Several examples in a row: llm-foundry packs them, and what a batch leaves out is counted."""

from typing import Any

from llmfoundry.data.packing import BinPackCollator
from torch.utils.data import DataLoader

from examples.mosaic_streaming.errors import ConfigError

LEFT_OUT, PACKED = "tokens_left_out", "tokens_packed"
"""Keys of a batch: of its samples' tokens, how many found no room in its rows, and how many did."""


class CountingPacker:
    """llm-foundry's packing, with the tokens that it leaves out counted in each batch.

    Args:
        packer: one that keeps nothing from batch to batch, so that a batch depends on its samples alone.
    """

    def __init__(self, packer: BinPackCollator) -> None:
        assert packer.max_leftover_bins_to_keep == 0
        self._packer = packer

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        packer = self._packer
        packer.n_packed_tokens = packer.n_total_tokens = 0
        batch: dict[str, Any] = packer(samples)
        packed = packer.n_packed_tokens
        return batch | {LEFT_OUT: packer.n_total_tokens - packed, PACKED: packed}


def count_left_out(loader: DataLoader[Any]) -> bool:
    """Have a loader count what its packing leaves out; return whether it packs.

    Raises:
        ConfigError: a loader that a user has registered keeps what didn't fit.
    """
    if not isinstance(loader.collate_fn, BinPackCollator):
        return False
    if loader.collate_fn.max_leftover_bins_to_keep != 0:
        raise ConfigError(
            "The loader packs with a BinPackCollator that keeps what didn't fit in the memory of its worker, where a "
            "restart loses it. Give it max_leftover_bins_to_keep=0."
        )
    loader.collate_fn = CountingPacker(loader.collate_fn)
    return True
