"""streaming's shared memory: its numbers, its names, and the functions that are replaced."""

import itertools
import uuid
from multiprocessing.shared_memory import SharedMemory as BuiltinSharedMemory
from pathlib import Path

import pytest
from streaming import StreamingDataset
from streaming.base import dataset as streaming_dataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK
from streaming.base.shared import SharedMemory
from streaming.base.shared import memory as streaming_memory
from streaming.base.shared.prefix import _each_prefix_int, _get_path

from examples.mosaic_streaming.upstream.patch import parameters
from examples.mosaic_streaming.upstream.shared_memory import (
    FIRST_NUMBER,
    SHM,
    ReadySharedMemory,
    keep_locks_together,
    shared_memory,
)
from tests.support.ranks import run_rank_values
from tests.support.streams import write_stream

ADAPT = "adapt upstream/shared_memory.py"


def test_what_is_replaced_has_the_known_parameters() -> None:
    assert parameters(streaming_dataset.get_shm_prefix) == ["streams_local", "streams_remote", "world", "retry"], ADAPT
    assert streaming_memory.BuiltinSharedMemory is BuiltinSharedMemory, ADAPT
    theirs, ours = parameters(BuiltinSharedMemory.__init__), parameters(ReadySharedMemory.__init__)
    assert theirs[: len(ours)] == ours, ADAPT


def test_streaming_counts_up_from_0_and_puts_the_number_in_front_of_names() -> None:
    assert list(itertools.islice(_each_prefix_int(), 3)) == [0, 1, 2], f"numbers may collide with ours: {ADAPT}"
    assert _get_path(FIRST_NUMBER, "name") == f"{FIRST_NUMBER}_name", f"remove_stale finds nothing: {ADAPT}"
    assert _get_path(7, "name") == "000007_name", "shards/dataset.py and shards/fetch_stats.py name files so"


def test_streaming_fails_to_open_shared_memory_that_has_no_size_yet() -> None:
    file = SHM / f"test-{uuid.uuid4().hex}"
    file.touch(0o600)
    try:
        with pytest.raises(ValueError, match="cannot mmap an empty file"):  # or ReadySharedMemory can go
            SharedMemory(file.name, False)
    finally:
        file.unlink()


def test_a_datasets_memory_and_locks_have_the_given_number(tmp_path: Path) -> None:
    write_stream(tmp_path / "stream", 20)
    number = FIRST_NUMBER + uuid.uuid4().int % FIRST_NUMBER

    def read() -> tuple[int, set[str], set[str]]:
        before = {file.name for file in SHM.iterdir()}
        with shared_memory(number):
            dataset = StreamingDataset(local=str(tmp_path / "stream"), batch_size=1)
        keep_locks_together(dataset)
        sum(1 for _ in dataset)
        made = {file.name for file in SHM.iterdir()} - before
        return dataset._shm_prefix_int, made, {file.name for file in SHM.glob(f"{number}_*")}

    [(found, made, ours)] = run_rank_values(read)
    assert found == number and made <= ours, f"streaming makes shared memory elsewhere: {ADAPT}"
    locks = {_get_path(number, CACHE_FILELOCK), _get_path(number, BARRIER_FILELOCK)}
    assert locks <= ours, f"streaming locks other files: adapt keep_locks_together: {ADAPT}"
