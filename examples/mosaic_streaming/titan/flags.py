"""TorchTitan's flags, which its own manager parses."""

import contextlib
import io
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from examples.mosaic_streaming.errors import ConfigError, is_rank_0
from examples.mosaic_streaming.titan.job_values import leaves
from examples.mosaic_streaming.titan.refusals import first_line, keep_traceback

HELP = "All of its keys: python -m examples.mosaic_streaming.train -- --help"


@contextlib.contextmanager
def explain_parsing(source: str) -> Iterator[None]:
    """Explain what TorchTitan's manager raises over a file or function (`source`); rank 0 alone prints its usage."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except ConfigError:
        raise
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"TorchTitan refuses {source}: {problem_of(error)}. {HELP}") from error
    except SystemExit as exit:
        if not exit.code:
            raise
        if isinstance(getattr(exit.__context__, "arg", None), str):  # of a section's own check, which tyro prints
            said = io.StringIO()
            raise ConfigError(f"TorchTitan refuses {source}: {problem_of(exit.__context__)}. {HELP}") from exit
        raise ConfigError(f"TorchTitan refuses a flag or a value, as said above. {HELP}") from exit
    except Exception as error:  # of a module that the job names, too
        file = keep_traceback(error, tempfile.gettempdir())
        raise ConfigError(
            f"TorchTitan refuses {source}: {first_line(error)}. The whole traceback is in {file}."
        ) from error
    finally:
        if is_rank_0():
            sys.stderr.write(said.getvalue())


def problem_of(error: BaseException | None) -> str:
    """The first line of what an error says, without a full stop. tyro adds the section in which it was raised."""
    text = str(error.args[0]) if error and error.args else repr(error)
    return next(iter(text.splitlines()), repr(error)).rstrip(".")


def spell_boolean(flag: str, job_config: Any) -> str:
    """Respell `--section.key=true` and `=false` as `--section.key` and `--section.no-key`, as TorchTitan wants them.

    A key that `job_config`, with TorchTitan's defaults, has and that isn't boolean is left alone.
    """
    name, _, value = flag.partition("=")
    if not name.startswith("--") or value.lower() not in ("true", "false"):
        return flag
    section, dot, key = name.removeprefix("--").rpartition(".")
    plain, hints = f"{section}{dot}{key}".replace("-", "_"), {key: hint for key, _, hint, _ in leaves(job_config)}
    if hints.get(plain, None if hasattr(job_config, plain) else bool) is not bool:  # a custom config module adds keys
        return flag
    return f"--{section}{dot}{'' if value.lower() == 'true' else 'no-'}{key}"
