"""The benchmark on GPUs (`make bench-gpu`), as far as it can be tried without one."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from streaming.base.format import reader_from_json
from torchtitan.hf_datasets import DatasetConfig, text_datasets
from torchtitan.models.llama3 import Transformer, llama3_args

from examples.mosaic_streaming.batch import TitanBatch
from examples.mosaic_streaming.titan.v0_2.job import make_job
from examples.mosaic_streaming.titan.v0_2.load import load_job_config
from examples.mosaic_streaming.tokenizer import build_tokenizer
from tests.benchmarks import gpu
from tests.benchmarks.gpu_figures import WAYS, Row, Run, figures_of_turns, findings
from tests.benchmarks.gpu_job import FLAVORS, InTurns
from tests.benchmarks.gpu_settings import CPU, MODELS, Settings, parse
from tests.benchmarks.measure import Comparison, Figure, show
from tests.support.streams import TOKENIZER
from tests.upstream.test_lazy_imports import run

SEQ_LEN = 16
TEXTS = ["def f(x):\n    return x\n", "import os\n", "# " + "words and more words " * 9]


def test_turns_have_what_they_took_in_their_second_window_and_a_round_that_is_not_whole_is_left_out() -> None:
    def row(step: int, tokens: float, seconds: float) -> Row:
        return {"step": step, "tokens": tokens, "loss": 8, "seconds": seconds, "mfu_percent": 1, "data_wait_percent": 9}

    took = {window: 1.0 + window for window in range(1, 14)}  # seconds of a step, of windows of 10 steps
    rows = [row(1, 10, 99), *(row(10 * window, 100 * window, seconds) for window, seconds in took.items())]
    found = figures_of_turns(rows, window=10)
    assert [(run["round"], run["way"], run["tokens_per_second"]) for run in found] == [
        *((0, "text", 100 / 30), (0, "ours", 100 / 50), (0, "memory", 100 / 70)),
        *((1, "text", 100 / 90), (1, "memory", 100 / 110), (1, "ours", 100 / 130)),
    ]
    assert figures_of_turns(rows[:6], window=10) == []


def turn(round: int, way: str, rate: float, wait: float, seconds: float = 1.0) -> Run:
    figures = {"tokens_per_second": rate, "mfu_percent": 40.0, "data_wait_percent": wait, "seconds": seconds}
    return {"round": round, "way": way, **figures}


@pytest.mark.parametrize(
    ("rate", "wait", "met"), [(995.0, 0.5, ["yes", "yes"]), (994.0, 0.5, ["no", "yes"]), (995.0, 0.7, ["yes", "no"])]
)
def test_aims_are_for_the_ratio_of_a_round_and_for_the_wait_of_all_turns(
    rate: float, wait: float, met: list[str]
) -> None:
    """The first turn of ours takes half as long as the second, so its wait weighs half as much."""
    runs = [turn(0, "text", 400, 60), turn(0, "ours", rate, wait, seconds=1), turn(0, "memory", 1000, 0)]
    runs += [turn(1, "text", 500, 60), turn(1, "memory", 2000, 0), turn(1, "ours", 2 * rate, 0.1, seconds=2)]
    to_memory, to_text, *figures = findings("1B", 8192, runs, has_aims=True)
    assert isinstance(to_memory, Comparison) and isinstance(to_text, Comparison)
    assert to_memory.ratios == [rate / 1000] * 2 and to_text.ratios == [rate / 400, rate / 250]
    waits = [figure.values for figure in figures if isinstance(figure, Figure)]
    assert [to_memory.row()[4], waits[0]["met"]] == met
    assert [one["batches"] for one in waits] == ["ours", "batches from memory", "TorchTitan's loader"]
    unaimed = findings("debugmodel", 8192, runs, has_aims=False)
    assert "≥" not in show(unaimed) and "yes" not in show(unaimed)


def test_settings_are_those_of_the_machine_unless_given() -> None:
    assert parse([], has_gpu=True) == Settings()
    assert parse([], has_gpu=False) == parse(["--cpu"], has_gpu=True) == CPU
    settings = parse(["--seq-len", "2048", "--window", "4", "--rounds", "1"], has_gpu=True)
    assert (settings.seq_len, settings.window, settings.rounds) == (2048, 4, 1)


def test_parts_are_chosen_by_name_and_the_others_are_said_to_be_left_out() -> None:
    settings = parse(["--only", "1B", "attention"], has_gpu=True)
    assert gpu.left_out(settings) == {"debugmodel": "--only names others"}
    assert settings.file == Path("outputs/bench/gpu-1B-attention.json")
    assert Settings().file == Path("outputs/bench/gpu.json") and gpu.left_out(Settings()) == {}
    with pytest.raises(SystemExit):
        parse(["--only", "2B"], has_gpu=True)


def test_larger_model_is_one_that_jobs_can_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llama3_args, "1B", FLAVORS["1B"])
    flags = gpu.titan_flags(Settings(), "1B", MODELS["1B"].batch_tokens, steps=6, log_freq=1)
    made = make_job(load_job_config([f"--job.config_file={gpu.JOB}", *flags]), 1, 1)
    assert (made.training.local_batch_size, made.training.seq_len) == (2, 8192)
    with torch.device("meta"):
        model = Transformer(FLAVORS["1B"])
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2) == 1.25, "as the page says"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The benchmark's data, of small texts, and a place for them among TorchTitan's data sets."""
    monkeypatch.setattr(gpu, "sources", lambda: TEXTS)
    assert gpu.write_data(tmp_path, SEQ_LEN, wanted=500) >= 500
    rows = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    texts = DatasetConfig("", lambda path: datasets.Dataset.from_list(rows), lambda sample: sample["text"])
    monkeypatch.setitem(text_datasets.DATASETS, "bench", texts)
    return tmp_path


def test_stream_has_the_tokens_that_torchtitan_makes_of_the_text(data: Path) -> None:
    tokenizer = build_tokenizer(TOKENIZER)
    samples = text_datasets.HuggingFaceTextDataset("bench", None, tokenizer, SEQ_LEN)
    expected = [[*inputs["input"].tolist(), int(labels[-1])] for inputs, labels in samples]
    [shard] = json.loads((data / "stream/index.json").read_text())["shards"]
    reader = reader_from_json(str(data / "stream"), None, shard)
    assert [reader[number]["tokens"].tolist() for number in range(shard["samples"])] == expected
    assert len(expected) >= 500 // (SEQ_LEN + 1)


def test_loaders_take_turns_and_memory_has_the_same_batch_each_time() -> None:
    def batches(name: str) -> Iterator[TitanBatch]:
        for number in itertools.count():
            yield {"input": torch.tensor([number])}, torch.tensor([len(name)])

    taken, tensors = [], []
    for inputs, labels in itertools.islice(InTurns(batches("ours"), batches("text of theirs"), turn=2), 12):
        taken.append(("text" if labels[0] > 4 else "ours", int(inputs["input"][0])))
        tensors.append(inputs["input"])
        inputs["input"] = labels  # as the trainer does, with a tensor on the GPU
    text, ours, memory = [[("text", n), ("text", n + 1)] for n in (0, 2)], [("ours", n) for n in range(5)], ("ours", 0)
    assert taken == [*text[0], *ours[1:3], memory, memory, *text[1], memory, memory, *ours[3:5]]
    assert tensors[4] is tensors[5] is tensors[8]


@pytest.mark.long
def test_jobs_import_llm_foundry_without_what_training_never_uses() -> None:
    assert run("import tests.benchmarks.gpu_job\n{report}\nprint(json.dumps(packages))") == []


@pytest.mark.long
def test_command_of_the_attention_runs_trains(tmp_path: Path) -> None:
    """All of it but attention: this flavor sees beyond documents, which is all that a CPU can do."""
    gpu.write_data(tmp_path, CPU.seq_len, wanted=1 << 16)
    found = gpu.train_within_documents(CPU, tmp_path, time.monotonic() + 200, "debugmodel")
    assert len(found["losses"]) == gpu.ATTENTION_STEPS


@pytest.mark.long
def test_of_a_run_that_is_not_done_in_time_the_whole_rounds_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.write_data(tmp_path, CPU.seq_len, wanted=1 << 16)
    settings = dataclasses.replace(CPU, rounds=1000, window=1, out=str(tmp_path / "gpu.json"))
    report: dict[str, Any] = {"runs": {}, "results": {}, "left_out": {}}
    gpu.measure(settings, tmp_path, time.monotonic() + gpu.TO_STOP + 40, "debugmodel", report)
    runs = report["runs"]["debugmodel"]
    assert len(runs) % len(WAYS) == 0 and list(report["left_out"]) == [
        f"rounds {len(runs) // 3 + 1} to 1000 of debugmodel"
    ]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_whole_benchmark_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.gpu", "--cpu", "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=840)
    assert done.returncode == 0, done.stdout
    report = json.loads(out.read_text())
    assert report["failures"] == [] and report["machine"]["cpu"] and report["versions"]["torch"]
    assert list(report["left_out"]) == ["1B", "attention"] and "left out: attention: flex" in done.stdout
    turns = report["runs"]["debugmodel"]
    assert len(turns) == len(WAYS) * (CPU.rounds or 0)
    assert turns[-1]["tokens"] == 2 * CPU.window * (CPU.batch_tokens or 0) * len(turns)
    figures = [one[name] for one in turns for name in ("tokens_per_second", "mfu_percent", "data_wait_percent")]
    assert all(math.isfinite(value) and value > 0 for value in figures), figures
    assert [finding.get("against") for finding in report["results"]["debugmodel"]][:2] == [WAYS["memory"], WAYS["text"]]
    assert done.stdout.count("| debugmodel, 256 tokens |") == 2
