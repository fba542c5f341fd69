"""`make bench` on little data: each part works, and says what it has found. How fast anything is isn't tested."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from streaming.base import shuffle

from tests.benchmarks import blend, data, epochs, loaders, scale, starts, tokenizing, training, zephon
from tests.benchmarks.measure import Comparison, Figure, number, show, table
from tests.support.ranks import run_rank_values


@pytest.fixture
def tokens(tmp_path: Path) -> data.Tokens:
    """64 samples in batches of 4, in a stream of several shards."""
    return data.write_tokens(tmp_path / "tokens", 4, 64, 64)


def test_ratio_is_that_of_neighbours_and_the_aim_is_for_its_median() -> None:
    slower_and_slower = Comparison("batches", "theirs", [8, 4, 3], [4, 2, 1], "batches/s", at_least=2)
    assert slower_and_slower.ratios == [2, 2, 3] and slower_and_slower.is_met
    assert not Comparison("batches", "theirs", [1.9], [1], "batches/s", at_least=2).is_met
    assert not Comparison("seconds", "theirs", [1.2], [1], "s", at_most=1.1).is_met
    assert Comparison("seconds", "theirs", [9], [1], "s").is_met
    assert slower_and_slower.row()[:5] == ["batches", "theirs", "≥ 2", "2.00 (2.00 to 3.00)", "yes"]
    assert Comparison("seconds", "theirs", [1.2], [1], "s", at_most=1.1).row()[2:5] == [
        "≤ 1.1",
        "1.20 (1.20 to 1.20)",
        "no",
    ]


def test_tables_line_up() -> None:
    assert (
        number(1234.5) == "1,234" and number(12.34) == "12.3" and number(1.234) == "1.23" and number(0.1234) == "0.123"
    )
    assert table(["a", "long"], [["wide", "b"]]) == "| a    | long |\n|------|------|\n| wide | b    |"
    shown = show([Figure("x", {"a": 1}), Figure("x", {"a": 2}), Comparison("w", "o", [1], [1], "s")])
    assert shown.count("against") == 1 and shown.endswith("\n\n| a |\n|---|\n| 1 |\n| 2 |")


@pytest.mark.long
def test_loaders_are_compared(tokens: data.Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"REPEATS": 2, "SECONDS": 0.01, "EPOCH": 4000, "WARM_UP": 2}.items():
        monkeypatch.setattr(loaders, name, value)
    for workers in (0, 1):
        found = loaders.compare(tokens, workers)
        names = [comparison.against for comparison in found]
        assert names[:2] == ["llm-foundry", "StreamingDataset"] and ("memory-mapped array" in names) == (workers == 0)
        assert ("Zephon" in names) == zephon.IS_INSTALLED
        found += loaders.compare_shards(tokens) if workers else []
        assert all(len(one.ours) == len(one.theirs) == 2 and min(*one.ours, *one.theirs) > 0 for one in found)


@pytest.mark.long
def test_loader_on_text_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"REPEATS": 1, "SECONDS": 0.01, "EPOCH": 20_000, "WARM_UP": 2}.items():
        monkeypatch.setattr(loaders, name, value)
    found = loaders.compare_text(data.write_text(tmp_path / "text", 256))
    assert found.against == "TorchTitan's loader" and min(*found.ours, *found.theirs) > 0


def test_loaders_of_text_get_the_same_ids_in_the_same_order(tmp_path: Path) -> None:
    documents = tokenizing.write_documents(tmp_path / "text", {"text": 200}, 4 * tokenizing.ROWS, 64)

    def read() -> list[list[list[int]]]:
        found = [[batch[0]["input"] for batch in itertools.islice(tokenizing.ours(documents)(), 3)]]
        others = [tokenizing.llm_foundry] + [tokenizing.zephon_text] * zephon.IS_INSTALLED
        for other in others:
            found.append([batch["input_ids"][:, :-1] for batch in itertools.islice(other(documents)(), 3)])
        return [[row.tolist() for batch in batches for row in batch] for batches in found]

    [found] = run_rank_values(read)
    expected = [ids for batch in itertools.islice(tokenizing.tokenizers(documents)(), 3) for ids in batch]
    assert len({len(ids) for ids in expected}) > 5 and max(map(len, expected)) == 65, "long ones are cut, others not"
    padding = tokenizing.load_tokenizer()[0].token_to_id("<|pad|>")
    assert all(rows == [(ids + 65 * [padding])[:64] for ids in expected] for rows in found)


@pytest.mark.long
def test_tokenizing_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"TURNS": 2, "BATCHES": 2, "SECONDS": 0.01, "SEQ_LEN": 64, "SAMPLES": 96, "CHARACTERS": 200}
    for name, value in (small | {"PROMPT": 20, "RESPONSE": 40}).items():
        monkeypatch.setattr(tokenizing, name, value)
    for name, value in {"REPEATS": 2, "WARM_UP": 2, "DRAINED": 0.01}.items():
        monkeypatch.setattr(loaders, name, value)
    found = list(tokenizing.compare(tmp_path))
    assert all(len(one.ours) == len(one.theirs) == 2 and min(*one.ours, *one.theirs) > 0 for one in found)
    assert [one.against for one in found if one.at_most] == ["tokenizers"]
    assert [one.what for one in found if "finetuning" in one.what and one.against == "llm-foundry"] == [
        "a batch of 8 x 64, finetuning, 0 workers",
        "a batch of 8 x 64, finetuning, packed, 0 workers",
    ]


@pytest.mark.long
def test_epochs_and_memory_are_measured(tokens: data.Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epochs, "SIZES", (10_000, 20_000))
    monkeypatch.setattr(epochs, "LATE", 200)
    found, ways = epochs.measure_epochs(tmp_path / "epochs"), 1 + len(shuffle.algos)
    assert [figure.values["samples"] for figure in found] == ways * ["10,000"] + ways * ["20,000"]
    assert {figure.values["shuffle_algo"] for figure in found} >= {"none", "py1e", "py1br"}
    grown = epochs.measure_growth(tokens)
    assert [figure.values["process"] for figure in grown] == ["rank", "rank", "worker 0", "worker 1"]


@pytest.mark.long
def test_resumes_and_verifying_are_measured(
    tokens: data.Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starts, "REPEATS", 1)
    monkeypatch.setattr(starts, "EPOCH", 4000)
    monkeypatch.setattr(starts, "MEGABYTES", 2)
    assert [comparison.at_most for comparison in starts.compare_resumes(tokens)] == [1.1] * 3
    assert all(cost > 0 for cost in starts.measure_verifying(tmp_path).values.values())


@pytest.mark.long
def test_ranks_are_measured(tokens: data.Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "RANKS", (1, 2))
    assert [figure.values["loader ranks"] for figure in scale.measure(tokens, tmp_path)] == ["1", "2"]


@pytest.mark.long
def test_training_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "STEPS", 2)
    monkeypatch.setattr(training, "PAIRS", 3)
    compared, waited = training.compare(tmp_path)
    assert len(compared.ours) == len(compared.theirs) == 2 and min(*compared.ours, *compared.theirs) > 0
    assert "share of the time" in waited.values


@pytest.mark.long
def test_starts_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "REPEATS", 1)
    compared = starts.compare_first_steps(tmp_path, data.write_text(tmp_path / "text", 256))
    assert len(compared.ours) == len(compared.theirs) == 1 and min(*compared.ours, *compared.theirs) > 5


@pytest.mark.long
def test_blend_is_measured(tokens: data.Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SIZES": (100_000, 200_000),
        "STEP": 2000,
        "MIXED": 80_000,
        "SHUFFLE_BLOCK": 2000,
        "TURNS": 2,
    }.items():
        monkeypatch.setattr(blend, name, value)
    monkeypatch.setattr(loaders, "SECONDS", 0.01)
    begins, opening = blend.measure_positions(), blend.measure_opening(tmp_path / "index")
    assert [figure.values["samples"] for figure in begins] == 3 * ["100,000"] + 3 * ["200,000"]
    assert opening.values["shards"] == "100" and float(opening.values["preview step 2,000, s"]) > 0
    used = {figure.values["order"]: figure.values for figure in blend.measure_shards(tmp_path / "shards")}
    assert used.keys() == {"blend", "py1e", "py1br"}
    assert all(0 < float(one["in use at once, mean"]) <= float(one["most"]) <= 80 for one in used.values())
    compared = [*blend.compare_rates(tokens), *blend.compare_plans(tokens)]
    assert all(len(one.ours) == len(one.theirs) == 2 for one in compared)
    assert [figure.values["workers"] for figure in blend.measure_boundary(tokens)] == [0, 2]


@pytest.mark.long
def test_results_are_written(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.benchmarks",
        "--only",
        "memory",
        "--out",
        f"{tmp_path}/b.json",
    ]
    subprocess.run(command, check=True, timeout=240)
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["machine"]["torch"] and list(written["results"]) == ["memory"]
