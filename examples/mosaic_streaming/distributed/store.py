"""Passes results between ranks through the job's store: that a node is ready, or what one rank has computed."""

import json
import os
import random
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.tools.utils import device_type

from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.upstream.shared_memory import FIRST_NUMBER

POLL_SECONDS, MAX_POLL_SECONDS = 0.01, 5.0
"""The shortest and the longest pause between two polls of a key."""

MAX_SHOWN = 8
"""A message names at most so many machines of a kind."""


def new_job_id() -> int:
    """Draw a random number, the same on all ranks, that no other job on this machine has."""
    number = [random.SystemRandom().randrange(FIRST_NUMBER, 9 * FIRST_NUMBER)]
    if dist.is_initialized():
        dist.broadcast_object_list(number)
    return number[0]


def open_store(job_id: int) -> dist.Store:
    """Open a connection to the store at which the job's ranks have met. Its keys are those of this job ID."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.PrefixStore(str(job_id), dist.TCPStore(host, port, is_master=False, wait_for_workers=False))


def wait_for(store: dist.Store, key: str, seconds: float = float("inf")) -> str | None:
    """Return the value of a key once it is set; None if it isn't in time.

    The longer it takes, the less often it polls. Unlike `Store.wait`, it can be interrupted by signals, and it logs no
    warnings.
    """
    begin = time.monotonic()
    while not store.check([key]):
        if (waited := time.monotonic() - begin) > seconds:
            return None
        time.sleep(min(MAX_POLL_SECONDS, POLL_SECONDS + waited / 10))
    return str(store.get(key).decode())


def on_each_node(job_id: int, prepare: Callable[[], None]) -> None:
    """Call a function on the first rank of each node. All ranks wait for all nodes, however long it takes.

    Raises:
        ConfigError, DataError: on all ranks, the error of the first node that failed.
    """
    store, node_size = open_store(job_id), int(os.environ["LOCAL_WORLD_SIZE"])
    if dist.get_rank() % node_size == 0:
        publish(store, f"node {dist.get_rank() // node_size}", prepare)
    for node in range(dist.get_world_size() // node_size):
        await_result(store, f"node {node}")


def on_rank_0(job_id: int, compute: Callable[[], Any]) -> Any:
    """Call a function on rank 0 alone, and return its result, or raise its error, on all ranks.

    Args:
        job_id: the same on all ranks, and not used for this before.
        compute: returns what JSON can hold. It may take any time.
    """
    store = open_store(job_id)
    if dist.get_rank() == 0:
        publish(store, "rank 0", compute)
    return await_result(store, "rank 0")


def publish(store: dist.Store, key: str, compute: Callable[[], Any]) -> None:
    """Set a key to the result of a function, or to its error."""
    try:
        found = ["", compute()]
    except (ConfigError, DataError) as error:
        found = [type(error).__name__, str(error)]
    except Exception as error:
        traceback.print_exc()  # not a user's error
        found = ["DataError", f"{type(error).__name__}: {error}"]
    store.set(key, json.dumps(found))


def await_result(store: dist.Store, key: str) -> Any:
    """Wait for the result that another rank publishes; raise its error."""
    kind, found = json.loads(wait_for(store, key) or "")
    if kind:
        raise (ConfigError if kind == "ConfigError" else DataError)(found)
    return found


def check_machines() -> None:
    """Raise ConfigError on all ranks unless all machines have equally many. It takes one small collective."""
    mine = torch.tensor([int(os.environ["LOCAL_WORLD_SIZE"])], device=device_type)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    sizes = [int(size) for size in everyone]
    firsts, rank = [], 0
    while rank < len(sizes):
        firsts.append(rank)
        rank += sizes[rank]
    if len(set(sizes)) > 1:
        machines = {size: [str(rank) for rank in firsts if sizes[rank] == size] for size in sorted(set(sizes))}
        found = [
            f"{size} on {'those of ranks' if len(ranks) > 1 else 'that of rank'} "
            f"{', '.join(ranks[:MAX_SHOWN] + ['…'] * (len(ranks) > MAX_SHOWN))}"
            for size, ranks in machines.items()
        ]
        raise ConfigError(
            f"Machines have unequal numbers of ranks: {'; '.join(found)}. Start each torchrun with the same "
            "--nproc_per_node."
        )
