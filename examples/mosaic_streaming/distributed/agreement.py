"""Compares what ranks read, once after each start: wrong data doesn't fail, it only trains badly."""

import hashlib
import json
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from examples.mosaic_streaming.batch import TitanBatch
from examples.mosaic_streaming.checkpoint import Fingerprint, differences, without_name
from examples.mosaic_streaming.errors import DataError, text_table


def check_peers(batch: TitanBatch, dp_rank: int, settings: Fingerprint, source: str) -> None:
    """Compare this rank's first batch with those of its peers, and its settings with those of all ranks.

    It takes one small collective, and a second one if ranks differ.

    Args:
        batch: the first batch after the start.
        dp_rank: this rank's coordinate on TorchTitan's batch mesh. Ranks that share it have to read the same.
        settings: what all ranks have to agree on.
        source: the file that configures the loader.

    Raises:
        DataError: on all ranks, if ranks differ that must not.
    """
    agreed = json.dumps({key: without_name(value) for key, value in settings.items()})
    mine = torch.tensor([dp_rank, hash_of(agreed.encode()), hash_of(bytes_of(batch))], device=device_type)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    dp_ranks, agreements, batches = zip(*(one.tolist() for one in everyone), strict=True)
    if ranks := unlike_first(agreements, [0] * len(agreements)):
        told: list[Fingerprint] = [{}] * len(agreements)
        dist.all_gather_object(told, settings)
        rows = [[str(rank), *row] for rank in ranks for row in differences(told[0], told[rank])]
        told_table = text_table(["rank", "setting", "rank 0", "this rank"], rows)
        raise DataError(
            f"Ranks {ranks} don't read what rank 0 reads.\n{told_table}\n"
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
    """The ranks whose value differs from that of the first rank of their group."""
    return [rank for rank, group in enumerate(groups) if values[rank] != values[groups.index(group)]]


def bytes_of(batch: TitanBatch) -> bytes:
    """The content of all tensors that the model gets."""
    inputs, labels = batch
    tensors = [inputs[key] for key in sorted(inputs)] + [labels]
    return b"".join(tensor.cpu().numpy().tobytes() for tensor in tensors)


def hash_of(content: bytes) -> int:
    """A hash that fits into an int64."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "big")
