"""Figures, what they are compared with, and how they are shown."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """The same thing measured of two, in turns.

    Attributes:
        what: was measured.
        against: what ours was compared with.
        ours: values.
        theirs: values, measured each next to ours.
        unit: of both.
        at_least: the aim for the ratio of ours to theirs.
        at_most: the same, where less is better.
    """

    what: str
    against: str
    ours: Sequence[float]
    theirs: Sequence[float]
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def ratios(self) -> list[float]:
        """Of ours to theirs."""
        return [one / other for one, other in zip(self.ours, self.theirs, strict=True)]

    @property
    def is_met(self) -> bool:
        """Whether the median of the ratios is what was aimed for."""
        ratio = statistics.median(self.ratios)
        return (self.at_least is None or ratio >= self.at_least) and (self.at_most is None or ratio <= self.at_most)

    def row(self) -> list[str]:
        """For a table; the headings are `HEADINGS`."""
        aim = "" if self.at_least is None else f"≥ {self.at_least:g}"
        aim = aim if self.at_most is None else f"≤ {self.at_most:g}"
        ratio = f"{number(statistics.median(self.ratios))} ({number(min(self.ratios))} to {number(max(self.ratios))})"
        met = "" if not aim else "yes" if self.is_met else "no"
        ours, theirs = (number(statistics.median(values)) for values in (self.ours, self.theirs))
        return [self.what, self.against, aim, ratio, met, ours, theirs, self.unit]


HEADINGS = ["", "against", "aim", "ratio of pairs: median (min to max)", "met", "ours", "theirs", "unit"]


@dataclass(frozen=True)
class Figure:
    """Something measured by itself.

    Attributes:
        what: was measured.
        values: by name.
    """

    what: str
    values: dict[str, Any]


def cpu_model() -> str:
    """The name of this machine's CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def number(value: float) -> str:
    """Three digits, or all of them in front of the point."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown that lines up on a terminal, too."""
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [headings, *rows]
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def show(findings: Sequence[Comparison | Figure]) -> str:
    """Comparisons as a table, and figures that have the same names as another."""
    comparisons = [finding.row() for finding in findings if isinstance(finding, Comparison)]
    tables = [table(HEADINGS, comparisons)] * bool(comparisons)
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for finding in findings:
        if isinstance(finding, Figure):
            groups.setdefault(tuple(finding.values), []).append([str(value) for value in finding.values.values()])
    return "\n\n".join([*tables, *(table(names, rows) for names, rows in groups.items())])


def written(finding: Comparison | Figure) -> dict[str, Any]:
    """A finding for the JSON file."""
    more = {"ratios": finding.ratios, "is_met": finding.is_met} if isinstance(finding, Comparison) else {}
    return asdict(finding) | more
