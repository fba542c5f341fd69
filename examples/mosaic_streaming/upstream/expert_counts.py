"""Validation that leaves the experts' counts of tokens alone.

Experts count their tokens in each forward pass, and the next optimizer step moves their biases by that (torchtitan
0.2.2, models/moe/moe.py, components/optimizer.py): tokens of validation would change training. Experts that count in
training mode alone make this module needless.
"""

import contextlib
from collections.abc import Iterator

from torch import nn

BUFFER = "tokens_per_expert"


@contextlib.contextmanager
def kept_expert_counts(model_parts: list[nn.Module]) -> Iterator[None]:
    """A context at whose end the experts' counts are what they were at its beginning."""
    buffers = [buffer for model in model_parts for name, buffer in model.named_buffers() if name.endswith(BUFFER)]
    counts = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, count in zip(buffers, counts, strict=True):
            buffer.copy_(count)
