"""Reports of `preview` as tables: in colour in a terminal, plain elsewhere."""

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
"""Columns where the output is no terminal."""
SHOWN_TEXT, SHOWN_IDS = 600, 12
"""Characters of a text, and ids, of which the middle is left out."""
SHOWN_RANKS = 4
STYLES = {TARGET: "green", CONTEXT: "yellow"}
ESCAPED = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}
UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def console() -> Console:
    """Where tables go."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else WIDTH, highlight=False, markup=False, emoji=False)


def table(title: str, *columns: str, numbers: Sequence[str] = ()) -> Table:
    """A table without a frame; columns of numbers stand on the right, and without names there is no line of them."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False)
    made.show_header = any(columns)
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return made


def size(count: float) -> str:
    """Bytes, in a unit."""
    unit = 0
    while count >= 1000 and unit + 1 < len(UNITS):
        count, unit = count / 1000, unit + 1
    return f"{count:.4g} {UNITS[unit]}"


def number(count: float | None) -> str:
    """A number with separators; none is a dash."""
    return "-" if count is None else f"{count:,.0f}"


def many(count: int, one: str, more: str | None = None) -> str:
    """A number with its noun."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def printable(text: str) -> str:
    """A text whose control characters a terminal won't obey; lines and tabs stay."""
    return text.translate(ESCAPED)


def middle_out(text: str, shown: int) -> str:
    """A text without its middle, if it is long."""
    half = shown // 2
    return text if len(text) <= shown else f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"


def print_rows(out: Console, rows: Sequence[dict[str, Any]], form: BatchSpec, full: bool) -> None:
    """Rows of a batch, each document's spans with their ids and text."""
    for row in rows:
        names = ", ".join(
            f"{sample['sample']} ({sample['stream']}, {sample['shard']} [{sample['sample_of_shard']}])"
            for sample in row["samples"]
        )
        out.print(Text(f"Sample {names}", style="bold"))
        if "error" in row:
            out.print(Text(f"{printable(row['error'])}\n", style="red"))
            continue
        within = "attention stays within each" if form.documents else "attention crosses them"
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
    """Tokens of one kind: what they are, their ids, their text."""
    ids, begin = span["ids"], span["begin"]
    half = SHOWN_IDS // 2
    shown = ids if full or len(ids) <= SHOWN_IDS else [*ids[:half], "…", *ids[-half:]]
    end = begin + len(ids) - 1
    places = str(begin) if begin == end else f"{begin}-{end}"
    out.print(Text(f"{span['kind']:8}{places}: {' '.join(map(str, shown))}", style="dim"), soft_wrap=full)
    text = span["text"] if full else middle_out(span["text"], SHOWN_TEXT)
    for line in printable(text).split("\n"):
        out.print(Text(f"  │ {line}", style=STYLES[span["kind"]]), soft_wrap=True)


def print_plan(out: Console, plan: dict[str, Any]) -> None:
    """All sections of a plan."""
    for section in (print_streams, print_run, print_layout, print_needs, print_settings):
        section(out, plan)
        out.print()
    if plan["validation"]:
        print_validation(out, plan["validation"])
        out.print()
    for title, when, mark in (("Checked now", "now", "✓"), ("Will be checked", "later", "·")):
        out.print(Text(title, style="bold"))
        for check in plan["checks"][when]:
            out.print(f"  {mark} {check}")
    if plan["resume"]:
        out.print()
        print_resume(out, plan["resume"])
    out.print()
    out.print(Text(f"Warnings: {len(plan['warnings']) or 'none'}", style="bold"))
    for warning in plan["warnings"]:
        out.print(Text(f"  ! {warning}", style="yellow"))


def print_streams(out: Console, plan: dict[str, Any]) -> None:
    """The streams and their part of an epoch."""
    right = ["samples", "tokens", "shards", "size", "asked", "share", "passes/epoch"]
    shown = table("Streams", "stream", *right, "source", numbers=right)
    for stream in plan["streams"]:
        counts = [number(stream[key]) for key in ("samples", "tokens", "shards")]
        shares = [f"{stream['share_asked']:.2%}", f"{stream['share']:.2%}", f"{stream['passes']:.3f}"]
        shown.add_row(stream["name"], *counts, size(stream["bytes"]), *shares, stream["source"])
    out.print(shown)
    if any(stream["passes"] < 1 for stream in plan["streams"]):
        out.print(
            "  passes/epoch below 1: an epoch leaves out the rest of the stream; each epoch draws from all of it."
        )


def print_run(out: Console, plan: dict[str, Any]) -> None:
    """An epoch, and what all steps come to."""
    epoch, run = plan["epoch"], plan["run"]
    shown = table("Epoch and run", "", "steps", "samples", "tokens", "", numbers=["steps", "samples", "tokens"])
    left_out = f"{number(epoch['left_out'])} samples are left out" if epoch["left_out"] else "nothing is left out"
    shown.add_row("epoch", *[number(epoch[key]) for key in ("steps", "samples", "tokens")], left_out)
    fits = {True: "no sample twice", False: "some samples more than once", None: "repeats were not looked for"}[
        run["fits"]
    ]
    epochs = "" if run["epochs"] is None else f"{run['epochs']:.3g} epochs"
    counts = [number(run[key]) for key in ("steps", "samples", "tokens")]
    shown.add_row("training.steps", *counts, ": ".join(filter(None, [epochs, fits])))
    if run["first_repeat_step"]:
        counts = [number(run["first_repeat_step"] - 1)]
        counts += [number(run[f"first_repeat_{unit}"]) for unit in ("samples", "tokens")]
        shown.add_row("without repeats", *counts, until_repeat(run))
    out.print(shown)
    if not run["first_repeat_step"]:
        is_refused = plan["resume"] and not plan["resume"]["order_survives"]
        unknown = "the checkpoint, of an earlier version of this code, doesn't say what was read in which step"
        reason = "a start would be refused" if is_refused else unknown
        out.print(Text(f"  Not known, as {reason}.", style="yellow"))
    if since := run["since_step"]:
        text = f"Samples, tokens and repeats since the streams began anew after step {since:,}."
        out.print(
            f"  {text}" if since > 0 else f"  Samples and tokens of {-since:,} steps before step 1 are counted, too."
        )


def until_repeat(run: dict[str, Any]) -> str:
    """What ends the steps without repeats."""
    if not run["first_repeat_is_exact"]:
        return "at least, until the first repeat"
    step, epoch = run["first_repeat_step"], run["first_repeat_epoch"]
    goes_again = ", which goes through the streams again" if epoch else ""
    return f"until the first repeat, in step {step:,}, of epoch {epoch}{goes_again}"


def print_validation(out: Console, validation: dict[str, Any]) -> None:
    """The validation streams, and what a round reads."""
    right = ["samples", "shards", "size"]
    shown = table("Validation", "stream", *right, "source", numbers=right)
    for stream in validation["streams"]:
        counts = [number(stream[key]) for key in ("samples", "shards")]
        shown.add_row(stream["name"], *counts, size(stream["bytes"]), stream["source"])
    out.print(shown)
    part = validation["round"]
    out.print(
        f"  A round, after step 1 and each {many(validation['freq'], 'step')}: {part['samples']:,} of "
        f"{many(validation['samples'], 'sample')}, in {many(part['batches'], 'batch', 'batches')} of "
        f"{many(part['global_batch_size'], 'row')} of {many(validation['seq_len'], 'token')}."
    )


def print_layout(out: Console, plan: dict[str, Any]) -> None:
    """The ranks, and which of them share data."""
    layout = plan["layout"]
    degrees = ", ".join(f"{name} {degree}" for name, degree in layout["degrees"].items())
    shown = table("Layout", "", "")
    each = f", {layout['ranks_per_node']} on each" if layout["nodes"] > 1 else ""
    shown.add_row("ranks", f"{layout['world_size']} on {many(layout['nodes'], 'machine')}{each}")
    shown.add_row("degrees", degrees)
    shown.add_row(
        "global batch",
        f"{many(layout['global_batch_size'], 'sample')} = {many(layout['dp_world_size'], 'dp rank')} x "
        f"{many(layout['batches_per_step'], 'batch', 'batches')} x "
        f"{many(layout['samples_per_batch'], 'sample')}",
    )
    for dp_rank, ranks in enumerate(layout["dp_ranks"][:SHOWN_RANKS]):
        shown.add_row(f"dp rank {dp_rank}", f"read by rank {ranks}")
    if len(layout["dp_ranks"]) > SHOWN_RANKS:
        shown.add_row("…", f"and so on, to dp rank {len(layout['dp_ranks']) - 1}")
    out.print(shown)


def print_needs(out: Console, plan: dict[str, Any]) -> None:
    """What each machine needs."""
    needs = plan["needs"]
    shown = table("Each machine needs", "", "", "")
    shared = [needs[f"shared_memory_{part}"] for part in ("order", "shards", "batches")]
    order, shards, batches = map(size, shared)
    shown.add_row(
        "shared memory",
        size(sum(shared)),
        f"order {order}, while an epoch begins; shards {shards}; batches in flight {batches}",
    )
    shown.add_row("memory", size(needs["memory_to_order_an_epoch"]), "in one process, while an epoch is put in order")
    limit = f"at most {needs['cache_limit']} (dataset.cache_limit)" if needs["cache_limit"] else "no limit is set"
    shown.add_row("cache", size(needs["cache"]), f"of disk for what is fetched; {limit}")
    shown.add_row("to hash", size(needs["hashed_at_a_start"]), "at each start, and what the caches hold by then")
    out.print(shown)


def print_settings(out: Console, plan: dict[str, Any]) -> None:
    """The settings and who has set them."""
    shown = table("Settings", "setting", "value", "set by")
    for setting in plan["settings"]:
        shown.add_row(setting["setting"], str(setting["value"]), os.path.basename(setting["owner"]))
    out.print(shown)


def print_resume(out: Console, resume: dict[str, Any]) -> None:
    """Where a checkpoint's run stands, and what has changed since."""
    out.print(Text("Resume", style="bold"))
    out.print(
        f"  {resume['checkpoint']}: after step {resume['step']}, {resume['steps_left']} more to training.steps"
        + (", counted from 1 again (checkpoint.exclude_from_loading)" if resume["steps_done"] != resume["step"] else "")
    )
    follow = resume["steps_left_in_epoch"]
    out.print(
        f"  The next sample is {resume['sample_in_epoch']:,} of epoch {resume['epoch']}"
        + ("." if follow is None else f", of which {follow:,} steps follow.")
    )
    batch = resume["global_batch_size"]
    if not resume["order_survives"]:
        shown = table("  The order does not survive:", "  setting", "checkpoint", "now")
        for difference in resume["differences"]:
            shown.add_row(f"  {difference['setting']}", difference["checkpoint"], difference["now"])
        out.print(shown, style="red")
    elif resume["begins_anew"]:
        pass
    elif resume["same_batches"]:
        out.print(Text("  Nothing has changed: the same global batches follow.", style="green"))
    else:
        sizes = f"in global batches of {batch['now']} in place of {batch['checkpoint']}"
        out.print(Text(f"  The order survives: the same samples follow, {sizes}.", style="green"))
    if not resume["is_loaded"]:
        out.print(Text("  checkpoint.enable = false: a start would not load it.", style="yellow"))
    if resume["begins_anew"]:
        text = "  checkpoint.exclude_from_loading: the streams would start from their beginning."
        out.print(Text(text, style="yellow"))
    elif resume["streams_are_loaded"] and not resume["order_survives"]:
        out.print(Text("  A start would be refused, with the reason at the end.", style="red"))


def print_layout_of(out: Console, report: dict[str, Any]) -> None:
    """What a report is true for."""
    out.print(
        f"For {many(report['world_size'], 'rank')} (--world-size), {many(report['dp_world_size'], 'dp rank')}: global "
        f"batches of {many(report['global_batch_size'], 'sample')}."
    )


def print_warnings(out: Console, report: dict[str, Any]) -> None:
    """What a report isn't true for."""
    for warning in report["warnings"]:
        out.print(Text(warning, style="yellow"))


def print_steps(out: Console, report: dict[str, Any], full: bool, found: bool) -> None:
    """Samples of global batches, one a line."""
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
    """What each stream was asked for and has given."""
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
