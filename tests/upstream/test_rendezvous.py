"""torchrun's ranks meet in a store that outlives restarts, and NCCL leaves a key at its root."""

import importlib
import inspect
import mmap
from pathlib import Path

import pytest
import torch

from examples.mosaic_streaming.upstream.rendezvous import NCCL_FAULT, fresh_rendezvous

RENDEZVOUS = importlib.import_module("torch.distributed.rendezvous")


def test_torch_makes_its_store_in_the_function_that_is_replaced() -> None:
    create = RENDEZVOUS._create_c10d_store
    with fresh_rendezvous():
        assert RENDEZVOUS._create_c10d_store is not create
    assert RENDEZVOUS._create_c10d_store is create
    for handler in (RENDEZVOUS._env_rendezvous_handler, RENDEZVOUS._tcp_rendezvous_handler):
        assert "_create_c10d_store(" in inspect.getsource(handler), "see upstream/rendezvous.py"


def test_torch_still_puts_no_prefix_before_the_keys_of_a_restart() -> None:
    """tests/unit/distributed/test_store.py and tests/e2e/test_torchrun.py have what comes of it."""
    source = inspect.getsource(RENDEZVOUS._create_c10d_store)
    assert "TCPStore(" in source and "PrefixStore" not in source, (
        "torch keeps restarts apart: see upstream/rendezvous.py"
    )


def test_nccl_still_has_the_key() -> None:
    library = Path(torch.__file__).parent / "lib/libtorch_cuda.so"
    if not library.exists():
        pytest.skip("this torch has no CUDA")
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        assert content.find(NCCL_FAULT.encode()) > 0, "NCCL's watchdogs use another key: see upstream/rendezvous.py"
