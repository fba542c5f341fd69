"""The memory of a process, where a container or a scheduler gives it less than the machine has."""

import os
from pathlib import Path

import numpy as np
import pytest

from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.sampling import memory
from examples.mosaic_streaming.sampling.blend import Blend, Stream
from examples.mosaic_streaming.sampling.memory import memory_limit
from examples.mosaic_streaming.sampling.order import ENDLESS, Order

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
NONE_V1 = 9223372036854771712
"""What version 1 says where there is no limit."""


def limit(root: Path, groups: str, files: dict[str, object]) -> int:
    """The limit with these groups of a process, and these files of cgroups."""
    for name, content in {"proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return memory_limit(str(root))


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"sys/fs/cgroup/memory.max": 5 << 20}, 5 << 20),  # a container
        ("0::/", {"sys/fs/cgroup/memory.max": "max"}, MACHINE),
        ("0::/", {}, MACHINE),
        ("0::/job/step", {"sys/fs/cgroup/job/step/memory.max": 5 << 20}, 5 << 20),
        ("0::/job/step", {"sys/fs/cgroup/job/step/memory.max": "max", "sys/fs/cgroup/job/memory.max": 4096}, 4096),
        ("0::/job", {"sys/fs/cgroup/job/memory.max": 1 << 60}, MACHINE),
        ("0::/job", {"sys/fs/cgroup/other/memory.max": 4096}, MACHINE),
        ("3:cpu,memory:/job\n0::/", {"sys/fs/cgroup/memory/job/memory.limit_in_bytes": 8192}, 8192),
        ("3:memory:/docker/1f", {"sys/fs/cgroup/memory/memory.limit_in_bytes": 8192}, 8192),  # its path on the host
        ("3:memory:/", {"sys/fs/cgroup/memory/memory.limit_in_bytes": NONE_V1}, MACHINE),
        ("1:name=systemd:/a:b\n2:cpuset:/job", {"sys/fs/cgroup/job/memory.max": 4096}, MACHINE),
    ],
)
def test_the_smallest_limit_of_machine_and_cgroups_counts(
    tmp_path: Path, groups: str, files: dict[str, object], expected: int
) -> None:
    assert limit(tmp_path, groups, files) == expected


def test_without_cgroups_it_is_the_machines(tmp_path: Path) -> None:
    assert memory_limit(str(tmp_path)) == MACHINE


def test_epoch_that_the_limit_has_no_room_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_free = limit(tmp_path, "0::/", {"sys/fs/cgroup/memory.max": 4_700_000_000})
    monkeypatch.setattr(memory, "memory_limit", lambda: bytes_free)
    order = Order("random", 8, 8, 100_000_000)
    memory.check_memory(order, 100_000_000, "loader.toml")
    with pytest.raises(
        ConfigError, match=r"An epoch of 200,000,000 samples takes about 9\.4 GB .* of 4\.7 GB that a process may use"
    ):
        memory.check_memory(order, 200_000_000, "loader.toml")
    blend = Blend([Stream(0, np.array([10**12]), 1, 0)], 64, 1, 1 << 18)
    memory.check_memory(Order("blend", 8, 8, ENDLESS, blend=blend), 10**12, "loader.toml")
