"""All that depends on TorchTitan's config and spec classes, with a package for each of its generations.

`train.py` calls `load_job_config`, `check_job`, `import_custom`, `register` and `warnings_of_job`; after a failure
`refusal`, and after a signal `next_start`. Preview also calls `make_job`, `settings_of` and `steps_with`. Beside
`train.py`, only this room reads TorchTitan's `JobConfig`: everything else gets a `Job`. Nothing slow is imported before
a function is called.
"""

from typing import Any

from examples.mosaic_streaming.config import Job, LoaderFile
from examples.mosaic_streaming.distributed import AbortChannel
from examples.mosaic_streaming.titan.v0_2.checkpoints import next_start, steps_with
from examples.mosaic_streaming.titan.v0_2.checks import check_job, warnings_of_job
from examples.mosaic_streaming.titan.v0_2.job_config import import_custom, load_job_config, settings_of
from examples.mosaic_streaming.titan.v0_2.refusals import refusal


def register(name: str, train: LoaderFile, validation: LoaderFile | None, channel: AbortChannel) -> None:
    """Register the Mosaic form of a text model with TorchTitan; arguments and errors are those of `spec.register`."""
    from examples.mosaic_streaming.titan.v0_2 import spec

    spec.register(name, train, validation, channel)


def make_job(job_config: Any, world_size: int, ranks_per_node: int) -> Job:
    """Make the `Job` that a job config describes; arguments and errors are those of `job.make_job`."""
    from examples.mosaic_streaming.titan.v0_2 import job

    return job.make_job(job_config, world_size, ranks_per_node)
