"""Keeps validation from changing the experts' token counts.

Experts count their tokens in every forward pass, and the next optimizer step adjusts their biases by these counts
(torchtitan 0.2.2, models/moe/moe.py, components/optimizer.py), so validation would change training. Experts that count
only in training mode make this module needless.
"""

import contextlib
from collections.abc import Iterator

from torch import nn

BUFFER = "tokens_per_expert"


@contextlib.contextmanager
def kept_expert_counts(model_parts: list[nn.Module]) -> Iterator[None]:
    """Restore the experts' token counts when the context ends."""
    buffers = [buffer for model in model_parts for name, buffer in model.named_buffers() if name.endswith(BUFFER)]
    counts = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, count in zip(buffers, counts, strict=True):
            buffer.copy_(count)
