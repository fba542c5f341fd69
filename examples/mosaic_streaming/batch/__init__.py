"""Makes TorchTitan's batches of llm-foundry's: collate, shift, mask, documents, packing, checks.

`use_fast_collator` gives a loader the one `Collator`. `Batches` iterates the loader, and `convert` makes the
`TitanBatch` that a `BatchSpec` describes. Before a run, `check_first_samples` compares the data with the model, and
`choose_ratio` fills in `packing_ratio = "auto"`.
"""

from examples.mosaic_streaming.batch.collate import (
    DROPPED_TOKENS,
    PACKED_TOKENS,
    Collator,
    to_tensors,
    use_fast_collator,
)
from examples.mosaic_streaming.batch.documents import SEQUENCE_ID, ends
from examples.mosaic_streaming.batch.first_samples import check_first_samples
from examples.mosaic_streaming.batch.iterator import Batches
from examples.mosaic_streaming.batch.loss_tokens import no_loss_token
from examples.mosaic_streaming.batch.packing_ratio import choose_ratio
from examples.mosaic_streaming.batch.round_trip import PROBE
from examples.mosaic_streaming.batch.titan_batch import (
    BatchSpec,
    TitanBatch,
    check_keys,
    convert,
    is_padding,
    to_titan_batch,
)
