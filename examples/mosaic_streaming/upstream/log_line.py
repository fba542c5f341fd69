"""More text at the end of the line that TorchTitan logs for a step.

TorchTitan 0.2.2 logs a step in one line that takes nothing else (components/metrics.py). A line made of the metrics
that are handed to it makes this module needless.
"""

import contextlib
from collections.abc import Iterator

from torchtitan.components.metrics import MetricsProcessor

from examples.mosaic_streaming.upstream.patch import replaced


@contextlib.contextmanager
def line_ends_in(processor: MetricsProcessor, text: str) -> Iterator[None]:
    """A context in which the lines of a metrics processor end in a text.

    A line ends with `color.reset`. This is no field of the dataclass but an attribute of the class, as it has no
    annotation, so `dataclasses.replace` doesn't know it (torchtitan 0.2.2, tools/utils.py).
    """
    color = processor.color
    kind = type(color)
    ending = type(kind.__name__, (kind,), {"reset": f"  {color.yellow}{text}{color.reset}"})
    with replaced(processor, "color", ending()):
        yield
