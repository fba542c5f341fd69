"""Decides which samples are read, in which order, and by which rank.

An `Order` tells which sample is at which position. It depends on the streams and their settings alone. It is
streaming's, or a blend, whose arithmetic is in `blend.py`. `set_order` gives a dataset its order, and
`set_validation_order` does the same for validation. `Layout` says which ranks read the same. `assign_to_ranks` shares
an order out to them, and `WorkerSamples` does so piece by piece. A start checks the order (`check_order`), the memory
that it takes (`check_memory`), and logs the streams' shares (`log_mixture`).
"""

from examples.mosaic_streaming.sampling.blend import Reading
from examples.mosaic_streaming.sampling.memory import check_memory, ordering_bytes
from examples.mosaic_streaming.sampling.mixture import log_mixture, passes_of, passes_text, stream_shares
from examples.mosaic_streaming.sampling.order import (
    ENDLESS,
    MAX_CANONICAL_NODES,
    SHARE_DIGITS,
    Order,
    check_order,
    round_down,
    set_order,
    set_validation_order,
    size_of_round,
    start_at,
    stream_numbers,
)
from examples.mosaic_streaming.sampling.placement import Layout, WorkerSamples, assign_to_ranks
