"""Run a function in several ranks that are forked from this warm process, and end them as torchrun would.

The parent has imported everything, so ranks start in milliseconds. It must not have computed with several threads or
opened shared memory: a child of such a process can hang.
"""

import atexit
import contextlib
import ctypes
import gc
import math
import os
import pickle
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
from torchtitan.train import Trainer

from examples.mosaic_streaming.sampling.placement import Layout

OURS = re.compile(r"\d{13}_")
"""Shared memory of a job begins so."""

CLONE_NEWNS, CLONE_NEWIPC, MS_REC, MS_PRIVATE = 0x20000, 0x8000000, 0x4000, 0x40000
"""Source: Linux, sched.h and mount.h."""
TIME_TO_CLOSE = 30.0
"""Seconds that torchrun leaves ranks after SIGTERM."""


@dataclass
class Rank:
    """How one rank ended.

    Attributes:
        code: its exit code; negative: the signal that ended it.
        value: what the function returned.
        output: what it printed.
        shared_memory: files in /dev/shm that it used at its end.
        left: commands of the processes of its group that outlived it.
    """

    code: int
    value: Any
    output: str
    shared_memory: list[str]
    left: list[str]


def run_ranks(
    function: Callable[[], Any],
    world_size: int = 1,
    *,
    nodes: int = 1,
    timeout: float = 120.0,
    notice: float = 0.0,
    while_running: Callable[[list[int], list[Path]], None] = lambda pids, outputs: None,
) -> list[Rank]:
    """Call `function` in `world_size` new processes that look like torchrun's.

    Args:
        function: called without arguments; what it returns is pickled.
        world_size: number of ranks.
        nodes: machines that the ranks are spread over: each has its own shared memory and temporary folder.
        timeout: seconds until the test fails, and ranks that still run are killed.
        notice: seconds from a rank's failure to the others' SIGTERM; torchrun looks every 0.1 s.
        while_running: called once they are started, with the ranks' pids and the files with what they print.

    Returns:
        how each rank ended.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        port = free_port()
        pids = [fork_rank(function, rank, world_size, nodes, port, Path(folder)) for rank in range(world_size)]
        try:
            while_running(pids, [Path(folder, f"{rank}.txt") for rank in range(world_size)])
            codes = wait_for_ranks(pids, time.monotonic() + timeout, notice)
            left = [group_members(pid) for pid in pids]
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):  # the group: a rank's dataloader workers too
                    os.killpg(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)
        return [read_rank(Path(folder), rank, codes[pid], left[rank]) for rank, pid in enumerate(pids)]


def run_rank_values(
    function: Callable[[], Any], world_size: int = 1, nodes: int = 1, timeout: float = 120.0
) -> list[Any]:
    """What `function` returns in each rank; the test fails if a rank does."""
    ranks = run_ranks(function, world_size, nodes=nodes, timeout=timeout)
    failed = [f"rank {i} ended with {rank.code}:\n{rank.output}" for i, rank in enumerate(ranks) if rank.code]
    assert not failed, "\n".join(failed)
    return [rank.value for rank in ranks]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def fork_rank(function: Callable[[], Any], rank: int, world_size: int, nodes: int, port: int, folder: Path) -> int:
    """Start one rank and return its pid, which is that of its process group, too."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            live_as_rank(function, rank, world_size, nodes, port, folder)
        os._exit(70)
    with contextlib.suppress(PermissionError):
        os.setpgid(pid, pid)
    return pid


def live_as_rank(
    function: Callable[[], Any], rank: int, world_size: int, nodes: int, port: int, folder: Path
) -> NoReturn:
    """All of a rank's life, from the fork to the exit; what happens at the exit of an interpreter happens here, too."""
    os.setpgid(0, 0)
    gc.freeze()  # a collection that looked at all of the parent's objects would copy their memory
    atexit._clear()
    output = open(folder / f"{rank}.txt", "w", buffering=1)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    # pytest's hooks would keep to themselves what destructors and threads raise.
    sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
    per_node = world_size // nodes
    local = {"LOCAL_RANK": str(rank % per_node), "LOCAL_WORLD_SIZE": str(per_node)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), **local}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    tempfile.tempdir = str(folder)
    # A fork invalidates torch's pool of threads. Renew it here, before several threads of autograd race to do so and
    # one of them finds none ("Invalid thread pool!", torch 2.13).
    torch.set_num_threads(1)
    shorten_last_pause(folder, world_size)
    code = 1
    try:
        if nodes > 1:
            enter_node(folder / f"node-{rank // per_node}", is_first=rank % per_node == 0)
        (folder / f"{rank}.pickle").write_bytes(pickle.dumps(function()))
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    (folder / f"{rank}.shm").write_text("\n".join(shared_memory_of(os.getpid())))
    threading._shutdown()  # type: ignore[attr-defined]  # with this, and then with that, an interpreter ends
    atexit._run_exitfuncs()
    os._exit(code)


def shorten_last_pause(folder: Path, world_size: int) -> None:
    """Let TorchTitan's rank 0 end as soon as the other ranks have, rather than 2 s after its last step.

    Source: torchtitan 0.2.2, train.py, and 0.3.0, trainer.py: "Sleeping 2 seconds for other ranks to complete".
    """
    others = [folder / f"{rank}.pickle" for rank in range(1, world_size)]

    def sleep(seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not all(other.exists() for other in others):
            time.sleep(0.01)

    module: Any = sys.modules[Trainer.__module__]
    module.time = SimpleNamespace(**vars(time) | {"sleep": sleep})


def enter_node(folder: Path, is_first: bool) -> None:
    """Give this process a machine's own shared memory and temporary folder, together with the others of its node."""
    ready = folder / "ready"
    if is_first:
        folder.mkdir()
        call_libc("unshare", CLONE_NEWNS | CLONE_NEWIPC)
        call_libc("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
        call_libc("mount", b"tmpfs", b"/dev/shm", b"tmpfs", 0, None)
        ready.with_suffix(".part").write_text(str(os.getpid()))
        ready.with_suffix(".part").rename(ready)
    while not ready.exists():
        time.sleep(0.01)
    if not is_first:
        here = os.getcwd()
        for kind in ("ipc", "mnt"):
            with open(f"/proc/{ready.read_text()}/ns/{kind}") as namespace:
                call_libc("setns", namespace.fileno(), 0)
        os.chdir(here)  # the namespace's root is where one enters
    tempfile.tempdir = str(folder)


def call_libc(name: str, *arguments: Any) -> None:
    """Call a function of the C library; raise OSError if it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def can_make_nodes() -> bool:
    """Whether this user may have namespaces of their own, which nodes are made of."""
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory() as folder:
        pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                enter_node(Path(folder, "node"), is_first=True)
                code = 0
            os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return False


def shared_memory_of(pid: int) -> set[str]:
    """Files in /dev/shm that a process uses."""
    return set(re.findall("/dev/shm/.*", Path(f"/proc/{pid}/maps").read_text()))


def wait_for_ranks(pids: list[int], deadline: float, notice: float) -> dict[int, int]:
    """Exit codes by pid. When a rank fails, the others get SIGTERM, and at last SIGKILL, as from torchrun."""
    codes: dict[int, int] = {}
    ended_at = killed_at = math.inf
    while len(codes) < len(pids):
        assert time.monotonic() < deadline, f"{len(pids) - len(codes)} of {len(pids)} ranks hang"
        for pid in set(pids) - set(codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid]:
                    ended_at = min(ended_at, time.monotonic() + notice)
        if time.monotonic() > ended_at:
            signal_ranks(set(pids) - set(codes), signal.SIGTERM)
            ended_at, killed_at = math.inf, min(killed_at, time.monotonic() + TIME_TO_CLOSE)
        if time.monotonic() > killed_at:
            signal_ranks(set(pids) - set(codes), signal.SIGKILL)
        time.sleep(0.02)
    return codes


def signal_ranks(pids: set[int], number: signal.Signals) -> None:
    """Send a signal to the process groups of ranks."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)


def group_members(group: int, patience: float = 5.0) -> list[str]:
    """Commands of the living processes of a group that still live after `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        members = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                state, _, pgrp = process.joinpath("stat").read_text().rpartition(")")[2].split()[:3]
                if int(pgrp) == group and state != "Z":
                    members.append(process.joinpath("cmdline").read_text().replace("\0", " "))
        if not members or time.monotonic() > deadline:
            return members
        time.sleep(0.05)


def wait_until(ready: Callable[[], bool], said: Callable[[], str] = str) -> None:
    """Look again and again, for a minute: less than ranks have; the test fails with what is `said` if it never is."""
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline, said()
        time.sleep(0.01)


def read_rank(folder: Path, rank: int, code: int, left: list[str]) -> Rank:
    """What a rank has left in the folder."""
    value, output = folder / f"{rank}.pickle", folder / f"{rank}.txt"
    shared_memory = folder / f"{rank}.shm"
    return Rank(
        code=code,
        value=pickle.loads(value.read_bytes()) if value.exists() else None,
        output=output.read_text() if output.exists() else "",  # it was ended before it began
        shared_memory=shared_memory.read_text().split() if shared_memory.exists() else [],
        left=left,
    )


def shared() -> set[str]:
    """What jobs have in shared memory now."""
    return {file.name for file in Path("/dev/shm").iterdir() if OURS.match(file.name)}


def nothing_is_left(ranks: list[Rank]) -> None:
    """Check that no process and no shared memory has outlived the ranks."""
    assert [rank.left for rank in ranks] == [[]] * len(ranks)
    for rank in ranks:
        assert len(rank.shared_memory) > 4, "streaming's shared memory is where this test looks"
        assert not [path for path in rank.shared_memory if os.path.exists(path)]


def dp_ranks_of(layout: dict[str, int]) -> list[int]:
    """The dp rank of every rank, by the order (pp, batch, cp, tp)."""
    ranks = int(np.prod([layout[name] for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp")]))
    return [Layout(ranks, ranks, layout).dp_rank(rank) for rank in range(ranks)]
