"""Jobs of one machine leave each other alone, and the dead leave nothing behind that the living stumble over."""

import contextlib
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from streaming.base.shared import SharedMemory

from examples.mosaic_streaming.batch.titan_batch import TitanBatch
from examples.mosaic_streaming.dataloader import MosaicDataLoader
from examples.mosaic_streaming.distributed.store import draw_number
from examples.mosaic_streaming.train import main
from examples.mosaic_streaming.upstream.shared_memory import FIRST_NUMBER, SHM, hold, shared_memory
from tests.support.jobs import command, logged, train, write_files
from tests.support.ranks import run_rank_values, run_ranks, shared, wait_until
from tests.support.reading import read_job
from tests.support.store import running_store
from tests.support.streams import build_loader, loader_config, write_stream


def cached(stream: Path, cache: Path, **settings: Any) -> dict[str, Any]:
    """A loader with a cache."""
    return loader_config(cache, remote=str(stream), **settings)


@contextlib.contextmanager
def another_job(config: dict[str, Any]) -> Iterator[int]:
    """Within it, a job of one rank has built its loader; gives its pid."""

    def stay() -> None:
        build_loader(config)
        print("ready", flush=True)
        time.sleep(600)

    started, over = os.pipe(), os.pipe()

    def tell(pids: list[int], outputs: list[Path]) -> None:
        wait_until(lambda: outputs[0].exists() and "ready" in outputs[0].read_text())
        os.write(started[1], str(pids[0]).encode())
        os.read(over[0], 1)
        os.killpg(pids[0], signal.SIGTERM)

    if (parent := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            run_ranks(stay, while_running=tell)
        os._exit(0)
    try:
        yield int(os.read(started[0], 20))
    finally:
        os.write(over[1], b"1")
        os.waitpid(parent, 0)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_job_on_the_cache_of_another_is_told_its_pid_at_once(tmp_path: Path, world_size: int) -> None:
    stream = write_stream(tmp_path / "stream", 40)
    config = cached(stream, tmp_path / "cache")
    with another_job(config) as pid:
        refused = read_job(config, tmp_path / "1", world_size, steps=5)
        assert re.match(
            rf"ConfigError: `local` of the stream in loader\.toml, {tmp_path}/cache/?, is the cache of another job, "
            rf"process {pid} on .+\. Give each job another `local` in loader\.toml, or end that one\.",
            refused.message,
        )
        other = read_job(cached(stream, tmp_path / "other"), tmp_path / "2", world_size, steps=5)
        assert len(other.steps) == 5, "with another cache it reads"
    assert read_job(config, tmp_path / "3", world_size, steps=5).steps == other.steps, "and with that one, once free"


def test_local_stream_is_read_by_several_jobs(tmp_path: Path) -> None:
    config = loader_config(write_stream(tmp_path / "stream", 40))
    with another_job(config):
        assert len(read_job(config, tmp_path / "1", steps=5).steps) == 5


def test_only_stale_memory_of_this_user_is_removed(tmp_path: Path) -> None:
    """That of a living process stays, and so does what isn't ours."""
    stale, foreign, streamings, held = FIRST_NUMBER + 1, FIRST_NUMBER + 2, "000007_locals", FIRST_NUMBER + 3
    names = [f"{stale}_job", f"{stale}_epoch", f"{foreign}_job", f"{foreign}_epoch", streamings, f"{held}_epoch"]
    config = loader_config(write_stream(tmp_path / "stream", 40))
    try:
        for name in names:
            (SHM / name).touch()
        if os.getuid() == 0:
            for name in names[2:4]:
                os.chown(SHM / name, 12345, -1)
        holds = os.pipe()
        if (holder := os.fork()) == 0:
            hold(held)
            os.write(holds[1], b"1")
            signal.pause()
        os.read(holds[0], 1)
        assert len(read_job(config, tmp_path / "notes", steps=2).steps) == 2
        left = {name for name in names if (SHM / name).exists()}
        assert left == {streamings, f"{held}_epoch"} | ({*names[2:4]} if os.getuid() == 0 else set())
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        read_job(config, tmp_path / "notes", steps=2)
        assert not (SHM / f"{held}_epoch").exists() and not (SHM / f"{held}_job").exists()
    finally:
        for name in [*names, f"{held}_job"]:
            (SHM / name).unlink(missing_ok=True)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")
def test_what_another_user_has_put_beside_stale_memory_neither_hangs_a_start_nor_is_removed(tmp_path: Path) -> None:
    number = FIRST_NUMBER + 4
    pipe, theirs, stale = (SHM / f"{number}_{name}" for name in ("job", "epoch", "locals"))
    try:
        os.mkfifo(pipe)
        theirs.touch()
        for file in (pipe, theirs):
            os.chown(file, 12345, -1)
        stale.touch()
        config = loader_config(write_stream(tmp_path / "stream", 40))
        assert len(read_job(config, tmp_path / "notes", steps=2).steps) == 2
        assert pipe.exists() and theirs.exists() and not stale.exists()
    finally:
        for file in (pipe, theirs, stale):
            file.unlink(missing_ok=True)


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.long), 2])
def test_nothing_is_left_in_shared_memory_nor_beside_the_shards(tmp_path: Path, num_workers: int) -> None:
    stream = write_stream(tmp_path / "stream", 40)
    before = shared()
    for number in range(2):
        read_job(cached(stream, tmp_path / "cache", num_workers=num_workers), tmp_path / str(number), 2, steps=5)
        assert shared() == before
    expected = {".in_use", ".mosaic_cache", *(file.name for file in stream.iterdir())}
    assert {file.name for file in (tmp_path / "cache").iterdir()} == expected


def test_what_a_killed_job_was_fetching_is_removed(tmp_path: Path) -> None:
    stream = write_stream(tmp_path / "stream", 40)
    (tmp_path / "cache/.incoming-abc").mkdir(parents=True)
    (tmp_path / "cache/.incoming-abc/file").write_text("half")
    assert len(read_job(cached(stream, tmp_path / "cache"), tmp_path / "notes", steps=5).steps) == 5
    assert not list((tmp_path / "cache").glob(".incoming-*"))


ROUNDS = 10


@pytest.mark.long
def test_neighbour_is_started_killed_and_restarted_while_a_job_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its losses are those of an undisturbed run."""
    one, other = write_files(tmp_path / "one"), write_files(tmp_path / "other")
    for files in (one, other):
        loader = files / "loader.toml"
        loader.write_text(loader.read_text().replace("num_workers = 0", "num_workers = 1"))
        loader.write_text(loader.read_text().replace("/stream", "/cache") + f'remote = "{files}/stream"\n')
    flags = [f"--training.steps={ROUNDS + 2}", "--training.global_batch_size=4"]
    undisturbed = logged(train(one, *flags, world_size=2))
    before = shared()
    read_batches = MosaicDataLoader.__iter__

    def read_in_rounds(self: MosaicDataLoader) -> Iterator[TitanBatch]:
        for number, batch in enumerate(read_batches(self)):
            wait_until((tmp_path / f"round {min(number, ROUNDS)}").exists)
            yield batch

    def disturb(pids: list[int], outputs: list[Path]) -> None:
        (tmp_path / "round 0").touch()
        draw = random.Random(0)
        for number in range(1, ROUNDS + 1):
            run_ranks(lambda: main(command(other, *flags)), while_running=lambda pids, _: kill(pids, draw))
            assert shared() > before, "the job's own is still there"
            (tmp_path / f"round {number}").touch()

    def kill(pids: list[int], draw: random.Random) -> None:
        time.sleep(draw.uniform(0, 2.5))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pids[0], draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))

    def trains() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(MosaicDataLoader, "__iter__", read_in_rounds)
            main(command(one, *flags))

    ranks = run_ranks(trains, 2, while_running=disturb, timeout=240)
    assert [rank.code for rank in ranks] == [0, 0], ranks[0].output
    assert logged(ranks) == undisturbed
    train(other, *flags)
    assert shared() == before, "and the next start has removed what the killed ones left"


@pytest.mark.long
@pytest.mark.parametrize(
    ("remote", "told"),
    [
        ("foo://bucket/stream", r"ConfigError: the stream in loader\.toml: .*foo"),
        (
            "s3://bucket/nothing",
            r"DataError: s3://bucket/nothing/index\.json of the stream in loader\.toml can't be fetched",
        ),
    ],
)
def test_remote_that_there_is_not_is_told(tmp_path: Path, remote: str, told: str) -> None:
    with running_store() as store:
        config = loader_config(tmp_path / "cache", remote=remote)
        stopped = read_job(config, tmp_path / "notes", 2, steps=1, environment=store.environment())
    assert re.match(told, stopped.message), stopped.message


@pytest.mark.long
def test_missing_credentials_are_told(tmp_path: Path) -> None:
    with running_store() as store:
        environment = dict.fromkeys(store.environment(), "") | {
            "S3_ENDPOINT_URL": store.environment()["S3_ENDPOINT_URL"]
        }
        environment |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/nowhere", "HOME": str(tmp_path)}
        environment |= {"AWS_SHARED_CREDENTIALS_FILE": "/nowhere"}
        config = loader_config(tmp_path / "cache", remote="s3://bucket/stream")
        stopped = read_job(config, tmp_path / "notes", 2, steps=1, environment=environment)
    assert re.match(r"(DataError|ConfigError): .*[cC]redentials", stopped.message), stopped.message


def test_shared_memory_is_opened_once_its_creator_has_given_it_a_size() -> None:
    """As where a rank is slow to start: opened at once, an empty file can't be mapped."""
    name = f"{FIRST_NUMBER}_slow"

    def give_size() -> None:
        time.sleep(0.3)
        os.truncate(SHM / name, 8)

    (SHM / name).touch()
    creator = threading.Thread(target=give_size)
    creator.start()
    try:
        with shared_memory(FIRST_NUMBER):
            assert SharedMemory(name, False).buf.nbytes == 8
    finally:
        creator.join()
        (SHM / name).unlink()


def test_numbers_of_jobs_differ() -> None:
    """So many that start at once don't meet."""

    def numbers() -> list[int]:
        dist.init_process_group("gloo")
        return [draw_number() for _ in range(20)]

    one, other = run_rank_values(numbers, 2)
    assert one == other and len(set(one)) == 20 and all(len(str(number)) == 13 for number in one)
