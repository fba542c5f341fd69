"""Checks types and limits of the job config's values. TorchTitan takes those of the file as they come."""

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from examples.mosaic_streaming.config import refuse, wrong_value

AT_LEAST: dict[str, int] = {
    **{"training.seq_len": 1, "training.steps": 1, "training.gc_freq": 1, "training.max_norm": 0},
    **{"optimizer.lr": 0, "optimizer.beta1": 0, "optimizer.beta2": 0, "optimizer.eps": 0, "optimizer.weight_decay": 0},
    **{"lr_scheduler.warmup_steps": 0, "lr_scheduler.total_steps": 1, "lr_scheduler.decay_ratio": 0},
    **{"checkpoint.interval": 1, "validation.freq": 1, "validator.freq": 1, "metrics.log_freq": 1},
    **{"parallelism.pipeline_parallel_microbatch_size": 1},
    **{"comm.init_timeout_seconds": 1, "comm.train_timeout_seconds": 1},
}
"""The smallest allowed values. Nothing reads the numbers of a section that has `enable = false`."""


def wrong_job_values(job_config: Any) -> list[str]:
    """Name the values of a job config that have the wrong type, or are smaller than makes sense."""
    return list(filter(None, (wrong_job_value(*leaf) for leaf in leaves(job_config))))


def wrong_job_value(key: str, value: Any, hint: Any, is_read: bool) -> str:
    """Return what is wrong with one value; `is_read` says whether its section is in use. Empty if nothing is."""
    limits = (AT_LEAST[key], math.inf) if is_read and key in AT_LEAST else None
    return wrong_value(key, value, hint, "the job config", limits)


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, bool]]:
    """Yield key, value and type of each setting, and whether its section is in use."""
    hints: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(section)}
    if any(isinstance(hint, str) for hint in hints.values()):
        hints |= typing.get_type_hints(type(section))
    for name, hint in hints.items():
        value, key = getattr(section, name), f"{prefix}{name}"
        if dataclasses.is_dataclass(value) and name != "model_spec":  # which no file and no flag sets
            yield from leaves(value, f"{key}.")
        else:
            yield key, value, hint, getattr(section, "enable", True)


def unknown_key(key: str, path: str, known: set[str]) -> str:
    """Say that a job's file has a key which is none of those that TorchTitan knows."""
    near = difflib.get_close_matches(key, sorted(known), n=2, cutoff=0.5)
    return f"{key} in {path}: unknown. Keys like it: {', '.join(near) or 'none'}."


def with_values(config: Any, values: dict[str, Any], names: Mapping[str, str], path: str) -> Any:
    """Return a config with the values of a job's file, if they are right; it calls some keys by other `names`."""
    known, wrong = {key: (hint, is_read) for key, _, hint, is_read in leaves(config)}, []
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = names.get(key, key).rpartition(".")
        hint, is_read = known.get(names.get(key, key), (None, False))
        if name in sections.get(section, {}):
            wrong.append(f"{key} in {path} is given twice: {names.get(key, key)} is another name of it.")
        elif hint is None or "." in section:
            wrong.append(unknown_key(key, path, {*names, *known}))
        else:
            wrong.append(wrong_job_value(key, value, hint, is_read))
        sections.setdefault(section, {})[name] = value
    refuse(wrong)
    changes = sections.pop("", {})
    for section, of_section in sections.items():
        changes[section] = dataclasses.replace(getattr(config, section), **of_section)
    return dataclasses.replace(config, **changes)
