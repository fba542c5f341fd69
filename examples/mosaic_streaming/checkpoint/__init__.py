"""What a checkpoint says about the data, and whether a run may go on from it.

`State` is saved as one string of JSON (`pack`, `unpack`): a position, what has been read (`ConsumptionCounter`), in
which batches (`Segment`), and the `Fingerprint` of the data, which `check_same_data` compares. `History` tells from the
segments which samples a run has read, and will read, in which step. `read_position` reads the state in a checkpoint.
"""

from examples.mosaic_streaming.checkpoint.changes import changes_ahead, check_same_data, data_differences
from examples.mosaic_streaming.checkpoint.fingerprint import (
    Fingerprint,
    differences,
    fingerprint_of,
    shards_of,
    stream_keys,
    without_name,
)
from examples.mosaic_streaming.checkpoint.history import History, Segment, Slice, append_segment
from examples.mosaic_streaming.checkpoint.position_log import (
    epoch_end_message,
    resume_messages,
    run_message,
    skip_message,
    stage_message,
    start_message,
)
from examples.mosaic_streaming.checkpoint.progress import ConsumedCounts, ConsumptionCounter, Progress
from examples.mosaic_streaming.checkpoint.state import (
    STATE_KEY,
    State,
    check_position,
    damaged_state_error,
    pack,
    plan_ahead,
    read_checkpoint,
    read_position,
    unpack,
)
