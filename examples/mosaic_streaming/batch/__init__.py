"""Turns what llm-foundry reads into TorchTitan's batches.

`use_fast_collator` gives a loader the project's one collator, `Batches` takes batches from the loader, and `convert`
shifts, masks and checks them by a `BatchSpec` (`to_titan_batch` returns the same without the padding). Before training,
`check_first_samples` refuses streams that don't fit the model, and `choose_ratio` finds the ratio for
`packing_ratio = "auto"`.
"""

from examples.mosaic_streaming.batch.first_samples import PROBE, check_first_samples
from examples.mosaic_streaming.batch.packing import DROP_WARN_FRACTION, PackingLog, choose_ratio
from examples.mosaic_streaming.batch.reading import Batches, Collator, no_loss_token_error, use_fast_collator
from examples.mosaic_streaming.batch.titan_batch import (
    SEQUENCE_ID,
    BatchSpec,
    TitanBatch,
    check_keys,
    convert,
    ends,
    is_padding,
    spec_of,
    split_rows,
    to_titan_batch,
)
