"""Restarts through torchrun itself: after SIGKILL, on other ranks, and on two machines with an agent each."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import SAVE, command, losses, write_files, write_loader
from tests.support.ranks import can_make_nodes, free_port, shared
from tests.support.recording import PAUSE, recorded, steps_recorded
from tests.support.streams import SEQ_LEN

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
TORCHRUN = [str(Path(sys.executable).with_name("torchrun")), "--local-ranks-filter=0"]


def start(
    folder: Path, name: str, torchrun: list[str], *flags: str, prefix: tuple[str, ...] = (), workers: int = 0
) -> subprocess.Popen[str]:
    """Start an agent with its ranks; what it prints goes to a file, the samples to a folder of this name."""
    (folder / "recorded" / name).mkdir(parents=True, exist_ok=True)
    write_loader(folder, folder / "stream", workers)
    run = [
        "-m",
        "tests.support.recording",
        str(folder / "recorded" / name),
        *command(folder, *SAVE, "--debug.seed=1", "--checkpoint.interval=6", *flags),
    ]
    with open(folder / f"{name}.log", "a") as log:
        return subprocess.Popen(
            [*prefix, *TORCHRUN, *torchrun, *run],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def ends_well(folder: Path, name: str, agents: list[subprocess.Popen[str]]) -> tuple[dict[int, float], list[list[int]]]:
    """Wait for all agents; losses and samples of the run."""
    codes = end_of(agents)
    log = (folder / f"{name}.log").read_text()
    assert codes == [0] * len(agents), log
    return losses(log), recorded(folder / "recorded" / name)


def end_of(agents: Sequence[subprocess.Popen[Any]]) -> list[int | None]:
    """Exit codes; none of an agent that doesn't end, and nothing of it is left."""
    until = time.monotonic() + 300
    try:
        while time.monotonic() < until and any(agent.poll() is None for agent in agents):
            time.sleep(0.1)
        return [agent.poll() for agent in agents]
    finally:
        for agent in agents:
            kill_tree(agent.pid)


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all that it has started, resource trackers too."""
    tree, found = [pid], [pid]
    while found:
        found = [child for parent in found for child in children(parent)]
        tree += found
    for member in tree:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            found += [int(child) for child in task.read_text().split()]
    return found


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    return write_files(module_path)


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[dict[int, float], list[list[int]]]:
    """12 steps in one go, on two ranks; saved at step 6, too."""
    run = ends_well(folder, "whole", [start(folder, "whole", ["--nproc_per_node=2"], "--checkpoint.folder=whole")])
    assert list(run[0]) == list(range(1, 13))
    assert len(run[1]) == 12
    return run


@pytest.mark.parametrize("ranks", [2, 4])
def test_killed_job_goes_on_on_as_many_ranks_or_twice_as_many(
    folder: Path, whole: tuple[dict[int, float], list[list[int]]], monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    name, flag = f"killed-{ranks}", f"--checkpoint.folder=killed-{ranks}"
    monkeypatch.setenv(PAUSE, "8")
    before = shared()
    agent = start(folder, name, ["--nproc_per_node=2"], flag)
    wait_for_steps(folder, name, 8, agent)
    kill_tree(agent.pid)
    agent.wait()
    assert shared() > before
    monkeypatch.delenv(PAUSE)
    again = start(folder, f"{name}-again", [f"--nproc_per_node={ranks}"], flag)
    found, samples = ends_well(folder, f"{name}-again", [again])
    assert shared() == before, "also what the killed one has left"
    assert recorded(folder / "recorded" / name)[:6] + samples == whole[1]
    expected = {step: loss for step, loss in whole[0].items() if step > 6}
    assert found == pytest.approx(expected, abs=1e-5 if ranks == 2 else 1e-3)


def wait_for_steps(folder: Path, name: str, steps: int, agent: subprocess.Popen[str]) -> None:
    """Wait until both ranks have read so many steps."""
    deadline = time.monotonic() + 300
    while not all(steps_recorded(folder / "recorded" / name / f"{rank}.jsonl") == steps for rank in range(2)):
        assert time.monotonic() < deadline and agent.poll() is None, (folder / f"{name}.log").read_text()
        time.sleep(0.1)


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_rank_that_is_killed_is_restarted_by_torchrun(
    folder: Path,
    whole: tuple[dict[int, float], list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    rendezvous: str,
) -> None:
    """With --max-restarts nobody has to do anything, and nothing of ours stays behind in the temporary folder."""
    monkeypatch.setenv(PAUSE, "8")  # the ranks that are started anew read 6 more
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = shared()
    name, flags = f"restarted-{rendezvous}", ["--standalone"] if rendezvous == "c10d" else []
    torchrun = [*flags, "--nproc_per_node=2", "--max-restarts=1"]
    agent = start(folder, name, torchrun, f"--checkpoint.folder={name}", workers=2)
    wait_for_steps(folder, name, 8, agent)
    first = recorded(folder / "recorded" / name)
    [one, _] = [child for child in children(agent.pid) if "tests.support.recording" in cmdline(child)]
    os.kill(one, signal.SIGKILL)
    found, samples = ends_well(folder, name, [agent])
    assert first[:6] + samples == whole[1]
    assert found == pytest.approx(whole[0], abs=1e-5)
    assert shared() == before
    of_python_and_torchrun = ("pymp-", "torchelastic_")  # of processes that were killed
    assert not [name for name in os.listdir(tmp_path) if not name.startswith(of_python_and_torchrun)]


def cmdline(pid: int) -> str:
    """The command of a process."""
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


@pytest.mark.skipif(not can_make_nodes(), reason="no rights to namespaces, of which machines are made")
def test_job_of_four_ranks_goes_on_on_two_machines(folder: Path, tmp_path: Path) -> None:
    """One machine with 4 ranks, then two with 2: each has its own agent, shared memory and temporary folder."""
    losses_of_one, samples_of_one = ends_well(
        folder, "one", [start(folder, "one", ["--nproc_per_node=4"], "--checkpoint.folder=one")]
    )
    shutil.copytree(folder / "outputs/one/step-6", folder / "outputs/two/step-6")
    port, agents = free_port(), []
    for node in range(2):
        (tmp_path / f"node-{node}").mkdir()
        shell = f'mount -t tmpfs tmpfs /dev/shm && TMPDIR={tmp_path}/node-{node} exec "$@"'
        agent = ["--nnodes=2", f"--node_rank={node}", "--nproc_per_node=2"]
        agent += ["--rdzv_backend=c10d", "--rdzv_id=two", f"--rdzv_endpoint=127.0.0.1:{port}"]
        prefix = ("unshare", "--mount", "--ipc", "sh", "-c", shell, "sh")
        agents.append(start(folder, "two", agent, "--checkpoint.folder=two", prefix=prefix))
    found, samples = ends_well(folder, "two", agents)
    assert samples == samples_of_one[6:]
    assert found == pytest.approx({step: loss for step, loss in losses_of_one.items() if step > 6}, abs=1e-3)


@pytest.mark.skipif(not can_make_nodes(), reason="needs namespaces")
def test_launch_script_starts_two_machines(tmp_path: Path) -> None:
    """`configs/launch/multinode.sh` as it is, on two machines with an agent and two ranks each, and with validation."""
    folder = write_files(tmp_path)
    shutil.copy(folder / "loader.toml", folder / "validation.toml")
    agents, environment = [], {"NNODES": "2", "GPUS_PER_NODE": "2", "MASTER": "127.0.0.1", "PORT": str(free_port())}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for node in range(2):
        (folder / f"node-{node}").mkdir()
        shell = f'mount -t tmpfs tmpfs /dev/shm && TMPDIR={folder}/node-{node} exec "$@"'
        script = ["configs/launch/multinode.sh", *(f"{folder}/{name}.toml" for name in ("job", "loader", "validation"))]
        flags = ["--validation.enable", "--validation.freq=2", f"--validation.seq_len={SEQ_LEN}"]
        flags += ["--training.local_batch_size=1", "--validation.local_batch_size=2"]
        with open(folder / f"{node}.log", "w") as log:
            agents.append(
                subprocess.Popen(
                    ["unshare", "--mount", "--ipc", "sh", "-c", shell, "sh", *script, *flags],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **environment, "PATH": path, "OMP_NUM_THREADS": "1"},
                )
            )
    codes = end_of(agents)
    logs = [(folder / f"{node}.log").read_text() for node in range(2)]
    assert codes == [0, 0], "\n".join(logs)
    assert all(list(losses(log)) == [1, 2, 3, 4] for log in logs)
    assert len(set(re.findall(r"validate step: +4 +loss: +([\d.]+)", "".join(logs)))) == 1
    assert sum(log.count("All 4 ranks agree on data and settings") for log in logs) == 2, "training, and validation"
