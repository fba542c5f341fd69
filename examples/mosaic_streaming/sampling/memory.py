"""The memory that a process may use, and what putting an epoch in order takes."""

import contextlib
import os
from pathlib import Path

from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.sampling.order import Order

ORDER_BYTES = 47  # of a node's memory per sample of an epoch, measured with 100 million samples
CGROUPS = {"": ("sys/fs/cgroup", "memory.max"), "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes")}
"""Where cgroups lie and which file has the limit, by controller; version 2 has "" (Linux, admin-guide/cgroup*)."""


def check_memory(order: Order, epoch_size: int, source: str) -> None:
    """Raise ConfigError unless there is the memory that ordering an epoch takes; `source` is the loader's file."""
    if (needed := ordering_bytes(order, epoch_size)) > (memory := memory_limit()):
        raise ConfigError(
            f"An epoch of {epoch_size:,} samples takes about {needed / 1e9:,.1f} GB of each node's memory to "
            f"put in order, of {memory / 1e9:,.1f} GB that a process may use. In {source}, set dataset.batching_method "
            "= 'blend', which has no epochs, or lower `epoch_size`, `repeat` or `choose`."
        )


def ordering_bytes(order: Order, epoch_size: int) -> int:
    """Bytes of a node's memory that ordering an epoch of so many samples takes."""
    return 0 if order.blend else epoch_size * ORDER_BYTES


def memory_limit(root: str = "/") -> int:
    """Bytes of memory for this process: the machine's, or less where one of its cgroups has a limit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):
        for line in Path(root, "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            for controller in CGROUPS.keys() & controllers.split(","):
                top, name = CGROUPS[controller]
                folder = Path(root, top, group.lstrip("/"))  # a container may not see it, but only those around it
                for ancestor in [folder, *folder.parents]:
                    with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
                        limits.append(int((ancestor / name).read_text()))
    return min(limits)
