"""TorchTitan's line of a step ends in `color.reset`."""

import logging

import pytest
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from examples.mosaic_streaming.upstream.log_line import line_ends_in


@pytest.mark.parametrize("plain", [True, False])
def test_line_of_a_step_ends_in_a_text(plain: bool) -> None:
    config, lines = JobConfig(), logging.Handler()
    config.metrics.disable_color_printing = plain
    records: list[str] = []
    lines.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    processor = MetricsProcessor(config, ParallelDims(1, 1, 1, 1, 1, 1, 1, world_size=1))
    processor.num_flops_per_token, processor.data_loading_times = 1, [0.1]
    color, level = processor.color, logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        with line_ends_in(processor, "epoch: 0"):
            processor.log(1, 2.0, 2.0, 1.0)
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)
    assert records[-1].endswith(f"%  {color.yellow}epoch: 0{color.reset}"), "TorchTitan builds its line in another way"
    assert processor.color is color
