"""Prints the reports of `preview` as tables: in colour in a terminal, plain elsewhere."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from examples.mosaic_streaming.batch import BatchSpec
from examples.mosaic_streaming.checkpoint import Segment
from examples.mosaic_streaming.preview.rows import CONTEXT, TARGET

WIDTH = 140
"""The width in characters if the output is no terminal."""
SHOWN_TEXT, SHOWN_IDS = 600, 12
"""A text of more characters, or a list of more ids, is printed without its middle."""
STYLES = {TARGET: "green", CONTEXT: "yellow"}
ESCAPED = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}
UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def console() -> Console:
    """The console for tables."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else WIDTH, highlight=False, markup=False, emoji=False)


def table(title: str, *columns: str, numbers: Sequence[str] = ()) -> Table:
    """A table without a frame. Columns of numbers are right-aligned; without column names there is no header."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False)
    made.show_header = any(columns)
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return made


def size(count: float) -> str:
    """Write bytes with a unit."""
    unit = 0
    while count >= 1000 and unit + 1 < len(UNITS):
        count, unit = count / 1000, unit + 1
    return f"{count:.4g} {UNITS[unit]}"


def number(count: float | None) -> str:
    """Write a number with separators, and None as a dash."""
    return "-" if count is None else f"{count:,.0f}"


def many(count: int, one: str, more: str | None = None) -> str:
    """Write a number with its noun."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def printable(text: str) -> str:
    """Escape control characters, which a terminal would obey, except newlines and tabs."""
    return text.translate(ESCAPED)


def middle_out(text: str, shown: int) -> str:
    """Leave out the middle of a long text."""
    half = shown // 2
    return text if len(text) <= shown else f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def print_rows(out: Console, rows: Sequence[dict[str, Any]], spec: BatchSpec, full: bool) -> None:
    """Print rows of a batch, with ids and text of each document's spans."""
    for row in rows:
        names = ", ".join(
            f"{sample['sample']} ({sample['stream']}, {sample['shard']} [{sample['sample_of_shard']}])"
            for sample in row["samples"]
        )
        out.print(Text(f"Sample {names}", style="bold"))
        if "error" in row:
            out.print(Text(f"{printable(row['error'])}\n", style="red"))
            continue
        within = "attention stays within each" if spec.documents else "attention crosses them"
        out.print(
            f"{row['tokens']} tokens: {row[TARGET]} targets, {row[CONTEXT]} context, {row['padding']} padding; "
            f"documents: {len(row['documents'])}" + (f", {within}" if len(row["documents"]) > 1 else "")
        )
        for count, document in enumerate(row["documents"], start=1):
            out.print(Text(f"── document {count}, {document['tokens']} tokens", style="dim"))
            for span in document["spans"]:
                print_span(out, span, full)
        out.print()


def print_span(out: Console, span: dict[str, Any], full: bool) -> None:
    """Print a span: its kind, ids and text."""
    ids, begin = span["ids"], span["begin"]
    half = SHOWN_IDS // 2
    shown = ids if full or len(ids) <= SHOWN_IDS else [*ids[:half], "…", *ids[-half:]]
    end = begin + len(ids) - 1
    places = str(begin) if begin == end else f"{begin}-{end}"
    out.print(Text(f"{span['kind']:8}{places}: {' '.join(map(str, shown))}", style="dim"), soft_wrap=full)
    text = span["text"] if full else middle_out(span["text"], SHOWN_TEXT)
    for line in printable(text).split("\n"):
        out.print(Text(f"  │ {line}", style=STYLES[span["kind"]]), soft_wrap=True)


def print_layout_of(out: Console, report: dict[str, Any]) -> None:
    """Print the layout for which a report is true."""
    out.print(
        f"For {many(report['world_size'], 'rank')} (--world-size), {many(report['dp_world_size'], 'dp rank')}: global "
        f"batches of {many(report['global_batch_size'], 'sample')}."
    )


def print_warnings(out: Console, report: dict[str, Any]) -> None:
    """Print the warnings of a report."""
    for warning in report["warnings"]:
        out.print(Text(warning, style="yellow"))


def print_steps(out: Console, report: dict[str, Any], full: bool, found: bool) -> None:
    """Print the samples of global batches, one a line."""
    print_layout_of(out, report)
    samples = report["samples"]
    print_warnings(out, report)
    if report["segments"] != [Segment(0, 0, 0, report["global_batch_size"])._asdict()]:
        for segment in report["segments"]:
            first, batch = segment["step"] + 1, many(segment["global_batch_size"], "sample")
            place = f"sample {segment['sample_in_epoch']:,} of epoch {segment['epoch']}"
            out.print(f"From step {first:,} on, global batches of {batch}, from {place}.")
    if report["packed"]:
        out.print("A batch's samples are packed into its rows; what finds no room is left out (`show` has the rows).")
    if found:
        out.print(f"Found in {many(len(samples), 'sample')}.")
    numbers = ["step", "dp rank", "batch", "sample"]
    shown = table("", *numbers, "stream", "shard", numbers=numbers)
    for column in shown.columns:
        column.no_wrap = True
    shown.expand = True
    shown.add_column("text", no_wrap=not full, overflow="fold" if full else "ellipsis", ratio=1)
    for sample in samples:
        text = printable(sample.get("text") or sample.get("error", ""))
        shown.add_row(
            *[str(sample[key]) for key in ("step", "dp_rank", "batch", "sample")],
            sample["stream"],
            f"{sample['shard']} [{sample['sample_of_shard']}]",
            text if full else " ".join(text.split()),
        )
    out.print(shown)


def print_ledger(out: Console, ledger: dict[str, Any]) -> None:
    """Print what each stream was asked for and has given."""
    if ledger["samples_by_checkpoint"] is None:  # or it is true for whichever ranks the run had
        print_layout_of(out, ledger)
    if ledger["since_step"] > 0:
        out.print(f"All is counted since the streams began anew after step {ledger['since_step']:,}.")
    print_warnings(out, ledger)
    has_tokens = "tokens" in ledger["streams"][0]
    unit = "tokens" if has_tokens else "samples"
    right = [f"{unit} asked", f"{unit} read", "difference", "asked", "share", "passes"]
    title = f"After step {ledger['step']:,}: {ledger['sample_in_epoch']:,} samples into epoch {ledger['epoch']}"
    shown = table(title, "stream", *right, numbers=right)
    for stream in ledger["streams"]:
        counts = [number(stream[f"{unit}_asked"]), number(stream[unit]), f"{stream[f'{unit}_difference']:+,.0f}"]
        shares = [f"{stream['share_asked']:.2%}", f"{stream['share']:.2%}", f"{stream['passes']:.3f}"]
        shown.add_row(stream["stream"], *counts, *shares)
    out.print(shown)
    if not has_tokens:
        out.print("Samples differ in length, so only they are counted: shares are of samples.")
