"""Plans a job: what it will read and need, from its settings and the streams' indexes alone."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.mosaic_streaming.checkpoint import History, shards_of
from examples.mosaic_streaming.config import flat
from examples.mosaic_streaming.preview.checkpoint import Saved
from examples.mosaic_streaming.preview.job_data import JobData, open_validation
from examples.mosaic_streaming.preview.ledger import ProgressBar
from examples.mosaic_streaming.sampling import ORDER_BYTES, size_of_round, stream_shares

EXACT = 20_000_000
"""In an epoch of at most so many samples, the first repeat is looked for. Else the plan only has a lower bound."""

DERIVED = {
    "dataset.max_seq_len": "derived from training.seq_len",
    "dataset.replication": "derived from [parallelism]",
    "dataset.decoder_only_format": "derived: the models are decoders",
}


def plan(data: JobData, history: History | None, progress_bar: ProgressBar) -> dict[str, Any]:
    """Make all sections of the plan.

    Args:
        data: the streams of the job.
        history: the run's history; None where a start would be refused.
        progress_bar: shows the progress of what takes long.
    """
    streams = data.opened
    parts = stream_shares(streams.names, streams.dataset, streams.order, streams.tokens_of_a_sample)
    return {
        "streams": [part._asdict() | sizes_of(data, number) for number, part in enumerate(parts)],
        "epoch": epoch_section(data),
        "run": run_section(data, history, progress_bar),
        "validation": validation_section(data),
        "layout": layout_section(data),
        "needs": needs_section(data),
        "settings": settings_section(data),
        "checks": checks(data),
    }


def sizes_of(data: JobData, number: int) -> dict[str, Any]:
    """A stream's source, its shards, and their bytes when they are unpacked."""
    name = data.opened.names[number]
    shards = shards_of(data.opened.dataset, number)
    return {
        "source": data.config.sources[name],
        "shards": len(shards),
        "bytes": sum(raw.bytes for shard in shards for raw, _ in shard.file_pairs),
    }


def epoch_section(data: JobData) -> dict[str, Any]:
    """The size of an epoch."""
    order = data.opened.order
    samples = order.remaining(0)
    return {
        "samples": samples,
        "left_out": data.opened.dataset.epoch_size - samples,
        "steps": data.steps_per_epoch,
        "tokens": times(samples, data.opened.tokens_of_a_sample),
    }


def times(samples: int | None, tokens: int | None) -> int | None:
    """The tokens of samples; None if their number or their length is unknown."""
    return None if samples is None or tokens is None else samples * tokens


def run_section(data: JobData, history: History | None, progress_bar: ProgressBar) -> dict[str, Any]:
    """What all steps read, and when a sample is first read again; None where that isn't known."""
    steps, tokens = data.job.steps, data.opened.tokens_of_a_sample
    repeat, exact = first_repeat(data, history, progress_bar) if history else (None, False)
    samples = history.samples(steps) if history else None
    unrepeated = history.samples(repeat - 1) if history and repeat else None
    return {
        "steps": steps,
        "global_batch_size": data.opened.order.global_batch_size,
        "since_step": history.segments[0].step if history and history.begins_anew else 0,
        "samples": samples,
        "tokens": times(samples, tokens),
        "epochs": None if samples is None else samples / data.opened.order.remaining(0),
        "first_repeat_step": repeat,
        "first_repeat_epoch": history.batch(repeat).epoch if history and repeat else None,
        "first_repeat_samples": unrepeated,
        "first_repeat_tokens": times(unrepeated, tokens),
        "first_repeat_is_exact": exact,
        "fits": None if repeat is None else True if steps < repeat else False if exact else None,
    }


def first_repeat(data: JobData, history: History, progress_bar: ProgressBar) -> tuple[int | None, bool]:
    """The first step that reads a sample again, and whether that is exact or only a lower bound.

    The step is None if it isn't known what was read before.
    """
    if not history.begins_anew:
        return None, False
    dataset = data.opened.dataset
    samples, choose = dataset.samples_per_stream, [int(stream.choose) for stream in dataset.streams]
    if dataset.epoch_size > EXACT:
        within = any(chosen > size for chosen, size in zip(choose, samples, strict=True))
        pairs = itertools.pairwise(history.slices())
        turn = next(new.step for old, new in pairs if (new.epoch, new.begin) != (old.epoch, old.end))
        return (history.segments[0].step if within else turn) + 1, False
    seen = np.zeros(dataset.num_samples, bool)
    parts = history.slices()
    for _ in progress_bar(itertools.count(), "looking for the first repeat"):
        part = next(parts)
        read = data.in_order(part.epoch)[part.begin : part.end]
        again = np.flatnonzero(seen[read] | is_again(read, dataset.num_samples))
        if again.size:
            return part.step + int(again[0]) // part.global_batch_size + 1, True
        seen[read] = True
    raise AssertionError


def is_again(samples: NDArray[np.int64], size: int) -> NDArray[np.bool_]:
    """Mark the samples, below `size`, that also stand further to the left."""
    first = np.zeros(size, np.int64)
    first[samples[::-1]] = np.arange(samples.size)[::-1]
    return first[samples] != np.arange(samples.size)


def validation_section(data: JobData) -> dict[str, Any] | None:
    """The validation streams and what a round reads of them; None without any. Errors are those of a start."""
    if not (found := open_validation(data)):
        return None
    assert data.job.validation
    settings, order, dataset = data.job.validation, found.opened.order, found.opened.dataset
    batches, samples = size_of_round(dataset.epoch_size, order.global_batch_size, settings.steps)
    streams = [
        {"name": name, "samples": int(dataset.samples_per_stream[number])} | sizes_of(found, number)
        for number, name in enumerate(found.opened.names)
    ]
    return {
        "streams": streams,
        "samples": dataset.epoch_size,
        "round": {"batches": batches, "samples": samples, "global_batch_size": order.global_batch_size},
        "seq_len": settings.shape.seq_len,
        "freq": settings.freq,
        "warnings": found.check_first_samples(),
    }


def layout_section(data: JobData) -> dict[str, Any]:
    """The ranks, and which of them read the same."""
    layout, order = data.job.layout, data.opened.order
    return {
        "world_size": layout.world_size,
        "nodes": layout.nodes,
        "ranks_per_node": layout.ranks_per_node,
        "degrees": dict(layout.degrees),
        "dp_world_size": layout.dp_world_size,
        "local_batch_size": data.job.training.local_batch_size,
        "samples_per_batch": order.local_batch_size,
        "batches_per_step": order.global_batch_size // order.local_batch_size // layout.dp_world_size,
        "global_batch_size": order.global_batch_size,
        "dp_ranks": [ranges(ranks) for ranks in layout.readers()],
    }


def ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers as "0-3, 8-11"."""
    parts = []
    for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(parts)


def needs_section(data: JobData) -> dict[str, Any]:
    """What each node needs, in bytes: shared memory, memory and disk."""
    streams, config = data.opened, data.config.config
    ahead = config["num_workers"] * (config.get("prefetch_factor") or 2)  # 2 is llm-foundry's default
    tensors = 3 if streams.spec.labels_are_ids else 4  # ids, labels, mask or documents; examples have both
    batch = streams.spec.rows * streams.spec.max_seq_len * 8 * tensors
    return {
        "shared_memory_order": 8 * streams.order.remaining(0),
        "shared_memory_shards": 9 * streams.dataset.num_shards,
        "shared_memory_batches": data.job.layout.ranks_per_node * ahead * batch,
        "memory_to_order_an_epoch": ORDER_BYTES * streams.dataset.epoch_size,
        "cache": cache_bytes(data),
        "cache_limit": data.config.dataset.get("cache_limit"),
        "hashed_at_a_start": bytes_of(data, cached=False) if any(data.config.hashes) else 0,
    }


def bytes_of(data: JobData, cached: bool) -> int:
    """The bytes of all shards of the streams with a cache, or of those without."""
    total = 0
    for number, (stream, folder) in enumerate(zip(data.config.streams.values(), data.config.folders, strict=True)):
        keeps_packed = stream["keep_zip"] or not cached
        if folder.is_copy == cached:
            shards = shards_of(data.opened.dataset, number)
            total += sum(shard.get_persistent_size(keeps_packed) for shard in shards)
    return total


def cache_bytes(data: JobData) -> int:
    """The bytes that a node's caches hold in the end without a limit: all shards, or those of its own ranges."""
    nodes, order = data.job.layout.world().num_nodes, data.opened.order
    ranges = data.config.dataset["num_canonical_nodes"]
    keeps_to_own = order.batching_method in ("random", "per_stream") and ranges % nodes == 0
    return bytes_of(data, cached=True) // (nodes if keeps_to_own else 1)


def settings_section(data: JobData) -> list[dict[str, Any]]:
    """The settings that decide what is read and how, with their values and owners."""
    rows = []
    given, resolved = flat(data.given.config), flat(data.config.config)
    for key, value in resolved.items():
        filled = DERIVED.get(key, "this project's default")
        rows.append((key, value, data.config.source if key in given else filled))
    for key, value in data.opened.fingerprint.items():
        if key.startswith("dataset.") and key not in resolved:
            rows.append((key, value, "streaming's default"))
    settings = [{"setting": key, "value": value, "owner": owner} for key, value, owner in rows]
    return settings + data.job_settings


def checks(data: JobData) -> dict[str, list[str]]:
    """What was checked just now, as at each start, and what a job checks while it reads."""
    spec, layout = data.opened.spec, data.job.layout
    hashes = "".join(f", {name}" for name in sorted(filter(None, set(data.config.hashes))))
    now = [
        "tokenizer: TorchTitan and transformers read the same ids from the same assets",
        "index of each stream: its form, files inside of its folder, no pickled columns, columns that a batch can have",
        "first samples of each stream, if they are ids: their type, their length, text of this tokenizer",
    ]
    later = [
        f"shards, when fetched and at each start: bytes, samples{hashes}",
        f"each batch: shape [{spec.rows}, {spec.max_seq_len}], ids 0 to {spec.vocab_size - 1:,}",
        "each epoch: as many samples as the index says",
    ]
    if layout.world_size > 1:
        later.append(f"first batch after a start: settings of all {layout.world_size} ranks; equal batches of peers")
    if data.job.checkpoints.enable:
        later.append("checkpoint, when loaded: streams, order, lengths and tokenizer are those it was written with")
    return {"now": now, "later": later}


def resume_section(data: JobData, saved: Saved, history: History | None) -> dict[str, Any]:
    """Where a checkpoint's run stands, what has changed since, and what a start would do."""
    order, checkpoint = data.opened.order, data.job.checkpoints
    state, differences = saved.state, saved.differences(data)
    anew = "dataloader" in checkpoint.exclude_from_loading
    done = 0 if "train_state" in checkpoint.exclude_from_loading else saved.step
    epoch, sample = history.position(done)[1:] if history else state[:2] if state else (0, 0)
    saved_batch = state and state.global_batch_size
    return {
        "checkpoint": saved.folder,
        "step": saved.step,
        "epoch": epoch,
        "sample_in_epoch": sample,
        "steps_left_in_epoch": order.remaining(sample) // order.global_batch_size if history else None,
        "steps_done": done,
        "steps_left": max(0, data.job.steps - done),
        "is_loaded": checkpoint.enable,
        "streams_are_loaded": checkpoint.enable and not anew,
        "begins_anew": anew,
        "differences": [dict(zip(("setting", "checkpoint", "now"), row, strict=True)) for row in differences],
        "order_survives": not differences,
        "global_batch_size": {"checkpoint": saved_batch, "now": order.global_batch_size},
        "same_batches": not differences and saved_batch == order.global_batch_size,
    }
