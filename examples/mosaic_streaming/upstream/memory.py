"""How much memory a process may use."""

import contextlib
import os
from pathlib import Path

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
