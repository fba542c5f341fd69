"""What ranks tell each other: why one stops, that a node is ready, what one has computed, and whether all agree.

All but `AbortChannel` needs torch, and is imported when it is first asked for (PEP 562), so that `--help` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from examples.mosaic_streaming.distributed.abort import AbortChannel, handle_signals

if TYPE_CHECKING:
    from examples.mosaic_streaming.distributed.agreement import check_peers, check_ranks_per_node
    from examples.mosaic_streaming.distributed.store import new_job_id, on_each_node, on_rank_0, open_store


def __getattr__(name: str) -> Any:
    file = "agreement" if name in ("check_ranks_per_node", "check_peers") else "store"
    return getattr(importlib.import_module(f"{__name__}.{file}"), name)
