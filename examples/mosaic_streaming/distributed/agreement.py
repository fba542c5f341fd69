"""What ranks compare after each start: wrong data doesn't fail, it only trains badly."""

import hashlib
import json
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from examples.mosaic_streaming.batch import TitanBatch
from examples.mosaic_streaming.checkpoint import Fingerprint, differences, without_name
from examples.mosaic_streaming.errors import ConfigError, DataError, text_table

MAX_SHOWN = 8  # machines of a kind that a message names


def gather(*values: int) -> list[list[int]]:
    """The values of each rank, by rank; one small collective."""
    mine = torch.tensor(values, device=device_type)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return [one.tolist() for one in everyone]


def check_ranks_per_node() -> None:
    """Raise ConfigError, on all ranks, unless all machines have the same number of ranks."""
    machines: dict[int, list[str]] = {}  # the first rank of each, by their number of ranks
    sizes = gather(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    for rank, (local_rank, size) in enumerate(sizes):
        if local_rank == 0:
            machines.setdefault(size, []).append(str(rank))
    if len(machines) > 1:
        found = [
            f"{size} (first rank: {', '.join(firsts[:MAX_SHOWN])}{', …' if len(firsts) > MAX_SHOWN else ''})"
            for size, firsts in sorted(machines.items())
        ]
        raise ConfigError(
            f"Machines have unequal numbers of ranks: {'; '.join(found)}. Start each torchrun with the same "
            "--nproc_per_node."
        )


def check_peers(batch: TitanBatch, dp_rank: int, settings: Fingerprint, source: str) -> None:
    """Compare this rank's first batch with those of its peers, and its settings with everyone's.

    It takes one small collective, and a second one if ranks differ that must not: then all of them raise DataError.
    `source` is the file that configures the loader.
    """
    agreed = json.dumps({key: without_name(value) for key, value in settings.items()})
    tensors = [tensor for _, tensor in sorted(batch[0].items())] + [batch[1]]  # all that the model gets
    content = b"".join(tensor.cpu().numpy().tobytes() for tensor in tensors)
    dp_ranks, agreements, batches = zip(*gather(dp_rank, hash_of(agreed.encode()), hash_of(content)), strict=True)
    if ranks := unlike_first(agreements, [0] * len(agreements)):
        by_rank: list[Fingerprint] = [{}] * len(agreements)
        dist.all_gather_object(by_rank, settings)
        rows = [[str(rank), *row] for rank in ranks for row in differences(by_rank[0], by_rank[rank])]
        raise DataError(
            f"Ranks {ranks} don't read what rank 0 reads.\n"
            f"{text_table(['rank', 'setting', 'rank 0', 'this rank'], rows)}\n"
            f"Each node needs the same {source}, job config, checkpoint, number of ranks, and index.json of each "
            "stream, also in `local`."
        )
    if ranks := unlike_first(batches, dp_ranks):
        pairs = [f"{rank} than {dp_ranks.index(dp_ranks[rank])} (dp rank {dp_ranks[rank]})" for rank in ranks]
        raise DataError(
            f"Ranks that share a dp rank have to read the same, but got another first batch: {', '.join(pairs)}. Their "
            f"settings are the same: suspect `local` in {source}, a cache with other shards than the stream's. "
            "Remove it on the nodes of these ranks."
        )
    if dist.get_rank() == 0 and len(dp_ranks) > 1:
        logger.info(f"All {len(dp_ranks)} ranks agree on data and settings; peers got the same first batch.")


def unlike_first(values: Sequence[int], groups: Sequence[int]) -> list[int]:
    """The ranks whose value is not that of the first rank of their group."""
    return [rank for rank, group in enumerate(groups) if values[rank] != values[groups.index(group)]]


def hash_of(content: bytes) -> int:
    """A hash that fits into an int64."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "big")
