"""Rows without loss tokens: a global batch or a validation round of them stops the job, fewer change nothing."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from streaming import MDSWriter
from tokenizers import Tokenizer

from examples.mosaic_streaming.train import main
from tests.support.jobs import command, logged, train
from tests.support.ranks import Rank, run_ranks
from tests.support.reading import read_job
from tests.support.streams import SEQ_LEN, TOKENIZER, loader_config, sample_tokens, write_tokens

PAD = Tokenizer.from_file(f"{TOKENIZER}/tokenizer.json").token_to_id("<|pad|>")


def write_rows(folder: Path, samples: range, empty: set[int]) -> Path:
    """Write a stream of samples, some of which have nothing behind their first token but padding."""
    rows = {sample: sample_tokens(sample).tolist() for sample in samples}
    return write_tokens(folder, [row[:1] + [PAD] * SEQ_LEN if sample in empty else row for sample, row in rows.items()])


def write_loader(files: Path, folders: list[Path], num_workers: int = 0, name: str = "loader") -> None:
    """Write the configuration of a loader that reads streams in their order."""
    streams = [f'[dataset.streams.{folder.name}]\nlocal = "{folder}"\n' for folder in folders]
    head = f'name = "text"\nnum_workers = {num_workers}\n[dataset]\nnum_canonical_nodes = 1\n'
    (files / f"{name}.toml").write_text(head + "".join(streams))


def message(ranks: list[Rank]) -> str:
    """Why a job stopped: rank 0 alone says it, once and without a traceback."""
    outputs = [rank.output for rank in ranks]
    assert all(rank.code not in (0, None) for rank in ranks), outputs
    told = re.findall("^DataError: .*", "\n".join(outputs), re.MULTILINE)
    assert len(told) == 1 and told[0] in outputs[0], outputs
    assert not any("Traceback" in output for output in outputs), outputs
    assert not any(rank.left for rank in ranks)
    return str(told[0])


@pytest.mark.parametrize(
    ("world_size", "num_workers", "flags"),
    [
        pytest.param(1, 0, ["--training.local_batch_size=2"], marks=pytest.mark.long),
        (2, 1, ["--training.local_batch_size=1"]),
        pytest.param(2, 0, ["--training.local_batch_size=2"], marks=pytest.mark.long),
        pytest.param(2, 0, ["--parallelism.tensor_parallel_degree=2"], marks=pytest.mark.long),
        pytest.param(4, 0, ["--parallelism.pipeline_parallel_degree=2"], marks=pytest.mark.long),
    ],
)
def test_global_batch_without_loss_tokens_stops_the_job_before_an_update(
    files: Path, world_size: int, num_workers: int, flags: list[str]
) -> None:
    """Samples 4 to 7 have none: those of the second step, of two streams."""
    empty = {4, 5, 6, 7}
    write_loader(files, [write_rows(files / "a", range(6), empty), write_rows(files / "b", range(6, 20), empty)],
                 num_workers)  # fmt: skip
    given = command(files, *flags, "--checkpoint.enable", "--checkpoint.interval=1")
    ranks = run_ranks(lambda: main(given), world_size)
    loader = f"{files}/loader.toml"
    assert message(ranks) == (
        "DataError: The global batch at sample 4 of epoch 0 has no loss token: all its labels are -100. It is made of "
        f"samples 4, 5, 6, 7 of stream 'a' in {loader}, stream 'b' in {loader}. `preview show --sample 4` shows one. "
        "Remove such samples, or raise training.global_batch_size, so that others are in a batch with them."
    )
    assert list(logged(ranks)) == [1]
    assert os.listdir(files / "outputs/checkpoint") == ["step-1"]


@pytest.mark.parametrize(("num_workers", "world_size"), [(0, 2), (2, 1)])
def test_samples_without_loss_tokens_are_named_in_any_epoch_after_a_resume(
    tmp_path: Path, num_workers: int, world_size: int
) -> None:
    """Ten steps of four are an epoch. What is emptied is what a run over whole samples reads in the 13th."""
    settings: dict[str, Any] = {"num_workers": num_workers, "shuffle": True}
    whole = loader_config(write_rows(tmp_path / "whole", range(40), set()), **settings)
    before = read_job(whole, tmp_path / "1", 1, steps=11, total=4)
    after = read_job(whole, tmp_path / "2", 1, steps=2, total=4, state=before.state)
    emptied = set(after.steps[1])
    stream = tmp_path / "emptied"
    config = loader_config(write_rows(stream, range(40), emptied), **settings)
    to_there = read_job(config, tmp_path / "3", 1, steps=11, total=4)
    assert to_there.steps == before.steps, "their samples are read with others in the first epoch"
    read = read_job(config, tmp_path / "4", world_size, steps=3, total=4, state=to_there.state)
    assert read.steps == after.steps[:1]
    assert "The global batch at sample 8 of epoch 1 has no loss token" in read.message
    [told] = re.findall(r"samples ([\d, ]+) of the stream in loader\.toml", read.message)
    assert set(map(int, told.split(", "))) == emptied


def test_of_a_large_global_batch_the_first_samples_are_named(tmp_path: Path) -> None:
    config = loader_config(write_rows(tmp_path / "stream", range(1000), set(range(1000))))
    told = read_job(config, tmp_path / "notes", steps=1, total=1000).message
    assert "samples 0, 1, 2, 3, 4, 5, 6, 7 and 992 more of the stream in loader.toml" in told


def test_empty_documents_have_no_loss_token(tmp_path: Path) -> None:
    with MDSWriter(out=str(tmp_path / "stream"), columns={"text": "str"}) as writer:
        for text in ["import os\n", "", "", ""]:
            writer.write({"text": text})
    read = read_job(loader_config(tmp_path / "stream"), tmp_path / "notes", steps=2, total=2)
    assert len(read.steps) == 1
    assert "It is made of samples 2, 3 of" in read.message


@pytest.mark.long
def test_rows_without_loss_tokens_change_nothing_beside_others(files: Path) -> None:
    """The losses are those of the other rows alone, where a rank has no others in a step, or a micro-batch."""
    of_rank_0, of_first_batches = {0, 2, 8, 10}, {4, 5, 12, 13}
    empty = of_rank_0 | of_first_batches
    write_loader(files, [write_rows(files / "mixed", range(16), empty)])
    flags = ("--debug.seed=1", "--training.local_batch_size=1")
    mixed = logged(train(files, *flags, world_size=2))
    rows = [sample_tokens(sample).tolist() for sample in range(16) if sample not in empty]
    write_loader(files, [write_tokens(files / "alone", rows)])
    alone = logged(train(files, *flags, "--training.global_batch_size=2", world_size=2))
    assert list(mixed) == [1, 2, 3, 4]
    assert mixed == pytest.approx(alone, abs=2e-5)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.long), 2])
def test_validation_without_loss_tokens_stops_the_job_at_the_first_round(files: Path, world_size: int) -> None:
    folder = write_rows(files / "held_out", range(6), set(range(6)))
    write_loader(files, [folder], name="validation")
    flags = ("--validation.enable", f"--validation.seq_len={SEQ_LEN}", "--validation.local_batch_size=4")
    given = ["--mosaic-validation-config", f"{files}/validation.toml", *command(files, *flags)]
    ranks = run_ranks(lambda: main(given), world_size)
    told = message(ranks)
    batches = 2 if world_size == 1 else 1
    assert told.startswith(
        f"DataError: A validation round has no loss token: all labels of its {batches} batches are -100. "
    )
    assert told.endswith(f" reads {{'held_out': '{folder}'}}, set in {files}/validation.toml.")
    assert not any("validate step" in rank.output for rank in ranks)
