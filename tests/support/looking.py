"""Streams looked at without a job, in a process of their own."""

import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.mosaic_streaming.config.files import LoaderFile
from examples.mosaic_streaming.config.plan import Plan
from examples.mosaic_streaming.distributed.abort import AbortChannel
from examples.mosaic_streaming.preview.__main__ import main
from examples.mosaic_streaming.preview.job_data import JobData
from examples.mosaic_streaming.preview.open_data import open_job_data
from tests.support.jobs import command
from tests.support.ranks import run_rank_values, run_ranks
from tests.support.streams import job
from tests.support.titan import loaded


def with_job_data(
    config: dict[str, Any] | Plan,
    look: Callable[[JobData], Any],
    job_config: Any = None,
    world_size: int = 1,
    ranks_per_node: int | None = None,
) -> Any:
    """What a function sees in the streams of a loader configuration."""
    job_config = job_config or job()

    def run() -> Any:
        file = config if isinstance(config, Plan) else LoaderFile(config, "loader.toml")
        with open_job_data(loaded(job_config, file), world_size, ranks_per_node, AbortChannel()) as opened:
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


def by_dp_rank(lines: list[dict[str, Any]]) -> dict[tuple[int, int], list[int]]:
    """Samples by step and dp rank, in the order in which they are read."""
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for line in lines:
        found[line["step"], line["dp_rank"]] += line["samples"] if "samples" in line else [line["sample"]]
    return found


def recorded_by_dp_rank(folder: Path, first_step: int = 1) -> dict[tuple[int, int], list[int]]:
    """What a training run has read; peers have read the same."""
    ranks = [
        by_dp_rank([json.loads(line) for line in file.read_text().splitlines()]) for file in folder.glob("*.jsonl")
    ]
    found: dict[tuple[int, int], list[int]] = {}
    for (step, dp_rank), samples in (item for rank in ranks for item in rank.items()):
        assert found.setdefault((step + first_step, dp_rank), samples) == samples
    return found


def looked_up(files: Path, steps: str, *flags: str, world_size: int = 1, titan: Any = ()) -> dict[tuple[int, int], Any]:
    """What `step` says of the same."""
    given = ["step", steps, "--no-text", f"--world-size={world_size}", *flags]
    return by_dp_rank(preview(files, *given, titan=tuple(titan))["samples"])
