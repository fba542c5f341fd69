"""The abort channel as an object, in ranks without torchrun: what each prints, its exit code, what a signal does."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from examples.mosaic_streaming.distributed import abort, store
from examples.mosaic_streaming.distributed.abort import AbortChannel
from examples.mosaic_streaming.distributed.store import draw_number, is_connection_error
from examples.mosaic_streaming.errors import ConfigError, DataError
from tests.support.ranks import Rank, run_rank_values, run_ranks, wait_until

MESSAGE = "seq_len = 7, expected an even number."


def fail(error: BaseException, **environment: str) -> Rank:
    """How a rank of this environment ends whose program raises an error before it is connected."""

    def run() -> None:
        os.environ |= environment
        with AbortChannel().report_errors_once():
            raise error

    [rank] = run_ranks(run)
    return rank


def connected(body: Callable[[AbortChannel], None]) -> Callable[[], None]:
    """A program whose ranks are connected to each other when its body begins."""

    def run() -> None:
        dist.init_process_group("gloo")
        channel = AbortChannel()
        with channel.report_errors_once():
            channel.exit_on_signals()
            channel.connect(draw_number())
            dist.barrier()
            body(channel)

    return run


def test_channel_is_importable_without_torch() -> None:
    code = "import sys, examples.mosaic_streaming.distributed; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("error", [ConfigError(MESSAGE), DataError(MESSAGE)])
def test_rank_0_prints_one_line(error: Exception) -> None:
    rank = fail(error)
    assert (rank.code, rank.output) == (1, f"{type(error).__name__}: {MESSAGE}\n")


def test_other_errors_keep_their_traceback() -> None:
    rank = fail(KeyError("a bug"))
    assert rank.code == 1 and "Traceback" in rank.output and "KeyError: 'a bug'" in rank.output


def test_torchruns_report_gets_the_reason_in_place_of_a_traceback(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    fail(ConfigError(MESSAGE), TORCHELASTIC_ERROR_FILE=str(file))
    report = json.loads(file.read_text())["message"]
    assert report["message"] == report["extraInfo"]["py_callstack"] == f"ConfigError: {MESSAGE}"


def test_rank_that_outlives_its_wait_for_rank_0_prints_the_reason_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abort, "RANK_0_SECONDS", 0.5)
    rank = fail(ConfigError(MESSAGE), RANK="3", LOCAL_RANK="1")
    assert (rank.code, rank.output) == (1, f"[rank 3] ConfigError: {MESSAGE}\n")


def test_before_ranks_have_met_rank_0_alone_prints_what_all_find() -> None:
    def run() -> None:
        with AbortChannel().report_errors_once():
            raise ConfigError(MESSAGE)

    first, second = run_ranks(run, 2, notice=0.1)
    assert (first.code, first.output) == (1, f"ConfigError: {MESSAGE}\n")
    assert second.code == 1 and not second.output


def test_rank_that_is_ended_while_it_waits_for_rank_0_prints_nothing(tmp_path: Path) -> None:
    file = tmp_path / "error.json"

    def end(pids: list[int], outputs: list[Path]) -> None:
        wait_until(lambda: outputs[0].exists() and "failing" in outputs[0].read_text())
        time.sleep(0.3)
        os.kill(pids[0], signal.SIGTERM)

    def run() -> None:
        os.environ |= {"RANK": "1", "TORCHELASTIC_ERROR_FILE": str(file)}
        print("failing")
        with AbortChannel().report_errors_once():
            raise ConfigError(MESSAGE)

    [rank] = run_ranks(run, while_running=end)
    assert (rank.code, rank.output) == (1, "failing\n")
    assert json.loads(file.read_text())["message"]["message"] == "Ended with rank 0."


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_the_program_with_its_code_even_if_its_exit_is_lost(signum: signal.Signals) -> None:
    def run() -> None:
        channel = AbortChannel()
        with channel.report_errors_once():
            channel.exit_on_signals()
            try:
                os.kill(os.getpid(), signum)
            except SystemExit:
                assert channel.stopped_by is signum
                os.kill(os.getpid(), signum)  # a second one changes nothing
            print("lost")
            channel.exit_if_signalled()

    [rank] = run_ranks(run)
    assert (rank.code, rank.output) == (128 + signum, "lost\n")


def test_no_signal_breaks_a_shutdown_that_has_begun() -> None:
    def run() -> None:
        channel = AbortChannel()
        with channel.report_errors_once():
            channel.begin_shutdown()
            os.kill(os.getpid(), signal.SIGTERM)
            print("goes on")

    [rank] = run_ranks(run)
    assert (rank.code, rank.output) == (0, "goes on\n")


def test_what_fails_after_a_signal_is_not_printed() -> None:
    def run() -> None:
        channel = AbortChannel()
        with channel.report_errors_once():
            channel.exit_on_signals()
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                raise DataError(MESSAGE)

    [rank] = run_ranks(run)
    assert (rank.code, rank.output) == (128 + signal.SIGTERM, "")


@pytest.mark.parametrize("failing", [0, 1])
def test_rank_0_prints_the_reason_of_any_connected_rank(failing: int) -> None:
    def body(channel: AbortChannel) -> None:
        if dist.get_rank() == failing:
            raise DataError(MESSAGE)
        time.sleep(60)

    ranks = run_ranks(connected(body), 2, timeout=60)
    assert all(rank.code != 0 for rank in ranks) and ranks[failing].code == 1
    assert (ranks[0].output, ranks[1].output) == (f"DataError: {MESSAGE}\n", "")


def test_rank_that_goes_on_after_another_has_failed_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another machine, whose torchrun has nothing to do with it, while a collective holds the rank."""
    monkeypatch.setattr(store, "EXIT_SECONDS", 0.5)

    def body(channel: AbortChannel) -> None:
        if dist.get_rank() == 1:
            raise DataError(MESSAGE)
        time.sleep(60)

    ranks = run_ranks(connected(body), 2, timeout=60, notice=30)
    assert [rank.code for rank in ranks] == [1, 1] and ranks[0].output == f"DataError: {MESSAGE}\n"


def test_ranks_count_together() -> None:
    def run() -> list[int]:
        dist.init_process_group("gloo")
        channel = AbortChannel()
        channel.connect(draw_number())
        counts = [channel.count("a"), channel.count("b")]
        dist.barrier()
        channel.close()
        return counts

    counts = run_rank_values(run, 3)
    assert [sorted(ranks) for ranks in zip(*counts, strict=True)] == [[1, 2, 3]] * 2


def test_closed_channel_ends_nothing() -> None:
    def body(channel: AbortChannel) -> None:
        channel.close()
        dist.barrier()
        dist.destroy_process_group()

    ranks = run_ranks(connected(body), 2, timeout=60)
    assert [(rank.code, rank.output) for rank in ranks] == [(0, "")] * 2


def test_errors_of_collectives_and_of_the_store_are_known_also_as_a_cause() -> None:
    stage = RuntimeError("A pipeline's stage failed.")
    assert not is_connection_error(stage)
    stage.__cause__ = dist.DistNetworkError("reset by peer")
    assert is_connection_error(stage)
    assert is_connection_error(RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:144] closed"))
    assert not is_connection_error(ValueError("/gloo/"))


def test_ranks_that_do_not_all_answer_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is gone, as by SIGKILL. In the step that the other has begun, and where it waits for the agreement."""
    monkeypatch.setattr(store, "AGREE_SECONDS", 0.5)

    def body(channel: AbortChannel) -> None:
        channel.begin_step(1, lambda: None)
        pids = [0] * 3
        dist.all_gather_object(pids, os.getpid())
        if dist.get_rank() == 2:
            os._exit(0)
        if dist.get_rank() == 0:
            wait_until(lambda: not Path(f"/proc/{pids[2]}").exists())  # until then, its listener could still answer
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        listener = channel._listener
        while listener and not listener.signum:
            time.sleep(0.01)
        channel.begin_step(2, lambda: print("saved"))
        time.sleep(60)

    ranks = run_ranks(connected(body), 3, timeout=50)
    assert [rank.code for rank in ranks] == [128 + signal.SIGTERM] * 2 + [0]
    # torch warns where a reply of the store is under way while rank 0, which has the store, ends.
    assert not any(word in rank.output for rank in ranks for word in ("saved", "Traceback", "Error: "))


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_ranks_stop_after_the_last_step_that_any_has_begun(ahead: int) -> None:
    """The main threads never wait for each other here: one may be some steps ahead of the others."""

    def body(channel: AbortChannel) -> None:
        rank, listener = dist.get_rank(), channel._listener
        assert listener
        begun = 2 + ahead * rank
        for step in range(1, begun + 1):
            channel.begin_step(step, lambda: print("too early"))
        dist.barrier()
        if rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        while not listener.signum:
            time.sleep(0.01)
        for step in range(begun + 1, 100):
            channel.begin_step(step, functools.partial(print, "saved after", step - 1))

    ranks = run_ranks(connected(body), 3, timeout=60)
    assert [rank.code for rank in ranks] == [0] * 3
    # All else is torch's own, of a store that has ended with rank 0. torchrun's lives on.
    said = [re.findall("saved after .*|too early", rank.output) for rank in ranks]
    assert said == [[f"saved after {2 + 2 * ahead}"]] * 3
