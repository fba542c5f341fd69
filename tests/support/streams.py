"""Small MDS streams whose every sample tells its own number, and loaders over them in the present rank."""

import atexit
import copy
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from streaming import MDSWriter

from examples.mosaic_streaming.checkpoint.history import History, Segment
from examples.mosaic_streaming.config.files import LoaderFile
from examples.mosaic_streaming.config.job import BatchShape, Job
from examples.mosaic_streaming.config.loader import ResolvedLoader, resolve
from examples.mosaic_streaming.config.plan import Plan, resolve_stages
from examples.mosaic_streaming.dataloader import MosaicDataLoader, build_mosaic_dataloader
from examples.mosaic_streaming.distributed.abort import AbortChannel
from examples.mosaic_streaming.sampling.order import Order
from examples.mosaic_streaming.shards.cache import MARKER
from examples.mosaic_streaming.titan import make_job
from examples.mosaic_streaming.tokenizer import build_tokenizer
from tests.support.ranks import run_rank_values
from tests.support.titan import TOKENIZER as TOKENIZER
from tests.support.titan import job_config, loaded

WEIGHTS: dict[str, list[dict[str, float]]] = {
    "unweighted": [{}, {}],
    "proportion": [{"proportion": 0.25}, {"proportion": 0.75}],
    "repeat": [{"repeat": 1.5}, {"repeat": 0.5}],
    "choose": [{"choose": 61}, {"choose": 20}],
}

BATCHING = ["random", "per_stream", "stratified", "device_per_stream"]

METHODS = [*BATCHING, "blend"]
"""Those of streaming, and this project's own."""

SHUFFLE = ["py1e", "py1br", "py1s", "py2s", "naive"]

SEQ_LEN = 16
COLUMNS = {"tokens": "ndarray:int32"}
FIRST_ID = 16
"""Below are ids with a meaning."""


def sample_tokens(sample: int, length: int = SEQ_LEN + 1) -> NDArray[np.int32]:
    """The tokens of one sample: its number in the first, which makes it known, then random ones."""
    tokens = np.random.default_rng(sample).integers(FIRST_ID, 2048, length, dtype=np.int32)
    tokens[0] = FIRST_ID + sample
    return tokens


def write_stream(
    folder: Path,
    samples: int,
    length: int = SEQ_LEN + 1,
    first: int = 0,
    hashes: Sequence[str] = ("xxh64",),
    columns: dict[str, str] = COLUMNS,
    compression: str | None = None,
) -> Path:
    """Write a stream of token samples in several shards, numbered from `first` on."""
    settings: dict[str, Any] = {"size_limit": 1024, "hashes": list(hashes), "compression": compression}
    with MDSWriter(out=str(folder), columns=columns, **settings) as writer:
        for sample in range(first, first + samples):
            dtype = columns["tokens"].partition(":")[2]
            writer.write({"tokens": sample_tokens(sample, length).astype(dtype)})
    return folder


def mark(cache: Path) -> Path:
    """Have a folder taken for a cache, whatever is in it."""
    cache.mkdir(exist_ok=True)
    (cache / MARKER).touch()
    return cache


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Each file of a folder, hidden ones too: when it was written, and its content."""
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def write_tokens(folder: Path, rows: list[list[int]]) -> Path:
    """Write a stream of just these samples."""
    with MDSWriter(out=str(folder), columns=COLUMNS) as writer:
        for row in rows:
            writer.write({"tokens": np.array(row, np.int32)})
    return folder


def job(local_batch_size: int = 2, global_batch_size: int = -1, seq_len: int = SEQ_LEN) -> Any:
    """TorchTitan's config of a job, for loaders."""
    return job_config(
        training__local_batch_size=local_batch_size,
        training__global_batch_size=global_batch_size,
        training__seq_len=seq_len,
    )


def loader_config(folder: Path, num_workers: int = 0, **dataset: Any) -> dict[str, Any]:
    """A configuration for llm-foundry's text loader."""
    settings = {"local": str(folder), "num_canonical_nodes": 1, **dataset}
    return {"name": "text", "num_workers": num_workers, "dataset": settings}


def mixture(streams: dict[str, dict[str, Any]], num_workers: int = 0, **dataset: Any) -> dict[str, Any]:
    """A configuration of several streams, shuffled."""
    settings = {"streams": streams, "shuffle": True, "num_canonical_nodes": 4, **dataset}
    return {"name": "text", "num_workers": num_workers, "dataset": settings}


def weigh(streams: dict[str, dict[str, Any]], weights: str) -> dict[str, dict[str, Any]]:
    """Two streams with their weights in one of the ways of `WEIGHTS`."""
    return {name: stream | weight for (name, stream), weight in zip(streams.items(), WEIGHTS[weights], strict=True)}


def resolved(
    config: dict[str, Any], local_batch_size: int = 8, replication: int = 1, source: str = "loader.toml"
) -> ResolvedLoader:
    """The complete configuration of a loader for rows of `SEQ_LEN`."""
    return resolve(LoaderFile(config, source), BatchShape("training", local_batch_size, SEQ_LEN), replication)


def described(job_config: Any, dp_ranks: Sequence[int] = (0,), ranks_per_node: int | None = None) -> Job:
    """A job on ranks with these dp ranks: those of one are neighbours, as under TP, or apart, as under PP, or both.

    Its batches are handed out whole, also where a pipeline would get parts.
    """
    peers = len(dp_ranks) // len(set(dp_ranks))
    for pp in (1, peers, 2):
        job_config = copy.deepcopy(job_config)
        job_config.parallelism.pipeline_parallel_degree = pp
        job_config.parallelism.tensor_parallel_degree = peers // pp
        made = make_job(loaded(job_config, LoaderFile({}, "")), len(dp_ranks), ranks_per_node or len(dp_ranks))
        if [made.layout.dp_rank(rank) for rank in range(len(dp_ranks))] == list(dp_ranks):
            return dataclasses.replace(made, microbatches=1)
    raise ValueError(f"no layout has {dp_ranks}")


def build_loader(
    config: dict[str, Any] | Plan,
    job_config: Any = None,
    dp_ranks: Sequence[int] = (),
    channel: AbortChannel | None = None,
) -> MosaicDataLoader:
    """The loader of the present rank, given the dp ranks of all ranks; without, they all read different samples."""
    job_config = job_config or job()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    dp_ranks = dp_ranks or range(dist.get_world_size())
    made = described(job_config, dp_ranks, int(os.environ["LOCAL_WORLD_SIZE"]))
    plan = config if isinstance(config, Plan) else Plan.of(LoaderFile(config, "loader.toml"))
    tokenizer, dp_rank = build_tokenizer(made.assets), dp_ranks[dist.get_rank()]
    loader = build_mosaic_dataloader(
        made, dp_rank, tokenizer, plan, resolve_stages(plan, made), channel or AbortChannel()
    )
    atexit.register(loader.close)  # or its workers find out seconds later that their rank is gone
    return loader


def read_samples(loader: MosaicDataLoader, batches: int) -> list[list[int]]:
    """The numbers of the samples in the next batches."""
    iterator = iter(loader)
    return [(next(iterator)[0]["input"][:, 0] - FIRST_ID).tolist() for _ in range(batches)]


def history(order: Order, *segments: Segment) -> History:
    """The history of a run of one stage."""
    return History(Plan.of(LoaderFile({}, "loader.toml")), (order,), segments)


@dataclass
class Reading:
    """What ranks have read: the samples of each global batch, sorted, and the state after it."""

    samples: list[list[int]]
    states: list[dict[str, str]]


@dataclass(frozen=True)
class Turn:
    """What a loader is to read: of a configuration, so many global batches, from a state on if there is one."""

    config: dict[str, Any] | Plan
    steps: int
    state: dict[str, str] | None = None


def read_steps(
    config: dict[str, Any] | Plan, steps: int, *, state: dict[str, str] | None = None, **options: Any
) -> Reading:
    """Read global batches in ranks of their own; the options are those of `read_each`."""
    [reading] = read_each([Turn(config, steps, state)], **options)
    return reading


def read_each(
    turns: Sequence[Turn],
    *,
    dp_ranks: Sequence[int] = (0,),
    nodes: int = 1,
    total: int = 8,
    local: int | None = None,
) -> list[Reading]:
    """Read with one loader after another, in ranks of their own.

    All peers have to get the same, and all ranks to save the same.

    Args:
        turns: what to read.
        dp_ranks: the dp rank of each rank.
        nodes: machines that the ranks are spread over.
        total: sequences of a global batch.
        local: sequences per dp rank and batch; without, a rank's whole share.
    """
    dp = len(set(dp_ranks))
    local = local or total // dp

    def read(turn: Turn, channel: AbortChannel) -> tuple[list[list[int]], list[dict[str, str]]]:
        loader = build_loader(turn.config, job(local, total), list(dp_ranks), channel)
        if turn.state:
            loader.load_state_dict(turn.state)
        batches, samples, states = iter(loader), [], []
        for _ in range(turn.steps):
            accumulated = [next(batches)[0]["input"][:, 0] - FIRST_ID for _ in range(total // local // dp)]
            samples.append([sample for batch in accumulated for sample in batch.tolist()])
            states.append(loader.state_dict())
        loader.close()
        return samples, states

    def read_all() -> list[tuple[list[list[int]], list[dict[str, str]]]]:
        channel = AbortChannel()
        return [read(turn, channel) for turn in turns]

    ranks = run_rank_values(read_all, len(dp_ranks), nodes)
    return [merged([rank[number] for rank in ranks], dp_ranks) for number in range(len(turns))]


def merged(ranks: list[tuple[list[list[int]], list[dict[str, str]]]], dp_ranks: Sequence[int]) -> Reading:
    """What ranks have read together, given the samples and states of each."""
    assert all(states == ranks[0][1] for _, states in ranks)
    of_dp = {dp_rank: samples for dp_rank, (samples, _) in zip(dp_ranks, ranks, strict=True)}
    assert all(of_dp[dp_rank] == samples for dp_rank, (samples, _) in zip(dp_ranks, ranks, strict=True))
    steps = range(len(ranks[0][1]))
    return Reading(
        [sorted(sample for samples in of_dp.values() for sample in samples[step]) for step in steps], ranks[0][1]
    )
