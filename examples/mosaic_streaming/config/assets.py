"""Why a library can't read a folder of tokenizer assets: the file, the key, and the way out."""

import contextlib
import json
import os
import textwrap
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from examples.mosaic_streaming.errors import ConfigError

CONFIG = "tokenizer_config.json"
JSON_FILES = (CONFIG, "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
TEXT_FILES = ("merges.txt", "vocab.txt", "chat_template.jinja")
FAST = '"PreTrainedTokenizerFast", which takes tokenizer.json as it is'


@contextlib.contextmanager
def explain_asset_errors(path: str, reader: str) -> Iterator[None]:
    """Turn what a library, `reader`, raises over the assets in `path` into a ConfigError that says what to change."""
    check_assets(path)
    try:
        yield
    except Exception as error:
        raise ConfigError(f"model.hf_assets_path = {path!r}: {explain(Path(path), reader, error)}") from error


def check_assets(path: str) -> None:
    """Raise ConfigError unless the folder has a tokenizer_config.json that can be opened."""
    try:
        with open(os.path.join(path, CONFIG)):
            return
    except (FileNotFoundError, NotADirectoryError):
        fault = f"has no {CONFIG}"
        if not os.path.isdir(path):
            fault += ": it is no folder here. What is on the Hugging Face Hub has to be downloaded first"
    except OSError as error:
        fault = f"can't be read ({CONFIG}: {error.strerror})"
    raise ConfigError(
        f"model.hf_assets_path = {path!r} {fault}. Set it to a folder with the model's tokenizer assets "
        f"(tokenizer.json and {CONFIG})."
    )


def tokenizer_config(path: str | Path) -> dict[str, Any]:
    """Read the tokenizer_config.json of a folder with assets."""
    return json.loads(Path(path, CONFIG).read_text("utf-8"))


def explain(folder: Path, reader: str, error: Exception) -> str:
    """What is wrong with assets that a library has failed to read, and what to do."""
    if fault := file_fault(folder):
        return fault
    config = tokenizer_config(folder)
    if "trust_remote_code" in str(error):
        file = CONFIG if "auto_map" in config else "config.json"
        return (
            f"{file} has `auto_map`, which names code that comes with the assets; it isn't run. Remove the key, and "
            f"set `tokenizer_class` in {CONFIG} to {FAST}."
        )
    if fault := class_fault(folder, config.get("tokenizer_class"), str(error)):
        return fault
    if not (folder / "tokenizer.json").exists():
        return (
            f"There is no tokenizer.json, and {reader} can't read the other files. Make one of them: "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    return (
        f"{reader} can't read the tokenizer ({type(error).__name__}: {textwrap.shorten(str(error), 200)}). Put "
        f"{CONFIG} or tokenizer.json right, or save them anew with transformers {version('transformers')} and "
        f"tokenizers {version('tokenizers')}, which read them here."
    )


def file_fault(folder: Path) -> str:
    """Which file is damaged, or is not what its name says."""
    for name in (*JSON_FILES, *TEXT_FILES):
        try:
            text = (folder / name).read_text("utf-8")
            if text.startswith("version https://git-lfs.github.com"):
                return f"{name} is a Git LFS pointer, not the file itself. Run `git lfs pull` there, or download it."
            if name in JSON_FILES and not isinstance(json.loads(text), dict):
                return f"{name} holds no JSON object. Download it again."
        except FileNotFoundError:
            continue
        except OSError as error:
            return f"{name} can't be read: {error.strerror}."
        except ValueError as error:
            kind = "JSON" if name in JSON_FILES else "text"
            return f"{name} is damaged, not {kind} in UTF-8: {error}. Download it again."
    return ""


def class_fault(folder: Path, name: Any, error: str) -> str:
    """Whether transformers doesn't know the `tokenizer_class`, or needs one and there is none."""
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if name is None and ("model_type" in error or "model type" in error):
        add = '`tokenizer_class`: "GPT2Tokenizer" for a vocab.json and merges.txt like GPT-2\'s'
        if (folder / "tokenizer.json").exists():
            add = f"`tokenizer_class`: {FAST}, and `bos_token` and `eos_token` where they are missing"
        return f"transformers can't tell which class the tokenizer is of. Add to {CONFIG}: {add}."
    known = isinstance(name, str) and (tokenizer_class_from_name(name) or tokenizer_class_from_name(f"{name}Fast"))
    if name is None or known:
        return ""
    ours = f"transformers {version('transformers')}"
    return f"{CONFIG} has tokenizer_class = {name!r}, which {ours} doesn't know. Set it to {FAST}."
