"""What ranks tell each other: that a node is ready, that they read the same, why one of them stops.

`AbortChannel` is there before torch is imported. What needs torch is imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from examples.mosaic_streaming.distributed.abort import AbortChannel, handle_signals

if TYPE_CHECKING:
    from examples.mosaic_streaming.distributed.agreement import check_peers
    from examples.mosaic_streaming.distributed.store import (
        check_machines,
        new_job_id,
        on_each_node,
        on_rank_0,
        open_store,
    )


def __getattr__(name: str) -> Any:
    module = importlib.import_module(f"{__name__}.{'agreement' if name == 'check_peers' else 'store'}")
    return getattr(module, name)
