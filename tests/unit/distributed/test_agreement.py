"""The comparison at the first batch: what differs is told, with the ranks, before anything is trained."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from examples.mosaic_streaming.distributed import agreement
from examples.mosaic_streaming.errors import ConfigError, DataError
from tests.support.ranks import can_make_nodes, run_rank_values
from tests.support.streams import build_loader, job, mixture, write_stream


def messages(
    config_of_rank: list[dict[str, Any]], dp_ranks: list[int], nodes: int, totals: Sequence[int] = ()
) -> list[str]:
    """What each rank's first batch ends with; `totals` are their global batch sizes."""

    def read() -> str:
        rank = int(os.environ["RANK"])
        try:
            next(iter(build_loader(config_of_rank[rank], job(2, totals[rank] if totals else -1), dp_ranks)))
        except DataError as error:
            return str(error)
        return "no error"

    return [str(message) for message in run_rank_values(read, len(dp_ranks), nodes)]


def test_ranks_with_other_settings_are_named_with_the_settings(streams: dict[str, dict[str, Any]]) -> None:
    """As when nodes have different copies of the file."""
    here, there = mixture(streams), mixture(streams, shuffle_seed=5, predownload=64)
    told = messages([here, here, there, there], [0, 1, 0, 1], nodes=1)
    assert len(set(told)) == 1, "all ranks stop together"
    lines = told[0].splitlines()
    assert lines[0] == "Ranks [2, 3] don't read what rank 0 reads."
    assert [line.split() for line in lines[2:-1]] == [
        ["2", "dataset.shuffle_seed", "9176", "5"],
        ["3", "dataset.shuffle_seed", "9176", "5"],
    ]
    assert lines[-1].startswith(
        "Each node needs the same loader.toml, job config, checkpoint, number of ranks, and index.json"
    )


def test_ranks_with_another_job_config_are_named_with_the_settings(streams: dict[str, dict[str, Any]]) -> None:
    told = messages([mixture(streams)] * 2, [0, 1], nodes=1, totals=[8, 4])
    [row] = told[0].splitlines()[2:-1]
    assert row.split() == ["1", *["samples", "of", "a", "global", "batch"], "8", "4"]


def test_names_of_streams_may_differ(streams: dict[str, dict[str, Any]]) -> None:
    renamed = dict(zip(["x", "y"], streams.values(), strict=True))
    assert messages([mixture(streams), mixture(renamed)], [0, 1], nodes=1) == ["no error"] * 2


needs_nodes = pytest.mark.skipif(not can_make_nodes(), reason="no rights to namespaces, of which nodes are made")


def test_machines_with_unequal_numbers_of_ranks_are_told(streams: dict[str, dict[str, Any]]) -> None:
    """Two ranks on each of two machines, and one on a third."""
    sizes = [2, 2, 2, 2, 1]

    def build() -> str:
        rank = int(os.environ["RANK"])
        os.environ |= {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": str(sizes[rank])}
        try:
            build_loader(mixture(streams))
        except ConfigError as error:
            return str(error)
        return "no error"

    told = run_rank_values(build, len(sizes), timeout=30)
    expected = "Machines have unequal numbers of ranks: 1 (first rank: 4); 2 (first rank: 0, 2). "
    assert told == [expected + "Start each torchrun with the same --nproc_per_node."] * 5


def test_eight_machines_of_a_kind_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "gather", lambda *mine: [[0, 1]] * 9 + [[0, 2], [1, 2]])
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=r"ranks: 1 \(first rank: 0, 1, 2, 3, 4, 5, 6, 7, …\); 2 \(first rank: 9\)\."):
        agreement.check_ranks_per_node()


@needs_nodes
def test_ranks_with_an_older_index_in_their_cache_are_named(tmp_path: Path) -> None:
    configs = [mixture({"a": {"local": str(write_stream(tmp_path / name, n))}}) for name, n in (("x", 40), ("y", 32))]
    told = messages(configs, [0, 1], nodes=2)
    assert "Ranks [1] don't read what rank 0 reads." in told[0]
    assert "stream 1 (a): index" in told[1]


@needs_nodes
@pytest.mark.parametrize(
    ("dp_ranks", "pairs"), [([0, 0], "1 than 0 (dp rank 0)"), ([0, 1, 0, 1], "1 than 0"), ([0, 1], "")]
)
def test_peers_that_got_other_tokens_are_named_with_the_suspect(
    tmp_path: Path, dp_ranks: list[int], pairs: str
) -> None:
    """Rank 1 has a cache with other shards under the same index, which has no hashes."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder, first in ((good, 0), (bad, 100)):
        write_stream(folder, 40, first=first, hashes=[])
    (bad / "index.json").write_bytes((good / "index.json").read_bytes())
    configs = [mixture({"a": {"local": str(bad if rank == 1 else good)}}) for rank in range(len(dp_ranks))]
    told = messages(configs, dp_ranks, nodes=len(dp_ranks))
    if dp_ranks == [0, 1]:
        assert told == ["no error"] * 2, "a rank without peers has none to compare with"
    elif dp_ranks == [0, 0]:
        assert len(set(told)) == 1
        assert f"but got another first batch: {pairs}. Their settings are the same: suspect `local` in" in told[0]
    else:
        assert "got another first batch: 3 than 1 (dp rank 1)." in told[0]
