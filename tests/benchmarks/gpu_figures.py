"""What `tests.benchmarks.gpu` makes of its runs: their figures, comparisons and the table. Pure functions."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WAYS = ("mosaic", "text", "memory")
NAMES = {
    "tokens": "n_tokens_seen",
    "loss": "loss_metrics/global_avg_loss",
    "seconds": "time_metrics/end_to_end(s)",
    "mfu_percent": "mfu(%)",
    "data_wait_percent": "time_metrics/data_loading(%)",
}
"""What TorchTitan calls the figures of the steps since it last logged: tokens since the run's start, seconds of a step,
share of the time that rank 0 waits for data (torchtitan 0.2.2, components/metrics.py)."""
FORMS = {"tokens_per_second": ",.0f", "mfu_percent": ".2f", "data_wait_percent": ".2f"}

Row = dict[str, float]
Run = dict[str, Any]


def read_scalars(folder: Path) -> list[Row]:
    """What TorchTitan has logged for TensorBoard under a folder, by step, with names of our own."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [file] = folder.rglob("events.*")
    events = EventAccumulator(str(file))
    events.Reload()
    rows: dict[int, Row] = {}
    for name, tag in NAMES.items():
        for event in events.Scalars(tag):
            rows.setdefault(event.step, {"step": event.step})[name] = event.value
    return [rows[step] for step in sorted(rows)]


def summarize(rows: list[Row], window: int) -> Row:
    """A run's figures: of all windows but the first together, each weighing as much as it took.

    Args:
        rows: one for each window, and one for the first step.
        window: its steps.
    """
    [warm] = [row for row in rows if row["step"] == window]
    measured = [row for row in rows if row["step"] > window]
    seconds = sum(row["seconds"] for row in measured)
    rate = (rows[-1]["tokens"] - warm["tokens"]) / (seconds * window)
    shares = {
        name: sum(row[name] * row["seconds"] for row in measured) / seconds
        for name in ("mfu_percent", "data_wait_percent")
    }
    losses = {"first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"]}
    return {"tokens": rows[-1]["tokens"], "tokens_per_second": rate, **shares, **losses}


def spread(values: Sequence[float]) -> Row:
    """The median of values, the least and the greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compare(runs: list[Run]) -> list[dict[str, Any]]:
    """For each model and `seq_len`, figures of each way, and the tokens per second of `mosaic` divided by the others'.

    Args:
        runs: whole rounds. A ratio is one of two runs of the same round, which other work of the machine and the heat
            of the card have met alike.
    """
    found = []
    for model, seq_len in dict.fromkeys((run["model"], run["seq_len"]) for run in runs):
        of_way = {
            way: [run for run in runs if (run["model"], run["seq_len"], run["way"]) == (model, seq_len, way)]
            for way in WAYS
        }
        rates = {way: {run["repeat"]: run["tokens_per_second"] for run in of_way[way]} for way in WAYS}
        ratios = {
            way: spread([rate / rates[way][repeat] for repeat, rate in rates["mosaic"].items()])
            for way in WAYS
            if way != "mosaic"
        }
        figures = {way: {name: spread([run[name] for run in of_way[way]]) for name in FORMS} for way in WAYS}
        repeats = len(rates["mosaic"])
        found.append(
            {"model": model, "seq_len": seq_len, "repeats": repeats, "ways": figures, "mosaic_divided_by": ratios}
        )
    return found


def table(comparisons: list[dict[str, Any]]) -> str:
    """The comparisons, one line for each way: of the repeats the median, and in brackets the least and the greatest."""
    lines = [("model", "seq_len", "way", "tokens/s", "MFU %", "waits for data %", "mosaic / this")]
    for one in comparisons:
        for way, figures in one["ways"].items():
            cells = [cell(figures[name], form) for name, form in FORMS.items()]
            ratio = one["mosaic_divided_by"].get(way)
            lines.append((one["model"], str(one["seq_len"]), way, *cells, cell(ratio, ".3f") if ratio else "-"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def cell(values: Row, form: str) -> str:
    """A spread as text."""
    return f"{values['median']:{form}} ({values['min']:{form}} to {values['max']:{form}})"
