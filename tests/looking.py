"""Streams looked at without a job, in a process of their own."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchtitan.config import JobConfig

from examples.mosaic_streaming.config.cli import LoaderFile
from examples.mosaic_streaming.preview.__main__ import main
from examples.mosaic_streaming.preview.offline import Offline, open_offline
from tests.jobs import command
from tests.ranks import run_rank_values, run_ranks
from tests.streams import job


def offline(
    config: dict[str, Any],
    look: Callable[[Offline], Any],
    job_config: JobConfig | None = None,
    world_size: int = 1,
    ranks_per_node: int | None = None,
) -> Any:
    """What a function sees in the streams of a loader configuration."""
    job_config = job_config or job()
    job_config.model.name = "llama3_mosaic"

    def run() -> Any:
        with open_offline(job_config, LoaderFile(config, "loader.toml"), None, world_size, ranks_per_node) as opened:
            return look(opened)

    [found] = run_rank_values(run)
    return found


def preview(files: Path, *flags: str, titan: tuple[str, ...] = ()) -> Any:
    """The report of a command on a folder's files, as JSON has it."""

    def run() -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            main([*flags, "--json", *command(files, *titan)])
        assert len(output.getvalue().splitlines()) == 1, output.getvalue()
        return json.loads(output.getvalue())

    [report] = run_rank_values(run)
    return report


def printed(files: Path, *flags: str, titan: tuple[str, ...] = (), code: int = 0) -> str:
    """What a command prints on a folder's files."""
    [rank] = run_ranks(lambda: main([*flags, *command(files, *titan)]))
    assert rank.code == code, rank.output
    assert "Traceback" not in rank.output
    return rank.output
