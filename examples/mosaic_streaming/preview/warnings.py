"""Settings that are allowed, but known to hurt, and why."""

from collections.abc import Iterator, Mapping
from typing import Any

from streaming.base.util import bytes_to_int

from examples.mosaic_streaming.batch import DROP_WARN_FRACTION
from examples.mosaic_streaming.checkpoint import shards_of
from examples.mosaic_streaming.config import Job, warnings_of, warnings_of_plan, warnings_of_validation
from examples.mosaic_streaming.preview.job_data import JobData
from examples.mosaic_streaming.preview.plan import needs_section
from examples.mosaic_streaming.shards import ADD_HASHES
from examples.mosaic_streaming.titan import own_checkpoints

MANY_PASSES = 4
"""Over the same text; one more teaches next to nothing (Scaling Data-Constrained Language Models, arXiv 2305.16264)."""


def plan_warnings(data: JobData, plan: Mapping[str, Any]) -> list[str]:
    """What a job would warn of, and what would hurt it later, given the other sections of its plan."""
    warnings = warnings_of_plan(data.plan, data.job)
    for stage in data.stages:
        own = dict(plan) | {"streams": [stream for stream in plan["streams"] if stream["stage"] == stage.stage + 1]}
        warnings += warnings_of(stage.config, data.job, data.tokenizer, stage.opened.columns)
        warnings += [*stage_warnings(stage, own), *cache_warnings(stage, own)]
    warnings += job_warnings(data)
    if data.validation:
        warnings += plan["validation"]["warnings"]
        warnings += warnings_of_validation(data.validation, [stage.config for stage in data.stages])
    return [*warnings, *checkpoint_warnings(data.job, plan["resume"] is not None)]


def stage_warnings(data: JobData, plan: Mapping[str, Any]) -> Iterator[str]:
    """What an epoch leaves out, in which order the rest comes, and what is read too often, or unchecked."""
    left_out, samples = plan["epoch"]["left_out"] if plan["epoch"] else 0, data.opened.dataset.epoch_size
    batch, ranges = data.opened.order.global_batch_size, int(data.opened.dataset.num_canonical_nodes or 1)
    if left_out > DROP_WARN_FRACTION * samples:
        yield (
            f"An epoch leaves out {left_out:,} of {samples:,} samples: they fill no global batch, or no turn of "
            f"dataset.num_canonical_nodes = {ranges}. Lower one of them."
        )
    if len(plan["streams"]) > 1 and data.opened.order.batching_method == "random" and batch < ranges:
        yield (
            f"A global batch has {batch} samples, and dataset.num_canonical_nodes = {ranges} ranges take turns, each "
            "within a stream or two: single batches are not mixed as the whole is. Lower num_canonical_nodes to the "
            "batch or less, or raise training.global_batch_size."
        )
    if not data.opened.dataset.shuffle:
        yield (
            "dataset.shuffle is false: samples come as they were written, neighbours of one source in one batch. Set "
            "it to true, unless they were shuffled before."
        )
    for number, stream in enumerate(plan["streams"]):
        passes = stream["passes_of_run"] or (stream["passes"] or 0) * (plan["run"]["epochs"] or 0)
        if passes > MANY_PASSES:
            yield (
                f"{stream['name']} is read {passes:.1f} times: beyond about {MANY_PASSES} passes, the same text "
                "teaches next to nothing. Lower its weight or training.steps, or add data."
            )
        if not data.config.hashes[number]:
            raw = shards_of(data.opened.dataset, number)[0].file_pairs[0][0]
            has = f"The stream has {', '.join(raw.hashes)}" if raw.hashes else f"Add hashes: {ADD_HASHES}"
            yield f"{stream['name']} is read without validate_hash: only sizes are compared, not contents. {has}."


def cache_warnings(data: JobData, plan: Mapping[str, Any]) -> Iterator[str]:
    """What makes nodes fetch more than their share, or the same again."""
    dataset, cache, order = data.opened.dataset, needs_section(data)["cache"], data.opened.order
    nodes, ranges = data.job.layout.world().num_nodes, int(dataset.num_canonical_nodes or 1)
    if not cache:
        return
    if ranges % nodes:
        yield (
            f"dataset.num_canonical_nodes = {ranges} is no multiple of {nodes}, the machines that share out the "
            "samples: several of them fetch the same shards. A multiple would keep each to its own."
        )
    if nodes > 1 and order.batching_method in ("stratified", "device_per_stream"):
        method = f"dataset.batching_method = {order.batching_method!r}"
        yield f"{method}: each of {nodes} machines fetches shards of all ranges."
    limit = bytes_to_int(data.config.dataset.get("cache_limit") or 0)
    sizes, blocks = [dataset.epoch_size], [int(dataset.shuffle_block_size or 1)]
    if order.blend:
        sizes, blocks = dataset.samples_per_stream.tolist(), order.blend.shuffle_blocks
    block = sum(min(size, -(-of_stream // ranges)) for size, of_stream in zip(blocks, sizes, strict=True))
    total = sum(stream["bytes"] for stream in plan["streams"])
    in_use = max(1, ranges // nodes) * block * total // dataset.num_samples if dataset.shuffle else 0
    if limit and limit < min(in_use, cache):
        yield (
            f"dataset.cache_limit = {limit:,} bytes, but a shuffle over blocks of {block:,} samples in {ranges} ranges "
            f"keeps about {in_use:,} bytes in use on each machine: shards are evicted and fetched again within a "
            "pass. Raise it, or lower dataset.shuffle_block_size."
        )


def job_warnings(data: JobData) -> Iterator[str]:
    """What makes the training process wait, or keeps a run from going on."""
    checkpoints = data.job.checkpoints
    if data.config.config["num_workers"] == 0:
        yield "num_workers = 0: the training process reads by itself, and the model waits for it. Set 1 or more."
    if not checkpoints.enable:
        yield "checkpoint.enable = false: a run that stops begins anew."
    elif checkpoints.last_save_model_only:
        yield (
            "checkpoint.last_save_model_only = true, TorchTitan's default: no run can go on from this one's last "
            "checkpoint. Set it to false."
        )
    if "dataloader" in checkpoints.exclude_from_loading:
        yield "checkpoint.exclude_from_loading has dataloader: each start reads the streams from their beginning."


def checkpoint_warnings(job: Job, reads_one: bool) -> Iterator[str]:
    """That a job has checkpoints, where a report is about a new run."""
    if not reads_one and (folder := own_checkpoints(job.checkpoints)):
        yield (
            f"This report is for a new run whose settings never change. {folder} has checkpoints: for the run that "
            f"goes on from them, add --checkpoint {folder}."
        )
