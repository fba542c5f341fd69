"""The errors that a user can put right, and what their messages are made with."""

import os
from collections.abc import Sequence


class ConfigError(ValueError):
    """A setting is wrong. The message says what was given, what was expected and where to change it."""


class DataError(RuntimeError):
    """The data can't be read, or is not what the settings say. The message names the streams and what was found."""


def is_rank_0() -> bool:
    """Whether this process is the one that prints and logs for the whole job."""
    return int(os.environ.get("RANK", 0)) == 0


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns of equal width, for a message or the log."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join(f"  {line}".rstrip() for line in lines)
