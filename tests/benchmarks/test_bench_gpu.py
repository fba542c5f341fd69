"""The benchmark on GPUs (`make bench-gpu`), as far as it can be tried without one."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from streaming.base.format import reader_from_json
from torchtitan.hf_datasets import DatasetConfig, text_datasets

from examples.mosaic_streaming.tokenizer import build_tokenizer
from tests.benchmarks import gpu
from tests.benchmarks.gpu_figures import FORMS, WAYS, Row, compare, spread, summarize, table
from tests.benchmarks.gpu_job import InMemory
from tests.support.streams import TOKENIZER, job

SEQ_LEN = 16
TEXTS = ["def f(x):\n    return x\n", "import os\n", "# " + "words and more words " * 9]


def run(repeat: int, way: str, rate: float, model: str = "debugmodel") -> dict[str, Any]:
    shares = {"mfu_percent": 40.0, "data_wait_percent": 0.5}
    return {"model": model, "seq_len": 4096, "repeat": repeat, "way": way, "tokens_per_second": rate, **shares}


RUNS = [
    *(run(0, way, rate) for way, rate in zip(WAYS, (900.0, 600.0, 1000.0), strict=True)),
    *(run(1, way, rate) for way, rate in zip(WAYS, (990.0, 495.0, 1000.0), strict=True)),
    *(run(2, way, rate) for way, rate in zip(WAYS, (800.0, 500.0, 1000.0), strict=True)),
]


def test_windows_weigh_what_they_took_and_the_first_is_left_out() -> None:
    rows: list[Row] = [
        {"step": 1, "tokens": 10, "loss": 8, "seconds": 99, "mfu_percent": 1, "data_wait_percent": 99},
        {"step": 10, "tokens": 100, "loss": 7, "seconds": 50, "mfu_percent": 2, "data_wait_percent": 98},
        {"step": 20, "tokens": 200, "loss": 6, "seconds": 1, "mfu_percent": 30, "data_wait_percent": 8},
        {"step": 30, "tokens": 300, "loss": 5, "seconds": 3, "mfu_percent": 10, "data_wait_percent": 0},
    ]
    assert summarize(rows, window=10) == {
        "tokens": 300,
        "tokens_per_second": 200 / 40,
        "mfu_percent": 15,
        "data_wait_percent": 2,
        "first_loss": 8,
        "last_loss": 5,
    }


def test_ratios_are_those_of_one_round() -> None:
    [found, other] = compare([*RUNS, *(run(0, way, 7.0, "1B") for way in WAYS)])
    assert (found["model"], found["seq_len"], found["repeats"]) == ("debugmodel", 4096, 3)
    assert found["mosaic_divided_by"] == {
        "text": {"median": 1.6, "min": 1.5, "max": 2.0},
        "memory": {"median": 0.9, "min": 0.8, "max": 0.99},
    }
    assert found["ways"]["text"]["tokens_per_second"] == {"median": 500, "min": 495, "max": 600}
    assert other["mosaic_divided_by"]["text"] == spread([1.0])


def test_table_has_a_line_for_each_way() -> None:
    lines = table(compare(RUNS)).splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["debugmodel", "4096", way] for way in WAYS]
    assert "900 (800 to 990)" in lines[1] and lines[1].endswith("-")
    assert lines[2].endswith("1.600 (1.500 to 2.000)")
    assert table([]).startswith("model")


def test_settings_are_those_of_the_machine_unless_given() -> None:
    assert gpu.parse([], has_gpu=True) == gpu.Settings()
    assert gpu.parse([], has_gpu=False) == gpu.parse(["--cpu"], has_gpu=True) == gpu.CPU
    settings = gpu.parse(["--models", "1B", "--seq-len", "2048", "--steps", "8", "--repeats", "1"], has_gpu=True)
    assert (settings.models, settings.seq_len, settings.steps, settings.repeats) == (["1B"], [2048], 8, 1)
    with pytest.raises(SystemExit):
        gpu.parse(["--steps", "10"], has_gpu=True)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The benchmark's data, of small texts, and a place for them among TorchTitan's data sets."""
    monkeypatch.setattr(gpu, "sources", lambda: TEXTS)
    assert gpu.write_data(tmp_path, [SEQ_LEN], wanted=500) >= 500
    rows = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    texts = DatasetConfig("", lambda path: datasets.Dataset.from_list(rows), lambda sample: sample["text"])
    monkeypatch.setitem(text_datasets.DATASETS, "bench", texts)
    return tmp_path


def test_stream_has_the_tokens_that_torchtitan_makes_of_the_text(data: Path) -> None:
    tokenizer = build_tokenizer(TOKENIZER)
    samples = text_datasets.HuggingFaceTextDataset("bench", None, tokenizer, SEQ_LEN)
    expected = [[*inputs["input"].tolist(), int(labels[-1])] for inputs, labels in samples]
    [shard] = json.loads((data / f"{SEQ_LEN}/index.json").read_text())["shards"]
    reader = reader_from_json(str(data / str(SEQ_LEN)), None, shard)
    assert [reader[number]["tokens"].tolist() for number in range(shard["samples"])] == expected
    assert len(expected) >= 500 // (SEQ_LEN + 1)


def test_batches_in_memory_stay_when_the_trainer_has_replaced_their_tensors(data: Path) -> None:
    batches = iter(InMemory(dp_world_size=1, dp_rank=0, tokenizer=build_tokenizer(TOKENIZER), job_config=bench_job()))
    first, labels = next(batches)
    tokens = first["input"]
    assert tokens.shape == labels.shape == (2, SEQ_LEN)
    first["input"] = labels
    assert next(batches)[0]["input"] is tokens


def bench_job() -> Any:
    config = job()
    config.training.dataset = "bench"
    return config


@pytest.mark.long
def test_command_of_the_attention_runs_trains(tmp_path: Path) -> None:
    """All of it but attention: this flavor sees beyond documents, which is all that a CPU can do."""
    gpu.write_data(tmp_path, gpu.CPU.seq_len, wanted=1 << 16)
    [found] = gpu.train_within_documents(gpu.CPU, tmp_path, "debugmodel")
    assert len(found["losses"]) == gpu.ATTENTION_STEPS


@pytest.mark.long
@pytest.mark.timeout(900)
def test_whole_benchmark_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.gpu", "--cpu", "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=840)
    assert done.returncode == 0, done.stdout
    report = json.loads(out.read_text())
    assert report["failures"] == [] and report["machine"]["cpu"] and report["versions"]["torch"]
    assert list(report["left_out"]) == list(gpu.ATTENTION) and "debugmodel_flex_attn is left out" in done.stdout
    tokens = gpu.CPU.steps * (gpu.CPU.batch_tokens or 0)
    assert {run["way"]: run["tokens"] for run in report["runs"]} == dict.fromkeys(WAYS, tokens)
    [comparison] = report["comparisons"]
    assert comparison["repeats"] == 1 and list(comparison["ways"]) == list(WAYS)
    figures = [comparison["ways"][way][name] for way in WAYS for name in FORMS]
    figures += [comparison["mosaic_divided_by"][way] for way in ("text", "memory")]
    values = [value for figure in figures for value in (figure["median"], figure["min"], figure["max"])]
    assert all(math.isfinite(value) and value > 0 for value in values), figures
    first = {run["way"]: run["first_loss"] for run in report["runs"]}
    assert first["text"] == pytest.approx(first["memory"], abs=1e-5), "the same weights and the same batch"
    assert table(report["comparisons"]) in done.stdout
