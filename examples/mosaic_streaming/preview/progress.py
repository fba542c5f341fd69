"""Progress on stderr, if that is a terminal."""

from collections.abc import Iterable
from typing import Any

import rich.progress
from rich.console import Console

STDERR = Console(stderr=True)


def progress_bar(items: Iterable[Any], text: str) -> Iterable[Any]:
    """The items, while a terminal shows how many of them are done."""
    return rich.progress.track(items, text, console=STDERR, transient=True, disable=not STDERR.is_terminal)
