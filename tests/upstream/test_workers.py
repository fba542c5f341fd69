"""Python drops a batch that a worker can't send, and torch ends workers in a private function."""

import multiprocessing
import os
import signal
import time
from multiprocessing import queues, resource_tracker

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from examples.mosaic_streaming.upstream.patch import parameters
from examples.mosaic_streaming.upstream.torchelastic import SAVING
from examples.mosaic_streaming.upstream.workers import end_worker, let_processes_outlive_signals, shut_down_workers
from tests.support.ranks import run_rank_values

DROPPED: list[object] = []


class Reporting(queues.Queue):  # type: ignore[type-arg]
    """A queue that reports what it drops."""

    @staticmethod
    def _on_queue_feeder_error(e: Exception, obj: object) -> None:
        DROPPED.append(obj)


def test_python_asks_this_function_about_a_batch_that_it_drops() -> None:
    theirs = vars(queues.Queue)["_on_queue_feeder_error"]
    assert parameters(theirs) == parameters(end_worker), "adapt end_worker in upstream/workers.py"

    def send() -> tuple[str, int]:
        queue = Reporting(ctx=multiprocessing.get_context())
        queue.put(lambda: 0)
        queue.put("next")
        return queue.get(timeout=20), len(DROPPED)

    [(received, dropped)] = run_rank_values(send)
    assert received == "next", "Python no longer drops what it can't send: upstream/workers.py may go"
    assert dropped == 1, "Python reports it in another way: adapt prepare_worker in upstream/workers.py"


def test_torch_ends_workers_in_a_private_function_alone() -> None:
    def end() -> tuple[int, int]:
        batches = iter(DataLoader(TensorDataset(torch.arange(3)), num_workers=2))
        next(batches)
        before = len(multiprocessing.active_children())
        shut_down_workers(batches)
        return before, len(multiprocessing.active_children())

    assert run_rank_values(end) == [(2, 0)], "adapt shut_down_workers in upstream/workers.py"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_outlive_the_signals_after_which_a_run_saves_until_they_are_ended(method: str) -> None:
    def send_and_end() -> tuple[bool, int | None]:
        resource_tracker.ensure_running()  # as `AbortChannel.exit_on_signals` does: its start unblocks signals
        let_processes_outlive_signals()
        child = multiprocessing.get_context(method).Process(  # type: ignore[attr-defined]
            target=time.sleep, args=[60]
        )
        child.start()
        for number in SAVING:
            os.kill(child.pid or 0, number)
        child.join(0.5)
        lives = child.is_alive()
        child.terminate()  # as torch, and Python at its end
        child.join(20)
        return lives, child.exitcode

    ended = run_rank_values(send_and_end)
    assert ended == [(True, -signal.SIGKILL)], "adapt let_processes_outlive_signals in upstream/workers.py"
