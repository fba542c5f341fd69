"""The two tokenizers of one set of assets, and the vocabulary of the model."""

import json
import shutil
from pathlib import Path

import pytest

from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.tokenizer import build_tokenizer, build_transformers_tokenizer, check_vocabulary
from tests.streams import TOKENIZER, job


def build_both(path: str) -> None:
    config = job()
    config.model.hf_assets_path = path
    build_transformers_tokenizer(path, build_tokenizer(config))


def test_debug_tokenizer_is_small_and_has_its_special_tokens() -> None:
    tokenizer = build_transformers_tokenizer(TOKENIZER, build_tokenizer(job()))
    assert len(tokenizer) <= 2048
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, None}) == 4
    text = "naïve = 'ß' # 中文\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_assets_that_are_read_differently_are_refused_with_both_values(tmp_path: Path) -> None:
    shutil.copytree(TOKENIZER, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "LlamaTokenizerFast"  # adds tokens and a normalizer of its own
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="differently: vocabulary size: 2048 and 20"):
        build_both(str(tmp_path))


def test_missing_assets_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.hf_assets_path = '.*' has no tokenizer_config.json"):
        build_both(str(tmp_path))


def test_vocabulary_beyond_the_embedding_is_refused() -> None:
    tokenizer = build_tokenizer(job())
    check_vocabulary(tokenizer, 2048, "llama3 debugmodel")
    with pytest.raises(ConfigError, match="has 2048 entries, the embedding of llama3 debugmodel has 2047 rows"):
        check_vocabulary(tokenizer, 2047, "llama3 debugmodel")
