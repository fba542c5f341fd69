"""Batches come from workers as they were made, and a batch that was overwritten, or can't be sent, is no batch."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from examples.mosaic_streaming.batch import workers
from examples.mosaic_streaming.batch.reading import Batches, Collator
from examples.mosaic_streaming.batch.workers import Slots, WorkerContext
from tests.support.ranks import run_rank_values, run_ranks

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
