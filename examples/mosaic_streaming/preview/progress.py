"""Progress on stderr, if that is a terminal."""

from collections.abc import Iterable

import rich.progress
from rich.console import Console

STDERR = Console(stderr=True)


def progress_bar(numbers: Iterable[int], text: str) -> Iterable[int]:
    """The numbers, while a terminal shows how many of them are done."""
    return rich.progress.track(numbers, text, console=STDERR, transient=True, disable=not STDERR.is_terminal)
