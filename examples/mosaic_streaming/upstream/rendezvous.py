"""Lets restarted ranks rendezvous under a key prefix that no earlier start of theirs has used.

torchrun keeps one store for all restarts, in which each rank writes its address under the same key. A rank that reads
it too early tries to connect to a dead one until it times out (torch 2.13, distributed/rendezvous.py). A torchrun with
a new store for each start makes this module needless.
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
"""The key with which NCCL's watchdogs tell each other to abort; they write it without a prefix."""
POLL_SECONDS = 0.01
"""Between rank 0's checks for other ranks."""


@contextlib.contextmanager
def fresh_rendezvous() -> Iterator[None]:
    """Initialize process groups in this context under a key prefix that no earlier start has used."""
    rendezvous = importlib.import_module("torch.distributed.rendezvous")  # the attribute is a function
    create = rendezvous._create_c10d_store

    def create_unused(
        hostname: str, port: int, rank: int, world_size: int, timeout: timedelta, use_libuv: Any = True
    ) -> dist.Store:
        store = create(hostname, port, rank, world_size, timeout, use_libuv)
        return unused_prefix(store, rank, world_size, timeout) if rendezvous._torchelastic_use_agent_store() else store

    with replaced(rendezvous, "_create_c10d_store", create_unused):
        yield


def unused_prefix(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A part of the store that no earlier ranks of this job have used; all ranks call this together.

    Every other rank takes a number that no rank has had before, and rank 0 answers all numbers with a new prefix.
    First, rank 0 deletes NCCL's abort key, which would end the new ranks after some minutes (torch 2.13,
    csrc/distributed/c10d/ProcessGroupNCCL.cpp: its `globalStore_` ignores prefixes). TimeoutError if ranks are missing.
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
