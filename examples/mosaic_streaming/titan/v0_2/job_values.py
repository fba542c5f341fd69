"""Checks types and limits of the job config's values. TorchTitan takes those of the file as they come."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from examples.mosaic_streaming.config import wrong_value

AT_LEAST: dict[str, int] = {
    **{"training.seq_len": 1, "training.steps": 1, "training.gc_freq": 1, "training.max_norm": 0},
    **{"optimizer.lr": 0, "optimizer.beta1": 0, "optimizer.beta2": 0, "optimizer.eps": 0, "optimizer.weight_decay": 0},
    **{"lr_scheduler.warmup_steps": 0, "lr_scheduler.total_steps": 1, "lr_scheduler.decay_ratio": 0},
    **{"checkpoint.interval": 1, "validation.freq": 1, "metrics.log_freq": 1},
    **{"parallelism.pipeline_parallel_microbatch_size": 1},
    **{"comm.init_timeout_seconds": 1, "comm.train_timeout_seconds": 1},
}
"""The smallest allowed values. Nothing reads the numbers of a section that has `enable = false`."""


def wrong_job_values(job_config: Any) -> list[str]:
    """Name the values of a job config that have the wrong type, or are smaller than makes sense."""
    wrong = []
    for key, value, hint, is_read in leaves(job_config):
        limits = (AT_LEAST[key], math.inf) if is_read and key in AT_LEAST else None
        wrong.append(wrong_value(key, value, hint, "the job config", limits))
    return list(filter(None, wrong))


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, bool]]:
    """Yield key, value and type of each setting, and whether its section is in use."""
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type) and dataclasses.is_dataclass(value):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value, field.type, getattr(section, "enable", True)
