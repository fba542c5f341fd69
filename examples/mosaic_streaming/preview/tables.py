"""Reports as tables: in colour in a terminal, plain elsewhere."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from examples.mosaic_streaming.batch import BatchSpec
from examples.mosaic_streaming.preview.rows import CONTEXT, TARGET

Report = dict[str, Any]
Columns = dict[str, tuple[str, str]]
"""For each heading, the key of a record and the format of its numbers: Python's, or "bytes". Texts have none."""

SHOWN_TEXT, SHOWN_IDS = 600, 12  # characters of a text, and ids, beyond which the middle is left out
STYLES = {TARGET: "green", CONTEXT: "yellow"}
CONTROLS = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}
"""What is printed in place of characters that a terminal would obey. rich itself replaces only some of them."""


def plain_table(title: str, rows: Iterable[Sequence[str]] = (), headings: Sequence[str] = ()) -> Table:
    """A table without a frame."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False)
    table.show_header = bool(headings)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def records_table(title: str, records: Iterable[Report], columns: Columns) -> Table:
    """A table of records with headings; numbers stand on the right, and a dash for those that aren't known."""
    rows = [[written(record[key], form) for key, form in columns.values()] for record in records]
    table = plain_table(title, rows, list(columns))
    for column, (_, form) in zip(table.columns, columns.values(), strict=True):
        column.justify = "right" if form else "left"
    return table


def written(value: Any, form: str) -> str:
    """A value in a table."""
    if value is None:
        return "-"
    return decimal(value) if form == "bytes" else format(value, form)


def plural(number: int, noun: str, ending: str = "s") -> str:
    """A number with its noun."""
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def print_rows(out: Console, rows: Sequence[Report], spec: BatchSpec, full: bool) -> None:
    """Rows of a batch, each document's spans with their ids and text."""
    within = ", attention stays within each" if spec.documents else ", attention crosses them"
    for row in rows:
        names = [f"{sample['sample']} ({sample['stream']}, {place_of(sample)})" for sample in row["samples"]]
        out.print(f"Sample {', '.join(names)}", style="bold")
        if "error" in row:
            out.print(f"{row['error'].translate(CONTROLS)}\n", style="red")
            continue
        out.print(
            f"{row['tokens']} tokens: {row[TARGET]} targets, {row[CONTEXT]} context, {row['padding']} padding; "
            f"documents: {len(row['documents'])}{within if len(row['documents']) > 1 else ''}"
        )
        for number, document in enumerate(row["documents"], start=1):
            out.print(f"── document {number}, {document['tokens']} tokens", style="dim")
            for span in document["spans"]:
                print_span(out, span, full)
        out.print()


def place_of(sample: Report) -> str:
    """A sample's shard, and its number there."""
    return f"{sample['shard']} [{sample['sample_of_shard']}]"


def print_span(out: Console, span: Report, full: bool) -> None:
    """Tokens of one kind: what they are, their ids, their text."""
    ids, text, begin = span["ids"], span["text"], span["begin"]
    end = begin + len(ids) - 1
    if not full and len(ids) > SHOWN_IDS:
        ids = [*ids[: SHOWN_IDS // 2], "…", *ids[-SHOWN_IDS // 2 :]]
    if not full and len(text) > SHOWN_TEXT:
        half = SHOWN_TEXT // 2
        text = f"{text[:half]} … {len(text) - SHOWN_TEXT:,} characters … {text[-half:]}"
    places = str(begin) if begin == end else f"{begin}-{end}"
    out.print(f"{span['kind']:8}{places}: {' '.join(map(str, ids))}", style="dim", soft_wrap=full)
    for line in text.translate(CONTROLS).split("\n"):
        out.print(f"  │ {line}", style=STYLES[span["kind"]], soft_wrap=True)


def print_scope(out: Console, report: Report) -> None:
    """The ranks that a report is true for."""
    out.print(
        f"For {plural(report['world_size'], 'rank')} (--world-size), {plural(report['dp_world_size'], 'dp rank')}: "
        f"global batches of {plural(report['global_batch_size'], 'sample')}."
    )


def print_warnings(out: Console, report: Report, mark: str = "") -> None:
    """What a report warns of."""
    for warning in report["warnings"]:
        out.print(f"{mark}{warning}", style="yellow")


def print_steps(out: Console, report: Report, full: bool, found: bool) -> None:
    """Samples of global batches, one in a row."""
    print_scope(out, report)
    print_warnings(out, report)
    for segment in report["segments"] if report["has_changes"] else []:
        first, batch = segment["step"] + 1, plural(segment["global_batch_size"], "sample")
        place = f"epoch {segment['epoch']}" if report["has_epochs"] else "the run"
        place = f"stage {segment['stage']}" if report["stages"] > 1 else place
        begin = f"sample {segment['sample_in_epoch']:,} of {place}"
        out.print(f"From step {first:,} on, global batches of {batch}, from {begin}.")
    for skip in report["skips"]:
        out.print(f"Skipped before step {skip['step']:,}: {skip['text']}.")
    if report["packed"]:
        out.print("A batch's samples are packed into its rows; what finds no room is left out (`show` has the rows).")
    if found:
        out.print(f"Found in {plural(len(report['samples']), 'sample')}.")
    numbers = {"step": "step", "dp rank": "dp_rank", "micro-batch": "batch", "sample": "sample"}
    if report["stages"] > 1 or report["skips"] or "around" in report:
        numbers = {"step": "step", "global batch": "global_batch", "stage": "stage"} | numbers
    table = plain_table("", headings=[*numbers, "stream", "shard"])
    table.expand = True
    for number, column in enumerate(table.columns):
        column.justify, column.no_wrap = "right" if number < len(numbers) else "left", True
    table.add_column("text", ratio=1, no_wrap=not full, overflow="fold" if full else "ellipsis")
    for sample in report["samples"]:
        shown = [str(sample[key]) for key in numbers.values()]
        text = (sample.get("text") or sample.get("error", "")).translate(CONTROLS)
        table.add_row(*shown, sample["stream"], place_of(sample), text if full else " ".join(text.split()))
    out.print(table)
    if around := report.get("around"):
        out.print("\nTo leave these batches out, go back to a checkpoint before them, with this in the plan:")
        for skip in around:
            out.print(f'\n[[skip]]\nbatches = "{skip["batches"]}"\nreason = "{skip["reason"]}"')
    for note in report.get("around_notes", ()):
        out.print(f"\n{note}", style="yellow")


def print_ledger(out: Console, ledger: Report) -> None:
    """What each stream was asked for and has given."""
    if ledger["samples_by_checkpoint"] is None:  # otherwise it is true for whichever ranks the run had
        print_scope(out, ledger)
    if ledger["since_step"] > 0:
        out.print(f"All is counted since the streams began anew after step {ledger['since_step']:,}.")
    print_warnings(out, ledger)
    unit = "tokens" if "tokens" in ledger["streams"][0] else "samples"
    columns = {"stream": ("stream", ""), f"{unit} asked": (f"{unit}_asked", ",.0f"), f"{unit} read": (unit, ",.0f")}
    columns |= {"difference": (f"{unit}_difference", "+z,.0f"), "asked": ("share_asked", ".2%")}
    columns |= {"share": ("share", ".2%"), "passes": ("passes", ".3f")}
    place = f" of epoch {ledger['epoch']}" if ledger["has_epochs"] else ""
    place = f" of stage {ledger['stage'] + 1}" if ledger["stages"] > 1 else place
    title = f"After step {ledger['step']:,}, at sample {ledger['sample_in_epoch']:,}{place}"
    out.print(records_table(title, ledger["streams"], columns))
    if unit == "samples":
        out.print("Samples differ in length, so only they are counted: shares are of samples.")
