"""What `tests.benchmarks.gpu` makes of its runs: whose turn it is, the figures of each turn, and what they tell."""

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import Comparison, Figure, number

WAYS = {"text": "TorchTitan's loader", "ours": "ours", "memory": "batches from memory"}
"""Where batches come from."""
TURN = 2
"""Windows of a turn. Only the second counts: in the first, a loader hands out what it has prefetched meanwhile."""
ROUND = TURN * len(WAYS)
NAMES = {
    "tokens": "n_tokens_seen",
    "loss": "loss_metrics/global_avg_loss",
    "seconds": "time_metrics/end_to_end(s)",
    "mfu_percent": "mfu(%)",
    "data_wait_percent": "time_metrics/data_loading(%)",
}
"""What TorchTitan calls the figures of the steps since it last logged: tokens since the run's start, seconds of a step,
share of the time that rank 0 waits for data (torchtitan 0.2.2, components/metrics.py)."""
MEMORY_RATIO, WAIT_PERCENT = 0.995, 0.3
"""Aims: tokens per second at least, next to batches from memory, and less of the time spent waiting for data."""

Row = dict[str, float]
Run = dict[str, Any]


def turns() -> Iterator[str]:
    """Whose turn it is, without end. Ours and memory are neighbours in each round, and follow each other alike."""
    for order in itertools.cycle([("ours", "memory"), ("memory", "ours")]):
        yield "text"
        yield from order


def read_scalars(folder: Path) -> list[Row]:
    """What TorchTitan has logged for TensorBoard under a folder, by step, with names of our own."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows: dict[int, Row] = {}
    for file in folder.rglob("events.*"):
        events = EventAccumulator(str(file))
        events.Reload()
        for name, tag in NAMES.items():
            for event in events.Scalars(tag) if tag in events.Tags()["scalars"] else []:
                rows.setdefault(event.step, {"step": event.step})[name] = event.value
    return [rows[step] for step in sorted(rows) if rows[step].keys() >= NAMES.keys()]


def figures_of_turns(rows: list[Row], window: int) -> list[Run]:
    """The figures of each turn of the rounds that are whole.

    Args:
        rows: one for each window, and one for the first step.
        window: its steps.
    """
    rows = [row for row in rows if row["step"] % window == 0]
    whole = rows[: len(rows) // ROUND * ROUND]
    found = []
    for turn, way in zip(range(len(whole) // TURN), turns(), strict=False):
        before, counted = whole[TURN * turn : TURN * (turn + 1)]
        rate = (counted["tokens"] - before["tokens"]) / (counted["seconds"] * window)
        found.append({"round": turn // len(WAYS), "way": way, "tokens_per_second": rate, **counted})
    return found


def findings(part: str, seq_len: int, runs: list[Run], has_aims: bool) -> list[Comparison | Figure]:
    """Ours next to batches from memory and to TorchTitan's loader, and the figures of each of them."""
    of_way = {way: [run for run in runs if run["way"] == way] for way in WAYS}
    rates = {way: [run["tokens_per_second"] for run in of_way[way]] for way in WAYS}
    what, at_least = f"{part}, {seq_len:,} tokens", MEMORY_RATIO if has_aims else None
    found: list[Comparison | Figure] = [
        Comparison(what, WAYS["memory"], rates["ours"], rates["memory"], "tokens/s", at_least),
        Comparison(what, WAYS["text"], rates["ours"], rates["text"], "tokens/s"),
    ]
    for way in ("ours", "memory", "text"):
        seconds = sum(run["seconds"] for run in of_way[way])
        waits = sum(run["seconds"] * run["data_wait_percent"] for run in of_way[way]) / seconds
        has_aim = has_aims and way == "ours"
        values = {"model": part, "batches": WAYS[way], "tokens/s: median (min to max)": spread(rates[way])}
        values["MFU, %"] = spread([run["mfu_percent"] for run in of_way[way]])
        values["waits for data, % of all turns (min to max)"] = spread(
            [run["data_wait_percent"] for run in of_way[way]], waits
        )
        is_met = "yes" if waits < WAIT_PERCENT else "no"
        values |= {"aim": f"< {WAIT_PERCENT} %", "met": is_met} if has_aim else {"aim": "", "met": ""}
        found.append(Figure(what, values))
    return found


def spread(values: list[float], middle: float | None = None) -> str:
    """The median of values, or another middle, with the least and the greatest."""
    middle = statistics.median(values) if middle is None else middle
    return f"{number(middle)} ({number(min(values))} to {number(max(values))})"
