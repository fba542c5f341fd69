"""Settings that are allowed, but known to hurt, and why."""

from collections.abc import Iterator, Mapping
from typing import Any

from streaming.base.util import bytes_to_int
from torchtitan.config import JobConfig

from examples.mosaic_streaming.build import warnings_of
from examples.mosaic_streaming.checkpoint.state import shards_of
from examples.mosaic_streaming.config.loader import hashes_of
from examples.mosaic_streaming.dataloader import MUCH
from examples.mosaic_streaming.preview.checkpoint import own_checkpoints
from examples.mosaic_streaming.preview.offline import Offline
from examples.mosaic_streaming.shards.index import ADD_HASHES

MANY_PASSES = 4
"""Beyond so many over the same text, one more teaches next to nothing.

Source: Muennighoff et al., Scaling Data-Constrained Language Models, arXiv 2305.16264.
"""


def advice(offline: Offline, plan: Mapping[str, Any]) -> list[str]:
    """What a job would warn of, and what would hurt it later.

    Args:
        offline: the streams.
        plan: its other sections.
    """
    world_size = offline.layout.world_size
    return [
        *warnings_of(offline.job_config, offline.streams, offline.tokenizer, world_size),
        *of_order(offline, plan),
        *of_streams(offline, plan),
        *of_caches(offline, plan),
        *of_job(offline),
        *of_validation(offline, plan),
        *of_own_checkpoints(offline.job_config, plan["resume"] is not None),
    ]


def of_order(offline: Offline, plan: Mapping[str, Any]) -> Iterator[str]:
    """What an epoch leaves out, and in which order the rest comes."""
    left_out, samples = plan["epoch"]["left_out"], offline.streams.dataset.epoch_size
    if left_out > MUCH * samples:
        yield (
            f"An epoch leaves out {left_out:,} of {samples:,} samples: they fill no global batch, or no turn of "
            f"dataset.num_canonical_nodes = {offline.streams.dataset.num_canonical_nodes}. Lower one of them."
        )
    batch, ranges = offline.streams.order.global_batch_size, int(offline.streams.dataset.num_canonical_nodes or 1)
    if len(plan["streams"]) > 1 and offline.streams.order.batching_method == "random" and batch < ranges:
        yield (
            f"A global batch has {batch} samples, and dataset.num_canonical_nodes = {ranges} ranges take turns, each "
            "of which lies in a stream or two: single batches are not mixed as the whole is. Lower "
            "num_canonical_nodes to the batch or less, or raise training.global_batch_size."
        )
    if not offline.streams.dataset.shuffle:
        yield (
            "dataset.shuffle is false: samples come as they were written, neighbours of one source in one batch. Set "
            "it to true, unless they were shuffled before."
        )


def of_streams(offline: Offline, plan: Mapping[str, Any]) -> Iterator[str]:
    """What is read too often, or unchecked."""
    hashes = hashes_of(offline.config["dataset"])
    for number, stream in enumerate(plan["streams"]):
        passes = stream["passes"] * (plan["run"]["epochs"] or 0)
        if passes > MANY_PASSES:
            yield (
                f"{stream['name']} is read {passes:.1f} times: beyond about {MANY_PASSES} passes, the same text "
                "teaches next to nothing. Lower its weight or training.steps, or add data."
            )
        raw = shards_of(offline.streams.dataset, number)[0].file_pairs[0][0]
        if not hashes[number]:
            has = f"The stream has {', '.join(raw.hashes)}" if raw.hashes else f"Add hashes: {ADD_HASHES}"
            yield f"{stream['name']} is read without validate_hash: only sizes are compared, not contents. {has}."


def of_caches(offline: Offline, plan: Mapping[str, Any]) -> Iterator[str]:
    """What makes machines fetch more than their share, or the same again."""
    dataset, cache = offline.streams.dataset, plan["needs"]["cache"]
    nodes, ranges = offline.layout.world().num_nodes, int(dataset.num_canonical_nodes or 1)
    if not cache:
        return
    if ranges % nodes:
        yield (
            f"dataset.num_canonical_nodes = {ranges} is no multiple of {nodes}, the machines that share out the "
            "samples: several of them fetch the same shards. A multiple would keep each to its own."
        )
    if nodes > 1 and offline.streams.order.batching_method in ("stratified", "device_per_stream"):
        method = offline.streams.order.batching_method
        yield f"dataset.batching_method = {method!r}: each of {nodes} machines fetches shards of all ranges."
    limit = offline.config["dataset"].get("cache_limit")
    limit = bytes_to_int(limit) if isinstance(limit, str) else limit
    block = min(int(dataset.shuffle_block_size or 1), -(-dataset.epoch_size // ranges))
    total = sum(stream["bytes"] for stream in plan["streams"])
    at_once = max(1, ranges // nodes) * block * total // dataset.num_samples if dataset.shuffle else 0
    if limit and limit < min(at_once, cache):
        yield (
            f"dataset.cache_limit = {limit:,} bytes, but a shuffle over blocks of {block:,} samples in {ranges} ranges "
            f"keeps about {at_once:,} bytes in use on each machine: shards are evicted and fetched again within an "
            "epoch. Raise it, or lower dataset.shuffle_block_size."
        )


def of_job(offline: Offline) -> Iterator[str]:
    """What makes the training process wait, or a run end for good."""
    checkpoint = offline.job_config.checkpoint
    if offline.config["num_workers"] == 0:
        yield "num_workers = 0: the training process reads by itself, and the model waits for it. Set 1 or more."
    if not checkpoint.enable:
        yield "checkpoint.enable = false: a run that stops begins anew."
    elif checkpoint.last_save_model_only:
        yield (
            "checkpoint.last_save_model_only = true, TorchTitan's default: no run can go on from this one's last "
            "checkpoint. Set it to false."
        )
    if "dataloader" in checkpoint.exclude_from_loading:
        yield "checkpoint.exclude_from_loading has dataloader: each start reads the streams from their beginning."


def of_validation(offline: Offline, plan: Mapping[str, Any]) -> Iterator[str]:
    """What a job would warn of in its validation streams."""
    yield from (plan["validation"] or {"warnings": []})["warnings"]
    trained = {stream["source"] for stream in plan["streams"]}
    same = [stream["source"] for stream in (plan["validation"] or {"streams": []})["streams"]]
    if same := [source for source in same if source in trained]:
        yield f"Training reads the same as validation: {', '.join(same)}. The loss will tell less."


def of_own_checkpoints(job_config: JobConfig, reads_one: bool) -> Iterator[str]:
    """That a job has checkpoints, where a report is of a run that begins."""
    if not reads_one and (folder := own_checkpoints(job_config)):
        yield (
            f"This is a run that begins, and has had these settings in each step. {folder} has checkpoints: with "
            f"--checkpoint {folder} it is the run that goes on from them."
        )
