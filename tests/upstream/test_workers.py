"""What `upstream/workers.py` relies on: Python's queues drop what can't be pickled, and torch ends its workers."""

import multiprocessing
import threading
from multiprocessing import queues
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from examples.mosaic_streaming.upstream.patch import parameters
from examples.mosaic_streaming.upstream.workers import end_worker, prepare_worker, shut_down_workers
from tests.support.ranks import run_ranks


def test_python_still_drops_what_cannot_be_handed_on() -> None:
    """With Python's own function: nothing comes, and whoever reads would wait for ever."""
    told: list[Exception] = []
    original: Any = queues.Queue
    assert parameters(original._on_queue_feeder_error) == parameters(end_worker), "see upstream/workers.py"
    queue = multiprocessing.get_context("fork").Queue()

    class Kept(type(queue)):  # type: ignore[misc]
        @staticmethod
        def _on_queue_feeder_error(e: Exception, obj: object) -> None:
            told.append(e)

    queue.__class__ = Kept
    queue.put(threading.Lock())  # which can't be pickled
    queue.put("next")
    assert queue.get(timeout=30) == "next"
    assert len(told) == 1, "Python tells of it in another way: see upstream/workers.py"
    queue.close()
    queue.join_thread()


def test_prepared_worker_ends_where_it_cannot_hand_on() -> None:
    def hand_on() -> None:
        prepare_worker()
        queue: Any = multiprocessing.get_context("fork").Queue()
        queue.put(threading.Lock())
        queue.get(timeout=60)

    [rank] = run_ranks(hand_on)
    assert rank.code == 1
    assert "can't hand on a batch: TypeError: cannot pickle" in rank.output


def test_torch_ends_workers_through_its_private_function() -> None:
    def read() -> list[bool]:
        batches = iter(DataLoader(range(8), num_workers=2))  # type: ignore[arg-type]
        workers = batches._workers  # type: ignore[attr-defined]
        next(batches)
        shut_down_workers(batches)
        return [worker.is_alive() for worker in workers]

    [rank] = run_ranks(read)
    assert rank.value == [False, False], f"torch has another way to end workers: see upstream/workers.py\n{rank.output}"


def test_torchs_handler_still_raises_at_the_end_of_a_worker() -> None:
    assert callable(signal_handling._set_SIGCHLD_handler), "see AbortChannel.begin_shutdown"
