"""The commands of `preview`. Each makes a report, which is printed as tables or as JSON."""

import contextlib
import dataclasses
import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import rich.progress
from rich.console import Console

from examples.mosaic_streaming.checkpoint import History, check_same_data
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.preview import plots, tables
from examples.mosaic_streaming.preview.checkpoint import Saved, checkpoint_of_start, history_of_start
from examples.mosaic_streaming.preview.job_data import JobData, NoRowError, open_validation
from examples.mosaic_streaming.preview.ledger import ledger, shares_over_steps
from examples.mosaic_streaming.preview.plan import plan, resume_section
from examples.mosaic_streaming.preview.plan_tables import print_plan
from examples.mosaic_streaming.preview.rows import KINDS, Row, rows_of
from examples.mosaic_streaming.preview.warnings import job_warnings, of_own_checkpoints

ASIDE = Console(stderr=True)
"""Where progress is shown, if it is a terminal."""


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """A context in which a terminal shows that something goes on."""
    with ASIDE.status(text) if ASIDE.is_terminal else contextlib.nullcontext():
        yield


def progress_bar(numbers: Iterable[int], text: str) -> Iterable[int]:
    """Iterate numbers while a terminal shows a progress bar."""
    return rich.progress.track(numbers, text, console=ASIDE, transient=True, disable=not ASIDE.is_terminal)


def emit(report: Any, flags: Namespace, print_tables: Callable[[Console], None]) -> None:
    """Print a report, as tables or as JSON."""
    if flags.json:
        print(json.dumps(report))
    else:
        print_tables(tables.console())


def show(data: JobData, flags: Namespace) -> None:
    """Show rows as the model sees them; raise ConfigError if those of validation are wanted and there are none."""
    if flags.validation:
        if not (of_validation := open_validation(data)):
            raise ConfigError(
                "--validation, but the job reads no validation streams: name their file with "
                "--mosaic-validation-config, and set validation.enable to true."
            )
        data = of_validation
    data.check_first_samples()
    report = []
    for samples, count in groups(data, flags):
        try:
            report += [describe_row(data, row) for row in rows_of(data, samples)[:count]]
        except NoRowError as error:
            report.append({"samples": [describe_sample(data, sample) for sample in samples], "error": str(error)})
    emit(report, flags, lambda console: tables.print_rows(console, report, data.opened.spec, flags.full))
    if flags.plot:
        plots.plot_lengths(flags.plot, report)


def groups(data: JobData, flags: Namespace) -> Iterator[tuple[list[int], int]]:
    """Yield samples to make rows of, and how many rows to show. Packed rows are those of the run's first batches."""
    order, names = data.opened.order, data.opened.names
    if flags.sample:
        yield from (([sample], 1) for sample in flags.sample if data.locate(sample))
    elif order.packed:
        if flags.stream:
            raise ConfigError("--stream: packed rows are made of a batch, which has samples of all streams.")
        for row in range(0, flags.rows, made := data.opened.spec.rows):
            yield data.global_batch(1 + row // made)[0, 0].tolist(), flags.rows - row
    else:
        if flags.stream not in [None, *names]:
            raise ConfigError(f"--stream {flags.stream}, but {data.opened.config.source} has: {', '.join(names)}.")
        for number in progress_bar(
            [names.index(flags.stream)] if flags.stream else range(len(names)), "Reading streams"
        ):
            begin, size = int(data.offsets[number]), int(data.opened.dataset.samples_per_stream[number])
            yield from (([sample], 1) for sample in range(begin, begin + min(size, flags.rows)))


def describe_row(data: JobData, row: Row) -> dict[str, Any]:
    """Describe a row for a report."""
    return {
        "samples": [describe_sample(data, sample) for sample in row.samples],
        "tokens": sum(row.lengths) + row.padding,
        **{kind: row.count(kind) for kind in KINDS},
        "documents": [
            {"tokens": length, "spans": [dataclasses.asdict(span) for span in spans]}
            for length, spans in zip(row.lengths, row.documents, strict=True)
        ],
    }


def describe_sample(data: JobData, sample: int) -> dict[str, Any]:
    """Describe a sample for a report."""
    return {"sample": sample, **data.locate(sample)._asdict()}


def show_plan(data: JobData, flags: Namespace) -> None:
    """Show what a job will read and need, and what a resume would do.

    Raises:
        ConfigError: a start would load the checkpoint, but it was written on other data.
    """
    saved = checkpoint_of_start(data.job, flags.checkpoint)
    history = history_of_start(data, saved)
    warnings = data.check_first_samples()
    report = plan(data, history, progress_bar)
    report["resume"] = resume_section(data, saved, history) if saved else None
    report["warnings"] = warnings + job_warnings(data, report)
    emit(report, flags, lambda console: print_plan(console, report))
    if saved and saved.state and report["resume"]["streams_are_loaded"]:
        check_same_data(saved.state.data, data.opened.fingerprint, data.opened.config.source)


def layout_of_report(data: JobData) -> dict[str, int]:
    """The layout for which a report is true."""
    layout = data.job.layout
    return {
        "world_size": layout.world_size,
        "dp_world_size": layout.dp_world_size,
        "global_batch_size": data.opened.order.global_batch_size,
    }


def known_history(data: JobData, saved: Saved | None, of_start: bool = True) -> History:
    """What a run has read and, if it goes on with the job's settings (`of_start`), will read.

    Raises:
        ConfigError: the checkpoint was written on other data.
    """
    history = history_of_start(data, saved) if of_start or not saved else saved.history(data)
    if history is None:
        assert saved
        if not saved.state:
            raise ConfigError(f"--checkpoint {saved.folder} has no dataloader state that can be read.")
        check_same_data(saved.state.data, data.opened.fingerprint, data.opened.config.source)
    assert history
    return history


def step(data: JobData, flags: Namespace) -> None:
    """Show the samples of global batches; with a checkpoint, those of the run that wrote it and goes on from it."""
    saved, dp_ranks = checkpoint_of_start(data.job, flags.checkpoint), range(data.job.layout.dp_world_size)
    history = known_history(data, saved)
    if flags.dp_rank not in [None, *dp_ranks]:
        raise ConfigError(f"--dp-rank {flags.dp_rank}, but on these ranks there are 0 to {dp_ranks[-1]}.")
    samples: list[dict[str, Any]] = []
    for number in progress_bar(flags.steps, "Reading steps"):
        for dp_rank, batches in enumerate(data.global_batch(number, history).tolist()):
            if flags.dp_rank in (None, dp_rank):
                samples += samples_of(data, flags, number, dp_rank, batches)
    report = layout_of_report(data) | {
        "global_batch_size_before": saved.state.global_batch_size if saved and saved.state else None,
        "segments": [segment._asdict() for segment in history.segments],
        "packed": data.opened.order.packed,
        "samples": samples,
        "warnings": list(of_own_checkpoints(data.job, saved is not None)),
    }
    emit(report, flags, lambda console: tables.print_steps(console, report, flags.full, bool(flags.find)))


def samples_of(
    data: JobData, flags: Namespace, number: int, dp_rank: int, batches: list[list[int]]
) -> Iterator[dict[str, Any]]:
    """Describe the samples that a dp rank reads in a step; with `--find`, only those that have the text."""
    for batch, samples in enumerate(batches):
        for sample in samples:
            content = {} if flags.no_text and not flags.find else content_of(data, sample)
            if not flags.find or flags.find in content.get("text", ""):
                place = describe_sample(data, sample)
                yield {"step": number, "dp_rank": dp_rank, "batch": batch, **place, **content}


def content_of(data: JobData, sample: int) -> dict[str, str]:
    """The text of a sample, or the reason why it makes no row."""
    try:
        return {"text": data.text(sample)}
    except NoRowError as error:
        return {"error": str(error)}


def show_ledger(data: JobData, flags: Namespace) -> None:
    """Show what each stream was asked for and has given, up to a step or a checkpoint."""
    saved = checkpoint_of_start(data.job, flags.checkpoint)
    is_past = bool(saved and flags.checkpoint and not flags.step)
    history = known_history(data, saved, of_start=not is_past)
    until = saved.step if saved and is_past else flags.step or data.job.steps
    report = layout_of_report(data) | ledger(data, history, until, progress_bar)
    report["global_batch_size"] = history.segment(max(until, history.segments[0].step + 1)).global_batch_size
    report["samples_by_checkpoint"] = saved.state.seen.samples if saved and saved.state and saved.state.seen else None
    report["warnings"] = list(of_own_checkpoints(data.job, saved is not None))
    emit(report, flags, lambda console: tables.print_ledger(console, report))
    if flags.plot:
        steps, shares = shares_over_steps(data, history, until, progress_bar)
        asked = [stream["share_asked"] for stream in report["streams"]]
        plots.plot_shares(flags.plot, data.opened.names, steps, shares, asked)


COMMANDS: dict[str, Callable[[JobData, Namespace], None]] = {
    "show": show,
    "plan": show_plan,
    "step": step,
    "ledger": show_ledger,
}
