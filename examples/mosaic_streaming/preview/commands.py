"""The commands of `preview`: each makes a report, which is printed as tables or as JSON."""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from rich.console import Console

from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.preview import plots, tables
from examples.mosaic_streaming.preview.checkpoint import checkpoint_of_start, history_of_start, known_history
from examples.mosaic_streaming.preview.job_data import JobData, NoRowError
from examples.mosaic_streaming.preview.ledger import count_samples, ledger_report
from examples.mosaic_streaming.preview.open_data import open_validation
from examples.mosaic_streaming.preview.plan import plan_report
from examples.mosaic_streaming.preview.plan_tables import print_plan
from examples.mosaic_streaming.preview.progress import progress_bar
from examples.mosaic_streaming.preview.rows import rows_of
from examples.mosaic_streaming.preview.warnings import checkpoint_warnings, plan_warnings

WIDTH = 140
"""Columns where the output is no terminal."""


def emit(report: Any, flags: Namespace, print_tables: Callable[[Console], None]) -> None:
    """Print a report as JSON or as tables."""
    if flags.json:
        print(json.dumps(report))
    else:
        has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
        print_tables(Console(width=None if has_width else WIDTH, highlight=False, markup=False, emoji=False))


def show(data: JobData, flags: Namespace) -> None:
    """Rows as the model gets them."""
    if flags.validation:
        if not (validation := open_validation(data)):
            raise ConfigError(
                "--validation, but the job reads no validation streams: name their file with "
                "--mosaic-validation-config, and set validation.enable to true."
            )
        data = validation
    data.check_first_samples()
    rows = []
    for samples, count in samples_to_show(data, flags):
        try:
            rows += rows_of(data, samples)[:count]
        except NoRowError as error:
            rows.append({"samples": [data.locate(sample) for sample in samples], "error": str(error)})
    emit(rows, flags, lambda console: tables.print_rows(console, rows, data.opened.spec, flags.full))
    if flags.plot:
        plots.plot_lengths(flags.plot, rows)


def samples_to_show(data: JobData, flags: Namespace) -> Iterator[tuple[list[int], int]]:
    """Samples to make rows of, and how many of these rows to show. Packed rows are those of the run's first batches."""
    names, dataset = data.opened.names, data.opened.dataset
    if flags.sample:
        yield from (([sample], 1) for sample in flags.sample if data.locate(sample))
    elif data.opened.order.packed:
        if flags.stream:
            raise ConfigError("--stream: packed rows are made of a batch, which has samples of all streams.")
        for row in range(0, flags.rows, rows_of_batch := data.opened.spec.rows):
            yield data.global_batch(1 + row // rows_of_batch)[0, 0].tolist(), flags.rows - row
    else:
        if flags.stream not in [None, *names]:
            raise ConfigError(f"--stream {flags.stream}, but {data.opened.config.source} has: {', '.join(names)}.")
        numbers = [names.index(flags.stream)] if flags.stream else range(len(names))
        for number in progress_bar(numbers, "Reading streams"):
            begin, size = int(dataset.sample_offset_per_stream[number]), int(dataset.samples_per_stream[number])
            yield from (([sample], 1) for sample in range(begin, begin + min(size, flags.rows)))


def plan(data: JobData, flags: Namespace) -> None:
    """What a job will read and need, and what a resume would do; raises what a start would refuse it with."""
    checkpoint = checkpoint_of_start(data, flags.checkpoint)
    history = history_of_start(data, checkpoint)
    warnings = data.check_first_samples()
    report = plan_report(data, checkpoint, history)
    report["warnings"] = warnings + plan_warnings(data, report)
    emit(report, flags, lambda console: print_plan(console, report))
    if checkpoint and report["resume"]["streams_are_loaded"]:
        checkpoint.check_same_data(data)


def scope(data: JobData, reads_checkpoint: bool) -> dict[str, Any]:
    """What a report is true for."""
    return {
        "world_size": data.job.layout.world_size,
        "dp_world_size": data.job.layout.dp_world_size,
        "global_batch_size": data.opened.order.global_batch_size,
        "has_epochs": not data.opened.order.blend,
        "warnings": list(checkpoint_warnings(data.job, reads_checkpoint)),
    }


def step(data: JobData, flags: Namespace) -> None:
    """The samples of global batches, by dp rank; with a checkpoint, those of the run that goes on from it."""
    checkpoint, dp_ranks = checkpoint_of_start(data, flags.checkpoint), range(data.job.layout.dp_world_size)
    history = known_history(data, checkpoint)
    if flags.dp_rank not in [None, *dp_ranks]:
        raise ConfigError(f"--dp-rank {flags.dp_rank}, but on these ranks there are 0 to {dp_ranks[-1]}.")
    samples: list[dict[str, Any]] = []
    for number in progress_bar(flags.steps, "Reading steps"):
        for (dp_rank, batch, _), sample in np.ndenumerate(data.global_batch(number, history)):
            if flags.dp_rank in (None, dp_rank):
                content = {} if flags.no_text and not flags.find else content_of(data, int(sample))
                if not flags.find or flags.find in content.get("text", ""):
                    place = {"step": number, "dp_rank": dp_rank, "batch": batch}
                    samples.append(place | data.locate(int(sample)) | content)
    report = scope(data, checkpoint is not None) | {
        "global_batch_size_before": checkpoint.state.global_batch_size if checkpoint and checkpoint.state else None,
        "segments": [segment._asdict() for segment in history.segments],
        "packed": data.opened.order.packed,
        "samples": samples,
    }
    emit(report, flags, lambda console: tables.print_steps(console, report, flags.full, bool(flags.find)))


def content_of(data: JobData, sample: int) -> dict[str, str]:
    """The text of a sample, or why it makes no row."""
    try:
        return {"text": data.decode(data.tokens(sample))}
    except NoRowError as error:
        return {"error": str(error)}


def ledger(data: JobData, flags: Namespace) -> None:
    """What each stream was asked for and has given, up to a step or a checkpoint."""
    checkpoint = checkpoint_of_start(data, flags.checkpoint)
    ended = checkpoint if flags.checkpoint and not flags.step else None
    history = known_history(data, checkpoint, goes_on=not ended)
    until = ended.step if ended else flags.step or data.job.steps
    steps, counts = count_samples(data, history, until)
    report = scope(data, checkpoint is not None) | ledger_report(data, history, until, counts[-1])
    report["global_batch_size"] = history.segment(max(until, history.segments[0].step + 1)).global_batch_size
    seen = checkpoint.state.seen if checkpoint and checkpoint.state else None
    report["samples_by_checkpoint"] = seen.samples if seen else None
    emit(report, flags, lambda console: tables.print_ledger(console, report))
    if flags.plot:
        plots.plot_shares(flags.plot, steps, counts, report["streams"])
