"""Errors that a user can put right."""

import os


class ConfigError(ValueError):
    """A setting is wrong: the message says what was given, what was expected and where to change it."""


class DataError(RuntimeError):
    """The data is not what the settings promise: the message names the streams and the values found."""


def is_rank_0() -> bool:
    """Whether this process is the one that prints and logs for the whole job."""
    return int(os.environ.get("RANK", 0)) == 0
