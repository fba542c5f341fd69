"""Appends text to the line that TorchTitan logs for a step.

TorchTitan 0.2.2 logs a fixed set of values (components/metrics.py). A line that includes the metrics passed to it makes
this module needless.
"""

import contextlib
from collections.abc import Iterator

from torchtitan.components.metrics import MetricsProcessor

from examples.mosaic_streaming.upstream.patch import replaced


@contextlib.contextmanager
def line_ends_in(processor: MetricsProcessor, text: str) -> Iterator[None]:
    """Append a text to the lines that a metrics processor logs in this context.

    A line ends with `color.reset`, which has no annotation. So it is a class attribute, not a dataclass field, and
    `dataclasses.replace` can't change it (torchtitan 0.2.2, tools/utils.py).
    """
    color = processor.color
    kind = type(color)
    ending = type(kind.__name__, (kind,), {"reset": f"  {color.yellow}{text}{color.reset}"})
    with replaced(processor, "color", ending()):
        yield
