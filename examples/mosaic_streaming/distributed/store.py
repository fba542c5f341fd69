"""What ranks tell each other through the job's store: that a node is ready, what one has computed, why one fails."""

import contextlib
import json
import os
import random
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from examples.mosaic_streaming.distributed.abort import RANK_0_SECONDS
from examples.mosaic_streaming.errors import ConfigError, DataError, is_rank_0
from examples.mosaic_streaming.upstream.shared_memory import FIRST_NUMBER

EXIT_SECONDS = 20.0
"""How long a rank may live on after another has failed. A collective may hold it, and torchrun ends only the ranks of
the failed rank's machine."""
UNLIMITED = timedelta(days=20)
"""A wait without end: a store counts milliseconds in 32 bits, and logs a warning when the time is up."""
REASON_KEY, PRINTED_KEY, WAKE_UP_KEY = "reason", "printed", "wake up {rank}"
"""Keys of the store: why the job stops, that rank 0 has printed it, and what a rank's listener waits for."""
POLL_SECONDS, MAX_POLL_SECONDS = 0.01, 5.0
"""The shortest and the longest pause between two looks for a key."""


def draw_number() -> int:
    """Draw a random number, the same on all ranks, that no other job of this machine has.

    It is the prefix of keys in the job's store, and names a dataset's shared memory. What ranks share needs one each.
    """
    number = [random.SystemRandom().randrange(FIRST_NUMBER, 9 * FIRST_NUMBER)]
    if dist.is_initialized():
        dist.broadcast_object_list(number)
    return number[0]


def open_store(number: int) -> dist.Store:
    """Connect once more to the store of the job's process group, with keys of this number alone."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.PrefixStore(str(number), dist.TCPStore(host, port, is_master=False, wait_for_workers=False))


def wait_for(store: dist.Store, key: str, seconds: float = float("inf")) -> str | None:
    """The value of a key once it is set; None if it isn't in time.

    It polls, less and less often. Unlike `Store.wait`, it can be interrupted by signals, and logs no warnings.
    """
    begin = time.monotonic()
    while not store.check([key]):
        if (waited := time.monotonic() - begin) > seconds:
            return None
        time.sleep(min(MAX_POLL_SECONDS, POLL_SECONDS + waited / 10))
    return str(store.get(key).decode())


def on_each_node(number: int, prepare: Callable[[], None]) -> None:
    """Call a function on one rank of each node; all ranks wait for all nodes, and raise the first one's error."""
    store, node_size = open_store(number), int(os.environ["LOCAL_WORLD_SIZE"])
    this_node, local_rank = divmod(dist.get_rank(), node_size)
    if local_rank == 0:
        publish(store, f"node {this_node}", prepare)
    for node in range(dist.get_world_size() // node_size):
        await_result(store, f"node {node}")


def on_rank_0(number: int, compute: Callable[[], Any]) -> Any:
    """Call a function on rank 0, and return its result, or raise its error, on all ranks, however long it takes."""
    store = open_store(number)
    if dist.get_rank() == 0:
        publish(store, "rank 0", compute)
    return await_result(store, "rank 0")


def publish(store: dist.Store, key: str, compute: Callable[[], Any]) -> None:
    """Set a key to what a function returns, or to the error that it raises."""
    try:
        content = ["", compute()]
    except (ConfigError, DataError) as error:
        content = [type(error).__name__, str(error)]
    except Exception as error:
        traceback.print_exc()  # it is not the user's
        content = ["DataError", f"{type(error).__name__}: {error}"]
    store.set(key, json.dumps(content))


def await_result(store: dist.Store, key: str) -> Any:
    """Wait for what another rank publishes; raise its error."""
    kind, result = json.loads(wait_for(store, key) or "")
    if kind:
        raise (ConfigError if kind == "ConfigError" else DataError)(result)
    return result


class Listener:
    """A thread that waits until any rank of the job fails.

    Each rank waits for a key of its own, so that it can also wake itself. Until then, it asks nothing of the store.
    """

    def __init__(self, number: int, print_reason: Callable[[str], None]) -> None:
        self._store, self._key = open_store(number), WAKE_UP_KEY.format(rank=dist.get_rank())
        self._print_reason = print_reason
        self._is_woken, self._is_closed = False, threading.Event()
        self._thread = threading.Thread(target=self._listen, args=[open_store(number)], daemon=True)
        self._thread.start()

    def _listen(self, store: dist.Store) -> None:
        """Wait until a rank fails, and let rank 0 print why. End this process after a while, if nothing else does."""
        with contextlib.suppress(Exception):  # the store ends with the job
            while not (self._is_woken or self._is_closed.is_set()):
                with contextlib.suppress(dist.DistStoreError):  # the time is up
                    store.wait([self._key], UNLIMITED)
                    self._is_woken = not self._is_closed.is_set()
            if self._is_woken and is_rank_0():
                self._print_reason(store.get(REASON_KEY).decode())
                store.set(PRINTED_KEY, "")
            if not self._is_closed.wait(EXIT_SECONDS):
                os._exit(1)

    def close(self) -> None:
        """End the thread."""
        self._is_closed.set()
        if self._thread.is_alive():  # it may have ended with the store
            with contextlib.suppress(Exception):
                self._store.set(self._key, "")
            self._thread.join(EXIT_SECONDS)

    def count(self, key: str) -> int:
        """Add 1 to a key of the store, and return its value."""
        return int(self._store.add(key, 1))

    def send(self, message: str) -> bool:
        """Tell all ranks why the job stops; return whether rank 0 prints it."""
        with contextlib.suppress(Exception):
            self._store.compare_set(REASON_KEY, "", message)
            keys = [WAKE_UP_KEY.format(rank=rank) for rank in range(dist.get_world_size())]
            self._store.multi_set(keys, [""] * len(keys))  # type: ignore[attr-defined]  # not in torch 2.13's stub
            return wait_for(self._store, PRINTED_KEY, RANK_0_SECONDS) is not None
        return self._is_woken  # then rank 0 is too, and the store may have ended with it

    def explains(self, error: BaseException) -> bool:
        """Whether an error follows from another rank's end, whose reason is known, and on rank 0 printed.

        Raises:
            dist.DistError: The error does follow from that, but rank 0's store is gone.
        """
        if not is_connection_error(error) or not (self._is_woken or self._store.check([REASON_KEY])):
            return False
        if is_rank_0():  # its thread has just been woken, or is about to be
            wait_for(self._store, PRINTED_KEY, RANK_0_SECONDS)
        return True


def is_connection_error(error: BaseException) -> bool:
    """Whether an exception comes from a collective or the store, so that another rank's end may have caused it.

    Source: gloo's errors have no class of their own, but name its source files (torch 2.13).
    """
    if isinstance(error, dist.DistError) or (type(error) is RuntimeError and "/gloo/" in str(error)):
        return True
    return error.__cause__ is not None and is_connection_error(error.__cause__)
