"""What the log says of a run's position in the streams."""

from collections.abc import Sequence

from streaming import StreamingDataset

from examples.mosaic_streaming.checkpoint.progress import ConsumptionCounter
from examples.mosaic_streaming.checkpoint.state import State
from examples.mosaic_streaming.sampling import Order, passes_of, passes_text
from examples.mosaic_streaming.shards import FetchCounts


def start_message(names: Sequence[str], dataset: StreamingDataset, order: Order, state: State) -> tuple[str, float]:
    """Say where a start begins in the streams, and which share of an epoch it leaves out."""
    start, samples, follow = state.sample_in_epoch, dataset.epoch_size, order.remaining(state.sample_in_epoch)
    if order.blend:
        passes = passes_text(passes_of(names, dataset, order, start))
        return f"The streams start at sample {start:,} of the run: passes {passes}.", 0
    steps, left_out = follow // order.global_batch_size, samples - start - follow
    return (
        f"The streams start at sample {start:,} of epoch {state.epoch}, of which {steps:,} steps follow; it leaves out "
        f"{left_out:,} of {samples:,} samples (which fill no global batch, or no whole turn of "
        f"dataset.num_canonical_nodes = {dataset.num_canonical_nodes}: a smaller number leaves out fewer)."
    ), left_out / samples


def run_message(
    names: Sequence[str],
    dataset: StreamingDataset,
    order: Order,
    state: State,
    steps: int,
    counter: ConsumptionCounter,
) -> str:
    """Say what so many steps read from a state on."""
    samples, begin = steps * order.global_batch_size, state.sample_in_epoch
    rounds = f"{samples / order.remaining(0):.2f} epochs"
    if order.blend:
        rounds = f"passes {passes_text(passes_of(names, dataset, order, begin + samples, begin))}"
    return (
        f" In all, {steps:,} steps (training.steps) read {samples:,} samples, {counter.tokens(samples):,} tokens, "
        f"{rounds}."
    )


def epoch_end_message(order: Order, state: State, fetched: FetchCounts, counter: ConsumptionCounter) -> str:
    """Say what this start has read of an epoch at its end, and what its machine has fetched meanwhile."""
    start = order.first_sample if state.epoch == order.first_epoch else 0
    samples = state.sample_in_epoch - start
    return (
        f"Epoch {state.epoch} of the streams ends: {samples:,} samples read"
        f"{f' since this start, at sample {start:,}' if start else ''}, in {samples // state.global_batch_size:,} "
        f"steps, {counter.tokens(samples):,} tokens{f'; fetched: {fetched}' if any(fetched) else ''}."
    )
