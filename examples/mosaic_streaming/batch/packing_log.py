"""Logs how many tokens packing drops."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torchtitan.tools.logging import logger

from examples.mosaic_streaming.batch.collate import DROPPED_TOKENS, PACKED_TOKENS
from examples.mosaic_streaming.errors import is_rank_0

LOG_STEPS = {10**digits for digits in range(10)}
"""Steps after a start (1, 10, 100, …) at which the log says how much packing has dropped, as at each epoch's end."""

DROP_WARN_FRACTION = 0.01
"""The log warns if a larger share of the data is left out."""


class PackingLog:
    """Counts the tokens of this rank that packing has dropped and kept since this start."""

    def __init__(self) -> None:
        self.dropped = self._packed = self._steps = 0

    def add(self, micro_batches: Sequence[Mapping[str, Any]]) -> None:
        """Count the batches of an optimizer step."""
        self.dropped += sum(one.get(DROPPED_TOKENS, 0) for one in micro_batches)
        self._packed += sum(one.get(PACKED_TOKENS, 0) for one in micro_batches)
        self._steps += 1
        if self._steps in LOG_STEPS:
            self.log()

    def log(self) -> None:
        """Log on rank 0 how many tokens have been dropped."""
        if not self._packed or not is_rank_0():
            return
        tokens = self.dropped + self._packed
        is_much = (share := self.dropped / tokens) > DROP_WARN_FRACTION
        logger.log(
            logging.WARNING if is_much else logging.INFO,
            f"Packing has left out {self.dropped:,} of {tokens:,} tokens of rank 0's samples ({share:.2%})."
            f"{' Lower dataset.packing_ratio.' if is_much else ''}",
        )
