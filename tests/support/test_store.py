"""Each kind of fault, as streaming's own downloader finds it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from boto3.exceptions import RetriesExceededError
from botocore.exceptions import ClientError
from streaming.base.storage import CloudDownloader

from tests.support.store import Store, running_store

CONTENT = os.urandom(1_000_000)
HALF = CONTENT[:500_000]
FLIPPED = HALF + bytes([CONTENT[500_000] ^ 1]) + CONTENT[500_001:]
PATH = "/bucket/a/shard"


@pytest.fixture(scope="module")
def running() -> Iterator[Store]:
    with running_store() as store:
        store.put("a/shard", CONTENT)
        yield store


@pytest.fixture
def store(running: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    for name, value in running.environment().items():
        monkeypatch.setenv(name, value)
    running.clear()
    return running


def download(folder: Path, remote: str = "s3://bucket/a/shard") -> bytes:
    """What arrives in a new file, with a timeout of 1 s; a failure has to leave none."""
    local = folder / "shard"
    try:
        CloudDownloader.get(remote).download(remote, str(local), timeout=1.0)
    except Exception:
        assert not list(folder.iterdir())
        raise
    return local.read_bytes()


def faults(store: Store) -> list[tuple[str, str | None]]:
    """Each request's method and fault."""
    assert {request["path"] for request in store.requests()} == {PATH}
    return [(request["method"], request["fault"]) for request in store.requests()]


def test_no_fault(store: Store, tmp_path: Path) -> None:
    store.inject({"path": "other", "kind": "500"})
    assert download(tmp_path) == CONTENT
    assert faults(store) == [("HEAD", None), ("GET", None)]
    assert store.injected() == [0]


@pytest.mark.parametrize(("kind", "found"), [("truncate", HALF), ("flip", FLIPPED)])
def test_damage_that_nobody_notices(store: Store, tmp_path: Path, kind: str, found: bytes) -> None:
    store.inject({"path": "shard", "kind": kind})
    assert download(tmp_path) == found
    assert faults(store) == [("HEAD", None), ("GET", kind)]


@pytest.mark.parametrize(
    ("kind", "message", "requests"),
    [("500", "InternalError", 3), ("503", "SlowDown", 3), ("404", "not found", 1), ("403", "AccessDenied", 1)],
)
def test_errors(store: Store, tmp_path: Path, kind: str, message: str, requests: int) -> None:
    store.inject({"path": "shard", "kind": kind})
    with pytest.raises(ClientError, match=message):
        download(tmp_path)
    assert faults(store) == [("HEAD", None)] + [("GET", kind)] * requests


@pytest.mark.parametrize(("kind", "requests"), [("500", 3), ("404", 1)])
def test_errors_of_head(store: Store, tmp_path: Path, kind: str, requests: int) -> None:
    store.inject({"path": "shard", "kind": kind, "methods": ["HEAD"]})
    with pytest.raises(ClientError):
        download(tmp_path)
    assert faults(store) == [("HEAD", kind)] * requests


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("reset", "Connection reset by peer"),
        ("short", "500000 read"),
        pytest.param("stall", "Read timeout", marks=pytest.mark.long),
    ],
)
def test_broken_bodies(store: Store, tmp_path: Path, kind: str, cause: str) -> None:
    store.inject({"path": "shard", "kind": kind, "seconds": 2.0})
    start = time.monotonic()
    with pytest.raises(RetriesExceededError) as error:
        download(tmp_path)
    assert cause in str(error.value.last_exception)
    assert faults(store) == [("HEAD", None)] + [("GET", kind)] * 5
    assert (time.monotonic() - start >= 5.0) == (kind == "stall")


@pytest.mark.parametrize(("kind", "seconds"), [pytest.param("slow", 2.0, marks=pytest.mark.long), ("stall", 0.5)])
def test_pauses_shorter_than_the_timeout(store: Store, tmp_path: Path, kind: str, seconds: float) -> None:
    store.inject({"path": "shard", "kind": kind, "seconds": seconds})
    start = time.monotonic()
    assert download(tmp_path) == CONTENT
    assert time.monotonic() - start >= seconds
    assert faults(store) == [("HEAD", None), ("GET", kind)]


SLOW = [("503", 1), ("reset", 4), ("short", 4), ("stall", 1)]


@pytest.mark.parametrize(
    ("kind", "times"), [("500", 2), *(pytest.param(*case, marks=pytest.mark.long) for case in SLOW)]
)
def test_recovery(store: Store, tmp_path: Path, kind: str, times: int) -> None:
    store.inject({"path": "shard", "kind": kind, "times": times, "seconds": 2.0})
    assert download(tmp_path) == CONTENT
    assert store.injected() == [times]


def test_faults_in_turn(store: Store, tmp_path: Path) -> None:
    store.inject(
        {"path": "shard", "kind": "short", "skip": 1, "times": 1}, {"path": "/a/", "kind": "reset", "times": 2}
    )
    assert download(tmp_path) == CONTENT
    assert [fault for _, fault in faults(store)] == [None, "reset", "short", "reset", None]
    assert store.injected() == [1, 2]


def test_upload_and_delete(store: Store, tmp_path: Path) -> None:
    (tmp_path / "from" / "train").mkdir(parents=True)
    (tmp_path / "from" / "train" / "index.json").write_text("{}")
    remote = store.upload(tmp_path / "from", "b")
    (tmp_path / "to").mkdir()
    assert download(tmp_path / "to", f"{remote}/train/index.json") == b"{}"
    store.delete("b/train/index.json")
    (tmp_path / "again").mkdir()
    with pytest.raises(ClientError, match="not found"):
        download(tmp_path / "again", f"{remote}/train/index.json")


def test_unknown_faults(store: Store) -> None:
    with pytest.raises(ValueError, match="fire"):
        store.inject({"path": "shard", "kind": "fire"})


def test_ends_with_stdin() -> None:
    server = subprocess.run(
        [sys.executable, "-m", "tests.support.store"], stdin=subprocess.DEVNULL, capture_output=True
    )
    assert server.returncode == 0 and int(server.stdout) > 0 and not server.stderr
