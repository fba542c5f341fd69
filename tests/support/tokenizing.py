"""Tokenizer assets made for a test, from those of the debug model."""

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from examples.mosaic_streaming.tokenizer import build_tokenizer, build_transformers_tokenizer
from tests.support.streams import TOKENIZER

END_OF_TEXT = "<|endoftext|>"
"""GPT-2's, which begins texts, too."""


def derive(folder: Path, remove: tuple[str, ...] = (), **config: Any) -> Path:
    """The debug model's assets with other keys in tokenizer_config.json."""
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    file = folder / "tokenizer_config.json"
    keys = json.loads(file.read_text()) | config
    file.write_text(json.dumps({key: value for key, value in keys.items() if key not in remove}))
    return folder


def write_gpt2(folder: Path, with_tokenizer_json: bool = False, **config: Any) -> Path:
    """Assets of the debug model's words, with the files and the one special token that GPT-2's are published with."""
    folder.mkdir(parents=True, exist_ok=True)
    source = json.loads(Path(TOKENIZER, "tokenizer.json").read_text())
    special = {token["content"] for token in source["added_tokens"]}
    words = [word for word in sorted(source["model"]["vocab"], key=source["model"]["vocab"].get) if word not in special]
    vocab = {word: number for number, word in enumerate([*words, END_OF_TEXT])}
    merges = [tuple(merge) for merge in source["model"]["merges"]]
    model = models.BPE(vocab=vocab, merges=merges)
    model.save(str(folder))  # vocab.json and merges.txt
    if with_tokenizer_json:
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([END_OF_TEXT])
        tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 1024} | config))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return folder


def build_both(folder: Path) -> tuple[Any, Any]:
    """TorchTitan's tokenizer and transformers' of the assets in a folder."""
    titan = build_tokenizer(str(folder))
    return titan, build_transformers_tokenizer(str(folder), titan)
