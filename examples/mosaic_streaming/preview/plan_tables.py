"""The tables of a plan."""

import os
from collections.abc import Sequence

from rich.console import Console
from rich.filesize import decimal

from examples.mosaic_streaming.preview.tables import Report, plain_table, plural, print_warnings, records_table

SHOWN_RANKS = 4


def print_plan(out: Console, plan: Report) -> None:
    """All sections of a plan."""
    for number in range(1, len(plan["stages"]) + 1):
        of_stage = f" of stage {number}, with passes of the run until its end" if len(plan["stages"]) > 1 else ""
        print_streams(out, f"Streams{of_stage}", [one for one in plan["streams"] if one["stage"] == number])
    print_stages(out, plan)
    for print_section in (print_run, print_layout, print_needs):
        out.print()
        print_section(out, plan)
    settings = [(one["setting"], str(one["value"]), os.path.basename(one["owner"])) for one in plan["settings"]]
    out.print()
    out.print(plain_table("Settings", settings, ["setting", "value", "set by"]))
    out.print()
    if plan["validation"]:
        print_validation(out, plan["validation"])
        out.print()
    for title, when, mark in (("Checked now", "now", "✓"), ("Will be checked", "later", "·")):
        out.print(title, style="bold")
        for check in plan["checks"][when]:
            out.print(f"  {mark} {check}")
    if plan["resume"]:
        out.print("\nResume", style="bold")
        print_resume(out, plan)
    out.print(f"\nWarnings: {len(plan['warnings']) or 'none'}", style="bold")
    print_warnings(out, plan, "  ! ")


def print_streams(out: Console, title: str, streams: Sequence[Report]) -> None:
    """Streams and, of training, their part of an epoch."""
    columns = {"stream": ("name", ""), **{key: (key, ",.0f") for key in ("samples", "tokens", "shards")}}
    columns |= {"size": ("bytes", "bytes"), "asked": ("share_asked", ".2%"), "share": ("share", ".2%")}
    columns |= {"passes/epoch": ("passes", ".3f"), "passes/run": ("passes_of_run", ".3f"), "source": ("source", "")}
    known = {heading: column for heading, column in columns.items() if streams[0].get(column[0]) is not None}
    out.print(records_table(title, streams, known))
    if any((stream.get("passes") or 1) < 1 for stream in streams):
        out.print("  passes/epoch below 1: an epoch leaves out the rest of the stream; each one draws from all of it.")


def print_stages(out: Console, plan: Report) -> None:
    """What each stage reads, and what is skipped, where a run has several stages or skips."""
    if len(plan["stages"]) > 1:
        columns = {"": ("stage", "d"), "from step": ("from_step", ",.0f"), "to step": ("last_step", ",.0f")}
        columns |= {"from batch": ("first_batch", ",.0f")} | {key: (key, ",.0f") for key in ("samples", "tokens")}
        out.print()
        out.print(records_table("Stages", plan["stages"], columns | {"loader": ("file", "")}))
    if common := plan["in_common"]:
        known = "not counted, as there are too many" if common["samples"] is None else f"{common['samples']:,}"
        out.print(f"  Streams begin anew after stage 1. Samples that it and later stages both read: {known}.")
    for skip in plan["skips"]:
        out.print(f"  Skipped before step {skip['step']:,}: {skip['text']}.")


def print_run(out: Console, plan: Report) -> None:
    """An epoch, what all steps come to, and how far they get without repeats."""
    epoch, run, repeat = plan["epoch"], plan["run"], plan["run"]["first_repeat_step"]
    fits = {True: "no sample twice", False: "some samples more than once", None: "repeats were not looked for"}
    epochs = "" if run["epochs"] is None else f"{run['epochs']:.3g} epochs: "
    records = [run | {"name": "training.steps", "note": epochs + fits[run["fits"]]}]
    if epoch:
        left_out = f"{epoch['left_out']:,} samples are left out" if epoch["left_out"] else "nothing is left out"
        records.insert(0, epoch | {"name": "epoch", "note": left_out})
    if repeat:
        again = ", which goes through the streams again" if run["first_repeat_epoch"] else ""
        of_epoch = f"of epoch {run['first_repeat_epoch']}{again}" if epoch else "where a stream begins again"
        exact = f"until the first repeat, in step {repeat:,}, {of_epoch}"
        note = exact if run["first_repeat_is_exact"] else "at least, until the first repeat"
        amounts = {unit: run[f"first_repeat_{unit}"] for unit in ("samples", "tokens")}
        records.append({"name": "without repeats", "steps": repeat - 1, "note": note} | amounts)
    columns = {"": ("name", ""), **{key: (key, ",.0f") for key in ("steps", "samples", "tokens")}, " ": ("note", "")}
    out.print(records_table("Epoch and run" if epoch else "Run", records, columns))
    if not repeat:
        is_refused = plan["resume"] and not plan["resume"]["order_survives"]
        unknown = "the checkpoint, of an earlier version of this code, doesn't say what was read in which step"
        out.print(f"  Not known, as {'a start would be refused' if is_refused else unknown}.", style="yellow")
    if (since := run["since_step"]) > 0:
        out.print(f"  Samples, tokens and repeats since the streams began anew after step {since:,}.")
    elif since < 0:
        out.print(f"  Samples and tokens of {-since:,} steps before step 1 are counted, too.")


def print_validation(out: Console, validation: Report) -> None:
    """The validation streams, and what a round reads."""
    of_round = validation["round"]
    print_streams(out, "Validation", validation["streams"])
    out.print(
        f"  A round, after step 1 and each {plural(validation['freq'], 'step')}: {of_round['samples']:,} of "
        f"{plural(validation['samples'], 'sample')}, in {plural(of_round['batches'], 'batch', 'es')} of "
        f"{plural(of_round['global_batch_size'], 'row')} of {plural(validation['seq_len'], 'token')}."
    )


def print_layout(out: Console, plan: Report) -> None:
    """The ranks, and which of them share data."""
    layout, batches = plan["layout"], plural(plan["layout"]["batches_per_step"], "batch", "es")
    nodes = plural(layout["nodes"], "machine")
    nodes += f", {layout['ranks_per_node']} on each" if layout["nodes"] > 1 else ""
    global_batch = f"{plural(layout['global_batch_size'], 'sample')} = {plural(layout['dp_world_size'], 'dp rank')}"
    rows = [
        ("ranks", f"{layout['world_size']} on {nodes}"),
        ("degrees", ", ".join(f"{name} {degree}" for name, degree in layout["degrees"].items())),
        ("global batch", f"{global_batch} x {batches} x {plural(layout['samples_per_batch'], 'sample')}"),
    ]
    readers = [(f"dp rank {dp_rank}", f"read by rank {ranks}") for dp_rank, ranks in enumerate(layout["dp_ranks"])]
    more = [("…", f"and so on, to dp rank {len(readers) - 1}")] if len(readers) > SHOWN_RANKS else []
    out.print(plain_table("Layout", [*rows, *readers[:SHOWN_RANKS], *more]))


def print_needs(out: Console, plan: Report) -> None:
    """What each node needs."""
    needs = plan["needs"]
    order, shards, batches = (needs[f"shared_memory_{part}"] for part in ("order", "shards", "batches"))
    ordering = f"order {decimal(order)}, while an epoch begins; " if plan["epoch"] else ""
    shared = f"{ordering}shards {decimal(shards)}; batches in flight {decimal(batches)}"
    limit = f"at most {needs['cache_limit']} (dataset.cache_limit)" if needs["cache_limit"] else "no limit is set"
    rows = {
        "shared memory": (order + shards + batches, shared),
        "memory": (needs["memory_to_order_an_epoch"], "in one process, while an epoch is put in order"),
        "cache": (needs["cache"], f"of disk for what is fetched; {limit}"),
        "to hash": (needs["hashed_at_a_start"], "at each start, and what the caches hold by then"),
    }
    shown = [(name, decimal(size), note) for name, (size, note) in rows.items() if plan["epoch"] or name != "memory"]
    out.print(plain_table("Each machine needs", shown))


def print_resume(out: Console, plan: Report) -> None:
    """Where a checkpoint's run stands, and what has changed since."""
    resume = plan["resume"]
    restarts = resume["steps_done"] != resume["step"]
    from_1 = ", counted from 1 again (checkpoint.exclude_from_loading)" if restarts else ""
    left = f"{resume['steps_left']} more to training.steps{from_1}"
    out.print(f"  {resume['checkpoint']}: after step {resume['step']}, {left}")
    steps = resume["steps_left_in_epoch"]
    follow = "" if steps is None else f", of which {steps:,} steps follow"
    place = f"stage {resume['stage']}" if len(plan["stages"]) > 1 else "the run"
    place = f"epoch {resume['epoch']}" if steps is not None or (place == "the run" and plan["epoch"]) else place
    if resume["stage"]:  # known, as the data is that of the checkpoint
        out.print(f"  The next sample is {resume['sample_in_epoch']:,} of {place}{follow}.")
    if not resume["order_survives"]:
        rows = [(f"  {one['setting']}", one["checkpoint"], one["now"]) for one in resume["differences"]]
        table = plain_table("  The order does not survive:", rows, ["  setting", "checkpoint", "now"])
        out.print(table, style="red")
    elif resume["same_batches"] and not resume["begins_anew"]:
        nothing = "  Nothing has changed: the same global batches follow."
        out.print(f"  {resume['plan_changes']}" if resume["plan_changes"] else nothing, style="green")
    elif not resume["begins_anew"]:
        sizes = "in global batches of {now} in place of {checkpoint}".format_map(resume["global_batch_size"])
        out.print(f"  The order survives: the same samples follow, {sizes}.", style="green")
    if not resume["is_loaded"]:
        out.print("  checkpoint.enable = false: a start would not load it.", style="yellow")
    if resume["begins_anew"]:
        out.print("  checkpoint.exclude_from_loading: the streams would start from their beginning.", style="yellow")
    elif resume["streams_are_loaded"] and not resume["order_survives"]:
        out.print("  A start would be refused, with the reason at the end.", style="red")
