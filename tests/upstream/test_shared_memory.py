"""What `upstream/shared_memory.py` relies on in streaming: its functions, and what they do wrongly."""

import inspect
import multiprocessing.shared_memory
import os
from pathlib import Path

import pytest
from streaming import StreamingDataset
from streaming.base import dataset as streaming_dataset
from streaming.base.shared import memory as streaming_memory
from streaming.base.shared.prefix import get_shm_prefix

from examples.mosaic_streaming.upstream.shared_memory import FIRST_NUMBER, SHM, keep_locks_together, shared_memory
from tests.support.ranks import run_rank_values
from tests.support.streams import write_stream

CHANGED = "see upstream/shared_memory.py: "


def test_streaming_asks_for_its_number_by_the_names_that_are_replaced() -> None:
    assert streaming_dataset.get_shm_prefix is get_shm_prefix, CHANGED + "a dataset finds its number elsewhere"
    assert "get_shm_prefix(" in inspect.getsource(StreamingDataset.__init__), CHANGED + "and in another way"
    builtin = multiprocessing.shared_memory.SharedMemory
    assert streaming_memory.BuiltinSharedMemory is builtin, CHANGED + "shared memory is opened elsewhere"


def test_streaming_still_takes_the_first_free_number() -> None:
    source = inspect.getsource(get_shm_prefix)
    assert "_get_path(prefix_int" in source and "prefix_int" in source, CHANGED + "numbers are chosen otherwise"


def test_dataset_has_the_number_and_its_locks_lie_beside_its_memory(tmp_path: Path) -> None:
    number = FIRST_NUMBER + 7

    def open_dataset() -> tuple[int, list[str], bool]:
        with shared_memory(number):
            dataset = StreamingDataset(local=str(write_stream(tmp_path, 8)), batch_size=1)
        keep_locks_together(dataset)
        list(dataset)
        names = [name for name in os.listdir(SHM) if name.startswith(str(number))]
        return dataset._shm_prefix_int, names, os.path.exists(dataset._cache_filelock_path)

    [(found, names, is_locked_there)] = run_rank_values(open_dataset)
    assert found == number
    assert {f"{number}_locals", f"{number}_job"} <= set(names), names
    assert is_locked_there, CHANGED + "the cache's lock file has another name"
    assert not list(SHM.glob(f"{number}_*"))


def test_shared_memory_without_a_size_is_still_an_error_of_pythons() -> None:
    name = f"{FIRST_NUMBER}_empty"
    (SHM / name).touch()
    try:
        with pytest.raises(ValueError, match="cannot mmap an empty file"):
            multiprocessing.shared_memory.SharedMemory(name)
    finally:
        (SHM / name).unlink()
