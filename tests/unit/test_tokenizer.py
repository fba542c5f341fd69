"""The two tokenizers of one set of assets, and the vocabulary of the model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from examples.mosaic_streaming.checkpoint.fingerprint import tokenizer_fingerprint
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.tokenizer import (
    build_tokenizer,
    build_transformers_tokenizer,
    check_tokenizer,
)
from tests.support.streams import TOKENIZER, described, job
from tests.support.tokenizing import END_OF_TEXT, build_both, derive, write_gpt2

EOS = "<|end_of_text|>"
TEXT = "def f(x): return x + 1"


def test_debug_tokenizer_is_small_and_has_its_special_tokens() -> None:
    tokenizer = build_transformers_tokenizer(TOKENIZER, build_tokenizer(TOKENIZER))
    assert len(tokenizer) <= 2048
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, None}) == 4
    text = "naïve = 'ß' # 中文\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_assets_that_are_read_differently_are_refused_with_both_values(tmp_path: Path) -> None:
    derive(tmp_path, tokenizer_class="LlamaTokenizerFast")  # adds tokens and a normalizer of its own
    with pytest.raises(ConfigError, match="differently: vocabulary size: 2048 and 20"):
        build_both(tmp_path)


@pytest.mark.parametrize("form", [lambda token: token, lambda token: {"__type": "AddedToken", "content": token}])
def test_one_token_can_be_bos_and_eos(tmp_path: Path, form: object) -> None:
    token = form(EOS)  # type: ignore[operator]
    titan, transformers = build_both(derive(tmp_path, bos_token=token, eos_token=token))
    assert titan.bos_id == titan.eos_id == transformers.bos_token_id == transformers.eos_token_id == 1
    assert titan.eos_token == EOS


@pytest.mark.parametrize("with_tokenizer_json", [False, True])
def test_gpt2_assets_as_published_have_their_end_of_text(tmp_path: Path, with_tokenizer_json: bool) -> None:
    titan, transformers = build_both(write_gpt2(tmp_path, with_tokenizer_json))
    number = json.loads((tmp_path / "vocab.json").read_text())[END_OF_TEXT]
    assert titan.bos_id == titan.eos_id == transformers.bos_token_id == transformers.eos_token_id == number
    found = transformers(TEXT)["input_ids"]
    assert found and transformers.decode(found) == TEXT


def test_end_of_text_that_a_special_tokens_map_alone_names_is_found_and_recorded(tmp_path: Path) -> None:
    derive(tmp_path, remove=("eos_token", "bos_token"))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": EOS}))
    titan, _ = build_both(tmp_path)
    assert titan.eos_id == 1 and titan.bos_id is None
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|pad|>"}))
    assert tokenizer_fingerprint(titan) != tokenizer_fingerprint(build_both(tmp_path)[0])


def test_what_checkpoints_record_of_assets_has_not_changed() -> None:
    config = json.loads(Path(TOKENIZER, "tokenizer_config.json").read_text())
    keys = ("bos_token", "eos_token", "pad_token", "add_bos_token", "add_eos_token", "chat_template")
    content = json.loads(Path(TOKENIZER, "tokenizer.json").read_text())
    titan, _ = build_both(Path(TOKENIZER))
    assert tokenizer_fingerprint(titan) == [{key: config.get(key) for key in keys}, "tokenizer.json", content]


@pytest.mark.parametrize("extra", [["<|pad|>"], [{"__type": "AddedToken", "content": "<|pad|>", "special": True}], []])
@pytest.mark.parametrize("name", ["TokenizersBackend", "PreTrainedTokenizerFast"])
def test_assets_saved_by_transformers_5_are_read(tmp_path: Path, name: str, extra: list[object]) -> None:
    saved: dict[str, Any] = {
        "tokenizer_class": name,
        "backend": "tokenizers",
        "is_local": True,
        "extra_special_tokens": extra,
    }
    titan, transformers = build_both(derive(tmp_path, **saved))
    expected = Tokenizer.from_file(f"{TOKENIZER}/tokenizer.json").encode(TEXT).ids
    assert transformers(TEXT)["input_ids"] == expected == titan.encode(TEXT)
    assert transformers.eos_token_id == 1
    assert transformers.additional_special_tokens == (["<|pad|>"] if extra else [])


def test_vocabulary_beyond_the_embedding_is_refused() -> None:
    tokenizer = build_tokenizer(TOKENIZER)
    fits = described(job())
    check_tokenizer(tokenizer, fits)
    with pytest.raises(ConfigError, match="has 2048 entries, the embedding of llama3_mosaic debugmodel has 2047 rows"):
        check_tokenizer(tokenizer, dataclasses.replace(fits, vocab_size=2047))
