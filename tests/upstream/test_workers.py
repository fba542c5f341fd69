"""torch ends workers in a private function, and processes are ended by signals that a run outlives."""

import multiprocessing
import os
import signal
import time
from multiprocessing import resource_tracker

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from examples.mosaic_streaming.upstream.torchelastic import SAVING
from examples.mosaic_streaming.upstream.workers import let_processes_outlive_signals, shut_down_workers
from tests.support.ranks import run_rank_values


def test_torch_ends_workers_in_a_private_function_alone() -> None:
    def end() -> tuple[int, int]:
        batches = iter(DataLoader(TensorDataset(torch.arange(3)), num_workers=2))
        next(batches)
        before = len(multiprocessing.active_children())
        shut_down_workers(batches, close_pipe=False)
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
