"""TorchTitan's line of a step ends in `color.reset`."""

import logging

import pytest
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.tools.logging import logger

from examples.mosaic_streaming.upstream.log_line import line_ends_in
from tests.support.titan import IS_0_2, job_config, parallel_dims


@pytest.mark.parametrize("plain", [True, False])
def test_line_of_a_step_ends_in_a_text(plain: bool) -> None:
    config, lines = job_config(metrics__disable_color_printing=plain), logging.Handler()
    records: list[str] = []
    lines.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    if IS_0_2:
        processor = MetricsProcessor(config, parallel_dims(config, 1))
    else:
        metrics = {"parallel_dims": parallel_dims(config, 1), "dump_folder": "", "pp_schedule": "", "config_dict": {}}
        processor = config.metrics.build(**metrics, has_quantization=False)
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
