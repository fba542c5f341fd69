"""Tokenizers as GPT-2's, GPT-NeoX's and MPT's: one token begins documents, ends them and fills up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import MDSWriter
from torch import Tensor
from torchtitan.protocols.train_spec import get_train_spec

from examples.mosaic_streaming.titan.v0_2.models import within_documents
from tests.support.jobs import logged, train
from tests.support.ranks import run_rank_values
from tests.support.streams import SEQ_LEN, build_loader, job, loader_config, write_tokens
from tests.support.tokenizing import END_OF_TEXT, build_both, write_gpt2

IGNORED = -100
LAST = 2045
"""The id of the token."""


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    """GPT-2's as published, without tokenizer.json."""
    folder = write_gpt2(tmp_path / "gpt2")
    assert json.loads((folder / "vocab.json").read_text())[END_OF_TEXT] == LAST
    return folder


def read(assets: Path, config: dict[str, Any], rows: int, flavor: str = "debugmodel") -> tuple[Any, Tensor, Any]:
    """The first batch, and the masks that the model makes of it: whether flex attention lets a query see a key."""
    settings = job(local_batch_size=rows)
    settings.model.hf_assets_path, settings.model.flavor = str(assets), flavor

    def first_batch() -> Any:
        inputs, labels = next(iter(build_loader(config, settings)))
        return inputs, labels

    [(inputs, labels)] = run_rank_values(first_batch)
    return inputs, labels, build_both(assets)[0]


def seen(inputs: dict[str, Tensor], tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Whom each token may see, by the masks of TorchTitan's Llama 3: bool [rows, seq_len, seq_len]."""
    module = __import__("torchtitan.models.llama3.model.model", fromlist=["model"])
    monkeypatch.setattr(module, "create_attention_mask", lambda mask_mod, *sizes: mask_mod)
    spec = get_train_spec("llama3")
    model_cls: Any = within_documents(spec.model_cls)
    model = model_cls.__new__(model_cls)
    torch.nn.Module.__init__(model)
    model.model_args = spec.model_args["debugmodel_flex_attn"]
    extra = {key: value for key, value in inputs.items() if key != "input"}
    mask_mod = model.get_attention_masks(inputs["input"], tokenizer, extra)
    rows, length = inputs["input"].shape
    row, query, key = torch.meshgrid(*(torch.arange(size) for size in (rows, length, length)), indexing="ij")
    found: Tensor = mask_mod(row, torch.tensor(0), query, key)
    return found


def allowed(documents: list[list[int]]) -> Tensor:
    """Whom each token may see, by the number of its document in its row."""
    return torch.tensor(
        [[[own == other and key <= query for key, other in enumerate(row)] for query, own in enumerate(row)]
         for row in documents]
    )  # fmt: skip


def test_training_learns_the_same_tokens_as_with_any_other_tokenizer(files: Path, assets: Path) -> None:
    usual = logged(train(files))
    assert len(usual) == 4
    loader = (files / "loader.toml").read_text()
    (files / "loader.toml").write_text(f"{loader}eos_token_id = {LAST}\n")
    assert logged(train(files, f"--model.hf_assets_path={assets}")) == usual


ROW = [5, 6, 7, LAST, 8, 9, LAST, 10, 11, 12, 13, 14, 15, LAST, LAST, LAST, LAST]


def test_trailing_run_is_padding_and_all_other_ends_are_learned(tmp_path: Path, assets: Path) -> None:
    """Of a tokenizer that names a padding token, which is the same one again."""
    write_gpt2(assets, pad_token=END_OF_TEXT)
    write_tokens(tmp_path / "stream", [ROW])
    inputs, labels, _ = read(assets, loader_config(tmp_path / "stream"), 1)
    assert inputs["input"].tolist() == [ROW[:-1]]
    assert labels.tolist() == [[*ROW[1:14], IGNORED, IGNORED, IGNORED]]


def test_text_that_is_tokenized_as_it_is_read_asks_for_a_padding_token(tmp_path: Path, assets: Path) -> None:
    """The same one again is told from the end of a text."""
    text = f"def f(x):{END_OF_TEXT}"
    with MDSWriter(out=str(tmp_path / "stream"), columns={"text": "str"}) as writer:
        writer.write({"text": text})
    with pytest.raises(AssertionError, match=r"ConfigError: .*no padding token.*Set `pad_token` in its tokenizer_con"):
        read(assets, loader_config(tmp_path / "stream"), 1)
    write_gpt2(assets, pad_token=END_OF_TEXT)
    _, labels, tokenizer = read(assets, loader_config(tmp_path / "stream"), 1)
    words = tokenizer.tokenizer.encode("def f(x):").ids
    assert labels.tolist() == [[*words[1:], LAST, *[IGNORED] * (SEQ_LEN - len(words))]]


@pytest.mark.parametrize("key", [None, "eos_token_id", "bos_token_id"])
def test_masks_follow_the_token(tmp_path: Path, assets: Path, key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends documents; as `bos_token_id` it begins them."""
    write_tokens(tmp_path / "stream", [ROW])
    config = loader_config(tmp_path / "stream", **({key: LAST} if key else {}))
    inputs, _, tokenizer = read(assets, config, 1, "debugmodel_flex_attn")
    documents, number = [], 0
    for token in ROW[:-1]:
        number += token == LAST and key == "bos_token_id"
        documents.append(number)
        number += token == LAST and key != "bos_token_id"
    assert torch.equal(seen(inputs, tokenizer, monkeypatch), allowed([documents]))


def test_packed_examples_end_with_the_token_and_do_not_see_each_other(
    tmp_path: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [("x", "y"), ("def", "f"), ("return", "x"), ("class", "pass")]
    with MDSWriter(out=str(tmp_path / "stream"), columns={"prompt": "str", "response": "str"}) as writer:
        for prompt, response in examples:
            writer.write({"prompt": prompt, "response": response})
    folder = str(tmp_path / "stream")
    dataset = {"remote": folder, "local": folder, "num_canonical_nodes": 1, "packing_ratio": 2}
    inputs, labels, tokenizer = read(assets, {"name": "finetuning", "dataset": dataset}, 2, "debugmodel_flex_attn")
    numbers = inputs["sequence_id"]
    assert torch.equal(seen(inputs, tokenizer, monkeypatch), allowed(numbers.tolist()))
    assert (labels[numbers == -1] == IGNORED).all()
    found, expected = set(), set()
    for tokens, targets, of_row in zip(inputs["input"], labels, numbers, strict=True):
        for number in range(int(of_row.max()) + 1):
            found.add((tuple(tokens[of_row == number].tolist()), tuple(targets[of_row == number].tolist())))
    for prompt, response in examples:
        context, target = (tokenizer.tokenizer.encode(text).ids for text in (prompt, response))
        learned = (*[IGNORED] * (len(context) - 1), *target, LAST, IGNORED)
        expected.add(((*context, *target, LAST), learned))
    assert found == expected
