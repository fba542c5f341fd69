"""Opens the streams of a job in one process, on any machine, for any number of ranks.

The caches of jobs are neither used nor changed: what has to be fetched or unpacked goes into a private folder, which is
removed with its process. What a killed process has left is removed by the next.
"""

import contextlib
import copy
import dataclasses
import fcntl
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from streaming import StreamingDataset

from examples.mosaic_streaming import batch, dataloader, titan
from examples.mosaic_streaming.config import (
    WITHOUT_WORKERS,
    ResolvedLoader,
    is_local,
    resolve_stages,
    streams_of,
    without_token_ids,
)
from examples.mosaic_streaming.distributed import AbortChannel, draw_number
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.preview.job_data import JobData
from examples.mosaic_streaming.sampling import Order
from examples.mosaic_streaming.shards import fetch_index, make_stream
from examples.mosaic_streaming.tokenizer import build_tokenizer, build_transformers_tokenizer, check_tokenizer
from examples.mosaic_streaming.upstream.large_index import without_collection
from examples.mosaic_streaming.upstream.shared_memory import remove_stale
from examples.mosaic_streaming.validator import resolve_validation

GPUS_OF_A_NODE = 8  # unless the user says another number
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
"""What torchrun tells its processes. Here each of them would be wrong."""

PREFIX, LOCK = "mosaic_streaming-preview-", "in_use"
"""How the names of private folders begin, and the file in each of them that its process keeps locked."""


@contextlib.contextmanager
def open_job_data(
    loaded: titan.LoadedJob, world_size: int, ranks_per_node: int | None, channel: AbortChannel
) -> Iterator[JobData]:
    """A context in which the streams of a job can be read; `check_ranks` explains the nodes.

    ConfigError if the job would not start so, or not on so many ranks; DataError if an index can't be read.
    """
    for name in TORCHRUN_VARIABLES:
        os.environ.pop(name, None)
    ranks_per_node = check_ranks(world_size, ranks_per_node)
    titan.check_job(loaded, world_size)
    plan, validation, job = loaded.train, loaded.validation, titan.make_job(loaded, world_size, ranks_per_node)
    configs = resolve_stages(plan, job, loaded.position)
    titan_tokenizer = build_tokenizer(job.assets)
    tokenizer = build_transformers_tokenizer(job.assets, titan_tokenizer)
    check_tokenizer(titan_tokenizer, job)
    held_out = resolve_validation(validation, job, configs) if validation and job.validation else None
    settings, stages = titan.settings_of(loaded), list[JobData]()
    remove_stale()
    with private_folder(channel) as folder:
        for number, config in enumerate(configs):
            config = without_token_ids(config, tokenizer)
            own = with_own_caches(config, os.path.join(folder, f"stage-{number}"))
            own = dataloader.fill_in_packing_ratio(own, job, tokenizer, lambda choose: choose())
            if "packing_ratio" in own.dataset:
                config = config.with_settings(packing_ratio=own.dataset["packing_ratio"])
            with without_collection():
                opened = dataloader.open_loader(job, own, titan_tokenizer, tokenizer, draw_number(), "The preview")
            of_run = (tokenizer, folder, job.training, held_out, plan, number, stages)
            stages.append(JobData(job, settings, config, opened, *of_run))
        yield stages[0]


def open_validation(data: JobData) -> JobData | None:
    """The validation streams of a job, if it has any, with ids of their own; raises as `open_job_data` does."""
    if not data.validation or not data.job.validation:
        return None
    config, shape = without_token_ids(data.validation, data.tokenizer), data.job.validation.shape
    rows = shape.local_batch_size
    own = with_own_caches(config, os.path.join(data.folder, "validation"))
    loader = dataloader.build_foundry_loader(own, data.tokenizer, rows, draw_number())
    assert isinstance(loader.dataset, StreamingDataset)
    order = Order("random", rows * data.job.layout.dp_world_size, rows, loader.dataset.epoch_size)
    spec = batch.spec_of(data.job, shape, own, data.tokenizer, "The preview")
    opened = dataloader.OpenLoader(own, loader, order, spec, {})
    return dataclasses.replace(data, config=config, opened=opened, validation=None, shape=shape, stages=[])


def check_ranks(world_size: int, ranks_per_node: int | None) -> int:
    """The ranks of each node, if None up to 8; raises ConfigError if the world size is no multiple of them."""
    if ranks_per_node is None:
        ranks_per_node = world_size if world_size <= GPUS_OF_A_NODE else math.gcd(world_size, GPUS_OF_A_NODE)
    if world_size < 1 or ranks_per_node < 1 or world_size % ranks_per_node:
        raise ConfigError(
            f"--world-size {world_size} with --ranks-per-node {ranks_per_node}: expected a multiple of the second."
        )
    return ranks_per_node


def with_own_caches(loader: ResolvedLoader, folder: str) -> ResolvedLoader:
    """A configuration that reads the same streams in this process, with their indexes fetched.

    A stream in a folder of this machine is read there if nothing has to be unpacked beside it or evicted. The others
    are read through caches in `folder`.
    """
    config = copy.deepcopy(loader.config) | WITHOUT_WORKERS
    dataset = config["dataset"]
    dataset["replication"] = 1
    sections = list(streams_of(dataset).values())
    for number, (settings, label) in enumerate(zip(loader.streams.values(), loader.labels, strict=True)):
        local, source = is_local(settings), settings.get("remote") or settings["local"]
        source = os.path.abspath(source) if local else source
        own = {"remote": source, "local": os.path.join(folder, str(number))}
        parts = fetch_index(make_stream(settings | own, label), bool(dataset.get("allow_unsafe_types")))
        if local and not any(part.packed for part in parts) and not dataset.get("cache_limit"):
            own["local"] = source
        sections[number] |= own
    return dataclasses.replace(loader, config=config)


@contextlib.contextmanager
def private_folder(channel: AbortChannel) -> Iterator[str]:
    """Make a folder, and remove those that this user's killed processes have left; ConfigError if none can be made."""
    try:
        for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):
                remove_stale_folder(folder)
        own = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigError(f"No temporary folder can be made ({error}): set TMPDIR to a folder with space.") from error
    with own as mine, open(f"{mine}/{LOCK}.part", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        os.rename(lock.name, f"{mine}/{LOCK}")  # so that nobody sees it unlocked
        try:
            yield mine
        finally:
            channel.begin_shutdown()


def remove_stale_folder(folder: Path) -> None:
    """Remove a folder of this user's whose process has ended; raise OSError for one that is in use.

    The temporary folder is open to all users: a link is not followed, and a pipe in place of the lock can't block.
    """
    with open(os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as lock:
        found = os.fstat(lock.fileno())
        if {found.st_uid, folder.lstat().st_uid} == {os.getuid()} and stat.S_ISREG(found.st_mode):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)  # which refuses a link
