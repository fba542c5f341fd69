"""No shard that is damaged, missing or slow goes unnoticed: from a real S3 server that fails, and on local disks.

Either the job reads what it would have read, or all of its ranks stop and rank 0 says why once; then, with the cause
gone, it goes on where it was.
"""

import contextlib
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, NoReturn

import pytest

from examples.mosaic_streaming.batch import workers
from examples.mosaic_streaming.shards.stream import CheckedStream
from tests.support.ranks import run_rank_values
from tests.support.reading import Read, read_job, write_turns
from tests.support.store import Store, running_store
from tests.support.streams import build_loader, loader_config, mark, write_stream

SAMPLES, STEPS = 100, 12
SHARD = r"shard\.00003\.mds$"
"""Of the 13 shards of a stream; read in the fourth or fifth step."""


@dataclass
class Place:
    """A stream, in a folder and in a store."""

    kind: str
    folder: Path
    remote: str
    store: Store

    def config(self, cache: Path, num_workers: int = 0, **settings: Any) -> dict[str, Any]:
        """A loader over the store."""
        dataset = {"remote": self.remote, "local": str(cache), "num_canonical_nodes": 1, "validate_hash": "xxh64"}
        dataset |= {"shuffle_block_size": 1000} | settings
        if self.kind == "finetuning":
            dataset["decoder_only_format"] = True
        return {"name": self.kind, "num_workers": num_workers, "dataset": dataset}

    def read(self, config: dict[str, Any], notes: Path, world_size: int = 1, **options: Any) -> Read:
        """Read an epoch with a loader."""
        defaults: dict[str, Any] = {"steps": STEPS, "environment": self.store.environment()}
        return read_job(config, notes, world_size, **defaults | options)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with running_store() as store:
        yield store


@pytest.fixture(scope="module", params=["text"])
def place(request: pytest.FixtureRequest, store: Store, tmp_path_factory: pytest.TempPathFactory) -> Place:
    kind = request.param
    folder = tmp_path_factory.mktemp(kind) / "stream"
    write = write_stream if kind == "text" else write_turns
    write(folder, SAMPLES)
    return Place(kind, folder, store.upload(folder, kind), store)


@pytest.fixture(scope="module")
def whole(place: Place, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What an undisturbed job reads."""
    folder = tmp_path_factory.mktemp("whole")
    read = place.read(place.config(folder / "cache"), folder / "notes")
    assert [rank.code for rank in read.ranks] == [0] and len(read.steps) == STEPS
    assert sorted(sample for step in read.steps for sample in step) == list(range(STEPS * 8)), "each sample once"
    return read.steps


@pytest.fixture(autouse=True)
def working_store(store: Store) -> Iterator[None]:
    yield
    store.clear()


LASTING = {
    "flip": r"its xxh64 is [0-9a-f]+, expected [0-9a-f]+\.",
    "truncate": r"it has \d+ bytes, expected \d+\.",
    "404": r"\(404\): Object s3://bucket/\w+/shard\.00003\.mds not found!",
    "403": r"\(403\): Object s3://bucket/\w+/shard\.00003\.mds not found! .*permission",
    "500": r"\(InternalError\): ",
    "reset": r"(Connection|Read|Protocol|ResponseStreaming)\w*Error: ",
    "stall": r"no progress for 1 s \(dataset\.download_timeout\)\.",
}
"""What is said of a shard that the store never gives right."""

HEADS = {"404", "403"}
"""Faults that a HEAD request has, too."""

QUICK = {("flip", 2, 2)}
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.long)
    for kind in LASTING
    for num_workers in (0, 2)
    for world_size in (1, 2)
    if (case := (kind, num_workers, world_size))
]


def fault(kind: str, **options: Any) -> dict[str, Any]:
    """A fault of the shard, for the store."""
    return {"path": SHARD, "kind": kind, "seconds": 30.0, "methods": ["GET", "HEAD"][: 1 + (kind in HEADS)]} | options


@pytest.mark.parametrize(("kind", "num_workers", "world_size"), CASES)
def test_shard_that_cannot_be_fetched_stops_all_ranks_and_then_the_job_goes_on(
    place: Place, whole: list[list[int]], tmp_path: Path, kind: str, num_workers: int, world_size: int
) -> None:
    config = place.config(tmp_path / "cache", num_workers, download_timeout=1, predownload=8)
    place.store.inject(fault(kind))
    stopped = place.read(config, tmp_path / "1", world_size)
    assert re.search(LASTING[kind], stopped.message), stopped.message
    name = f"{place.remote}/shard.00003.mds of the stream in loader.toml"
    assert stopped.message.startswith(f"DataError: {name} can't be fetched: ")
    assert "Attempts: 2 (dataset.download_retry)." in stopped.message
    assert stopped.steps == whole[: len(stopped.steps)], "and nothing wrong before"
    place.store.clear()
    goes_on(place, config, tmp_path, stopped, whole, world_size)


def goes_on(
    place: Place, config: dict[str, Any], folder: Path, stopped: Read, whole: list[list[int]], world_size: int = 1
) -> None:
    """The same job, where it stopped, reads all the rest."""
    rest = place.read(config, folder / "rest", world_size, state=stopped.state, steps=STEPS - len(stopped.steps))
    assert [rank.code for rank in rest.ranks] == [0] * world_size, [rank.output for rank in rest.ranks]
    assert stopped.steps + rest.steps == whole


@pytest.mark.parametrize(
    "kind",
    [
        "flip",
        *(
            pytest.param(kind, marks=pytest.mark.long)
            for kind in ("404", "reset", "slow", "truncate", "500", "503", "short", "stall")
        ),
    ],
)
def test_store_that_comes_back_within_the_retries_is_survived(
    place: Place, whole: list[list[int]], tmp_path: Path, kind: str
) -> None:
    """Any shard, at its first request; boto3 tries some again by itself."""
    config = place.config(tmp_path / "cache", 2, download_timeout=1, predownload=8)
    place.store.inject(fault(kind, times=1, seconds=3.0))
    read = place.read(config, tmp_path / "notes", 2)
    assert [rank.code for rank in read.ranks] == [0, 0], [rank.output for rank in read.ranks]
    assert place.store.injected() == [1]
    assert read.steps == whole


@pytest.mark.long
@pytest.mark.parametrize("place", ["finetuning"], indirect=True)
@pytest.mark.parametrize("kind", ["flip", "404"])
def test_instruction_tuning_stops_and_goes_on_as_well(
    place: Place, whole: list[list[int]], tmp_path: Path, kind: str
) -> None:
    config = place.config(tmp_path / "cache", 2, predownload=8)
    place.store.inject(fault(kind))
    stopped = place.read(config, tmp_path / "1", 2)
    assert re.search(LASTING[kind].replace("text", "finetuning"), stopped.message), stopped.message
    place.store.clear()
    goes_on(place, config, tmp_path, stopped, whole, 2)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"shard\.00003\.mds: it has \d+ bytes, expected \d+\."),
    "flipped": (flip, r"shard\.00003\.mds: its xxh64 is \w+, expected \w+\."),
    "missing": (Path.unlink, r"shard\.00003\.mds is missing\."),
}


def test_damaged_file_in_the_cache_is_found_at_the_start_and_fetched_again(
    place: Place, whole: list[list[int]], tmp_path: Path
) -> None:
    config = place.config(tmp_path / "cache")
    place.read(config, tmp_path / "1")
    for kind in ("truncated", "flipped"):
        damage, told = DAMAGE[kind]
        damage(tmp_path / "cache/shard.00003.mds")
        place.store.clear()
        again = place.read(config, tmp_path / kind)
        assert again.steps == whole
        assert re.search(told + r" They were removed, and will be fetched again\.", again.ranks[0].output)
        requested = {request["path"] for request in place.store.requests()}
        assert requested == {"/bucket/text/shard.00003.mds"}, "nothing else"


@pytest.mark.parametrize(
    "content",
    [
        b'{"version": 2, "shards": []}',
        *(pytest.param(content, marks=pytest.mark.long) for content in (b"", b'{"version": 2, "shards": [', b"[]")),
    ],
)
def test_damaged_index_in_the_cache_is_fetched_again(
    place: Place, whole: list[list[int]], tmp_path: Path, content: bytes
) -> None:
    config = place.config(tmp_path / "cache")
    mark(tmp_path / "cache")
    (tmp_path / "cache/index.json").write_bytes(content)
    assert place.read(config, tmp_path / "notes").steps == whole


@pytest.mark.long
def test_index_in_the_cache_that_is_not_the_streams_is_fetched_again_at_the_next_start(
    place: Place, whole: list[list[int]], tmp_path: Path
) -> None:
    """One that can be believed, but for the size of a shard: it might be the shard that is wrong."""
    config = place.config(tmp_path / "cache")
    index = (place.folder / "index.json").read_text()
    mark(tmp_path / "cache")
    (tmp_path / "cache/index.json").write_text(index.replace('"bytes": 972', '"bytes": 973'))
    stopped = place.read(config, tmp_path / "1")
    assert "it has 972 bytes, expected 973" in stopped.message
    goes_on(place, config, tmp_path, stopped, whole)


@pytest.mark.parametrize(
    ("num_workers", "world_size", "kind"),
    [
        (0, 1, "truncated"),
        (2, 2, "missing"),
        pytest.param(0, 1, "missing", marks=pytest.mark.long),
        pytest.param(2, 2, "truncated", marks=pytest.mark.long),
        *(pytest.param(*ranks, "flipped", marks=pytest.mark.long) for ranks in ((0, 1), (2, 2))),
    ],
)
def test_damaged_local_stream_stops_the_job_at_the_start_and_is_left_alone(
    place: Place, whole: list[list[int]], tmp_path: Path, kind: str, num_workers: int, world_size: int
) -> None:
    damage, told = DAMAGE[kind]
    stream = write_stream(tmp_path / "stream", SAMPLES)
    config = place.config(tmp_path / "no cache", num_workers, remote=None, local=str(stream))
    damage(stream / "shard.00003.mds")
    files = {file: file.read_bytes() for file in stream.iterdir()}
    stopped = place.read(config, tmp_path / "1", world_size)
    assert re.search(told + r" There is no remote to fetch them from\.", stopped.message)
    assert str(stream) in stopped.message and "of the stream in loader.toml" in stopped.message
    assert stopped.steps == []
    assert {file: file.read_bytes() for file in stream.iterdir()} == files
    write_stream(tmp_path / "mended", SAMPLES)
    (tmp_path / "mended/shard.00003.mds").replace(stream / "shard.00003.mds")
    goes_on(place, config, tmp_path, stopped, whole, world_size)


@pytest.mark.parametrize(
    ("harm", "num_workers"),
    [
        (Path.unlink, 0),
        (truncate, 2),
        pytest.param(Path.unlink, 2, marks=pytest.mark.long),
        pytest.param(truncate, 0, marks=pytest.mark.long),
    ],
)
def test_file_that_vanishes_or_is_cut_while_in_use_is_fetched_again(
    place: Place, whole: list[list[int]], tmp_path: Path, harm: Callable[[Path], object], num_workers: int
) -> None:
    def lose(step: int) -> None:
        for file in (tmp_path / "cache").glob("shard.*"):
            with contextlib.suppress(FileNotFoundError):  # a reader has just found the damage, and removed it
                harm(file)

    config = place.config(tmp_path / "cache", num_workers, predownload=8)
    read = place.read(config, tmp_path / "notes", 2, at_step=lose)
    assert read.steps == whole, [rank.output for rank in read.ranks]


@pytest.mark.parametrize(("num_workers", "world_size"), [(0, 1), pytest.param(2, 2, marks=pytest.mark.long)])
def test_local_file_that_vanishes_while_in_use_stops_the_job(
    place: Place, whole: list[list[int]], tmp_path: Path, num_workers: int, world_size: int
) -> None:
    stream = write_stream(tmp_path / "stream", SAMPLES)
    config = place.config(tmp_path / "no cache", num_workers, remote=None, local=str(stream))
    content = (stream / "shard.00006.mds").read_bytes()

    def lose(step: int) -> None:
        if step == 2:
            (stream / "shard.00006.mds").unlink()

    stopped = place.read(config, tmp_path / "1", world_size, at_step=lose)
    assert f"{stream}/shard.00006.mds is missing, and the stream in loader.toml has no remote" in stopped.message
    (stream / "shard.00006.mds").write_bytes(content)
    goes_on(place, config, tmp_path, stopped, whole, world_size)


@pytest.mark.long
@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.long), 2])
def test_shards_that_are_evicted_all_the_time_are_fetched_again(
    place: Place, whole: list[list[int]], tmp_path: Path, num_workers: int
) -> None:
    size = sum(file.stat().st_size for file in (place.folder / "index.json", *place.folder.glob("shard.0000[0-3].mds")))
    config = place.config(tmp_path / "cache", num_workers, cache_limit=size + 100, shuffle=True)
    unlimited = place.config(tmp_path / "other", num_workers, shuffle=True)
    read = place.read(config, tmp_path / "1", 2)
    assert [rank.code for rank in read.ranks] == [0, 0], [rank.output for rank in read.ranks]
    kept = sum(file.stat().st_size for file in (tmp_path / "cache").iterdir())
    at_once = 2 * 2 * max(1, num_workers)  # each process fetches what it reads, and in a thread what it will read
    assert kept < size + 1000 * (at_once - 1) + 200, "the limit, and what others fetch at once"
    assert read.steps == place.read(unlimited, tmp_path / "2").steps


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_worker_that_is_killed_stops_the_job_with_its_exit_code(
    place: Place, whole: list[list[int]], tmp_path: Path, world_size: int
) -> None:
    def kill(step: int) -> None:
        if step == 3:
            multiprocessing.active_children()[0].kill()

    config = place.config(tmp_path / "cache", 2)
    stopped = place.read(config, tmp_path / "1", world_size, at_step=kill)
    assert re.match(r"DataError: Dataloader worker \d \(pid \d+\) ended with exit code -9\.", stopped.message)
    goes_on(place, config, tmp_path, stopped, whole, world_size)


def test_workers_are_quiet_where_the_reader_stops_while_it_takes_a_batch(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's handler of SIGCHLD makes it, when another worker ends; of batches that are too large for a slot."""
    monkeypatch.setattr(workers, "SHARED_BYTES", 1024)

    connect: Callable[[str], connection.Connection] = connection.SocketClient  # type: ignore[attr-defined]

    def connect_and_stop(address: str) -> NoReturn:
        connect(address).close()
        raise RuntimeError("interrupted")

    def interrupt(step: int) -> None:
        if step == 3:
            connection.SocketClient = connect_and_stop  # type: ignore[attr-defined]

    stopped = place.read(place.config(tmp_path / "cache", 2), tmp_path / "1", 1, at_step=interrupt)
    assert stopped.message.startswith("DataError: RuntimeError: interrupted")


def test_worker_that_cannot_hand_on_a_batch_stops_the_job(
    place: Place, whole: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here one that is too large for a slot, for a temporary folder whose path is too long for a socket."""
    monkeypatch.setattr(workers, "SHARED_BYTES", 1024)
    long = tmp_path / ("x" * 100)
    long.mkdir()

    def set_folder(step: int) -> None:
        tempfile.tempdir = str(long)

    config = place.config(tmp_path / "cache", 2)
    stopped = place.read(config, tmp_path / "1", 1, at_step=set_folder)
    assert re.match(r"DataError: Dataloader worker \d \(pid \d+\) ended with exit code 1\.", stopped.message)
    assert "can't hand on a batch: OSError: AF_UNIX path too long." in stopped.ranks[0].output
    goes_on(place, config, tmp_path, stopped, whole)


def test_store_that_may_stall_longer_than_ranks_wait_is_warned_of(place: Place, tmp_path: Path) -> None:
    warning = (
        "gives a store that stalls 2 (download_retry) x 60 s (download_timeout), but ranks wait for each other only"
    )
    told = place.read(place.config(tmp_path / "cache"), tmp_path / "1", 2, steps=1)
    assert [warning in rank.output for rank in told.ranks] == [True, False]
    quiet = place.read(place.config(tmp_path / "cache", download_timeout=30), tmp_path / "2", 2, steps=1)
    assert "ranks wait for each other" not in quiet.ranks[0].output


def test_nothing_more_is_fetched_once_nobody_reads_on(tmp_path: Path) -> None:
    """Though many samples are wanted ahead."""
    stream = write_stream(tmp_path / "stream", SAMPLES)
    config = loader_config(tmp_path / "cache", remote=str(stream), predownload=1000)

    def read() -> tuple[int, int]:
        prepare_shard, fetched = CheckedStream.prepare_shard, []

        def prepare_slowly(self: CheckedStream, shard: Any) -> int:
            fetched.append(shard)
            time.sleep(0.3)
            return int(prepare_shard(self, shard))

        CheckedStream.prepare_shard = prepare_slowly  # type: ignore[method-assign]
        loader = build_loader(config)
        next(iter(loader))
        loader._dataset._iterator.exit()
        return len(fetched), len(loader._dataset.shards)

    [(fetched, shards)] = run_rank_values(read)
    assert fetched <= 4 < shards
