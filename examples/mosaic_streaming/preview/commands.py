"""The commands of `preview`: each makes a report, which is printed as tables or as JSON."""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from rich.console import Console

from examples.mosaic_streaming.checkpoint import History
from examples.mosaic_streaming.config import Skip, joined
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.preview import plots, tables
from examples.mosaic_streaming.preview.checkpoint import checkpoint_of_start, history_of_start, known_history
from examples.mosaic_streaming.preview.job_data import JobData, NoRowError
from examples.mosaic_streaming.preview.ledger import asked_samples, count_samples, ledger_report
from examples.mosaic_streaming.preview.open_data import open_validation
from examples.mosaic_streaming.preview.plan import plan_report, skips_section
from examples.mosaic_streaming.preview.plan_tables import print_plan
from examples.mosaic_streaming.preview.progress import progress_bar
from examples.mosaic_streaming.preview.rows import rows_of
from examples.mosaic_streaming.preview.warnings import checkpoint_warnings, plan_warnings

WIDTH = 140  # columns where the output is no terminal
STEPS_AROUND = 10  # that `step --around` shows: a spike's cause is read in its step, or a few steps before


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
    if flags.stage and flags.stage > len(data.stages):
        raise ConfigError(
            f"--stage {flags.stage}, but {data.plan.source} has {tables.plural(len(data.stages), 'stage')}."
        )
    stages = [data] if flags.validation or (flags.sample and not flags.stage) else data.stages
    shown = [(stage, rows_to_show(stage, flags)) for stage in stages if flags.stage in (None, stage.stage + 1)]
    rows = [row for _, of_stage in shown for row in of_stage]
    if flags.stream and not rows:
        names = ", ".join(dict.fromkeys(name for stage, _ in shown for name in stage.opened.names))
        raise ConfigError(f"--stream {flags.stream}, but {data.plan.source} has: {names}.")

    def print_all(console: Console) -> None:
        for stage, of_stage in shown:
            if len(data.stages) > 1 and not flags.validation:
                console.print(f"Stage {stage.stage + 1}: {stage.config.source}", style="bold")
            tables.print_rows(console, of_stage, stage.opened.spec, flags.full)

    emit(rows, flags, print_all)
    if flags.plot:
        plots.plot_lengths(flags.plot, rows)


def rows_to_show(data: JobData, flags: Namespace) -> list[dict[str, Any]]:
    """Rows of a stage."""
    data.check_first_samples()
    rows: list[dict[str, Any]] = []
    for samples, count in samples_to_show(data, flags):
        try:
            rows += rows_of(data, samples)[:count]
        except NoRowError as error:
            rows.append({"samples": [data.locate(sample) for sample in samples], "error": str(error)})
    return rows


def samples_to_show(data: JobData, flags: Namespace) -> Iterator[tuple[list[int], int]]:
    """Samples to make rows of, and how many of these rows to show. Packed rows are those of the stage's first steps."""
    dataset = data.opened.dataset
    if flags.sample:
        yield from (([sample], 1) for sample in flags.sample if data.locate(sample))
    elif data.opened.order.packed:
        if flags.stream:
            raise ConfigError("--stream: packed rows are made of a batch, which has samples of all streams.")
        first = data.plan.stages[data.stage].from_step
        for row in range(0, flags.rows, rows_of_batch := data.opened.spec.rows):
            _, samples = data.global_batch(first + row // rows_of_batch)
            yield samples[0, 0].tolist(), flags.rows - row
    else:
        numbers = [number for number, name in enumerate(data.opened.names) if flags.stream in (None, name)]
        for number in progress_bar(numbers, "Reading streams"):
            begin, size = int(dataset.sample_offset_per_stream[number]), int(dataset.samples_per_stream[number])
            yield from (([sample], 1) for sample in range(begin, begin + min(size, flags.rows)))


def plan(data: JobData, flags: Namespace) -> None:
    """What a job will read and need, and what a resume would do; raises what a start would refuse it with."""
    checkpoint = checkpoint_of_start(data, flags.checkpoint)
    history = history_of_start(data, checkpoint)
    warnings = [warning for stage in data.stages for warning in stage.check_first_samples()]
    report = plan_report(data, checkpoint, history)
    report["warnings"] = list(dict.fromkeys(warnings + plan_warnings(data, report)))
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
        "stages": len(data.stages),
        "warnings": list(checkpoint_warnings(data.job, reads_checkpoint)),
    }


def step(data: JobData, flags: Namespace) -> None:
    """The samples of global batches, by dp rank; with a checkpoint, those of the run that goes on from it."""
    checkpoint, dp_ranks = checkpoint_of_start(data, flags.checkpoint), range(data.job.layout.dp_world_size)
    history, numbers = known_history(data, checkpoint), flags.steps
    if flags.dp_rank not in [None, *dp_ranks]:
        raise ConfigError(f"--dp-rank {flags.dp_rank}, but on these ranks there are 0 to {dp_ranks[-1]}.")
    if (numbers is None) == (flags.around is None):
        raise ConfigError("Expected one of: the steps, as N or N:M, and --around STEP. See --help.")
    if flags.around:
        numbers = range(max(history.first_step + 1, flags.around - STEPS_AROUND + 1), flags.around + 1)
    samples: list[dict[str, Any]] = []
    for number in progress_bar(numbers, "Reading steps"):
        stage, batches = data.global_batch(number, history)
        for (dp_rank, batch, _), sample in np.ndenumerate(batches):
            if flags.dp_rank in (None, dp_rank):
                content = {} if flags.no_text and not flags.find else content_of(stage, int(sample))
                if not flags.find or flags.find in content.get("text", ""):
                    place = {"step": number, "global_batch": history.batch(number), "stage": stage.stage + 1}
                    place |= {"dp_rank": dp_rank, "batch": batch, **stage.locate(int(sample)), **content}
                    samples.append(place)
    segments, state = history.report(), checkpoint.state if checkpoint else None
    report = scope(data, checkpoint is not None) | {
        "global_batch_size_before": state.global_batch_size if state else None,
        "segments": segments,
        "has_changes": segments != data.new_run().report(),
        "skips": skips_section(data.plan, history.steps_before),
        "packed": any(stage.opened.order.packed for stage in data.stages),
        "samples": samples,
    }
    if flags.around:
        report |= skips_around(history, numbers)
    emit(report, flags, lambda console: tables.print_steps(console, report, flags.full, bool(flags.find)))


def skips_around(history: History, steps: range) -> dict[str, Any]:
    """The skips that leave out what steps have read, as far as these are of one stage.

    A skip in an earlier stage would change which samples later stages read in which batches.
    """
    pieces, notes = list(history.slices(steps[0] - 1, steps[-1])), []
    if len({piece.global_batch_size for piece in pieces}) > 1:
        note = "The global batch changes in these steps: after a start before it, batches would have other samples."
        return {"around": [], "around_notes": [note]}
    own = [piece for piece in pieces if piece.stage == pieces[-1].stage]
    if len(own) < len(pieces):
        told = f"The steps up to {own[0].step:,} are of an earlier stage, and not in this table"
        notes = [f"{told}: a skip of their batches changes those of later stages. See --around {own[0].step}."]
    read = [Skip(one.batch + 1, one.batch + (one.end - one.begin) // one.global_batch_size) for one in own]
    around = [{"batches": f"{first}:{last}", "reason": f"up to step {steps[-1]}"} for first, last in joined(read)]
    return {"around": around, "around_notes": notes}


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
    report["global_batch_size"] = history.segment(max(until, history.first_step + 1)).global_batch_size
    seen = checkpoint.state.seen if checkpoint and checkpoint.state else None
    report["samples_by_checkpoint"] = seen.samples if seen else None
    emit(report, flags, lambda console: tables.print_ledger(console, report))
    if flags.plot:
        names = [stream["stream"] for stream in report["streams"]]
        stages = {stage.from_step - 1 + history.steps_before: stage.file.path for stage in data.plan.stages[1:]}
        plots.plot_shares(flags.plot, steps, counts, asked_samples(data, counts), names, stages)
