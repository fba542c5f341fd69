"""What the ranks of a job tell each other aside from training: whether they are ready, and why one stops."""

import atexit
import contextlib
import importlib
import json
import os
import random
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torchtitan.tools.utils import device_type

from examples.mosaic_streaming import errors
from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.shards.prepare import FIRST_NUMBER

FAULT, TOLD = "fault", "told"
"""Keys of the store: why the job stops, and that rank 0 has said it."""

MOMENT, PATIENCE = 0.01, 5.0
"""The fewest and the most seconds between two looks for what others do."""

FOR_EVER = timedelta(days=20)
"""As long as a store can be waited for: it counts milliseconds in 32 bits, and when time is up, it warns."""

NCCL_FAULT = "exception_dump"
"""The key by which NCCL's watchdogs tell each other to abort; they write it at the root of the store."""

SHOWN = 8
"""Machines of a kind that a message names."""

GRACE = 20.0
"""Seconds from the fault of one rank to the end of another that a collective won't let go."""


@contextlib.contextmanager
def meeting_anew() -> Iterator[None]:
    """Within it, the ranks that torchrun starts meet where those that it has ended have left nothing.

    Source: torchrun has one store for all its restarts, in which each rank leaves its address under the same key. One
    that reads it too early connects to a dead rank until its time is up (torch 2.13, distributed/rendezvous.py). A
    torchrun with another store for each start makes this unnecessary.
    """
    rendezvous = importlib.import_module("torch.distributed.rendezvous")  # which `torch.distributed` hides
    create = rendezvous._create_c10d_store

    def create_unused(host: str, port: int, rank: int, world_size: int, timeout: timedelta, *more: Any) -> dist.Store:
        store = create(host, port, rank, world_size, timeout, *more)
        return unused(store, rank, world_size, timeout) if rendezvous._torchelastic_use_agent_store() else store

    with mock.patch.object(rendezvous, "_create_c10d_store", create_unused):
        yield


def unused(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A part of a store in which no earlier ranks of this job have written; all ranks call it together.

    Each of the others takes a number that none has had before, and rank 0 answers all numbers with its own new name.
    Before, it removes what NCCL has left of a fault, which would end the new ranks, too, after some minutes (torch
    2.13, csrc/distributed/c10d/ProcessGroupNCCL.cpp: its `globalStore_` knows no parts).

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
        time.sleep(MOMENT)
    return dist.PrefixStore(name, store)


def check_machines() -> None:
    """Raise ConfigError, on all ranks, unless each machine has as many ranks as any other; one small collective."""
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
            f"{size} on {'those of ranks' if len(ranks) > 1 else 'that of rank'} {shorten(ranks)}"
            for size, ranks in machines.items()
        ]
        raise ConfigError(
            f"Machines have unequal numbers of ranks: {'; '.join(found)}. Start each torchrun with the same "
            "--nproc_per_node."
        )


def shorten(words: list[str]) -> str:
    """The first of some words."""
    return ", ".join(words[:SHOWN] + ["…"] * (len(words) > SHOWN))


def new_number() -> int:
    """A random number, the same on all ranks, that no other job of this machine has."""
    number = [random.SystemRandom().randrange(FIRST_NUMBER, 9 * FIRST_NUMBER)]
    if dist.is_initialized():
        dist.broadcast_object_list(number)
    return number[0]


def open_store(number: int) -> dist.Store:
    """A connection of one's own to the store that the job's ranks have met at, with keys of this number alone."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.PrefixStore(str(number), dist.TCPStore(host, port, is_master=False, wait_for_workers=False))


def wait_for(store: dist.Store, key: str, seconds: float = float("inf")) -> str | None:
    """The value of a key once somebody has set it; none if nobody does in time.

    The longer it takes, the less often it asks: unlike `Store.wait`, signals interrupt it, and nothing is warned of.
    """
    begin = time.monotonic()
    while not store.check([key]):
        if (waited := time.monotonic() - begin) > seconds:
            return None
        time.sleep(min(PATIENCE, MOMENT + waited / 10))
    return str(store.get(key).decode())


def on_each_node(number: int, prepare: Callable[[], None]) -> None:
    """Call a function on the local leader of each node; all ranks wait for all of them, however long it takes.

    Raises:
        ConfigError, DataError: on all ranks, the first node's that failed.
    """
    store, node_size = open_store(number), int(os.environ["LOCAL_WORLD_SIZE"])
    if dist.get_rank() % node_size == 0:
        share(store, f"node {dist.get_rank() // node_size}", prepare)
    for node in range(dist.get_world_size() // node_size):
        shared(store, f"node {node}")


def on_rank_0(number: int, compute: Callable[[], Any]) -> Any:
    """What a function returns that rank 0 alone calls; all ranks wait for it, however long it takes.

    Raises:
        ConfigError, DataError: on all ranks.
    """
    store = open_store(number)
    if dist.get_rank() == 0:
        share(store, "rank 0", compute)
    return shared(store, "rank 0")


def share(store: dist.Store, key: str, compute: Callable[[], Any]) -> None:
    """Tell all ranks what a function returns, or the error that it raises."""
    try:
        found = ["", compute()]
    except (ConfigError, DataError) as error:
        found = [type(error).__name__, str(error)]
    except Exception as error:
        traceback.print_exc()  # it is no user's
        found = ["DataError", f"{type(error).__name__}: {error}"]
    store.set(key, json.dumps(found))


def shared(store: dist.Store, key: str) -> Any:
    """Wait for what another rank shares; raise its error."""
    kind, found = json.loads(wait_for(store, key) or "")
    if kind:
        raise (ConfigError if kind == "ConfigError" else DataError)(found)
    return found


class Line(errors.Line):
    """The line by which any rank makes rank 0 say why the job stops.

    Each rank waits for a key of its own, which whoever tells a fault sets: until then, nothing is asked of the store.

    Args:
        number: of the job.
    """

    def __init__(self, number: int) -> None:
        self._store, self._key = open_store(number), wake_up(dist.get_rank())
        self._is_closed, self._has_heard = threading.Event(), False
        self._has_said = threading.Event()
        self._listener = threading.Thread(target=self._listen, args=[open_store(number)], daemon=True)
        self._listener.start()
        atexit.register(self.close)  # a thread that is inside of `wait` when Python ends aborts the process

    def _listen(self, store: dist.Store) -> None:
        """Wait until a rank stops; end this one some time later, if nothing else does."""
        with contextlib.suppress(Exception):  # the store ends with the job
            while not (self._has_heard or self._is_closed.is_set()):
                with contextlib.suppress(dist.DistStoreError):  # nobody has set it in time
                    store.wait([self._key], FOR_EVER)
                    self._has_heard = not self._is_closed.is_set()
            if self._has_heard and errors.is_rank_0():
                errors.say(store.get(FAULT).decode())
                self._has_said.set()
                store.set(TOLD, "")
            if not self._is_closed.wait(GRACE):
                os._exit(1)

    def close(self) -> None:
        self._is_closed.set()
        if self._listener.is_alive():  # it ends with the store
            with contextlib.suppress(Exception):
                self._store.set(self._key, "")
            self._listener.join(PATIENCE)

    def tell(self, message: str) -> bool:
        with contextlib.suppress(Exception):
            self._store.compare_set(FAULT, "", message)
            keys = [wake_up(rank) for rank in range(dist.get_world_size())]
            self._store.multi_set(keys, [""] * len(keys))  # type: ignore[attr-defined]  # not in torch 2.13's stub
            return wait_for(self._store, TOLD, errors.WAIT_FOR_RANK_0) is not None
        return self._has_heard  # and so has rank 0, whose end may be that of the store

    def explain(self, error: BaseException) -> str | None:
        if not is_of_a_connection(error):
            return None
        try:
            if not (self._has_heard or self._store.check([FAULT])):
                return None
            if errors.is_rank_0():  # whose listener has just woken up, or is about to
                self._has_said.wait(errors.WAIT_FOR_RANK_0)
            return "Ended with the rank that says why."
        except Exception:
            reason = f"Rank 0's store is gone, and with it the reason: {str(error).splitlines()[0]}"
            if os.environ["LOCAL_RANK"] == "0":
                errors.say(reason)
            return reason


def wake_up(rank: int) -> str:
    """The key that a rank's listener waits for."""
    return f"wake up {rank}"


def is_of_a_connection(error: BaseException) -> bool:
    """Whether an exception is of a collective or the store, or raised from one, and so may be another rank's doing.

    Source: errors of gloo have no class of their own, but name its sources (torch 2.13).
    """
    if isinstance(error, dist.DistError) or (type(error) is RuntimeError and "/gloo/" in str(error)):
        return True
    return error.__cause__ is not None and is_of_a_connection(error.__cause__)


def open_line(number: int) -> None:
    """Let rank 0 speak for all ranks from here on."""
    if not isinstance(errors.line, Line):
        errors.line = Line(number)
