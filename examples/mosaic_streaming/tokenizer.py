"""One set of tokenizer assets, two tokenizers: TorchTitan's and the transformers one that llm-foundry needs."""

import json
import os
from pathlib import Path

from torchtitan.components.tokenizer import HuggingFaceTokenizer, build_hf_tokenizer
from torchtitan.config import JobConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase

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
        ConfigError: there are no assets at that path.
    """
    path = job_config.model.hf_assets_path
    if not os.path.isfile(os.path.join(path, "tokenizer_config.json")):
        raise ConfigError(
            f"model.hf_assets_path = {path!r} has no tokenizer_config.json. "
            "Set it to a folder with the model's tokenizer assets (tokenizer.json and tokenizer_config.json)."
        )
    return build_hf_tokenizer(job_config)


def build_transformers_tokenizer(path: str, titan: HuggingFaceTokenizer) -> PreTrainedTokenizerBase:
    """The transformers tokenizer of the same assets, proven equal to TorchTitan's.

    Args:
        path: folder with the assets, `model.hf_assets_path`.
        titan: TorchTitan's tokenizer of that folder.

    Raises:
        ConfigError: the two read the assets differently; the message has both values.
    """
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    tokenizer.padding_side = "right"  # on the left, tokens would see the padding: TorchTitan doesn't mask it
    pairs = {
        "vocabulary size": (titan.get_vocab_size(), len(tokenizer)),
        "bos id": (titan.bos_id, tokenizer.bos_token_id),
        "eos id": (titan.eos_id, tokenizer.eos_token_id),
        f"ids of {PROBE!r}": (
            titan.tokenizer.encode(PROBE, add_special_tokens=False).ids,
            tokenizer.encode(PROBE, add_special_tokens=False),
        ),
    }
    differences = [f"{what}: {a} and {b}" for what, (a, b) in pairs.items() if a != b]
    if differences:
        raise ConfigError(
            f"TorchTitan and transformers read the tokenizer in model.hf_assets_path = {path!r} differently: "
            f"{'; '.join(differences)}. Data and model would not agree: repair the assets."
        )
    return tokenizer


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
    """The content of the assets that ids depend on, whichever versions of the libraries read them."""
    found: list[object] = [{key: tokenizer.config.get(key) for key in CONFIG_KEYS} if tokenizer.config else None]
    for name in ASSETS:
        if (file := Path(tokenizer.tokenizer_path, name)).is_file():
            text = file.read_text()
            found += [name, json.loads(text) if name.endswith(".json") else text]
    return found
