"""The memory that a process may use, and what putting an epoch in order takes of it."""

import contextlib
import os
from pathlib import Path

from examples.mosaic_streaming.errors import ConfigError

ORDER_BYTES = 47
"""Of a node's memory for each sample of an epoch: seen with 100 million samples."""

CGROUPS = {"": ("sys/fs/cgroup", "memory.max"), "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes")}
"""By controller, none in version 2: where cgroups lie, and the file with a limit (Linux, admin-guide/cgroup*)."""


def memory_limit(root: str = "/") -> int:
    """Bytes of memory for this process: the machine's, or less where its cgroup or one around that has a limit.

    Args:
        root: of the file system.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):
        for line in Path(root, "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            for controller in CGROUPS.keys() & controllers.split(","):
                top, name = CGROUPS[controller]
                folder = Path(root, top, group.lstrip("/"))  # which a container may not see, but those around it
                for one in [folder, *folder.parents]:
                    with contextlib.suppress(OSError, ValueError):  # no file where there is no limit, or "max" in it
                        limits.append(int((one / name).read_text()))
    return min(limits)


def check_memory(epoch_size: int, source: str) -> None:
    """Raise ConfigError unless an epoch can be put in order in the memory that this process may use.

    Args:
        epoch_size: samples of an epoch.
        source: the file that configures the loader.
    """
    if (needed := epoch_size * ORDER_BYTES) > (memory := memory_limit()):
        raise ConfigError(
            f"An epoch of {epoch_size:,} samples takes about {needed / 1e9:,.1f} GB of each node's memory to "
            f"put in order, of {memory / 1e9:,.1f} GB that a process may use. Lower `epoch_size`, `repeat` or `choose` "
            f"in {source}."
        )
