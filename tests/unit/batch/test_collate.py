"""Batches are, bit for bit, those that llm-foundry's own loader gives; only what nobody reads is left out."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llmfoundry.data.dataloader import build_dataloader
from llmfoundry.data.packing import BinPackCollator
from streaming import MDSWriter
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from examples.mosaic_streaming.batch import workers
from examples.mosaic_streaming.batch.reading import Collator, collate_rows, use_fast_collator
from examples.mosaic_streaming.batch.titan_batch import TitanBatch, to_titan_batch
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.shards import CheckedDataset
from examples.mosaic_streaming.shards.forms import encodes_plainly
from tests.support.ranks import run_rank_values
from tests.support.streams import FIRST_ID, SEQ_LEN, TOKENIZER, build_loader, job, loader_config, resolved
from tests.support.titan import IS_0_2, set_value
from tests.support.tokenizing import derive

SAMPLES, ROWS, BATCHES = 24, 4, 5
EOS, PAD = 1, 2
FORMS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "int32": ({"tokens": "ndarray:int32"}, {}),
    "uint16": ({"tokens": "ndarray:uint16"}, {}),
    "uint32": ({"tokens": "ndarray:uint32"}, {}),
    "int64": ({"tokens": "ndarray:int64"}, {}),
    "any type": ({"tokens": "ndarray"}, {}),
    "fixed shape": ({"tokens": f"ndarray:int32:{SEQ_LEN + 1}"}, {}),
    "several columns": ({"source": "str", "tokens": "ndarray:int32", "weight": "float32"}, {}),
    "bytes": ({"tokens": "bytes"}, {"token_encoding_type": "int64"}),
    "bytes of uint16": ({"tokens": "bytes"}, {"token_encoding_type": "uint16"}),
    "longer than a row": ({"tokens": "ndarray:int32"}, {"max_seq_len": SEQ_LEN}),
    "documents": ({"tokens": "ndarray:int32"}, {"eos_token_id": EOS}),
    "text": ({"text": "str"}, {}),
}


def sample(number: int, columns: dict[str, str], dtype: str) -> dict[str, Any]:
    """A sample with an EOS and, now and then, padding at its end."""
    tokens = np.random.default_rng(number).integers(FIRST_ID, 2048, SEQ_LEN + 1)
    tokens[5] = EOS
    tokens[SEQ_LEN + 1 - number % 3 :] = PAD
    typed = tokens.astype(dtype)
    values: dict[str, Any] = {"tokens": typed.tobytes() if columns.get("tokens") == "bytes" else typed}
    values |= {"text": f"import module_{number}\n" * (1 + number % 9), "source": f"file {number}"}
    values |= {"weight": np.float32(number)}
    return {name: values[name] for name in columns}


def write(folder: Path, form: str) -> dict[str, Any]:
    """Write a stream of a form, and return the loader's configuration."""
    columns, settings = FORMS[form]
    dtype = settings.get("token_encoding_type") or [*columns.get("tokens", "").split(":"), "uint16"][1]
    with MDSWriter(out=str(folder), columns=columns, size_limit=1024) as writer:
        for number in range(SAMPLES):
            writer.write(sample(number, columns, dtype))
    return {"name": "text", "num_workers": 0, "dataset": {"local": str(folder), "num_canonical_nodes": 1, **settings}}


def llm_foundry(config: dict[str, Any], assets: str = TOKENIZER) -> Iterator[Any]:
    """The batches of llm-foundry's own loader, of a configuration without shuffling."""
    tokenizer = AutoTokenizer.from_pretrained(assets, padding_side="right")  # as this project's always pad
    loader = build_dataloader(resolved(config, ROWS).config, tokenizer, ROWS).dataloader
    assert isinstance(loader, DataLoader)
    return iter(loader)


def same(ours: TitanBatch, theirs: TitanBatch) -> bool:
    """Whether two batches are the same bit for bit, in type, shape and layout."""
    pairs = [(ours[1], theirs[1]), *((ours[0][key], theirs[0][key]) for key in theirs[0])]
    return ours[0].keys() == theirs[0].keys() and all(
        torch.equal(one, other) and one.dtype == other.dtype and one.is_contiguous() for one, other in pairs
    )


@pytest.mark.parametrize("form", FORMS)
def test_batches_are_those_of_llm_foundry(tmp_path: Path, form: str) -> None:
    config = write(tmp_path, form)

    def read() -> list[bool]:
        loader = build_loader(config, job(ROWS))
        loader._spec = dataclasses.replace(loader._spec, documents="eos_token_id" in config["dataset"])
        theirs = llm_foundry(config)
        batches = [(batch, to_titan_batch(next(theirs), loader._spec)) for batch in itertools.islice(loader, BATCHES)]
        assert not IS_0_2 or all(("sequence_id" in inputs) == (form == "documents") for (inputs, _), _ in batches)
        return [same(*pair) for pair in batches]

    assert run_rank_values(read) == [[True] * BATCHES]


TEXTS = ["", "a", " ", "import os\n" * 3, "<|pad|>", "<|end_of_text|>", "x<|end_of_text|>", "<|pad|>y<|pad|>"]
TEXTS += ["naïve café — ﬁne 中文 🙂", "\ttab\r\n  spaces  ", "e\u0301"]
TEXTS += ["def f(x): return x" * length for length in (2, 9, 200)] + ["<|pad|>" * 40, "🙂" * 40]
"""Empty, shorter and longer than a row, and with special tokens, also where padding would be."""

TOKENIZERS: dict[str, dict[str, Any]] = {
    "pads right": {"padding_side": "right"},
    "pads left": {"padding_side": "left"},
    "pads with EOS": {"pad_token": "<|end_of_text|>"},
    "pads left with EOS": {"pad_token": "<|end_of_text|>", "padding_side": "left"},
    "cuts left": {"truncation_side": "left"},
    "without masks": {"model_input_names": ["input_ids"]},
    "a class with code of its own": {"tokenizer_class": "CodeGenTokenizerFast", "unk_token": "<|pad|>"},
    "with types": {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]},
}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_text_is_tokenized_as_llm_foundry_does(tmp_path: Path, tokenizer: str, documents: bool) -> None:
    """Ids, attention masks and documents, bit for bit. A tokenizer that would leave out the mask makes it here."""
    assets = str(derive(tmp_path / "assets", **TOKENIZERS[tokenizer]))
    config = loader_config(tmp_path / "stream", **({"eos_token_id": EOS} if documents else {}))
    with MDSWriter(out=str(tmp_path / "stream"), columns={"text": "str"}) as writer:
        for text in TEXTS:
            writer.write({"text": text})
    settings = job(ROWS)
    set_value(settings, "model.hf_assets_path", assets)

    def read() -> list[dict[str, torch.Tensor]]:
        loader = build_loader(config, settings)._batches._loader
        return list(itertools.islice(loader, len(TEXTS) // ROWS))

    [ours] = run_rank_values(read)
    assert encodes_plainly(type(AutoTokenizer.from_pretrained(assets))) == (tokenizer != "a class with code of its own")
    lengths = torch.tensor([len(AutoTokenizer.from_pretrained(assets)(text).input_ids) for text in TEXTS])
    theirs = list(itertools.islice(llm_foundry(config, assets), len(ours)))
    for batch, expected, found in zip(ours, theirs, lengths.split(ROWS), strict=True):
        assert batch.keys() == {"input_ids", "attention_mask"} | ({"sequence_id"} if documents else set())
        expected.setdefault("attention_mask", torch.arange(SEQ_LEN + 1) < found[:, None])
        for key, value in batch.items():
            assert torch.equal(value.long(), expected[key].long()), key


@pytest.mark.parametrize("packing", [{}, {"packing_ratio": 2}])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["text", "tokens"])
def test_finetuning_batches_are_those_of_llm_foundry(
    tmp_path: Path, form: str, side: str, packing: dict[str, Any]
) -> None:
    assets, remote = str(derive(tmp_path / "assets", padding_side=side)), str(tmp_path / "stream")
    kind, columns = ("str", ("prompt", "response")) if form == "text" else ("ndarray:int32", ("input_ids", "labels"))
    with MDSWriter(out=remote, columns=dict.fromkeys(columns, kind)) as writer:
        for number in range(SAMPLES * 2):
            parts: Any = ["import os " * (1 + number % 3), f"module_{number}"]
            if form == "tokens":
                parts = [np.arange(FIRST_ID, FIRST_ID + 2 + (number + part) % 3, dtype=np.int32) for part in (0, 1)]
            writer.write(dict(zip(columns, parts, strict=True)))
    config = {"name": "finetuning", "num_workers": 0}
    ours, theirs = (
        config | {"dataset": {"remote": remote, "local": str(tmp_path / who), "num_canonical_nodes": 1, **packing}}
        for who in ("ours", "theirs")
    )
    settings = job(ROWS)
    set_value(settings, "model.hf_assets_path", assets)

    def read() -> list[bool]:
        loader = build_loader(ours, settings)._batches._loader
        batches = itertools.islice(zip(loader, llm_foundry(theirs, assets), strict=False), 5)
        return [
            {"input_ids", "labels", "attention_mask", "sequence_id"} <= one.keys()
            and all(torch.equal(one[key], other[key]) for key in one.keys() & other.keys())
            and all(one[key].dtype == other[key].dtype for key in one.keys() & other.keys())
            for one, other in batches
        ]

    assert run_rank_values(read) == [[True] * 5]


@pytest.mark.parametrize("limit", [1024, workers.SHARED_BYTES])
def test_workers_hand_on_the_same_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """In slots, and as torch does."""
    config = write(tmp_path, "documents") | {"num_workers": 2}
    monkeypatch.setattr(workers, "SHARED_BYTES", limit)

    def read() -> list[bool]:
        loader, theirs = build_loader(config, job(ROWS)), llm_foundry(config | {"num_workers": 0})
        assert isinstance(next(iter(loader._batches._loader)), workers.Handed if limit > 1024 else dict)
        other = build_loader(config, job(ROWS))
        return [same(batch, to_titan_batch(next(theirs), loader._spec)) for batch in itertools.islice(other, BATCHES)]

    assert run_rank_values(read) == [[True] * BATCHES]


def test_text_is_handed_on_once(tmp_path: Path) -> None:
    """One tensor a batch, in the type in which ids were written."""
    config = write(tmp_path, "uint16")

    def read() -> list[tuple[str, torch.dtype]]:
        batch = next(iter(build_loader(config, job(ROWS))._batches._loader))
        return [(name, value.dtype) for name, value in batch.items()]

    assert run_rank_values(read) == [[("input_ids", torch.int32)]]


def test_samples_of_different_lengths_are_left_to_llm_foundry() -> None:
    """It pads them, as before; their shape is then refused, or not."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    theirs = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    samples = [np.arange(FIRST_ID, FIRST_ID + length, dtype=np.uint16) for length in (3, 5)]
    expected = theirs([torch.from_numpy(one.astype(np.int64)) for one in samples])
    found = collate_rows(theirs, samples)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert found["input_ids"].tolist()[0] == [16, 17, 18, PAD, PAD]


class Empty(CheckedDataset):
    """A dataset without streams."""

    def __init__(self) -> None:
        pass


def test_a_collator_of_someone_elses_stays() -> None:
    def own(samples: list[Any]) -> dict[str, Any]:
        return {"input_ids": torch.stack(samples)}

    loader: DataLoader[Any] = DataLoader(Empty(), collate_fn=own)
    use_fast_collator(loader, is_text=True)
    assert isinstance(loader.collate_fn, Collator) and loader.collate_fn._collate is own
    assert not loader.dataset.keep_dtype  # type: ignore[attr-defined]


def test_packing_that_a_restart_could_not_repeat_is_refused() -> None:
    packer = BinPackCollator(lambda batch: batch, 2, 16, PAD, "right", max_leftover_bins_to_keep=3)
    with pytest.raises(ConfigError, match=r"carries samples .* over .* Give it max_leftover_bins_to_keep=0"):
        use_fast_collator(DataLoader(Empty(), collate_fn=packer), is_text=False)


def test_the_widest_type_of_a_mixture_holds_all_ids() -> None:
    theirs = DataCollatorForLanguageModeling(AutoTokenizer.from_pretrained(TOKENIZER), mlm=False)
    narrow, wide = np.array([16, 17], np.int32), np.array([2**32 + 5, 18])
    for samples in ([narrow, wide], [wide, narrow]):
        assert collate_rows(theirs, samples)["input_ids"].tolist() == [sample.tolist() for sample in samples]


def test_samples_of_two_axes_stay_what_they_are() -> None:
    """So that their shape is refused."""
    theirs = DataCollatorForLanguageModeling(AutoTokenizer.from_pretrained(TOKENIZER), mlm=False)
    assert collate_rows(theirs, [np.ones((2, 3), np.int32)] * 4)["input_ids"].shape == (4, 2, 3)
