"""What ranks tell each other through the job's store: that a node is ready, what one has computed, why one fails."""

import contextlib
import json
import math
import os
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from examples.mosaic_streaming.distributed.abort import RANK_0_SECONDS
from examples.mosaic_streaming.errors import ConfigError, DataError, is_rank_0
from examples.mosaic_streaming.upstream.shared_memory import FIRST_NUMBER

EXIT_SECONDS = 20.0
"""How long a rank may live on after another has failed. A collective may hold it, and torchrun ends only the ranks of
the failed rank's machine."""
UNLIMITED = timedelta(days=20)  # a store counts milliseconds in 32 bits, and logs a warning when the time is up
AGREE_SECONDS = 10.0  # that ranks which are to stop wait for the answers of all; one that has ended gives none
REASON_KEY, PRINTED_KEY, STOP_KEY, WAKE_UP_KEY = "reason", "printed", "stop {rank}", "wake up {rank}"
"""Keys of the store: why the job stops, that rank 0 has printed it, and what a rank's listener waits for."""
SIGNAL_KEY, BEGUN_KEY, ANSWERS_KEY, LAST_KEY = "signal", "begun {rank}", "answers", "last step"
"""By which signal all ranks stop, the last step that one has begun, how many have said so, and the last of all."""
POLL_SECONDS, MAX_POLL_SECONDS = 0.01, 5.0  # between two looks for a key


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


def on_rank_0(compute: Callable[[], Any]) -> Any:
    """Call a function on rank 0, and return its result, or raise its error, on all ranks, however long it takes."""
    store = open_store(draw_number())
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
    """A thread that waits until any rank of the job fails, or is told to stop.

    Each rank waits for a key of its own, so that it can also wake itself. Until then, it asks nothing of the store.
    To stop, the threads agree on the last step that any rank has begun; until they have, no rank begins another one.
    """

    def __init__(self, number: int, print_reason: Callable[[str], None]) -> None:
        self.store, self._rank, self._ranks = open_store(number), dist.get_rank(), range(dist.get_world_size())
        self._print_reason = print_reason
        self._is_woken, self._is_closed, self._has_agreed = False, threading.Event(), threading.Event()
        self.signum, self._begun, self._last = 0, -1, math.inf
        """By which signal all ranks stop; the last step that this one has begun, once it trains, and that of all."""
        self._thread = threading.Thread(target=self._listen, args=[open_store(number)], daemon=True)
        self._thread.start()

    def _listen(self, store: dist.Store) -> None:
        """Wait until a rank fails, and let rank 0 print why. End this process after a while, if nothing else does."""
        store.set_timeout(UNLIMITED)
        with contextlib.suppress(Exception):  # the store ends with the job
            if self._await(store, STOP_KEY):
                self._agree(store)
                self._await(store, WAKE_UP_KEY)
            self._is_woken = not self._is_closed.is_set()
            if self._is_woken and is_rank_0():
                self._print_reason(store.get(REASON_KEY).decode())
                store.set(PRINTED_KEY, "")
            if not self._is_closed.wait(EXIT_SECONDS):
                os._exit(1)

    def _await(self, store: dist.Store, key: str) -> bytes:
        """The value of this rank's key, once it is set. The store may end soon after, so it isn't asked again."""
        while True:
            with contextlib.suppress(dist.DistStoreError):  # the time is up
                return store.get(key.format(rank=self._rank))

    def _agree(self, store: dist.Store) -> None:
        """Find the step after which all ranks stop. If they can't agree, end this one at once."""
        self.signum = int(store.get(SIGNAL_KEY))  # before it reads `_begun`; `may_begin` has the other order
        try:
            store.set(BEGUN_KEY.format(rank=self._rank), str(self._begun))
            if store.add(ANSWERS_KEY, 1) == len(self._ranks):
                begun = [int(store.get(BEGUN_KEY.format(rank=rank))) for rank in self._ranks]
                store.compare_set(LAST_KEY, "", str(max(begun)))
            wait_for(store, LAST_KEY, AGREE_SECONDS)
            self._last = float(store.compare_set(LAST_KEY, "", str(math.inf)))  # the first value counts
        finally:
            self._has_agreed.set()
            # Again, as a signal that comes while its handler runs doesn't end a sleep (Python 3.12, timemodule.c).
            while self._last == math.inf and not self._is_closed.wait(0.1):
                os.kill(os.getpid(), self.signum)

    def ask_to_stop(self, signum: int) -> bool:
        """Tell all ranks to stop; return whether they can. A signal handler calls it, so it takes no lock."""
        can_agree = not self._has_agreed.is_set() or self._last < math.inf
        with contextlib.suppress(Exception):
            if self._begun >= 0 and can_agree and not self._is_woken:
                self.store.compare_set(SIGNAL_KEY, "", str(signum))
                self._wake(self._ranks, "stop", [STOP_KEY])
                return True
        return False

    def may_begin(self, step: int) -> bool:
        """Whether this rank may begin a step. If not, all of them stop before it."""
        self._begun = step
        if not self.signum:
            return True
        self._has_agreed.wait()
        return step <= self._last

    def _wake(self, ranks: Iterable[int], value: str = "", keys: Sequence[str] = (WAKE_UP_KEY, STOP_KEY)) -> None:
        names = [key.format(rank=rank) for key in keys for rank in ranks]
        self.store.multi_set(names, [value] * len(names))  # type: ignore[attr-defined]  # not in torch 2.13's stub

    def close(self) -> None:
        self._is_closed.set()
        if self._thread.is_alive() and not self._is_woken:  # it may have ended with the store
            with contextlib.suppress(Exception):
                if self.signum and not self._has_agreed.is_set():
                    self.store.compare_set(LAST_KEY, "", str(math.inf))
                self._wake([self._rank])
        self._thread.join(EXIT_SECONDS)

    def send(self, message: str) -> bool:
        """Tell all ranks why the job stops; return whether rank 0 prints it."""
        with contextlib.suppress(Exception):
            self.store.compare_set(REASON_KEY, "", message)
            self._wake(self._ranks)
            return wait_for(self.store, PRINTED_KEY, RANK_0_SECONDS) is not None
        return self._is_woken  # then rank 0 is too, and the store may have ended with it

    def explains(self, error: BaseException) -> bool:
        """Whether an error follows from another rank's end, whose reason is known, and on rank 0 printed.

        dist.DistError if it does follow from that, but rank 0's store is gone.
        """
        if not is_connection_error(error) or not (self._is_woken or self.store.check([REASON_KEY])):
            return False
        if is_rank_0():  # its thread has just been woken, or is about to be
            wait_for(self.store, PRINTED_KEY, RANK_0_SECONDS)
        return True


def is_connection_error(error: BaseException) -> bool:
    """Whether an exception comes from a collective or the store, so that another rank's end may have caused it.

    Source: gloo's errors have no class of their own, but name its source files (torch 2.13).
    """
    if isinstance(error, dist.DistError) or (type(error) is RuntimeError and "/gloo/" in str(error)):
        return True
    return error.__cause__ is not None and is_connection_error(error.__cause__)
