"""What a job will read and need, from its settings and the streams' indexes alone."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.mosaic_streaming.checkpoint import History, shards_of
from examples.mosaic_streaming.config import flat
from examples.mosaic_streaming.preview.checkpoint import Checkpoint
from examples.mosaic_streaming.preview.job_data import JobData
from examples.mosaic_streaming.preview.open_data import open_validation
from examples.mosaic_streaming.preview.progress import progress_bar
from examples.mosaic_streaming.sampling import ordering_bytes, passes_of, size_of_round, stream_shares

EXACT = 20_000_000
"""Samples of an epoch up to which the first repeat is looked for. Beyond, only a lower bound is given."""

DERIVED = {
    "dataset.num_canonical_nodes": "this project's default",
    "dataset.max_seq_len": "derived from training.seq_len",
    "dataset.replication": "derived from [parallelism]",
    "dataset.decoder_only_format": "derived: the models are decoders",
}


def plan_report(data: JobData, checkpoint: Checkpoint | None, history: History | None) -> dict[str, Any]:
    """All sections of the plan but its warnings; `history` is None where a start would be refused."""
    dataset, order = data.opened.dataset, data.opened.order
    shares = stream_shares(data.opened.names, dataset, order, data.opened.tokens_of_a_sample)
    run, samples = run_section(data, history), order.remaining(0)
    epoch = {"left_out": dataset.epoch_size - samples, "steps": samples // order.global_batch_size}
    return {
        "streams": [
            share._asdict() | files_of(data, number) | {"passes_of_run": run["passes"] and run["passes"][number]}
            for number, share in enumerate(shares)
        ],
        "epoch": None if order.blend else epoch | amounts(data, samples),
        "run": run,
        "validation": validation_section(data),
        "layout": layout_section(data),
        "needs": needs_section(data),
        "settings": settings_section(data),
        "checks": checks_section(data),
        "resume": resume_section(data, checkpoint, history) if checkpoint else None,
    }


def files_of(data: JobData, stream: int) -> dict[str, Any]:
    """The source of a stream, its shards, and their bytes as they are read."""
    shards = shards_of(data.opened.dataset, stream)
    size = sum(raw.bytes for shard in shards for raw, _ in shard.file_pairs)
    return {"source": data.config.sources[data.opened.names[stream]], "shards": len(shards), "bytes": size}


def amounts(data: JobData, samples: int | None, prefix: str = "") -> dict[str, int | None]:
    """A number of samples and of their tokens, as far as these are known."""
    size = data.opened.tokens_of_a_sample
    tokens = samples * size if samples is not None and size else None
    return {f"{prefix}samples": samples, f"{prefix}tokens": tokens}


def run_section(data: JobData, history: History | None) -> dict[str, Any]:
    """What all steps read, and when a sample is read for the second time; values are None where that isn't known."""
    steps, order, passes = data.job.steps, data.opened.order, None
    repeat, exact = first_repeat(data, history) if history else (None, False)
    samples = history.samples(steps) if history else None
    unrepeated = history.samples(repeat - 1) if history and repeat else None
    fits = steps < repeat if repeat and (exact or steps < repeat) else None
    if order.blend and samples is not None:
        passes = list(passes_of(data.opened.names, data.opened.dataset, order, samples).values())
    return {
        "steps": steps,
        "global_batch_size": order.global_batch_size,
        "since_step": history.segments[0].step if history and history.begins_anew else 0,
        **amounts(data, samples),
        "epochs": None if samples is None or order.blend else samples / order.remaining(0),
        "passes": passes,
        "first_repeat_step": repeat,
        "first_repeat_epoch": history.batch(repeat).epoch if history and repeat else None,
        **amounts(data, unrepeated, "first_repeat_"),
        "first_repeat_is_exact": exact,
        "fits": fits,
    }


def first_repeat(data: JobData, history: History) -> tuple[int | None, bool]:
    """The first step that reads a sample again, None if unknown, and whether that is exact: it may be a later one."""
    if not history.begins_anew:
        return None, False
    dataset, order = data.opened.dataset, data.opened.order
    pairs = itertools.pairwise(history.slices())
    anew = next(new.step for old, new in pairs if (new.epoch, new.begin) != (old.epoch, old.end)) + 1
    if order.blend:
        sizes = enumerate(dataset.samples_per_stream.tolist())
        repeat = min(order.blend.position(number, size) for number, size in sizes if order.shares[number])
        piece = next(piece for piece in history.slices() if piece.end > repeat)
        return min(anew, piece.step + (repeat - piece.begin) // piece.global_batch_size + 1), True
    if dataset.epoch_size > EXACT:
        choices = zip(dataset.streams, dataset.samples_per_stream, strict=True)
        if any(int(stream.choose) > size for stream, size in choices):
            return history.segments[0].step + 1, False
        return anew, False
    seen = np.zeros(dataset.num_samples, bool)
    for piece in progress_bar(history.slices(), "Looking for the first repeat"):
        read = data.samples(piece)
        again = np.flatnonzero(seen[read] | is_repeat(read, dataset.num_samples))
        if again.size:
            return piece.step + int(again[0]) // piece.global_batch_size + 1, True
        seen[read] = True
    raise AssertionError


def is_repeat(samples: NDArray[np.int64], num_samples: int) -> NDArray[np.bool_]:
    """Which samples have an equal one to their left; ids are below `num_samples`."""
    first = np.zeros(num_samples, np.int64)
    first[samples[::-1]] = np.arange(samples.size)[::-1]
    return first[samples] != np.arange(samples.size)


def validation_section(data: JobData) -> dict[str, Any] | None:
    """The validation streams, and what a round reads of them; raises what a start would refuse them with."""
    if not (validation := open_validation(data)):
        return None
    assert data.job.validation
    settings, batch, dataset = data.job.validation, validation.opened.order.global_batch_size, validation.opened.dataset
    batches, samples = size_of_round(dataset.epoch_size, batch, settings.steps)
    return {
        "streams": [
            {"name": name, "samples": int(dataset.samples_per_stream[number])} | files_of(validation, number)
            for number, name in enumerate(validation.opened.names)
        ],
        "samples": dataset.epoch_size,
        "round": {"batches": batches, "samples": samples, "global_batch_size": batch},
        "seq_len": settings.shape.seq_len,
        "freq": settings.freq,
        "warnings": validation.check_first_samples(),
    }


def layout_section(data: JobData) -> dict[str, Any]:
    """Which ranks read what."""
    layout, order = data.job.layout, data.opened.order
    return {
        **dataclasses.asdict(layout),
        "nodes": layout.nodes,
        "dp_world_size": layout.dp_world_size,
        "local_batch_size": data.job.training.local_batch_size,
        "samples_per_batch": order.local_batch_size,
        "batches_per_step": order.global_batch_size // order.local_batch_size // layout.dp_world_size,
        "global_batch_size": order.global_batch_size,
        "dp_ranks": [ranges(ranks) for ranks in layout.readers()],
    }


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as "0-3, 8-11"."""
    parts = []
    for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(parts)


def needs_section(data: JobData) -> dict[str, Any]:
    """What each node needs, in bytes of shared memory, of memory and of disk."""
    streams, config, layout = data.opened, data.config.config, data.job.layout
    in_flight = layout.ranks_per_node * config["num_workers"] * (config.get("prefetch_factor") or 2)  # as llm-foundry
    tensors = 3 if streams.spec.labels_are_ids else 4  # ids, labels, mask or documents; examples have both
    nodes = layout.world().num_nodes
    own_shards = streams.order.batching_method in ("random", "per_stream", "blend")
    own_shards &= int(streams.dataset.num_canonical_nodes or 1) % nodes == 0  # each node reads its own ranges only
    return {
        "shared_memory_order": 0 if streams.order.blend else 8 * streams.order.remaining(0),
        "shared_memory_shards": 9 * streams.dataset.num_shards,
        "shared_memory_batches": in_flight * tensors * 8 * streams.spec.rows * streams.spec.max_seq_len,
        "memory_to_order_an_epoch": ordering_bytes(streams.order, streams.dataset.epoch_size),
        "cache": stored_bytes(data, cached=True) // (nodes if own_shards else 1),
        "cache_limit": data.config.dataset.get("cache_limit"),
        "hashed_at_a_start": stored_bytes(data, cached=False) if any(data.config.hashes) else 0,
    }


def stored_bytes(data: JobData, cached: bool) -> int:
    """Bytes of all shards of the streams that have a cache, or of those that have none."""
    return sum(
        shard.get_persistent_size(stream["keep_zip"] or not cached)
        for number, (stream, folder) in enumerate(zip(data.config.streams.values(), data.config.folders, strict=True))
        if folder.is_copy == cached
        for shard in shards_of(data.opened.dataset, number)
    )


def settings_section(data: JobData) -> list[dict[str, Any]]:
    """Each setting that decides what is read and how, its value, and who has set it."""
    resolved, recorded = flat(data.config.config), data.opened.fingerprint
    owners = dict.fromkeys(resolved, "this project's default") | DERIVED
    owners |= dict.fromkeys(flat(data.file.config), data.config.source)
    more = {key: value for key, value in recorded.items() if key.startswith("dataset.") and key not in resolved}
    rows = [(key, value, owners.get(key, "streaming's default")) for key, value in (resolved | more).items()]
    return [dict(zip(("setting", "value", "owner"), row, strict=True)) for row in rows] + data.job_settings


def checks_section(data: JobData) -> dict[str, list[str]]:
    """What has been checked just now, as at each start, and what a job checks while it reads."""
    spec = data.opened.spec
    hashes = "".join(f", {name}" for name in sorted(filter(None, set(data.config.hashes))))
    now = [
        "tokenizer: TorchTitan and transformers read the same ids from the same assets",
        "index of each stream: its form, files inside of its folder, no pickled columns, columns that a batch can have",
        "first samples of each stream, if they are ids: their type, their length, text of this tokenizer",
    ]
    ranks, checkpoints = data.job.layout.world_size, data.job.checkpoints.enable
    later = {
        f"shards, when fetched and at each start: bytes, samples{hashes}": True,
        f"each batch: shape [{spec.rows}, {spec.max_seq_len}], ids 0 to {spec.vocab_size - 1:,}": True,
        "each epoch: as many samples as the index says": not data.opened.order.blend,
        f"first batch after a start: settings of all {ranks} ranks; equal batches of peers": ranks > 1,
        "checkpoint, when loaded: streams, order, lengths and tokenizer are those it was written with": checkpoints,
    }
    return {"now": now, "later": [check for check, is_made in later.items() if is_made]}


def resume_section(data: JobData, checkpoint: Checkpoint, history: History | None) -> dict[str, Any]:
    """Where a checkpoint's run stands, what has changed since, and what a start would do with it."""
    order, settings, state = data.opened.order, data.job.checkpoints, checkpoint.state
    differences = checkpoint.differences(data)
    anew = "dataloader" in settings.exclude_from_loading
    done = 0 if "train_state" in settings.exclude_from_loading else checkpoint.step
    epoch, sample = history.position(done)[1:] if history else state[:2] if state else (0, 0)
    left = order.remaining(sample) if history and not order.blend else None
    saved_batch = state and state.global_batch_size
    return {
        "checkpoint": checkpoint.folder,
        "step": checkpoint.step,
        "epoch": epoch,
        "sample_in_epoch": sample,
        "steps_left_in_epoch": None if left is None else left // order.global_batch_size,
        "steps_done": done,
        "steps_left": max(0, data.job.steps - done),
        "is_loaded": settings.enable,
        "streams_are_loaded": settings.enable and not anew,
        "begins_anew": anew,
        "differences": [dict(zip(("setting", "checkpoint", "now"), row, strict=True)) for row in differences],
        "order_survives": not differences,
        "global_batch_size": {"checkpoint": saved_batch, "now": order.global_batch_size},
        "same_batches": not differences and saved_batch == order.global_batch_size,
    }
