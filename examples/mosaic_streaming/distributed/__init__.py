"""What ranks tell each other.

`AbortChannel` tells all ranks why one of them stops. Through the job's store, `on_each_node` waits until every node is
ready, and `on_rank_0` shares what rank 0 has computed. `check_ranks_per_node` and `check_peers` compare the ranks.

All but `AbortChannel` needs torch, and is imported when it is first asked for (PEP 562), so that `--help` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from examples.mosaic_streaming.distributed.abort import AbortChannel, handle_signals

if TYPE_CHECKING:
    from examples.mosaic_streaming.distributed.agreement import check_peers, check_ranks_per_node
    from examples.mosaic_streaming.distributed.store import draw_number, on_each_node, on_rank_0

FILES = {"agreement": ("check_peers", "check_ranks_per_node"), "store": ("draw_number", "on_each_node", "on_rank_0")}


def __getattr__(name: str) -> Any:
    for file, names in FILES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
