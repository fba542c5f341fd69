"""Batches come from workers as they were made, and a batch that was overwritten, or can't be sent, is no batch."""

import os
import pickle
import signal
import time
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from transformers import AutoTokenizer

from examples.mosaic_streaming.batch import workers
from examples.mosaic_streaming.batch.reading import Batches, Collator, PadsThroughArrays
from examples.mosaic_streaming.batch.workers import Slots, WorkerContext
from examples.mosaic_streaming.upstream.workers import let_processes_outlive_signals
from tests.support.ranks import run_rank_values, run_ranks
from tests.support.streams import TOKENIZER

WORKERS, PREFETCH, BATCHES = 3, 2, 40


class Numbers(IterableDataset[int]):
    """Each worker's samples: of the last one as many as there are, of the others the fewer the lower their number."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        assert info
        yield from range(info.id, BATCHES if info.id == WORKERS - 1 else info.id, WORKERS)


def make(samples: list[int]) -> dict[str, Any]:
    """A batch whose tensors have several types and shapes, and something else."""
    [number] = samples
    return {
        "ids": torch.full((2, 3 + number), number, dtype=torch.int32),
        "mask": torch.arange(number) % 2 == 0,
        "none": torch.empty(0),
        "half": torch.full((2,), number, dtype=torch.bfloat16),  # which numpy doesn't have
        "columns": torch.arange(12).reshape(3, 4)[:, ::2] + number,  # not contiguous
        "name": f"batch {number}",
    }


def batches_of(prefetch: int = PREFETCH, collate: Any = make, persistent: bool = False) -> Batches:
    """Batches of workers, with slots for so many that are prefetched."""
    loader = DataLoader(
        Numbers(),
        1,
        num_workers=WORKERS,
        collate_fn=Collator(collate, Slots(WORKERS, prefetch)),
        multiprocessing_context=WorkerContext(),
        prefetch_factor=PREFETCH,
        persistent_workers=persistent,
    )
    return Batches(loader, "", "loader.toml")


def same(found: Any, expected: dict[str, Any]) -> bool:
    """Whether two batches are the same, in the types of their tensors, too."""
    tensors = [key for key, value in expected.items() if isinstance(value, torch.Tensor)]
    return (
        found.keys() == expected.keys()
        and found["name"] == expected["name"]
        and all(torch.equal(found[key], expected[key]) for key in tensors)
        and all(found[key].dtype == expected[key].dtype for key in tensors)
    )


EXPECTED = range(WORKERS - 1, BATCHES, WORKERS)


@pytest.mark.parametrize("limit", [1 << 12, workers.SHARED_BYTES])
@pytest.mark.parametrize("persistent", [False, True])
def test_batches_are_what_workers_have_made(monkeypatch: pytest.MonkeyPatch, limit: int, persistent: bool) -> None:
    """Also of a slow reader, after most workers have ended, in a second epoch, and too large for a slot."""
    monkeypatch.setattr(workers, "SHARED_BYTES", limit)

    def read() -> list[bool]:
        batches, found = batches_of(persistent=persistent), []
        for _ in range(2):
            batches.begin()
            taken = []
            while some := batches.take(3):
                time.sleep(0.02)  # the workers fill all slots
                taken += some
            found += [same(*pair) for pair in zip(taken, [make([number]) for number in EXPECTED], strict=True)]
        batches.close()
        return found

    assert run_rank_values(read) == [[True] * 2 * len(EXPECTED)]


def test_an_overwritten_batch_is_found_out() -> None:
    """With a slot too few for what torch asks for ahead."""

    def read() -> None:
        batches = batches_of(prefetch=0)
        batches.begin()
        time.sleep(0.5)
        try:
            batches.take(len(EXPECTED))
        finally:
            batches.close()

    [rank] = run_ranks(read)
    assert "DataError: A dataloader worker has overwritten a batch that was not read yet." in rank.output


def test_a_batch_that_cannot_be_sent_ends_its_worker() -> None:
    def read() -> None:
        batches = batches_of(collate=lambda samples: {"name": lambda: samples})
        batches.begin()
        batches.take(1)

    [rank] = run_ranks(read)
    assert rank.code == 1
    assert "can't hand on a batch: AttributeError: Can't pickle local object" in rank.output
    assert "DataError: Dataloader worker 2 (pid" in rank.output and "ended with exit code 1." in rank.output


@pytest.mark.parametrize("workers", [0, 1])
def test_arrays_of_a_users_collator_become_tensors(workers: int) -> None:
    def read() -> bool:
        collator = Collator(lambda samples: {"ids": np.array(samples)}, Slots(1, PREFETCH))
        context, samples = WorkerContext() if workers else None, cast(Dataset[int], range(3))
        loader = DataLoader(samples, 3, num_workers=workers, collate_fn=collator, multiprocessing_context=context)
        batches = Batches(loader, "", "loader.toml")
        batches.begin()
        [batch] = batches.take(1)
        batches.close()
        return torch.equal(batch["ids"], torch.arange(3))

    assert run_rank_values(read) == [True]


def test_an_epoch_can_begin_while_workers_of_the_last_one_are_busy() -> None:
    """Both have the same slots."""
    epoch, rest = [0], 3

    def make_slowly(samples: list[int]) -> dict[str, Any]:
        [number] = samples
        if not epoch[0] and number >= rest:
            time.sleep(0.5)
        return {"ids": torch.tensor([epoch[0], number])}

    def read() -> list[list[int]]:
        collator, samples = Collator(make_slowly, Slots(1, PREFETCH)), cast(Dataset[int], range(9))
        loader = DataLoader(samples, 1, num_workers=1, collate_fn=collator, multiprocessing_context=WorkerContext())
        batches = Batches(loader, "", "loader.toml")
        batches.begin()
        batches.take(rest)
        epoch[0] = 1
        batches.begin()
        found = [batch["ids"].tolist() for batch in batches.take(9)]
        batches.close()
        return found

    assert run_rank_values(read) == [[[1, number] for number in range(9)]]


def fill_the_pipe() -> Batches:
    """Begin to read batches that are larger than a pipe, so that workers wait in the middle of one."""
    batches = batches_of(collate=lambda samples: {"names": [str(number) for number in range(60_000)]})
    batches.begin()
    batches.take(1)
    time.sleep(1.0)
    return batches


def test_workers_that_wait_for_their_reader_end_when_it_closes() -> None:
    """By themselves: torch would kill them one after another, and wait five seconds for each before."""

    def close() -> list[int | None]:
        let_processes_outlive_signals()  # as training does: whom torch ends has the exit code of SIGKILL
        batches = fill_the_pipe()
        processes = batches._batches._workers  # type: ignore[union-attr]
        batches.close()
        return [process.exitcode for process in processes]

    assert run_rank_values(close) == [[0] * WORKERS]


def test_workers_that_wait_for_their_reader_end_when_it_is_killed() -> None:
    def die() -> None:
        fill_the_pipe()
        os.kill(os.getpid(), signal.SIGKILL)

    [rank] = run_ranks(die)
    assert rank.code == -signal.SIGKILL and not rank.left


def test_a_worker_killed_while_it_sends_does_not_keep_training_from_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch wakes the thread that pins memory by the pipe which the worker has locked."""
    monkeypatch.setattr(workers, "LOCK_SECONDS", 0.1)

    def send() -> bool:
        context = WorkerContext()
        queue = context.Queue()

        def lock_and_die() -> None:
            queue._writing.acquire()
            os.kill(os.getpid(), signal.SIGKILL)

        process = context.Process(target=lock_and_die)
        process.start()
        process.join()
        queue.put((None, None))
        return process.exitcode == -signal.SIGKILL

    assert run_rank_values(send, timeout=20.0) == [True]


def test_a_tokenizer_that_pads_arrays_can_be_copied_and_shared() -> None:
    """A loader may pickle its collator, and two loaders may share it."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    copy: Any = pickle.loads(pickle.dumps(PadsThroughArrays(tokenizer)))
    assert copy.eos_token_id == tokenizer.eos_token_id
    shared: Any = PadsThroughArrays(copy)
    batch = shared.pad([{"input_ids": [1, 2]}, {"input_ids": [3]}], padding="max_length", max_length=3)
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
