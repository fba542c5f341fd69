"""Nothing but a cache of ours is ever written to: what is a copy, whose it is, and what lies beside it."""

import errno
import json
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streaming import Stream
from streaming.base.storage.download import DOWNLOADER_MAPPINGS, LocalDownloader

from examples.mosaic_streaming.config.folders import check_folders, default_cache, is_url, private_root
from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.shards.cache import IN_USE, MARKER
from examples.mosaic_streaming.shards.prepare import prepare_streams
from examples.mosaic_streaming.shards.stream import CheckedStream, make_checked, size_of
from tests.support import streams as support
from tests.support.ranks import CLONE_NEWNS, MS_PRIVATE, MS_REC, call_libc, can_make_nodes, run_rank_values, run_ranks
from tests.support.reading import read_job
from tests.support.streams import loader_config, mark, mixture, tree, write_stream

MS_RDONLY, MS_REMOUNT, MS_BIND = 1, 32, 4096
"""Source: Linux, mount.h."""
OTHER_USER = 12345


def resolved(config: dict[str, Any]) -> dict[str, Any]:
    """`dataset` as streaming gets it."""
    return support.resolved(config).dataset


def refuse(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(config)


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """A stream in a split, of several shards."""
    return write_stream(tmp_path / "data/train", 60)


@pytest.mark.parametrize("place", ["dataset", "stream", "both"])
def test_empty_remote_is_none_and_a_damaged_only_copy_stays(tmp_path: Path, train: Path, place: str) -> None:
    shard = train / "shard.00001.mds"
    os.truncate(shard, shard.stat().st_size - 7)
    before = tree(train)
    dataset: dict[str, Any] = {"local": str(train)} | ({"remote": ""} if place != "stream" else {})
    if place != "dataset":
        dataset = {"streams": {"it": {"local": str(train), "remote": ""}}} | ({"remote": ""} if place == "both" else {})
    stopped = read_job({"name": "text", "dataset": dataset}, tmp_path / "notes", 2, steps=2)
    assert "shard.00001.mds: it has" in stopped.message
    assert stopped.message.endswith("There is no remote to fetch them from.")
    assert tree(train) == before


def link_folder(remote: Path, local: Path) -> None:
    local.symlink_to(remote)


def link_split(remote: Path, local: Path) -> None:
    local.mkdir()
    (local / "train").symlink_to(remote / "train")


def mount_split(remote: Path, local: Path) -> None:
    (local / "train").mkdir(parents=True)
    call_libc("unshare", CLONE_NEWNS)
    call_libc("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    call_libc("mount", os.fsencode(remote / "train"), os.fsencode(local / "train"), None, MS_BIND, None)


@pytest.mark.parametrize("alias", [link_folder, link_split, mount_split])
def test_remote_by_another_name_is_no_cache(tmp_path: Path, train: Path, alias: Callable[[Path, Path], None]) -> None:
    """With another stream that fetches, and a small limit."""
    if alias is mount_split and not can_make_nodes():
        pytest.skip("no rights to mount")
    other, before = write_stream(tmp_path / "other/train", 60, first=60), tree(train)
    far = {"remote": str(other.parent), "local": str(tmp_path / "cache")}
    near = {"remote": str(train.parent), "local": str(tmp_path / "alias")}
    config = mixture({"near": near, "far": far}, split="train")

    def run() -> None:
        alias(train.parent, tmp_path / "alias")
        limited = mixture({"near": near, "far": far}, split="train", cache_limit=3000)
        refused = read_job(limited, tmp_path / "1", steps=10)
        assert "near has no `remote` beside its `local`: streaming would delete its only copy" in refused.message
        read = read_job(config, tmp_path / "2", steps=10)
        assert len({sample for step in read.steps for sample in step}) == 80

    [rank] = run_ranks(run)
    assert rank.code == 0, rank.output
    assert tree(train) == before
    assert (tmp_path / "cache/train" / MARKER).read_text() == f"{other}\n"


def test_source_outlives_a_cache_of_hard_links(tmp_path: Path, train: Path) -> None:
    before = tree(train)
    shutil.copytree(train, tmp_path / "cache", copy_function=os.link)
    shard = tmp_path / "cache/shard.00000.mds"
    shard.unlink()
    shard.write_bytes(b"damaged")
    settings: dict[str, Any] = {"remote": str(train), "cache_limit": 4000, "shuffle": True}
    read = read_job(loader_config(mark(tmp_path / "cache"), **settings), tmp_path / "notes", steps=7)
    assert len({sample for step in read.steps for sample in step}) == 56
    assert tree(train) == before


@pytest.mark.parametrize("is_there", [True, False])
def test_source_that_links_into_its_cache_is_refused(tmp_path: Path, train: Path, is_there: bool) -> None:
    shutil.copytree(train, tmp_path / "cache", ignore=None if is_there else shutil.ignore_patterns("shard.*"))
    for shard in train.glob("shard.*"):
        shard.unlink()
        shard.symlink_to(tmp_path / "cache" / shard.name)
    before = tree(train)
    settings: dict[str, Any] = {"remote": str(train), "cache_limit": 4000}
    stopped = read_job(loader_config(mark(tmp_path / "cache"), **settings), tmp_path / "notes", steps=7)
    assert f"shard.00000.mds of the stream in loader.toml is a link to {tmp_path}/cache/shard.0" in stopped.message
    assert tree(train) == before


def test_damaged_file_behind_a_linked_folder_of_a_cache_is_removed_at_a_start(tmp_path: Path, train: Path) -> None:
    index = json.loads((train / "index.json").read_text())
    (train / "part").mkdir()
    for shard in index["shards"]:
        name = shard["raw_data"]["basename"]
        (train / name).rename(train / "part" / name)
        shard["raw_data"]["basename"] = f"part/{name}"
    (train / "index.json").write_text(json.dumps(index))
    shutil.copytree(train, tmp_path / "cache")
    (tmp_path / "cache/part").rename(tmp_path / "elsewhere")
    (tmp_path / "cache/part").symlink_to(tmp_path / "elsewhere")
    damaged = tmp_path / "elsewhere/shard.00001.mds"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    config = support.resolved(loader_config(mark(tmp_path / "cache"), remote=str(train)))
    run_rank_values(lambda: prepare_streams([config]))
    assert not damaged.exists() and (tmp_path / "elsewhere/shard.00002.mds").exists()


def test_folder_with_files_is_a_cache_only_once_its_owner_says_so(tmp_path: Path, train: Path) -> None:
    own = write_stream(tmp_path / "own", 60)
    before = tree(own)
    config = loader_config(own, remote=str(train), cache_limit=4000)
    stopped = read_job(config, tmp_path / "1", 2, steps=7)
    assert stopped.message.startswith(
        f"ConfigError: `local` of the stream in loader.toml, {own}, is to be a cache, which may be emptied, but it "
        f"holds index.json, shard.00000.mds, shard.00001.mds, … and no {MARKER}: it may be the only copy."
    )
    assert tree(own) == before, "not even a lock is left"
    command = stopped.message.rpartition("say so with: ")[2]
    assert command == f"touch {own}/{MARKER}"
    assert os.system(command) == 0
    assert len(read_job(config, tmp_path / "2", 2, steps=7).steps) == 7
    assert (own / MARKER).read_text() == f"{train}\n"


def test_cache_of_another_remote_is_refused(tmp_path: Path, train: Path) -> None:
    newer = write_stream(tmp_path / "newer", 60, first=100)
    read_job(loader_config(tmp_path / "cache", remote=str(train)), tmp_path / "1", steps=2)
    before = tree(tmp_path / "cache")
    stopped = read_job(loader_config(tmp_path / "cache", remote=str(newer)), tmp_path / "2", steps=2)
    assert f"{tmp_path}/cache, is a cache of {train}, not of {newer}." in stopped.message
    assert tree(tmp_path / "cache") == before
    (tmp_path / "link").symlink_to(train)
    again = read_job(loader_config(tmp_path / "cache", remote=f"{tmp_path}/link/"), tmp_path / "3", steps=2)
    assert len(again.steps) == 2, "the same by another name"


@pytest.mark.parametrize(
    ("remote", "local"), [("data", "data/train"), ("data/train", "data"), ("data/train", "data/train/cache")]
)
def test_cache_that_overlaps_with_its_source_is_refused(train: Path, remote: str, local: str) -> None:
    shutil.copy(train / "index.json", train.parent)
    base = train.parents[1]
    config = loader_config(base / local, remote=str(base / remote))
    refuse(config, rf"`local` of dataset in loader\.toml, {base}/{local}/?, is a cache.* overlaps with {base}/{remote}")


@pytest.mark.parametrize("cache", ["b", "b/inside", ".", "link"])
def test_cache_that_overlaps_with_another_stream_is_refused(tmp_path: Path, cache: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "b")
    for name in ("a", "b"):
        write_stream(tmp_path / name, 4)
    a = {"remote": "s3://bucket/a", "local": str(tmp_path / cache)}
    refuse(mixture({"a": a, "b": {"local": str(tmp_path / "b")}}), "(overlaps with|the same `local`)")
    c = {"remote": str(tmp_path / "b"), "local": str(tmp_path / "c")}
    refuse(mixture({"a": a, "c": c}), "overlaps with .*/b, which c in loader.toml reads")
    d = {"remote": "s3://bucket/d", "local": str(tmp_path / "b")}
    refuse(mixture({"a": a, "d": d}), "(overlaps with|the same `local`)")
    apart = a | {"local": str(tmp_path / "bb")}
    resolved(mixture({"a": apart, "b": {"local": str(tmp_path / "b")}, "c": c}))


def test_validation_neither_empties_trainings_streams_nor_has_its_emptied(tmp_path: Path) -> None:
    streams = {name: {"local": str(write_stream(tmp_path / name, 4))} for name in ("train", "val")}

    def check(train: dict[str, Any], validation: dict[str, Any]) -> None:
        both = zip((train, validation), ("train.toml", "val.toml"), strict=True)
        one, other = (
            support.resolved({"name": "text", "dataset": dict(stream)}, source=source).folders
            for stream, source in both
        )
        check_folders(other, one)

    for reads, keeps in (("train", "val"), ("val", "train")):
        fetched = {"remote": "s3://bucket/x", "local": streams[reads]["local"]}
        pair = {reads: streams[reads], keeps: fetched}
        with pytest.raises(
            ConfigError, match=rf"overlaps with {tmp_path}/{reads}, which dataset in {reads}.toml reads|"
        ):
            check(pair["train"], pair["val"])
    shared = {"remote": "s3://bucket/x", "local": str(tmp_path / "cache")}
    check(shared, shared)
    with pytest.raises(
        ConfigError, match=r"dataset in train.toml and dataset in val.toml have the same `local`, .*, but another"
    ):
        check(shared, shared | {"remote": "s3://bucket/y"})


def test_same_remote_twice_is_told_as_that() -> None:
    streams = {"a": {"remote": "s3://bucket/x"}, "b": {"remote": "s3://bucket/x"}}
    refuse(mixture(streams), "a in loader.toml and b in loader.toml are the same stream, s3://bucket/x. Give it once")


def prepare(config: dict[str, Any], folder: Path) -> None:
    """Have streams ready as a job does, with temporary files in a folder that anybody may write to."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o1777)
    tempfile.tempdir = str(folder)
    prepare_streams([support.resolved(config)])


def test_default_cache_is_this_users_alone(tmp_path: Path, train: Path) -> None:
    def run() -> Path:
        prepare({"name": "text", "dataset": {"remote": str(train)}}, tmp_path / "tmp")
        assert stat.S_IMODE(os.stat(private_root()).st_mode) == 0o700
        return Path(default_cache(str(train)))

    [cache] = run_rank_values(run)
    assert (cache / "index.json").read_bytes() == (train / "index.json").read_bytes()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
@pytest.mark.parametrize("how", ["default", "given", "linked", "writable"])
def test_cache_where_another_user_may_have_put_data_is_refused(tmp_path: Path, train: Path, how: str) -> None:
    def run() -> None:
        tempfile.tempdir = str(tmp_path / "tmp")
        dataset = {"remote": str(train)} | ({"local": f"{tempfile.tempdir}/my-data"} if how == "given" else {})
        planted = Path(dataset.get("local", default_cache(str(train))))
        theirs = planted if how == "given" else Path(private_root())
        if how == "linked":
            theirs.parent.mkdir()
            theirs.symlink_to(tmp_path / "elsewhere")
            (tmp_path / "elsewhere").mkdir()
        shutil.copytree(write_stream(tmp_path / "planted", 60, first=100), planted)
        mark(planted)
        if how == "writable":
            theirs.chmod(0o777)
        else:
            os.chown(theirs, OTHER_USER, -1, follow_symlinks=False)
        user = 0 if how == "writable" else OTHER_USER
        with pytest.raises(ConfigError, match=f"lies in {theirs}, which belongs to user {user} or can be written by"):
            prepare({"name": "text", "dataset": dataset}, tmp_path / "tmp")

    run_rank_values(run)


def test_home_and_variables_in_paths_are_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    write_stream(tmp_path / "data/train", 4)
    streams = {"a": {"local": "~/data/train"}, "b": {"remote": "$DATA/train", "local": "${DATA}/cache"}}
    found = resolved(mixture(streams))["streams"]
    assert found["a"]["local"] == found["b"]["remote"] == f"{tmp_path}/data/train"
    assert found["b"]["local"] == f"{tmp_path}/data/cache"
    refuse(
        mixture({"a": {"local": "$NOT_SET_ANYWHERE/x"}}), r"`local` in loader.toml = '\$NOT_SET_ANYWHERE/x': there is"
    )
    refuse(mixture({"a": {"remote": "~nobody_at_all/x"}}), "`remote` in loader.toml = '~nobody_at_all/x': there is no")


def test_url_is_what_streaming_takes_for_one() -> None:
    assert is_url("s3://bucket/x") and is_url("dbfs:/Volumes/main/x") and is_url("dbfs:/mnt/x")
    assert not is_url("/data/x") and not is_url("data/x") and not is_url("./x")


def test_compressed_stream_that_cant_be_unpacked_beside_itself_gets_the_right_advice(tmp_path: Path) -> None:
    if not can_make_nodes():
        pytest.skip("no rights to mount")
    folder = tmp_path / "packed"
    write_stream(folder, 20, compression="zstd")

    def run() -> None:
        call_libc("unshare", CLONE_NEWNS)
        call_libc("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        call_libc("mount", os.fsencode(folder), os.fsencode(folder), None, MS_BIND, None)
        call_libc("mount", None, os.fsencode(folder), None, MS_REMOUNT | MS_BIND | MS_RDONLY, None)
        stopped = read_job(loader_config(folder), tmp_path / "1", steps=2)
        assert "can't be stored: Read-only file system" in stopped.message
        assert f"Or give it `remote` = '{folder}' and another folder as `local`." in stopped.message
        assert "cache_limit" not in stopped.message
        followed = loader_config(tmp_path / "cache", remote=str(folder))
        assert len(read_job(followed, tmp_path / "2", steps=2).steps) == 2

    [rank] = run_ranks(run)
    assert rank.code == 0, rank.output


def test_file_that_is_renamed_while_its_size_is_looked_at_counts_as_none(tmp_path: Path) -> None:
    over = threading.Event()

    def rename() -> None:
        while not over.is_set():
            (tmp_path / "file.part").write_bytes(b"1234")
            (tmp_path / "file.part").rename(tmp_path / "file")

    renaming = threading.Thread(target=rename)
    renaming.start()
    try:
        assert {size_of(str(tmp_path)) for _ in range(3000)} <= {0, 4, 8}
    finally:
        over.set()
        renaming.join()


@pytest.mark.parametrize(
    ("error", "is_disk"),
    [
        (OSError(errno.ENOSPC, "full"), True),
        (OSError(errno.EDQUOT, "quota"), True),
        (OSError(errno.EROFS, "read-only", "{cache}/x"), True),
        (OSError(errno.EACCES, "denied", "{cache}/x"), True),
        (OSError(errno.EACCES, "denied", "/remote/x"), False),
        (FileNotFoundError(errno.ENOENT, "renamed", "{cache}/.incoming-1/x"), False),
        (ConnectionResetError(errno.ECONNRESET, "reset"), False),
    ],
)
def test_only_what_a_disk_refuses_is_the_caches_fault(tmp_path: Path, error: OSError, is_disk: bool) -> None:
    error.filename = error.filename and error.filename.format(cache=tmp_path)
    stream = make_checked(Stream(remote="/remote", local=str(tmp_path), keep_zip=True), "the stream")
    with pytest.raises(DataError if is_disk else type(error)), stream.storing("shard", 1):
        raise error


class Client(LocalDownloader):
    """A store's client, which a slow download uses while another one fails."""

    busy, failed = threading.Event(), threading.Event()
    cleaned = False

    def clean_up(self) -> None:
        self.cleaned = True

    def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
        if "00000" in remote:
            self.busy.set()
            assert self.failed.wait(30)
            assert not self.cleaned, "the client was closed under a download"
        elif not self.failed.is_set():
            assert self.busy.wait(30)
            threading.Timer(0.2, self.failed.set).start()
            raise ConnectionResetError("reset")
        super()._download_file_impl(remote, local, timeout)


def test_failing_download_leaves_another_threads_client_alone(
    tmp_path: Path, train: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DOWNLOADER_MAPPINGS, "", Client)
    settings: dict[str, Any] = {"split": "", "download_retry": 2, "download_timeout": 60, "keep_zip": False}
    stream = make_checked(Stream(remote=str(train), local=str(tmp_path / "cache"), **settings), "the stream")
    errors: list[BaseException] = []

    def fetch(stream: CheckedStream, name: str) -> None:
        try:
            stream.fetch(name, 0, lambda path, folder: shutil.move(path, tmp_path / "cache" / name))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=fetch, args=(stream, f"shard.0000{n}.mds")) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    for n in range(2):
        name = f"shard.0000{n}.mds"
        assert (tmp_path / "cache" / name).read_bytes() == (train / name).read_bytes()


def test_lock_is_not_written_through_a_link(tmp_path: Path, train: Path) -> None:
    """Somebody's file stays what it is, whatever a cache has in place of ours."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    cache = mark(tmp_path / "cache")
    (cache / IN_USE).symlink_to(precious)
    stopped = read_job(loader_config(cache, remote=str(train)), tmp_path / "notes", steps=2)
    assert IN_USE in stopped.message
    assert precious.read_text() == "mine"
