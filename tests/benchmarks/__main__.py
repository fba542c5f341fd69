"""What data costs, next to what a user would pick instead: `make bench`, or python -m tests.benchmarks

Prints tables and writes `outputs/bench/bench.json` with all values. `--only` runs some parts.
"""

import argparse
import contextlib
import json
import os
import platform
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests import conftest  # noqa: F401  # first: imports everything once, for all ranks

# isort: split
from tests.benchmarks import blend, data, epochs, loaders, scale, starts, tokenizing, training
from tests.benchmarks.measure import Comparison, Figure, cpu_model, show, written

PARTS = ("loaders", "text", "tokenizing", "training", "starts", "resume", "blend", "epochs", "memory", "ranks")
WORKERS = (0, 1, 2, 4)
PACKAGES = ("torch", "torchtitan", "llm-foundry", "mosaicml-streaming", "litdata", "zephon", "numpy")


def machine() -> dict[str, Any]:
    """What it runs on."""
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def run(parts: list[str], folder: Path) -> dict[str, list[Comparison | Figure]]:
    """Each part's findings, printed as they come."""
    eight = data.write_tokens(folder / "8x2048", 8, 2048, 8192)
    found: dict[str, list[Any]] = {}
    for part in parts:
        begin = time.monotonic()
        if part == "loaders":
            one = data.write_tokens(folder / "1x8192", 1, 8192, 2048)
            found[part] = [
                c for tokens in (eight, one) for workers in WORKERS for c in loaders.compare(tokens, workers)
            ]
            found[part] += loaders.compare_shards(eight)
        if part == "text":
            found[part] = [loaders.compare_text(data.write_text(folder / "text", 2048))]
        if part == "tokenizing":
            found[part] = list(tokenizing.compare(folder / "documents"))
        if part == "training":
            found[part] = list(training.compare(folder))
        if part == "starts":
            found[part] = [
                starts.compare_first_steps(folder, data.write_text(folder / "short", 256)),
                starts.measure_verifying(folder),
            ]
        if part == "resume":
            found[part] = list(starts.compare_resumes(eight))
        if part == "blend":
            found[part] = [
                *blend.compare_rates(eight),
                *blend.compare_plans(eight),
                *blend.measure_boundary(eight),
                *starts.compare_resumes(eight, blend=True),
                *blend.measure_positions(),
                blend.measure_opening(folder / "large"),
                *blend.measure_shards(folder / "mixed"),
            ]
        if part == "epochs":
            found[part] = list(epochs.measure_epochs(folder / "epochs"))
        if part == "memory":
            found[part] = list(epochs.measure_growth(eight))
        if part == "ranks":
            found[part] = list(scale.measure(eight, folder / "ranks"))
        print(f"\n{part} ({time.monotonic() - begin:.0f} s)\n\n{show(found[part])}", flush=True)
    return found


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(
        "tests.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--out", type=Path, help="(default: outputs/bench/bench.json, or, of parts, their names)")
    flags = parser.parse_args()
    name = "bench" if flags.only == PARTS else "-".join(flags.only)
    out = flags.out or Path(f"outputs/bench/{name}.json")
    begin, found_on = time.monotonic(), machine()
    print(json.dumps(found_on))
    with tempfile.TemporaryDirectory() as folder:
        found = run(flags.only, Path(folder))
    out.parent.mkdir(parents=True, exist_ok=True)
    results = {part: [written(finding) for finding in findings] for part, findings in found.items()}
    out.write_text(json.dumps({"machine": found_on, "results": results}, indent=1))
    print(f"\n{out}, after {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
