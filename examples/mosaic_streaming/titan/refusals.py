"""Says in one line what TorchTitan refuses before the first step. Its own checks of a job end in tracebacks."""

import ast
import contextlib
import linecache
import os
import re
import sysconfig
import tempfile
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

from examples.mosaic_streaming.errors import ConfigError, DataError
from examples.mosaic_streaming.titan.job_values import leaves
from examples.mosaic_streaming.titan.loaded import LoadedJob

KINDS: tuple[type[Exception], ...] = (
    *(ValueError, TypeError, AssertionError, NotImplementedError, LookupError, AttributeError, ArithmeticError),
    *(ImportError, FileNotFoundError),
)
"""The errors with which TorchTitan and torch refuse a setting. A plain RuntimeError may also come from a device."""

OURS = str(Path(__file__).parents[1]) + os.sep
"""The folder of all modules of this project."""
LIBRARIES = (*(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), "<")
"""How the files of Python and of packages begin; "<" is that of code without a file."""

Call = tuple[FrameType, int]
"""A frame of a traceback, and the number of its line."""


def refusal(error: BaseException, job: LoadedJob) -> str | None:
    """Explain an error before the first step; return None if TorchTitan doesn't refuse a setting with it.

    It does if all calls below the innermost of ours are TorchTitan's or a library's, and the error has one of the types
    with which settings are refused. A device, a collective, our own code and the user's code fail in other ways. The
    whole traceback is written to the folder of the job.
    """
    if isinstance(error, ConfigError | DataError):
        return None
    calls = calls_below_ours(error)
    titan = [call for call in calls if is_titans(call)]
    if not titan or not all(is_titans(call) or call[0].f_code.co_filename.startswith(LIBRARIES) for call in calls):
        return None
    if not isinstance(error, KINDS) and not (type(error) is RuntimeError and is_raised_by(calls[-1])):
        return None
    frame, _ = titan[-1]
    words = {word for word in re.findall(r"\w+", str(error)) if "_" in word}  # others are also ordinary words
    named = [key for key, *_ in leaves(job.job_config) if key.rpartition(".")[2] in words]
    keys = named or keys_read(titan, str(error), job.job_config)
    settings = f" Look at {', '.join(keys)} in the job config." if keys else ""
    file = keep_traceback(error, job.dump_folder)
    return (
        f"TorchTitan refuses this job: {first_line(error, statement(calls[-1]))} ({frame.f_globals['__name__']}, "
        f"{frame.f_code.co_qualname}).{settings} The whole traceback is in {file}."
    )


def first_line(error: BaseException, otherwise: str = "") -> str:
    """The type and the first line of an error, without a full stop."""
    text = next(iter(str(error).strip().splitlines()), "") or otherwise
    return f"{type(error).__name__}: {text}".rstrip(" .:")


def keep_traceback(error: BaseException, folder: str) -> str:
    """Write the traceback of an error to a file of this rank, and return its path."""
    name = f"traceback-rank-{os.environ.get('RANK', 0)}.txt"
    for place in (folder, tempfile.gettempdir()):
        with contextlib.suppress(OSError):
            os.makedirs(place, exist_ok=True)
            with open(os.path.join(place, name), "w") as file:
                file.writelines(traceback.format_exception(error))
            return os.path.join(place, name)
    return "no file: none can be written"


def calls_below_ours(error: BaseException) -> list[Call]:
    """The calls that led to an error, after the last one of ours."""
    calls: list[Call] = []
    for frame, line in traceback.walk_tb(error.__traceback__):
        calls = [] if frame.f_code.co_filename.startswith(OURS) else [*calls, (frame, line)]
    return calls


def is_titans(call: Call) -> bool:
    """Whether a call is in TorchTitan."""
    return str(call[0].f_globals.get("__name__", "")).startswith("torchtitan.")


def is_raised_by(call: Call) -> bool:
    """Whether a call of TorchTitan's itself raises the error, rather than something that it calls."""
    return is_titans(call) and linecache.getline(call[0].f_code.co_filename, call[1]).strip().startswith("raise")


def statement(call: Call) -> str:
    """The statement that failed, in one line, with the conditions around it."""
    frame, line = call
    tree = ast.parse("".join(linecache.getlines(frame.f_code.co_filename)))
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    around = [node for node in statements if node.lineno <= line <= (node.end_lineno or node.lineno)]
    conditions = [ast.unparse(node.test) for node in around if isinstance(node, ast.If)]
    return ", if ".join([ast.unparse(around[-1]).splitlines()[0], *conditions]) if around else ""


def keys_read(calls: list[Call], message: str, job_config: Any) -> list[str]:
    """The settings that TorchTitan's innermost call reads where it fails, or that it got under their name."""
    words = set(re.findall(r"\w+", message))
    for depth, call in enumerate(reversed(calls)):
        text = statement(call)
        found = keys_in(text, call[0], job_config)
        named = [key for key in found if key.rpartition(".")[2] in words]
        if named or (found and not depth):
            return named or found
        words |= set(re.findall(r"\w+", text))
    return []


def keys_in(text: str, frame: FrameType, job_config: Any) -> list[str]:
    """The settings in a statement: `section.key`, or a key of a section that the function has."""
    found = []
    for key, *_ in leaves(job_config):
        section, _, name = key.rpartition(".")
        owner = getattr(job_config, section, object())
        has_section = any(local is owner for local in frame.f_locals.values())
        if re.search(rf"\b{name}\b" if has_section else rf"\b{re.escape(key)}\b", text):
            found.append(key)
    return found
