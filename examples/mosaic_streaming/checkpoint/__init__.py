"""The saved position, the fingerprint of the data, and what has been read."""

from examples.mosaic_streaming.checkpoint.fingerprint import (
    Fingerprint,
    check_same_data,
    differences,
    fingerprint_of,
    shards_of,
    without_name,
)
from examples.mosaic_streaming.checkpoint.history import History, Segment, Slice, go_on
from examples.mosaic_streaming.checkpoint.progress import ConsumedCounts, ConsumptionCounter, Progress
from examples.mosaic_streaming.checkpoint.state import (
    STATE_KEY,
    State,
    check_position,
    damaged,
    explain_missing,
    pack,
    unpack,
)
