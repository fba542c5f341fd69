"""Writes small, real MDS streams from the sources of the Python standard library.

    python -m examples.mosaic_streaming.make_demo_data

writes `data/demo/train` and `data/demo/val`: the top-level modules of the running Python, tokenized with the debug
tokenizer (made with `--train-tokenizer tests/assets/tokenizer`), joined with an EOS after each module, and cut into
samples of `seq_len + 1` tokens. The same Python always writes the same bytes, and a second run does nothing.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
from pathlib import Path

TOKENIZER = Path("tests/assets/tokenizer")
OUT = Path("data/demo")
SEQ_LEN = 256
VOCAB_SIZE = 2048  # of the debug tokenizer: as many as the embedding of TorchTitan's debug models has rows
VAL_EVERY = 20  # every twentieth module goes to `val`
SPECIAL_TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"}
MADE_FROM = "made_from.json"


def sources(split: str | None = None) -> list[str]:
    """Texts of the standard library's top-level modules, sorted by name: all, or those of `train` or `val`."""
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    texts = [module.read_text(encoding="utf-8", errors="replace") for module in modules]
    return [text for i, text in enumerate(texts) if split is None or (i % VAL_EVERY == 0) == (split == "val")]


def train_tokenizer(folder: Path) -> None:
    """Train the debug tokenizer (byte-level BPE) and write it as Hugging Face assets, which TorchTitan reads too."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer, special = ByteLevelBPETokenizer(), list(SPECIAL_TOKENS.values())
    tokenizer.train_from_iterator(sources(), VOCAB_SIZE, min_frequency=0, show_progress=False, special_tokens=special)
    tokenizer.post_processor = None  # it would only change the offsets of tokens
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **SPECIAL_TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def made_from(seq_len: int) -> dict[str, str | int]:
    """What decides the content of the streams."""
    digest = hashlib.sha256((TOKENIZER / "tokenizer.json").read_bytes()).hexdigest()
    return {"python": platform.python_version(), "tokenizer_sha256": digest, "seq_len": seq_len}


def write_streams(out: Path, seq_len: int) -> dict[str, int]:
    """Write both splits into the empty folder `out`, and return the tokens in each."""
    from llmfoundry.data import ConcatTokensDataset
    from streaming import MDSWriter
    from tqdm import tqdm
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    joined = {"bos_text": "", "eos_text": tokenizer.eos_token, "no_wrap": False}
    columns, tokens = {"tokens": "ndarray:int32"}, {"train": 0, "val": 0}
    for split in tokens:
        texts = ({"text": text} for text in tqdm(sources(split), desc=split, unit="module"))
        with MDSWriter(out=str(out / split), columns=columns, hashes=["xxh64"], size_limit=1 << 20) as writer:
            for sample in ConcatTokensDataset(texts, tokenizer, seq_len + 1, **joined):
                writer.write(sample)
                tokens[split] += sample["tokens"].size
    (out / MADE_FROM).write_text(json.dumps(made_from(seq_len)))
    return tokens


def make_demo_data(out: Path = OUT, seq_len: int = SEQ_LEN) -> None:
    """Write the streams to `out` unless they are there; an interrupted run leaves none that look complete."""
    if (out / MADE_FROM).is_file():
        if json.loads((out / MADE_FROM).read_text()) == made_from(seq_len):
            print(f"{out} is up to date.")
            return
    elif out.exists():
        raise SystemExit(f"{out} holds no demo data, and would be overwritten. Remove it, or give another --out.")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokens = write_streams(partial, seq_len)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    print(f"{out}: {tokens['train']:,} tokens in train, {tokens['val']:,} in val.")


def main() -> None:
    """Read the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the streams (default: %(default)s)")
    length = "training.seq_len of the job; samples have one token more"
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN, help=length)
    parser.add_argument("--train-tokenizer", type=Path, metavar="FOLDER", help="make the debug tokenizer instead")
    flags = parser.parse_args()
    if flags.train_tokenizer:
        train_tokenizer(flags.train_tokenizer)
    else:
        make_demo_data(flags.out, flags.seq_len)


if __name__ == "__main__":
    main()
