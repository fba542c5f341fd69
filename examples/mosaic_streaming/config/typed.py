"""Whether a value of a file is of the type that upstream says, and what to call that type."""

import types
import typing
from typing import Any


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
        return "a list"
    found = [type_name(one) for one in arguments] or [names.get(hint, "")]
    return " or ".join(filter(None, found))
