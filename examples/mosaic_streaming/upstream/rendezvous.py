"""Lets ranks that torchrun restarts meet under keys that earlier ranks have not used.

torchrun has one store for all its restarts, in which each rank leaves its address under the same key. A rank that reads
it too early connects to a dead one until its time is up (torch 2.13, distributed/rendezvous.py). A torchrun with
another store for each start makes this module needless.
"""

import contextlib
import importlib
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from examples.mosaic_streaming.upstream.patch import replaced

NCCL_FAULT = "exception_dump"
"""The key by which NCCL's watchdogs tell each other to abort. They write it at the root of the store."""

POLL_SECONDS = 0.01
"""The pause between two polls of rank 0."""


@contextlib.contextmanager
def fresh_rendezvous() -> Iterator[None]:
    """A context in which process groups are initialized under a key prefix that no earlier start has used."""
    rendezvous = importlib.import_module("torch.distributed.rendezvous")  # `torch.distributed` has a function so named
    create = rendezvous._create_c10d_store

    def create_unused(
        hostname: str, port: int, rank: int, world_size: int, timeout: timedelta, use_libuv: Any = True
    ) -> dist.Store:
        store = create(hostname, port, rank, world_size, timeout, use_libuv)
        return unused_prefix(store, rank, world_size, timeout) if rendezvous._torchelastic_use_agent_store() else store

    with replaced(rendezvous, "_create_c10d_store", create_unused):
        yield


def unused_prefix(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Find a part of a store in which no earlier ranks of this job have written. All ranks call it together.

    Each of the others takes a number that none has had before, and rank 0 answers all numbers with its own new name.
    Before, it removes what NCCL has left of a fault, which would end the new ranks, too, after some minutes (torch
    2.13, csrc/distributed/c10d/ProcessGroupNCCL.cpp: its `globalStore_` ignores prefixes).

    Raises:
        TimeoutError: ranks are missing.
    """
    if rank:
        name = store.get(f"to {store.add('arrived', 1)}").decode()  # waits for it
        store.add(name, 1)
        return dist.PrefixStore(name, store)
    store.delete_key(NCCL_FAULT)
    name, answered, end = uuid.uuid4().hex, 0, time.monotonic() + timeout.total_seconds()
    while (known := 1 + store.add(name, 0)) < world_size:
        if time.monotonic() > end:
            raise TimeoutError(f"{known} of {world_size} ranks have come in {timeout.total_seconds():g} s.")
        arrived = store.add("arrived", 0)
        for number in range(answered + 1, arrived + 1):
            store.set(f"to {number}", name)
        answered = arrived
        time.sleep(POLL_SECONDS)
    return dist.PrefixStore(name, store)
