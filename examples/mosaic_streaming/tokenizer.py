"""One set of tokenizer assets, two tokenizers: TorchTitan's and the transformers one that llm-foundry needs."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchtitan.components.tokenizer import HuggingFaceTokenizer, build_hf_tokenizer
from torchtitan.config import JobConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from examples.mosaic_streaming.config.assets import check_folder, explained
from examples.mosaic_streaming.errors import ConfigError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or tokenizers warns at each fork of a dataloader worker

PROBE = "def f(x):\n\treturn {'ä': 10**6}  # 你好, world\n"
"""A text on which two tokenizers that differ in normalization, splitting or merges give different ids."""

ASSETS = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja")
CONFIG_KEYS = ("bos_token", "eos_token", "pad_token", "add_bos_token", "add_eos_token", "chat_template")
"""Of tokenizer_config.json."""


def build_tokenizer(job_config: JobConfig) -> HuggingFaceTokenizer:
    """TorchTitan's tokenizer of `model.hf_assets_path`; the `build_tokenizer_fn` of a Mosaic TrainSpec.

    Raises:
        ConfigError: there are no assets at that path, or TorchTitan can't read them.
    """
    path = job_config.model.hf_assets_path
    check_folder(path)
    with explained(path, "TorchTitan"):
        return build_hf_tokenizer(job_config)


def build_transformers_tokenizer(path: str, titan: HuggingFaceTokenizer) -> PreTrainedTokenizerBase:
    """The transformers tokenizer of the same assets, proven equal to TorchTitan's.

    Args:
        path: folder with the assets, `model.hf_assets_path`.
        titan: TorchTitan's tokenizer of that folder; it is given the BOS and EOS that it left unset.

    Raises:
        ConfigError: transformers can't read the assets, or the two read them differently; the message has both values.
    """
    with explained(path, "transformers"):
        tokenizer = load(path, titan.config or {})
        tokenizer.padding_side = "right"  # on the left, tokens would see the padding: TorchTitan doesn't mask it
        fill_in_ends(titan, tokenizer)
        differences = differences_of(titan, tokenizer)
    if differences:
        raise ConfigError(
            f"TorchTitan and transformers read the tokenizer in model.hf_assets_path = {path!r} differently: "
            f"{'; '.join(differences)}. Data and model would not agree: repair the assets."
        )
    return tokenizer


class TokenizersBackend(PreTrainedTokenizerFast):
    """What transformers 5 calls PreTrainedTokenizerFast, and writes as `tokenizer_class`; 4.51.3 doesn't know it."""


def load(path: str, config: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """What transformers makes of assets; no code of theirs is run, nor anybody asked whether it may.

    Args:
        path: folder with the assets.
        config: the content of tokenizer_config.json.
    """
    kind = TokenizersBackend if config.get("tokenizer_class") == TokenizersBackend.__name__ else AutoTokenizer
    changes: dict[str, Any] = {}
    if isinstance(extra := config.get("extra_special_tokens"), list):  # transformers 5's name for the older key
        changes = {"extra_special_tokens": {}, "additional_special_tokens": extra}
    return kind.from_pretrained(path, local_files_only=True, trust_remote_code=False, **changes)


def fill_in_ends(titan: HuggingFaceTokenizer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give TorchTitan's tokenizer the BOS and EOS of transformers' where it has none.

    Source: where both are one token, as GPT-2's, torchtitan 0.2.2 sets `bos_id` alone; it reads neither
    special_tokens_map.json nor the defaults of a class (components/tokenizer.py). A version that sets both makes this
    needless.
    """
    for name in ("bos", "eos"):
        if getattr(titan, f"{name}_id") is None:
            setattr(titan, f"{name}_token", getattr(tokenizer, f"{name}_token"))
            setattr(titan, f"{name}_id", getattr(tokenizer, f"{name}_token_id"))


def differences_of(titan: HuggingFaceTokenizer, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """In what two tokenizers of the same assets differ, with both values."""
    pairs = {
        "vocabulary size": (titan.get_vocab_size(), len(tokenizer)),
        "bos id": (titan.bos_id, tokenizer.bos_token_id),
        "eos id": (titan.eos_id, tokenizer.eos_token_id),
        f"ids of {PROBE!r}": (
            titan.tokenizer.encode(PROBE, add_special_tokens=False).ids,
            tokenizer.encode(PROBE, add_special_tokens=False),
        ),
    }
    return [f"{what}: {a} and {b}" for what, (a, b) in pairs.items() if a != b]


def check_vocabulary(tokenizer: HuggingFaceTokenizer, vocab_size: int, model: str) -> None:
    """Raise ConfigError unless each id of the tokenizer has a row in the model's embedding.

    Args:
        tokenizer: TorchTitan's tokenizer.
        vocab_size: rows of the model's embedding.
        model: name and flavor, for the message.
    """
    if tokenizer.get_vocab_size() > vocab_size:
        raise ConfigError(
            f"The tokenizer in model.hf_assets_path = {tokenizer.tokenizer_path!r} has "
            f"{tokenizer.get_vocab_size()} entries, the embedding of {model} has {vocab_size} rows. "
            "Choose the tokenizer of this model, or a model.flavor with a larger vocabulary."
        )


def what_decides_ids(tokenizer: HuggingFaceTokenizer) -> list[object]:
    """The content of the assets that ids depend on, whichever versions of the libraries read them.

    Raises:
        ConfigError: a file that neither of the libraries has read is damaged.
    """
    config = tokenizer.config
    found: list[object] = [
        {key: config.get(key, getattr(tokenizer, key, None)) for key in CONFIG_KEYS} if config else None
    ]
    with explained(tokenizer.tokenizer_path, "Python"):
        for name in ASSETS:
            if (file := Path(tokenizer.tokenizer_path, name)).is_file():
                text = file.read_text()
                found += [name, json.loads(text) if name.endswith(".json") else text]
    return found
