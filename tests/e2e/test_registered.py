"""Loaders that a user has registered with llm-foundry, through a module that the job config imports."""

import json
from pathlib import Path
from typing import Any

import pytest

from examples.mosaic_streaming.config.values import hints_of
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.train import main
from tests.support.jobs import command, logged, losses, train
from tests.support.looking import printed
from tests.support.ranks import run_rank_values, run_ranks
from tests.support.streams import SEQ_LEN, build_loader, job, resolved, write_stream, write_tokens
from tests.support.titan import IS_0_2, masking

PAD = 2
"""Of the debug tokenizer."""

MODULE = """
from __future__ import annotations
from typing import TYPE_CHECKING, Any

import torch
from composer import DataSpec
from llmfoundry import registry
from llmfoundry.data.text_data import StreamingTextDataset
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

if TYPE_CHECKING:
    from somewhere_else import Tokenizer


def stacked(samples):
    return torch.stack([torch.as_tensor(sample) for sample in samples])

def with_labels(samples):
    return {"input_ids": stacked(samples), "labels": stacked(samples)}

def second_half(samples):
    labels = stacked(samples)
    labels[:, : labels.shape[1] // 2] = -100
    return {"input_ids": stacked(samples), "labels": labels, "more": "words"}

def bare(samples):
    return {"tokens": stacked(samples), "length": 17}

def short_labels(samples):
    return {"input_ids": stacked(samples), "labels": stacked(samples)[:, 1:]}

def build(collate, tokenizer, device_batch_size, dataset, num_workers=0):
    streams = StreamingTextDataset(tokenizer=tokenizer, batch_size=device_batch_size, **dataset)
    return DataLoader(streams, batch_size=device_batch_size, collate_fn=collate, num_workers=num_workers)

@registry.dataloaders.register("own")
def own(tokenizer: Tokenizer, device_batch_size: int, dataset: dict[str, Any], num_workers: int) -> Tokenizer:
    return DataSpec(dataloader=build(with_labels, tokenizer, device_batch_size, dataset, num_workers))

@registry.dataloaders.register("own_text")
def own_text(tokenizer, device_batch_size, dataset, **others):
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return build(collate, tokenizer, device_batch_size, dataset)

@registry.dataloaders.register("own_order")
def own_order(tokenizer, device_batch_size, dataset):
    return build(with_labels, tokenizer, device_batch_size, {**dataset, "batching_method": "per_stream"})

for collate in (stacked, second_half, bare, short_labels):
    def one(tokenizer, device_batch_size, dataset, num_workers=0, collate=collate):
        return DataSpec(build(collate, tokenizer, device_batch_size, dataset, num_workers))
    registry.dataloaders.register(collate.__name__, func=one)
"""


@pytest.fixture
def files(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the module, which ranks alone import: nothing is registered here."""
    (files / "own_loaders.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(files))
    return files


IMPORT = "--experimental.custom_import=own_loaders"


def name_loader(files: Path, name: str, settings: str = "") -> None:
    (files / "loader.toml").write_text(f'name = "{name}"\n{settings}\n[dataset]\nlocal = "{files}/stream"\n')


@pytest.mark.long
def test_registered_loaders_without_an_attention_mask_train_as_text_does_and_validate(files: Path) -> None:
    write_stream(files / "held_out", 5, first=200)
    (files / "validation.toml").write_text(f'name = "own"\n[dataset]\nlocal = "{files}/held_out"\n')
    validate = ("--validation.enable", "--validation.freq=2", f"--validation.seq_len={SEQ_LEN}")
    name_loader(files, "text")
    usual = logged(train(files))
    name_loader(files, "own_text", "any_key = 1")
    assert logged(train(files, IMPORT)) == usual
    name_loader(files, "own", "num_workers = 1")
    arguments = [f"--mosaic-validation-config={files}/validation.toml", *command(files, *validate, IMPORT)]
    [rank] = run_ranks(lambda: main(arguments))
    assert losses(rank.output) == usual and "validate step:  4" in rank.output, rank.output


def test_padding_and_documents_of_a_registered_loader_are_told_by_the_padding_token(files: Path) -> None:
    rows = [[*range(20, 28), *[PAD] * 9], list(range(30, 47))]
    write_tokens(files / "rows", rows)
    config = masking(job(local_batch_size=2))

    def read() -> Any:
        __import__("own_loaders")
        dataset = {"local": f"{files}/rows", "num_canonical_nodes": 1}
        inputs, labels = next(iter(build_loader({"name": "second_half", "dataset": dataset}, config)))
        return {key: value.tolist() for key, value in inputs.items()}, labels.tolist()

    [(inputs, labels)] = run_rank_values(read)
    assert inputs["input"] == [row[:-1] for row in rows]
    assert labels == [[-100] * 16, [-100] * 7 + rows[1][8:]]
    assert not IS_0_2 or inputs["sequence_id"] == [[0] * 8 + [-1] * 8, [0] * 16]
    assert inputs["positions"] == [[*range(8), *range(8)], list(range(16))]


def test_batching_method_of_a_registered_loader_is_kept_unless_the_file_says_blend(files: Path) -> None:
    def methods() -> list[str]:
        __import__("own_loaders")
        dataset = {"local": f"{files}/stream", "num_canonical_nodes": 1}
        ways: list[dict[str, str]] = [{}, {"batching_method": "blend"}]
        loaders = [build_loader({"name": "own_order", "dataset": dataset | way}, job()) for way in ways]
        return [loader.state_dict()["mosaic"] for loader in loaders]

    [states] = run_rank_values(methods)
    assert [json.loads(state)["data"]["dataset.batching_method"] for state in states] == ["per_stream", "blend"]


def fails(files: Path, *flags: str) -> str:
    """The one line of a run that a loader's batches end."""
    [rank] = run_ranks(lambda: main(command(files, IMPORT, *flags)))
    assert rank.code == 1 and "Traceback" not in rank.output, rank.output
    [line] = [line for line in rank.output.splitlines() if line.startswith(("DataError", "ConfigError"))]
    return line


@pytest.mark.parametrize(
    ("name", "workers", "message"),
    [
        pytest.param(
            *("stacked", 1, "A batch of the loader is a Tensor, expected a dict of tensors."), marks=pytest.mark.long
        ),
        ("bare", 0, "A batch has no tensor input_ids nor labels, but: tokens, length. Have the loader make"),
    ],
)
def test_batch_that_says_too_little_is_told(files: Path, name: str, workers: int, message: str) -> None:
    name_loader(files, name, f"num_workers = {workers}")
    line = fails(files)
    assert line.startswith(f"DataError: {message}") and f"{files}/loader.toml" in line
    assert message in printed(files, "show", titan=(IMPORT,), code=1)


def test_labels_of_another_length_are_told(files: Path) -> None:
    name_loader(files, "short_labels")
    assert "several shapes, expected one: {'input_ids': [2, 17], 'labels': [2, 16]}" in fails(files)


def test_what_a_registered_loader_raises_is_told_as_its_own(files: Path) -> None:
    name_loader(files, "own", "num_workers = 1")
    settings = (files / "loader.toml").read_text()
    (files / "loader.toml").write_text(settings + "no_such_setting = 1\n")
    assert "The loader 'own' refuses" in (line := fails(files)) and "no_such_setting" in line


def test_types_that_can_be_resolved_are_checked_beside_those_that_can_not(files: Path) -> None:
    def check() -> None:
        module = __import__("own_loaders")
        assert hints_of(module.own) == {"device_batch_size": int, "dataset": dict[str, Any], "num_workers": int}
        config = {"name": "own", "num_workers": "two", "dataset": {"local": f"{files}/stream"}}
        with pytest.raises(ConfigError, match=r"num_workers = 'two' in loader.toml, expected a whole number"):
            resolved(config, 2)
        with pytest.raises(ConfigError, match=r"keys that nothing reads: timeout \(valid: .*num_workers"):
            resolved(config | {"timeout": 1}, 2)
        packed = {"local": f"{files}/stream", "packing_ratio": "auto"}
        with pytest.raises(ConfigError, match=r'packing_ratio = "auto" .* is for name = "finetuning", not \'own\''):
            resolved({"name": "own", "dataset": packed}, 2)

    run_rank_values(check)
