"""The format of the saved state: what earlier code wrote is still read, and today's code writes the same bytes.

The states in `tests/assets/states` are of the run in `write_state`: 3 steps of 8 samples, then 2 steps of 12.
`version_2.json` is what the code wrote at commit 59f0cfe; the other lacks the keys that states have had only later.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_rank_values
from tests.support.streams import SEQ_LEN, build_loader, job, mixture, read_steps

STATES = Path("tests/assets/states")
SEEN = 3 * 8 + 2 * 12


def write_state(config: dict[str, Any], total: int, steps: int, state: dict[str, str] | None = None) -> dict[str, str]:
    """Read global batches of a size in one rank, count their loss tokens as metrics do, and save."""

    def read() -> dict[str, str]:
        loader = build_loader(config, job(4, total))
        if state:
            loader.load_state_dict(state)
        batches = iter(loader)
        for _ in range(steps * total // 4):
            next(batches)
        loader.progress()
        return loader.state_dict()

    [saved] = run_rank_values(read)
    assert isinstance(saved, dict)
    return saved


def test_state_is_written_byte_for_byte_as_before(streams: dict[str, dict[str, Any]]) -> None:
    config = mixture(streams)
    state = write_state(config, 12, 2, write_state(config, 8, 3))
    assert state == {"mosaic": (STATES / "version_2.json").read_text()}


@pytest.mark.parametrize(
    ("name", "after"),
    [
        (
            "version_2.json",
            {
                "seen": {"samples": SEEN + 36, "tokens": (SEEN + 36) * SEQ_LEN, "targets": (SEEN + 36) * SEQ_LEN},
                "steps": 8,
                "segments": [[0, 0, 0, 8], [3, 0, 24, 12]],
            },
        ),
        (
            "version_2_without_history.json",
            {
                "seen": {"samples": SEEN + 36, "tokens": (SEEN + 36) * SEQ_LEN, "targets": None},
                "steps": 3,
                "segments": [[0, 0, SEEN, 12]],
            },
        ),
    ],
)
def test_saved_state_is_read_and_the_run_goes_on_from_it(
    streams: dict[str, dict[str, Any]], name: str, after: dict[str, Any]
) -> None:
    """Over the end of the epoch, whose 80 samples leave 8 that fill no global batch of 12."""
    text = (STATES / name).read_text()
    read = read_steps(mixture(streams), 3, total=12, local=4, state={"mosaic": text})
    in_order = [sample for step in read_steps(mixture(streams), 23, total=4).samples for sample in step]
    assert read.samples == [sorted(in_order[begin : begin + 12]) for begin in (SEEN, SEEN + 12, 80)]
    changed = {"epoch": 1, "sample_in_epoch": 12, **after}
    assert read.states[-1] == {"mosaic": json.dumps(json.loads(text) | changed)}
