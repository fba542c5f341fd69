"""Where ranks meet that torchrun starts again: all in one part of its store, and none in one of earlier ranks."""

import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from examples.mosaic_streaming.distributed.abort import AbortChannel
from examples.mosaic_streaming.distributed.store import await_result, draw_number, publish
from examples.mosaic_streaming.errors import DataError
from examples.mosaic_streaming.upstream.rendezvous import NCCL_FAULT, unused_prefix
from tests.support.ranks import free_port, run_rank_values

RANKS = 4


class Job:
    """A store as torchrun keeps it over all restarts, and ranks that meet there, each with a connection of its own."""

    def __init__(self) -> None:
        self._port = free_port()
        self._server = dist.TCPStore("127.0.0.1", self._port, is_master=True, wait_for_workers=False)

    def store(self, timeout: timedelta = timedelta(seconds=20)) -> dist.TCPStore:
        """Another connection."""
        return dist.TCPStore("127.0.0.1", self._port, timeout=timeout, wait_for_workers=False)

    def start(self, ranks: list[int], seconds: float) -> list[str]:
        """Start ranks in any order; what each then reads of what rank 0 writes, or why it gives up."""

        def run(rank: int) -> str:
            time.sleep(random.random() * 0.05)
            timeout = timedelta(seconds=seconds)
            store = self.store(timeout)
            try:
                part = unused_prefix(store, rank, RANKS, timeout)
                if rank == 0:
                    time.sleep(0.05)  # others ask before it is there
                    part.set("address", str(time.monotonic()))
                return part.get("address").decode()
            except (TimeoutError, dist.DistError) as error:
                return type(error).__name__

        with ThreadPoolExecutor(len(ranks)) as pool:
            return list(pool.map(run, ranks))


def test_ranks_never_read_what_earlier_ones_have_written() -> None:
    def restart() -> list[list[str]]:
        job = Job()
        return [job.start([*range(RANKS)], 20) for _ in range(20)]

    [starts] = run_rank_values(restart)
    read = [set(start) for start in starts]
    assert all(len(values) == 1 for values in read), "the same on all ranks"
    assert len(set.union(*read)) == 20, "another at each start"


@pytest.mark.parametrize("came", [[1, 2, 3], [0, 1, 2], [0], [2]])
def test_ranks_that_ended_while_they_met_disturb_nobody(came: list[int]) -> None:
    def restart() -> tuple[list[str], list[str], list[str]]:
        job = Job()
        return job.start([*range(RANKS)], 20), job.start(came, 1), job.start([*range(RANKS)], 20)

    [(first, some, again)] = run_rank_values(restart)
    assert set(some) <= {"TimeoutError", "DistStoreError"}
    assert len(set(again)) == 1 and set(again) != set(first)


def test_what_nccl_leaves_of_a_fault_is_removed_before_ranks_meet() -> None:
    def restart() -> tuple[int, bool]:
        job = Job()
        first = job.start([*range(RANKS)], 20)
        job.store().set(NCCL_FAULT, "0")
        again = job.start([*range(RANKS)], 20)
        return len(set(first + again)), job.store().check([NCCL_FAULT])

    assert run_rank_values(restart) == [(2, False)]


def test_errors_that_are_no_users_reach_all_ranks_too() -> None:
    def fail() -> None:
        def compute() -> None:
            raise ZeroDivisionError("nobody's fault")

        job = Job()
        publish(job.store(), "key", compute)
        with pytest.raises(DataError, match="ZeroDivisionError: nobody's fault"):
            await_result(job.store(), "key")

    run_rank_values(fail)


def test_ranks_that_listen_for_a_fault_ask_nothing_of_the_store() -> None:
    """Rank 0 serves it: what its process reads meanwhile is what the others ask."""

    def listen() -> int:
        dist.init_process_group("gloo")
        channel = AbortChannel()
        channel.connect(draw_number())
        dist.barrier()
        time.sleep(0.5)
        counts = [reads_of_this_process(), reads_of_this_process()]
        time.sleep(2.5)
        counts.append(reads_of_this_process())
        dist.barrier()
        channel.close()
        return (counts[2] - counts[1]) - (counts[1] - counts[0])

    assert run_rank_values(listen, RANKS)[0] == 0


def reads_of_this_process() -> int:
    """Its system calls that read, from sockets too; to ask takes some itself."""
    return int(re.findall(r"syscr: (\d+)", Path("/proc/self/io").read_text())[0])
