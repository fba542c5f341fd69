"""torch's rendezvous reads one store over all restarts, through a function that can be replaced."""

import importlib
import mmap
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from examples.mosaic_streaming.upstream.patch import parameters
from examples.mosaic_streaming.upstream.rendezvous import NCCL_FAULT, fresh_rendezvous

CUDA = Path(torch.__file__).parent / "lib/libtorch_cuda.so"


def rendezvous() -> dist.Store:
    """The store of one start of a rank."""
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=20)))
    assert isinstance(store, dist.Store)
    return store


def test_function_that_is_replaced_has_the_known_parameters() -> None:
    create = importlib.import_module("torch.distributed.rendezvous")._create_c10d_store
    expected = ["hostname", "port", "rank", "world_size", "timeout", "use_libuv"]
    assert parameters(create) == expected, "adapt fresh_rendezvous in upstream/rendezvous.py"


def test_restarts_share_a_store_of_torchrun_unless_they_meet_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": server.port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    rendezvous().set("address", "of a dead rank")
    assert rendezvous().check(["address"]), "torch keeps restarts apart: upstream/rendezvous.py can go"
    with fresh_rendezvous():
        assert not rendezvous().check(["address"]), "torch makes its store elsewhere: see upstream/rendezvous.py"


@pytest.mark.skipif(not CUDA.exists(), reason="this torch has no NCCL")
def test_nccls_watchdogs_abort_by_the_known_key() -> None:
    with CUDA.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
        found = library.find(NCCL_FAULT.encode() + b"\0")
    assert found >= 0, "NCCL's abort key has another name: set NCCL_FAULT in upstream/rendezvous.py"
