"""What a job will read and need, from its settings and the streams' indexes alone."""

import dataclasses
import itertools
from collections.abc import Sequence, Set
from typing import Any

from examples.mosaic_streaming import sampling
from examples.mosaic_streaming.checkpoint import History, changes_ahead, plan_ahead, shards_of
from examples.mosaic_streaming.config import Plan, flat
from examples.mosaic_streaming.preview.checkpoint import Checkpoint
from examples.mosaic_streaming.preview.job_data import JobData
from examples.mosaic_streaming.preview.ledger import first_repeat, in_common
from examples.mosaic_streaming.preview.open_data import open_validation

DERIVED = {
    "dataset.num_canonical_nodes": "this project's default",
    "dataset.max_seq_len": "derived from training.seq_len",
    "dataset.replication": "derived from [parallelism]",
    "dataset.decoder_only_format": "derived: the models are decoders",
}


def plan_report(data: JobData, checkpoint: Checkpoint | None, history: History | None) -> dict[str, Any]:
    """All sections of the plan but its warnings; `history` is None where a start would be refused."""
    order, layout = data.opened.order, data.job.layout
    samples, folders = order.remaining(0), [{folder[2:] for folder in stage.config.folders} for stage in data.stages]
    needs = [needs_section(stage, set().union(*folders[: stage.stage])) for stage in data.stages]
    adds_up = ("cache", "hashed_at_a_start", "shared_memory_shards")  # the others are of one stage at a time
    epoch = {"left_out": data.opened.dataset.epoch_size - samples, "steps": samples // order.global_batch_size}
    begins_anew = len(data.stages) > 1 and not order.blend  # in the second stage
    return {
        "streams": [stream for stage in data.stages for stream in streams_section(stage, history)],
        "stages": [stage_section(stage, history) for stage in data.stages],
        "skips": skips_section(data.plan, history.steps_before if history else 0),
        "in_common": {"samples": in_common(data, history)} if history and begins_anew else None,
        "epoch": None if order.blend else epoch | amounts(data.opened.tokens_of_a_sample, samples),
        "run": run_section(data, history),
        "validation": validation_section(data),
        "layout": {
            **dataclasses.asdict(layout),
            "nodes": layout.nodes,
            "dp_world_size": layout.dp_world_size,
            "local_batch_size": data.job.training.local_batch_size,
            "samples_per_batch": order.local_batch_size,
            "batches_per_step": order.global_batch_size // order.local_batch_size // layout.dp_world_size,
            "global_batch_size": order.global_batch_size,
            "dp_ranks": [ranges(ranks) for ranks in layout.readers()],
        },
        "needs": {key: max((need[key] for need in needs), key=lambda value: value or 0) for key in needs[0]}
        | {key: sum(need[key] for need in needs) for key in adds_up},
        "settings": settings_section(data),
        "checks": checks_section(data),
        "resume": resume_section(data, checkpoint, history) if checkpoint else None,
    }


def steps_of(data: JobData, history: History | None) -> range:
    """The steps of a run that read a stage."""
    before = history.steps_before if history else 0
    begins = [*(stage.from_step + before for stage in data.plan.stages), sampling.ENDLESS]
    return range(max(1, begins[data.stage]), max(1, min(begins[data.stage + 1], data.job.steps + 1)))


def streams_section(data: JobData, history: History | None) -> list[dict[str, Any]]:
    """The streams of a stage, and how often each has been read at its end."""
    opened, steps, passes = data.opened, steps_of(data, history), dict[str, float]()
    if opened.order.blend and steps and history and history.samples_before is not None:
        sample = history.position(steps[-1]).sample_in_epoch
        passes = sampling.passes_of(opened.names, opened.dataset, history.orders[data.stage], sample)
    shares = sampling.stream_shares(opened.names, opened.dataset, opened.order, opened.tokens_of_a_sample)
    return [
        share._asdict() | files_of(data, number) | {"passes_of_run": passes.get(share.name), "stage": data.stage + 1}
        for number, share in enumerate(shares)
    ]


def stage_section(data: JobData, history: History | None) -> dict[str, Any]:
    """What a stage reads: its steps, its samples and their tokens, as far as these are known."""
    steps, samples = steps_of(data, history), None
    if history and (not steps or steps[0] > history.first_step):
        samples = history.samples_between(steps.start - 1, steps.stop - 1)
    return {
        "stage": data.stage + 1,
        "file": data.config.source,
        "from_step": steps.start,
        "first_batch": data.plan.begins[data.stage] + 1,
        "last_step": steps[-1] if steps else None,
        "steps": len(steps),
        **amounts(data.opened.tokens_of_a_sample, samples),
    }


def skips_section(plan: Plan, steps_before: int = 0) -> list[dict[str, Any]]:
    """What is skipped, and the step that reads on behind it, in a run that begins the plan after some steps."""
    before = {skip: steps_before + plan.steps(skip.last) + 1 for skip in plan.skips}
    return [skip._asdict() | {"step": step, "text": str(skip)} for skip, step in before.items()]


def files_of(data: JobData, stream: int) -> dict[str, Any]:
    """The source of a stream, its shards, and their bytes as they are read."""
    shards = shards_of(data.opened.dataset, stream)
    size = sum(raw.bytes for shard in shards for raw, _ in shard.file_pairs)
    return {"source": data.config.sources[data.opened.names[stream]], "shards": len(shards), "bytes": size}


def amounts(size: int | None, samples: int | None, prefix: str = "") -> dict[str, int | None]:
    """A number of samples, and of their tokens, given those of each, as far as these are known."""
    return {f"{prefix}samples": samples, f"{prefix}tokens": samples * size if samples is not None and size else None}


def run_section(data: JobData, history: History | None) -> dict[str, Any]:
    """What all steps read, and when a sample is read for the second time; values are None where that isn't known."""
    steps, order = data.job.steps, data.opened.order
    repeat, exact = first_repeat(data, history) if history else (None, False)
    samples = history.samples(steps) if history else None
    has_epochs = not order.blend and len(data.stages) == 1
    sizes = {stage.opened.tokens_of_a_sample for stage in data.stages}
    size = sizes.pop() if len(sizes) == 1 else None  # or tokens would be those of one stage
    return {
        "steps": steps,
        "global_batch_size": order.global_batch_size,
        "since_step": history.first_step if history and history.begins_anew else 0,
        **amounts(size, samples),
        "epochs": samples / order.remaining(0) if has_epochs and samples is not None else None,
        "first_repeat_step": repeat,
        "first_repeat_epoch": history.slice(repeat).epoch if history and repeat else None,
        **amounts(size, history.samples(repeat - 1) if history and repeat else None, "first_repeat_"),
        "first_repeat_is_exact": exact,
        "fits": steps < repeat if repeat and (exact or steps < repeat) else None,
    }


def validation_section(data: JobData) -> dict[str, Any] | None:
    """The validation streams, and what a round reads of them; raises what a start would refuse them with."""
    settings, validation = data.job.validation, open_validation(data)
    if not settings or not validation:
        return None
    batch, dataset = validation.opened.order.global_batch_size, validation.opened.dataset
    batches, samples = sampling.size_of_round(dataset.epoch_size, batch, settings.steps)
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


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as "0-3, 8-11"."""
    groups = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return ", ".join(str(first) if not more else f"{first}-{more[-1]}" for first, *more in runs)


def needs_section(data: JobData, earlier: Set[Any] = frozenset()) -> dict[str, Any]:
    """What a stage needs on each node, in bytes of shared memory, of memory and of disk.

    Streams in folders that earlier stages have are left out of what adds up.
    """
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
        "memory_to_order_an_epoch": sampling.ordering_bytes(streams.order, streams.dataset.epoch_size),
        "cache": stored_bytes(data, True, earlier) // (nodes if own_shards else 1),
        "cache_limit": data.config.dataset.get("cache_limit"),
        "hashed_at_a_start": stored_bytes(data, False, earlier) if any(data.config.hashes) else 0,
    }


def stored_bytes(data: JobData, cached: bool, earlier: Set[Any]) -> int:
    """Bytes of all shards of the streams that have a cache, or of those that have none, but for some folders."""
    return sum(
        shard.get_persistent_size(stream["keep_zip"] or not cached)
        for number, (stream, folder) in enumerate(zip(data.config.streams.values(), data.config.folders, strict=True))
        if folder.is_copy == cached and folder[2:] not in earlier
        for shard in shards_of(data.opened.dataset, number)
    )


def settings_section(data: JobData) -> list[dict[str, Any]]:
    """Each setting that decides what is read and how, its value, and who has set it."""
    rows = []
    for stage, read in zip(data.stages, data.plan.stages, strict=True):
        resolved, recorded = flat(stage.config.config), stage.opened.fingerprint
        place = f"stage {stage.stage + 1}, " if len(data.stages) > 1 else ""
        owners = dict.fromkeys(resolved, "this project's default") | DERIVED
        owners |= dict.fromkeys(flat(read.file.config), stage.config.source)
        more = {key: value for key, value in recorded.items() if key.startswith("dataset.") and key not in resolved}
        for key, value in (resolved | more).items():
            rows.append({"setting": place + key, "value": value, "owner": owners.get(key, "streaming's default")})
    return rows + data.job_settings


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
    settings, state, differences = data.job.checkpoints, checkpoint.state, checkpoint.differences(data)
    anew = "dataloader" in settings.exclude_from_loading
    done = 0 if "train_state" in settings.exclude_from_loading else checkpoint.step
    place = next(history.slices(done)) if history else None
    epoch, sample = (place.epoch, place.begin) if place else state[:2] if state else (0, 0)
    order = data.stages[place.stage if place else 0].opened.order
    left = order.remaining(sample) // order.global_batch_size if place and not order.blend else None
    saved_batch = state and state.global_batch_size
    size = data.orders[min(len(state.past) if state else 0, len(data.stages) - 1)].global_batch_size
    return {
        "checkpoint": checkpoint.folder,
        "step": checkpoint.step,
        "stage": place.stage + 1 if place else None,
        "global_batch": place.batch + 1 if place else None,
        "epoch": epoch,
        "sample_in_epoch": sample,
        "steps_left_in_epoch": left,
        "steps_done": done,
        "steps_left": max(0, data.job.steps - done),
        "is_loaded": settings.enable,
        "streams_are_loaded": settings.enable and not anew,
        "begins_anew": anew,
        "differences": [dict(zip(("setting", "checkpoint", "now"), row, strict=True)) for row in differences],
        "order_survives": not differences,
        "global_batch_size": {"checkpoint": saved_batch, "now": size},
        "same_batches": not differences and saved_batch == size,
        "plan_changes": changes_ahead(state, plan_ahead(data.plan, state.steps, data.fingerprints)) if state else "",
    }
