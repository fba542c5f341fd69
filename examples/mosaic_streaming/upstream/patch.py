"""The one way in which this project replaces other projects' code."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any


def replace(owner: Any, name: str, replacement: Any) -> Callable[[], None]:
    """Replace an attribute of a module, a class or an object.

    Args:
        owner: it has the attribute.
        name: of the attribute.
        replacement: of a function, one that is called in the same way.

    Returns:
        a function that puts the original back.

    Raises:
        RuntimeError: there is no such attribute, or it takes other arguments than the replacement. The upstream version
            is another one than this code was written for.
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
    """Replace an attribute for as long as the context lasts; arguments and errors are those of `replace`."""
    put_back = replace(owner, name, replacement)
    try:
        yield
    finally:
        put_back()


def parameters(function: Any) -> list[str]:
    """The names of a function's parameters, "*" for any; empty for what isn't a Python function."""
    function = getattr(function, "__func__", function)  # of a staticmethod
    if not inspect.isfunction(function):
        return []
    return [
        "*" if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) else name
        for name, parameter in inspect.signature(function).parameters.items()
    ]
