"""What each stream has given, against the samples that real loaders have delivered."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.mosaic_streaming.checkpoint.history import Segment
from examples.mosaic_streaming.preview.job_data import JobData
from examples.mosaic_streaming.preview.ledger import asked_samples, count_samples, ledger_report
from examples.mosaic_streaming.preview.plots import plot_shares
from tests.support.looking import preview, with_job_data
from tests.support.streams import METHODS, SEQ_LEN, WEIGHTS, history, job, mixture, read_steps

STEPS = 25
"""Of 8 samples: more than two epochs."""


@pytest.mark.parametrize("batching_method", METHODS)
@pytest.mark.parametrize("weights", ["unweighted", "proportion", "repeat"])
def test_ledger_counts_what_is_delivered(
    streams: dict[str, dict[str, Any]], batching_method: str, weights: str
) -> None:
    weighted = {name: stream | weight for (name, stream), weight in zip(streams.items(), WEIGHTS[weights], strict=True)}
    config = mixture(weighted, batching_method=batching_method)
    read = read_steps(config, STEPS, local=2).samples
    of_a = np.cumsum([sum(sample < 50 for sample in step) for step in read])
    at = (1, 5, 9, 10, 11, STEPS)

    def look(opened: JobData) -> Any:
        history = opened.new_run()
        counts = [count_samples(opened, history, step) for step in at]
        ledgers = [ledger_report(opened, history, step, found[-1]) for step, (_, found) in zip(at, counts, strict=True)]
        return ledgers, counts[-1]

    ledgers, (steps, counts) = with_job_data(config, look, job(2, 8))
    assert [found["streams"][0]["samples"] for found in ledgers] == [of_a[step - 1] for step in at]
    asked = {"unweighted": 50 / 83, "proportion": 0.25, "repeat": 75 / (75 + 16)}[weights]
    for step, found in zip(at, ledgers, strict=True):
        a, b = found["streams"]
        assert a["samples"] + b["samples"] == 8 * step
        assert a["share_asked"] == pytest.approx(asked, abs=0.001)
        assert a["tokens_difference"] == pytest.approx((a["samples"] - a["share_asked"] * 8 * step) * SEQ_LEN, abs=1e-6)
        assert b["tokens_difference"] == pytest.approx(-a["tokens_difference"], abs=1e-6)
        assert a["passes"] == a["samples"] / 50 and a["tokens"] == a["samples"] * SEQ_LEN
    assert steps == list(range(STEPS + 1))
    assert counts[:, 0, 0].tolist() == [0, *of_a]
    assert counts.sum(axis=(1, 2)).tolist() == [8 * step for step in steps]


def test_what_was_read_before_the_first_known_step_is_counted_and_drawn(
    streams: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """As after a checkpoint of an earlier version of this code, which knows its own step alone."""

    def look(opened: JobData) -> Any:
        known = history(opened.opened.order, Segment(3, 0, 24, 8))
        steps, counts = count_samples(opened, known, 3)
        asked = asked_samples(opened, counts)
        plot_shares(str(tmp_path / "shares.png"), steps, counts, asked, opened.opened.names, {})
        return steps, counts, count_samples(opened, opened.new_run(), 3)[1]

    steps, counts, all_counts = with_job_data(mixture(streams), look, job(2, 8))
    assert steps == [3]
    assert counts.tolist() == [all_counts[-1].tolist()]
    assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")


def test_ledger_is_drawn_and_goes_to_the_last_step_unless_another_is_given(files: Path) -> None:
    plot = files / "shares.png"
    found = preview(files, "ledger", f"--plot={plot}")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert (found["step"], found["streams"][0]["samples"]) == (4, 16)
    assert preview(files, "ledger", "--step=3")["streams"][0]["samples"] == 12
