"""Tokenizer assets that a library can't read: one line says which file and which key, and what to do."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.train import main
from tests.support.jobs import command
from tests.support.ranks import run_ranks
from tests.support.streams import TOKENIZER
from tests.support.tokenizing import build_both, derive, write_gpt2

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9085657\n"
READ_WHERE_THERE = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")


def refuse(folder: Path, message: str) -> None:
    """Building the tokenizers has to fail with this in one line that also names the setting."""
    with pytest.raises(ConfigError, match=message) as caught:
        build_both(folder)
    text = str(caught.value)
    assert text.startswith(f"model.hf_assets_path = '{folder}'") and "\n" not in text and len(text) < 600


@pytest.mark.parametrize("name", READ_WHERE_THERE)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": ', "is damaged, not JSON in UTF-8: Expecting value: line 1 column 7 .* Download it again"),
        ("", "is damaged, not JSON in UTF-8: Expecting value"),
        ('{"\xe4": 1}'.encode("latin-1"), "is damaged, not JSON in UTF-8: .*can't decode byte 0xe4"),
        ("[1]", "holds no JSON object"),
        (POINTER, "is a Git LFS pointer, not the file itself. Run `git lfs pull` there"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    derive(tmp_path)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(tmp_path, f": {name} {message}")


def test_file_that_is_a_folder_is_named(tmp_path: Path) -> None:
    derive(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        refuse(tmp_path, rf"{name}\W.*Is a directory")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user who may not read")
def test_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    derive(tmp_path / "assets")
    (tmp_path / "assets").chmod(0o700)

    def build() -> None:
        os.seteuid(65534)
        build_both(tmp_path / "assets")

    [rank] = run_ranks(build)
    assert "can't be read (tokenizer_config.json: Permission denied)" in rank.output.splitlines()[-1]


def test_missing_assets_are_named(tmp_path: Path) -> None:
    refuse(tmp_path, "has no tokenizer_config.json. Set it to a folder")


@pytest.mark.parametrize("path", ["meta-llama/Llama-3.1-8B", "tests/assets/tokenizer/tokenizer.json"])
def test_path_that_is_no_folder_is_told(path: str) -> None:
    refuse(Path(path), "it is no folder here. What is on the Hugging Face Hub has to be downloaded first")


@pytest.mark.parametrize("name", ["MistralCommonBackend", 3])
def test_class_that_transformers_does_not_know_is_told(tmp_path: Path, name: object) -> None:
    derive(tmp_path, tokenizer_class=name)
    refuse(tmp_path, rf'tokenizer_class = {name!r}, which transformers 4\S+ doesn\'t know. Set it to "PreTrainedTok')


@pytest.mark.parametrize("model_type", [None, "from_the_future"])
def test_assets_without_a_class_are_answered_with_the_keys_to_add(tmp_path: Path, model_type: str | None) -> None:
    derive(tmp_path / "a", remove=("tokenizer_class",))
    write_gpt2(tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        (folder / "config.json").write_text(json.dumps({"model_type": model_type} if model_type else {}))
    refuse(tmp_path / "a", 'Add to tokenizer_config.json: `tokenizer_class`: "PreTrainedTokenizerFast".*`eos_token`')
    refuse(tmp_path / "b", 'Add to tokenizer_config.json: `tokenizer_class`: "GPT2Tokenizer"')
    derive(tmp_path / "a")
    write_gpt2(tmp_path / "b", tokenizer_class="GPT2Tokenizer")
    assert build_both(tmp_path / "a")[0].eos_id == 1
    assert build_both(tmp_path / "b")[0].eos_id is not None


def test_sentencepiece_model_without_tokenizer_json_is_told_how_to_convert(tmp_path: Path) -> None:
    derive(tmp_path, tokenizer_class="LlamaTokenizer")
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    refuse(tmp_path, r"There is no tokenizer.json.*from_pretrained\(FOLDER\).save_pretrained\(FOLDER\)")


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": 5},
        {"padding_side": "middle"},
        {"added_tokens_decoder": {"x": {"content": "y"}}},
        {"model_max_length": "long"},
        {"tokenizer_class": "BertTokenizer"},
    ],
)
def test_whatever_else_fails_is_one_line_with_the_library(tmp_path: Path, config: dict[str, Any]) -> None:
    derive(tmp_path, **config)
    refuse(tmp_path, r"(TorchTitan|transformers) can't read the tokenizer \(\w+: .*\). Put tokenizer_config.json or")


def test_tokenizer_json_of_a_newer_version_is_told(tmp_path: Path) -> None:
    derive(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text()) | {"normalizer": {"type": "FromTheFuture"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    refuse(tmp_path, r"TorchTitan can't read the tokenizer .*save them anew with transformers 4\S+ and tokenizers 0")


@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json"])
def test_code_among_the_assets_is_not_run_and_nobody_is_asked(files: Path, where: str) -> None:
    """A run whose standard input would answer yes to everything."""
    own: dict[str, Any] = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None], "AutoConfig": "own.Config"}}
    assets = derive(files / "assets", remove=("tokenizer_class",))
    (assets / "config.json").write_text(json.dumps({"model_type": "own"} | own))
    if where == "tokenizer_config.json":
        derive(assets, tokenizer_class="OwnTokenizer", **own)
    (assets / "own.py").write_text("open('/dev/stderr', 'w').write('IT HAS RUN')\n")

    def run() -> None:
        reading, writing = os.pipe()
        os.write(writing, b"y\n" * 100)
        os.dup2(reading, 0)
        sys.stdin = os.fdopen(0)
        main(command(files, f"--model.hf_assets_path={assets}"))

    [rank] = run_ranks(run)
    assert rank.code == 1 and "y/N" not in rank.output and "IT HAS RUN" not in rank.output, rank.output
    [line] = [line for line in rank.output.splitlines() if line.startswith("ConfigError")]
    assert f"{where} has `auto_map`, which names code" in line and "set `tokenizer_class` in tokenizer_config" in line
    assert "Traceback" not in rank.output


def test_damaged_file_that_only_the_fingerprint_reads_is_named(files: Path) -> None:
    assets = derive(files / "assets")
    (assets / "vocab.json").write_text(POINTER)
    [rank] = run_ranks(lambda: main(command(files, f"--model.hf_assets_path={assets}")))
    assert rank.code == 1 and "Traceback" not in rank.output
    assert f"ConfigError: model.hf_assets_path = '{assets}': vocab.json is a Git LFS pointer" in rank.output


def test_the_assets_of_the_debug_model_are_read() -> None:
    assert build_both(Path(TOKENIZER))[0].eos_id == 1
