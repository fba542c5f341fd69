"""Decides which samples are read, in which order, and by which rank.

`Order` puts an epoch in an order that depends on the streams and their settings alone. `set_order` gives it to a
dataset, and `set_validation_order` does the same for validation. `Layout` says which ranks read the same, and
`assign_to_ranks` shares an order out to them. A start checks the order (`check_order`), the memory that it takes
(`check_memory`), and logs the streams' shares (`log_mixture`).
"""

from examples.mosaic_streaming.sampling.memory import ORDER_BYTES, check_memory
from examples.mosaic_streaming.sampling.mixture import log_mixture, stream_shares
from examples.mosaic_streaming.sampling.order import (
    Order,
    check_order,
    global_batch,
    round_down,
    set_order,
    set_validation_order,
    size_of_round,
    start_at,
    stream_numbers,
)
from examples.mosaic_streaming.sampling.placement import Layout, assign_to_ranks
