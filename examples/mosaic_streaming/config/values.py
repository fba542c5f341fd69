"""Types and limits of settings. Upstream takes a string for true, and a negative number for None."""

import contextlib
import inspect
import math
import os
import types
import typing
from typing import Any

from examples.mosaic_streaming.errors import ConfigError

Limits = tuple[float, float]  # the smallest and the largest value of a number

LIMITS: dict[str, Limits] = {
    "num_workers": (0, max(64, os.cpu_count() or 1)),
    "prefetch_factor": (1, 1024),
    "timeout": (0, 10**6),
    "predownload": (1, 10**9),
    "cache_limit": (1, 10**18),
    "num_canonical_nodes": (1, 1 << 16),
    "shuffle_seed": (0, 2**32 - 1),
    "shuffle_block_size": (2, 10**12),  # at 1, streaming's py1e never ends
    "sampling_granularity": (1, 10**9),
    "epoch_size": (1, 10**12),
    "proportion": (0, 1),
    "repeat": (0, 10**6),
    "choose": (0, 10**12),
    "download_retry": (1, 1000),
    "download_timeout": (0.001, 86_400),
}

WITH_UNITS = {
    "cache_limit": (
        {unit: 1024**power for power, unit in enumerate(("kb", "mb", "gb", "tb", "pb", "eb", "zb", "yb"), start=1)},
        'a number of bytes, also as "10gb" (b, kb, mb, gb, tb, pb)',
    ),
    "epoch_size": ({"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}, 'a whole number, also as "10k" (k, m, b, t)'),
}
"""Numbers that can be strings with a unit: the units, and what to call them."""


def wrong_value(name: str, value: Any, hint: Any, source: str, limits: Limits | None = None) -> str:
    """Return what is wrong with a setting of another type than its hint or beyond its limits; empty if nothing is."""
    key = name.rpartition(".")[2]
    if has_type(value, hint) and (limits is None or value is None or is_within(value, limits, key)):
        return ""
    expected = WITH_UNITS[key][1] if key in WITH_UNITS else type_name(hint)
    if limits:
        low, high = limits
        expected += f", from {low:,} on" if high == math.inf else f", from {low:,} to {high:,}"
    return f"{name} = {value!r} in {source}, expected {expected}."


def refuse(wrong: list[str]) -> None:
    """Raise ConfigError if a line says that something is wrong."""
    if lines := list(filter(None, wrong)):
        raise ConfigError(" ".join(lines))


def is_within(value: Any, limits: Limits, key: str) -> bool:
    """Whether a number, which may be a string with a unit, is within limits."""
    low, high = limits
    try:
        if isinstance(value, str):
            value = number_of(value, key)
        return bool(low <= value <= high)
    except (KeyError, ValueError, TypeError, OverflowError):
        return False


def number_of(text: str, key: str) -> int:
    """The number that streaming reads in a text with a unit (0.13.0, base/util.py); ValueError if it reads none."""
    text, units = text.lower().strip(), WITH_UNITS[key][0]
    for unit, factor in units.items():
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    digits = text.removesuffix("b")  # a byte; where "b" is a billion, it has been found
    if not digits.isdigit():
        raise ValueError(text)
    return int(digits)


def has_type(value: Any, hint: Any) -> bool:
    """Whether a value of a TOML file is of a type; other types than those of TOML have any value."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(has_type(value, one) for one in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(has_type(item, arguments[0]) for item in value)
    if hint is float:
        return type(value) in (int, float)
    if hint in (int, bool, str, types.NoneType):
        return type(value) is hint
    return True


def type_name(hint: Any) -> str:
    """What to call a type."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of: {', '.join(arguments)}"
    if origin is list:
        return "a list of strings" if arguments == (str,) else "a list"
    found = [type_name(one) for one in arguments] or [names.get(hint, "")]
    return " or ".join(filter(None, found))


def hints_of(function: Any) -> dict[str, Any]:
    """The types of a function's arguments, without those that only a type checker can resolve."""
    found: dict[str, Any] = {}
    for name, hint in getattr(function, "__annotations__", {}).items():
        with contextlib.suppress(Exception):  # a user's loader may say anything there, and Python evaluates it
            one = types.SimpleNamespace(__annotations__={name: hint})
            found |= typing.get_type_hints(one, getattr(inspect.unwrap(function), "__globals__", {}))
    return found


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested sections by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
