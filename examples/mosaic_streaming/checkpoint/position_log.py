"""What the log says of a run's position in the streams."""

from collections.abc import Sequence

from streaming import StreamingDataset

from examples.mosaic_streaming.checkpoint.changes import changes_ahead
from examples.mosaic_streaming.checkpoint.fingerprint import Fingerprint
from examples.mosaic_streaming.checkpoint.history import History
from examples.mosaic_streaming.checkpoint.progress import ConsumptionCounter
from examples.mosaic_streaming.checkpoint.state import State, plan_ahead
from examples.mosaic_streaming.sampling import Order, passes_of, passes_text
from examples.mosaic_streaming.shards import FetchCounts


def start_message(names: Sequence[str], dataset: StreamingDataset, history: History, steps: int) -> tuple[str, float]:
    """Say where a start begins in the streams, and which share of an epoch it leaves out."""
    stage, order = history.order(steps)
    start, epoch = order.first_sample, order.first_epoch
    samples, follow, left = dataset.epoch_size, order.remaining(start), history.steps_left(steps)
    place = f"stage {stage + 1}" if stage else "the run"
    if order.blend:
        passes = passes_text(passes_of(names, dataset, order, start))
        return f"The streams start at sample {start:,} of {place}: passes {passes}.", 0
    left_out, follow = samples - start - follow, follow // order.global_batch_size
    return (
        f"The streams start at sample {start:,} of epoch {epoch}, of which {min(follow, left):,} steps follow; it "
        f"leaves out {left_out:,} of {samples:,} samples (which fill no global batch, or no whole turn of "
        f"dataset.num_canonical_nodes = {dataset.num_canonical_nodes}: a smaller number leaves out fewer)."
    ), left_out / samples


def run_message(
    names: list[str], dataset: StreamingDataset, history: History, begin: int, steps: int, counter: ConsumptionCounter
) -> str:
    """Say what so many steps read after those before `begin`; of several stages, say when each begins."""
    plan, order = history.plan, history.orders[0]
    skips = f" Skipped: {', '.join(map(str, plan.skips))}." * bool(plan.skips)
    if len(plan.stages) > 1:
        read = ", ".join(f"{stage.file.path} from step {stage.from_step:,} on" for stage in plan.stages)
    else:
        samples = history.samples_between(begin, begin + steps)
        rounds = f"{samples / order.remaining(0):.2f} epochs"
        if order.blend:
            ends = (history.position(step).sample_in_epoch for step in (begin + steps, begin))
            rounds = f"passes {passes_text(passes_of(names, dataset, order, *ends))}"
        read = f"{samples:,} samples, {counter.tokens(samples):,} tokens, {rounds}"
    return f" In all, {steps:,} steps (training.steps) read {read}.{skips}"


def stage_message(names: Sequence[str], dataset: StreamingDataset, history: History, steps: int) -> str:
    """Say that a stage begins behind so many steps."""
    stage, order = history.order(steps)
    passes, file = passes_text(passes_of(names, dataset, order, 0)), history.plan.stages[stage].file.path
    batch = history.plan.begins[stage] + 1
    place = f"step {steps + 1:,} of the plan, batch {batch:,}"
    return f"Stage {stage + 1} begins with {place}: {file}; passes so far: {passes}."


def skip_message(history: History, steps: int) -> str:
    """Say which batches are skipped behind so many steps."""
    skips = [str(skip) for skip in history.plan.skips if history.plan.steps(skip.last) == steps]
    return f"Skipped: {', '.join(skips)}. Step {steps + 1:,} of the plan reads batch {history.plan.batch(steps + 1):,}."


def resume_messages(saved: State, history: History, fingerprints: Sequence[Fingerprint]) -> list[str]:
    """Say what changes at a resume, where it may."""
    size = history.orders[len(saved.past)].global_batch_size
    batch = (
        f"The global batch changes from {saved.global_batch_size} to {size} samples: the same samples follow, in other "
        "batches."
    ) * (size != saved.global_batch_size)
    ahead = changes_ahead(saved, plan_ahead(history.plan, saved.steps, fingerprints))
    counted = (
        f"The checkpoint, of an earlier version of this code, doesn't say how many steps were read before: those in "
        f"{history.plan.source} are counted from there."
    ) * (not history.begins_anew and (len(history.orders) > 1 or bool(history.plan.skips)))
    return [message for message in (batch, ahead, counted) if message]


def epoch_end_message(stage: int, order: Order, epoch: int, fetched: FetchCounts, counter: ConsumptionCounter) -> str:
    """Say what this start has read of an epoch or a stage at its end, and what its machine has fetched meanwhile."""
    is_stage = order.blend or (order.end and order.end[0] == epoch)
    start = order.first_sample if epoch == order.first_epoch else 0
    samples = sum(map(len, order.runs(epoch)))
    steps = samples // order.global_batch_size
    return (
        f"{f'Stage {stage + 1}' if is_stage else f'Epoch {epoch} of the streams'} ends: {samples:,} samples read"
        f"{f' since this start, at sample {start:,}' if start else ''}, in {steps:,} "
        f"step{'s' * (steps != 1)}, {counter.tokens(samples):,} tokens{f'; fetched: {fetched}' * any(fetched)}."
    )
