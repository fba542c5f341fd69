"""Which samples are read, in which order, by which rank."""

from examples.mosaic_streaming.sampling.memory import ORDER_BYTES, check_memory
from examples.mosaic_streaming.sampling.mixture import log_mixture, stream_shares
from examples.mosaic_streaming.sampling.order import (
    Order,
    check_blocks,
    check_epoch,
    global_batch,
    round_down,
    set_order,
    set_validation_order,
    size_of_round,
    start_at,
)
from examples.mosaic_streaming.sampling.placement import Layout, assign_to_ranks
