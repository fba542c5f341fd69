"""What a preview can say at once: the streams that the files name, read without torch, which takes long to import."""

import contextlib
import json
import os
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from examples.mosaic_streaming.config import check_files, complete_streams, is_local, read_plan, source_of
from examples.mosaic_streaming.errors import ConfigError

MAX_BYTES = 1 << 24  # of an index that is read twice: opening a larger one takes long itself


def print_first_look(flags: Namespace) -> None:
    """Print a line for each training stream, unless JSON is asked for, or the files can't be read, as is told later."""
    if flags.mosaic_config and not flags.json:
        with contextlib.suppress(ConfigError, OSError, LookupError, TypeError, ValueError, AttributeError):
            for line in [*lines_of(flags.mosaic_config)]:
                print(line, flush=True)


def lines_of(path: str) -> Iterator[str]:
    """Yield what each stream of a loader's file, or of a plan, is called, where it lies, and what its index says."""
    plan = read_plan(path)
    check_files(plan, None)
    for stage in plan.stages:
        for name, stream in complete_streams(stage.file.config["dataset"]).items():
            yield f"Opening {name} in {stage.file.path}: {source_of(stream)}{size_of(stream)}"


def size_of(stream: dict[str, Any]) -> str:
    """The samples and shards of a stream in a folder of this machine, for a line; empty if its index is large."""
    index = os.path.expanduser(os.path.expandvars(os.path.join(source_of(stream), "index.json")))
    if not is_local(stream) or os.path.getsize(index) > MAX_BYTES:
        return ""
    with open(index, encoding="utf-8") as file:
        shards = json.load(file)["shards"]
    return f" (samples: {sum(shard['samples'] for shard in shards):,}, shards: {len(shards):,})"
