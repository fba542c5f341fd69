"""Two tokenizers of the same assets: TorchTitan's, and the transformers one that llm-foundry needs."""

import os
from collections.abc import Mapping
from typing import Any

from torchtitan.components.tokenizer import HuggingFaceTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from examples.mosaic_streaming.batch import PROBE
from examples.mosaic_streaming.config import Job, explain_asset_errors, tokenizer_config
from examples.mosaic_streaming.errors import ConfigError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or tokenizers warns at each fork of a dataloader worker


def build_tokenizer(path: str) -> HuggingFaceTokenizer:
    """Load TorchTitan's tokenizer from a folder, `model.hf_assets_path`; a ConfigError says what is wrong with it."""
    with explain_asset_errors(path, "TorchTitan"):
        return HuggingFaceTokenizer(tokenizer_path=path)


def build_transformers_tokenizer(path: str, titan_tokenizer: HuggingFaceTokenizer) -> PreTrainedTokenizerBase:
    """Load the transformers tokenizer of the same assets, and compare it with TorchTitan's.

    A BOS or EOS that TorchTitan's has left unset is filled in. ConfigError if transformers can't read the assets, or
    the two tokenizers differ.
    """
    with explain_asset_errors(path, "transformers"):
        tokenizer = load(path, tokenizer_config(path))
        tokenizer.padding_side = "right"  # on the left, tokens would see the padding: TorchTitan doesn't mask it
        fill_in_bos_and_eos(titan_tokenizer, tokenizer)
        differences = differences_of(titan_tokenizer, tokenizer)
    if differences:
        raise ConfigError(
            f"TorchTitan and transformers read the tokenizer in model.hf_assets_path = {path!r} differently: "
            f"{'; '.join(differences)}. Data and model would not agree: repair the assets."
        )
    return tokenizer


class TokenizersBackend(PreTrainedTokenizerFast):
    """What transformers 5 calls PreTrainedTokenizerFast, and writes as `tokenizer_class`; 4.51.3 doesn't know it."""


def load(path: str, tokenizer_config: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Load assets with transformers. Code that comes with them is never run, and no prompt asks to allow it."""
    kind = TokenizersBackend if tokenizer_config.get("tokenizer_class") == TokenizersBackend.__name__ else AutoTokenizer
    changes: dict[str, Any] = {}
    if isinstance(extra := tokenizer_config.get("extra_special_tokens"), list):  # in transformers 5
        changes = {"extra_special_tokens": {}, "additional_special_tokens": extra}
    return kind.from_pretrained(path, local_files_only=True, trust_remote_code=False, **changes)


def fill_in_bos_and_eos(titan_tokenizer: HuggingFaceTokenizer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give TorchTitan's tokenizer the BOS and EOS of the transformers tokenizer where it has none.

    Source: if BOS and EOS are one token, as in GPT-2, torchtitan 0.2.2 sets only `bos_id`. It reads neither
    special_tokens_map.json nor the defaults of a class (components/tokenizer.py). A version that sets both makes this
    needless.
    """
    for name in ("bos", "eos"):
        if getattr(titan_tokenizer, f"{name}_id") is None:
            setattr(titan_tokenizer, f"{name}_token", getattr(tokenizer, f"{name}_token"))
            setattr(titan_tokenizer, f"{name}_id", getattr(tokenizer, f"{name}_token_id"))


def differences_of(titan_tokenizer: HuggingFaceTokenizer, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What differs between two tokenizers of the same assets, with both values."""
    pairs = {
        "vocabulary size": (titan_tokenizer.get_vocab_size(), len(tokenizer)),
        "bos id": (titan_tokenizer.bos_id, tokenizer.bos_token_id),
        "eos id": (titan_tokenizer.eos_id, tokenizer.eos_token_id),
        f"ids of {PROBE!r}": (
            titan_tokenizer.tokenizer.encode(PROBE, add_special_tokens=False).ids,
            tokenizer.encode(PROBE, add_special_tokens=False),
        ),
    }
    return [f"{what}: {a} and {b}" for what, (a, b) in pairs.items() if a != b]


def check_tokenizer(titan_tokenizer: HuggingFaceTokenizer, job: Job) -> None:
    """Raise ConfigError unless each id has a row in the model's embedding, and there is an EOS where masks need one."""
    if titan_tokenizer.get_vocab_size() > job.vocab_size:
        raise ConfigError(
            f"The tokenizer in model.hf_assets_path = {titan_tokenizer.tokenizer_path!r} has "
            f"{titan_tokenizer.get_vocab_size()} entries, the embedding of {job.model} {job.flavor} has "
            f"{job.vocab_size} rows. Choose the tokenizer of this model, or a model.flavor with a larger vocabulary."
        )
    if job.documents and titan_tokenizer.eos_id is None:
        raise ConfigError(
            f"model.flavor = {job.flavor!r} keeps attention within documents, which end with EOS, but the tokenizer in "
            f"model.hf_assets_path = {job.assets!r} has none. Set `eos_token` in its tokenizer_config.json."
        )


def check_pad_token(loader_name: str, shard: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError if text of a shard is tokenized as it is read, but the tokenizer has no padding token.

    Source: llm-foundry 0.22.0, data/text_data.py, refuses it at the first sample.
    """
    if loader_name == "text" and tokenizer.pad_token is None and "text" in getattr(shard, "column_names", []):
        raise ConfigError(
            f"The tokenizer in model.hf_assets_path = {tokenizer.name_or_path!r} has no padding token, which text that "
            "is tokenized as it is read needs. Set `pad_token` in its tokenizer_config.json; it may be the `eos_token`."
        )
