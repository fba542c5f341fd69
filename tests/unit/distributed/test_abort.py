"""The abort channel alone: what it prints, on which rank, and the exit code."""

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from examples.mosaic_streaming.distributed import AbortChannel, new_job_id
from examples.mosaic_streaming.errors import ConfigError, DataError
from tests.support.ranks import Rank, run_rank_values, run_ranks


def end(body: Callable[[AbortChannel], None], world_size: int = 1, connect: bool = False) -> list[Rank]:
    """Ranks that end as a body does within a channel."""

    def run() -> None:
        channel = AbortChannel()
        with channel.report_errors_once():
            if connect:
                dist.init_process_group("gloo")
                channel.connect(new_job_id())
            body(channel)
        channel.close()

    return run_ranks(run, world_size, notice=0.1)


def fail(error: BaseException) -> Callable[[AbortChannel], None]:
    def body(channel: AbortChannel) -> None:
        raise error

    return body


@pytest.mark.parametrize("error", [ConfigError("given, expected"), DataError("found")])
def test_users_error_is_one_line_and_exit_code_1(error: Exception) -> None:
    [rank] = end(fail(error))
    assert (rank.code, rank.output) == (1, f"{type(error).__name__}: {error}\n")


def test_any_other_error_keeps_its_traceback() -> None:
    [rank] = end(fail(KeyError("ours")))
    assert rank.code == 1 and "Traceback" in rank.output and rank.output.endswith("KeyError: 'ours'\n")


def test_before_ranks_have_met_rank_0_alone_prints_what_all_find() -> None:
    first, second = end(fail(ConfigError("the same on all")), 2)
    assert (first.code, first.output) == (1, "ConfigError: the same on all\n")
    assert second.code == 1 and not second.output


def test_rank_0_prints_the_error_of_another_rank() -> None:
    def body(channel: AbortChannel) -> None:
        if dist.get_rank() == 1:
            raise DataError("rank 1 knows")
        time.sleep(30)

    first, second = end(body, 2, connect=True)
    assert first.output == "DataError: rank 1 knows\n" and not second.output
    assert first.code and second.code == 1


def test_ranks_count_together() -> None:
    def run() -> list[int]:
        dist.init_process_group("gloo")
        channel = AbortChannel()
        channel.connect(new_job_id())
        counts = [channel.count("a"), channel.count("b")]
        dist.barrier()
        channel.close()
        return counts

    counts = run_rank_values(run, 3)
    assert [sorted(ranks) for ranks in zip(*counts, strict=True)] == [[1, 2, 3]] * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_a_program_with_its_number_and_closes_everything(number: signal.Signals) -> None:
    def body(channel: AbortChannel) -> None:
        channel.exit_on_signals()
        try:
            os.kill(os.getpid(), number)
            time.sleep(30)
        finally:
            print("closed", channel.stopped_by)

    [rank] = end(body)
    assert rank.code == 128 + number
    assert rank.output == f"closed {number!s}\n"


def test_no_signal_breaks_a_shutdown_that_has_begun() -> None:
    def body(channel: AbortChannel) -> None:
        channel.begin_shutdown()
        os.kill(os.getpid(), signal.SIGTERM)
        print("goes on")

    [rank] = end(body)
    assert (rank.code, rank.output) == (0, "goes on\n")


def test_signal_whose_exit_was_lost_ends_the_program_later() -> None:
    def body(channel: AbortChannel) -> None:
        channel.exit_on_signals()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        except SystemExit:
            pass  # as DCP does
        channel.exit_if_signalled()
        print("goes on")

    [rank] = end(body)
    assert (rank.code, rank.output) == (128 + signal.SIGTERM, "")
