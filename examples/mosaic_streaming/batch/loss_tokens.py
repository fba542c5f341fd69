"""The error for a global batch that has nothing to learn."""

from typing import cast

import numpy as np

from examples.mosaic_streaming.errors import DataError
from examples.mosaic_streaming.sampling import Order, stream_numbers
from examples.mosaic_streaming.shards import CheckedDataset, CheckedStream

SHOWN_SAMPLES = 8
"""Samples of a global batch that a message names."""


def no_loss_token_error(dataset: CheckedDataset, order: Order, epoch: int, sample_in_epoch: int) -> DataError:
    """Make the error for the global batch that begins at a sample of an epoch; it names samples and streams."""
    end = sample_in_epoch + order.global_batch_size
    samples = order.samples(dataset, epoch, np.arange(sample_in_epoch, end))
    told = ", ".join(map(str, samples[:SHOWN_SAMPLES]))
    more = f" and {samples.size - SHOWN_SAMPLES:,} more" if samples.size > SHOWN_SAMPLES else ""
    numbers = np.unique(stream_numbers(dataset, samples))
    streams = [cast(CheckedStream, dataset.streams[number]).label for number in numbers]
    return DataError(
        f"The global batch at sample {sample_in_epoch:,} of epoch {epoch} has no loss token: all its labels are -100. "
        f"It is made of samples {told}{more} of {', '.join(streams)}. `preview show --sample {samples[0]}` shows one. "
        "Remove such samples, or raise training.global_batch_size, so that others are in a batch with them."
    )
