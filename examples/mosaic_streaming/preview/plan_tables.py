"""Prints a plan as tables."""

import os
from typing import Any

from rich.console import Console
from rich.text import Text

from examples.mosaic_streaming.preview.tables import many, number, size, table

SHOWN_RANKS = 4
"""The dp ranks whose readers are shown."""


def print_plan(out: Console, plan: dict[str, Any]) -> None:
    """Print all sections of a plan."""
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
    """Print the streams and their shares of an epoch."""
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
    """Print the size of an epoch and of the whole run."""
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
    """Say what ends the steps without repeats."""
    if not run["first_repeat_is_exact"]:
        return "at least, until the first repeat"
    step, epoch = run["first_repeat_step"], run["first_repeat_epoch"]
    goes_again = ", which goes through the streams again" if epoch else ""
    return f"until the first repeat, in step {step:,}, of epoch {epoch}{goes_again}"


def print_validation(out: Console, validation: dict[str, Any]) -> None:
    """Print the validation streams, and what a round reads."""
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
    """Print the ranks, and which of them read the same."""
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
    """Print what each machine needs."""
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
    """Print the settings and who has set them."""
    shown = table("Settings", "setting", "value", "set by")
    for setting in plan["settings"]:
        shown.add_row(setting["setting"], str(setting["value"]), os.path.basename(setting["owner"]))
    out.print(shown)


def print_resume(out: Console, resume: dict[str, Any]) -> None:
    """Print where a checkpoint's run stands, and what has changed since."""
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
