"""Replaces attributes of other projects' code, and refuses a version that it doesn't fit."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any


def replace(owner: Any, name: str, replacement: Any) -> Callable[[], None]:
    """Replace an attribute of a module, class or object; return a function that restores the original.

    RuntimeError if the package has another version than the patch was written for: the attribute is missing, or is a
    function with other parameters than the replacement.
    """
    place = f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"
    if not hasattr(owner, name):
        raise RuntimeError(f"{place} is gone: this version of its package is not supported.")
    original = getattr(owner, name)
    ours, theirs = parameters(replacement), parameters(original)
    if ours and theirs and ours != theirs and "*" not in ours:
        raise RuntimeError(
            f"{place} takes {', '.join(theirs)}, expected {', '.join(ours)}: this version of its package is not "
            "supported."
        )
    setattr(owner, name, replacement)
    return lambda: setattr(owner, name, original)


@contextlib.contextmanager
def replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Replace an attribute while the context lasts, as `replace` does."""
    put_back = replace(owner, name, replacement)
    try:
        yield
    finally:
        put_back()


def parameters(function: Any) -> list[str]:
    """The names of a function's parameters, "*" for variable ones; empty for anything but a Python function."""
    function = getattr(function, "__func__", function)  # of a staticmethod
    if not inspect.isfunction(function):
        return []
    return [
        "*" if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) else name
        for name, parameter in inspect.signature(function).parameters.items()
    ]
