"""Write small, real MDS streams from the sources of the Python standard library.

    python -m examples.mosaic_streaming.make_demo_data

writes `data/demo/train` and `data/demo/val`: the top-level modules of the running Python, tokenized with the debug
tokenizer, concatenated with an EOS behind each module and cut into samples of `seq_len + 1` tokens. The same Python
writes the same bytes every time, and a second run does nothing. The debug tokenizer itself was made with
`--train-tokenizer tests/assets/tokenizer`.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

TOKENIZER = Path("tests/assets/tokenizer")
OUT = Path("data/demo")
SEQ_LEN = 256
VOCAB_SIZE = 2048
"""Entries of the debug tokenizer: as many as the embedding of TorchTitan's debug models has."""
VAL_EVERY = 20
"""Each twentieth module goes to `val`."""
SPECIAL_TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"}
MADE_FROM = "made_from.json"


def sources(split: str | None = None) -> list[str]:
    """Texts of the standard library's top-level modules, by name: all, or those of `train` or `val`."""
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    chosen = [m for i, m in enumerate(modules) if split is None or (i % VAL_EVERY == 0) == (split == "val")]
    return [module.read_text(encoding="utf-8", errors="replace") for module in chosen]


def train_tokenizer(folder: Path) -> None:
    """Train the debug tokenizer (byte-level BPE) and write it as Hugging Face assets, which TorchTitan reads too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sources(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **SPECIAL_TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def fingerprint(seq_len: int) -> dict[str, str | int]:
    """What the streams are made from: equal fingerprints, equal streams."""
    tokenizer = (TOKENIZER / "tokenizer.json").read_bytes()
    return {
        "python": platform.python_version(),
        "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
        "seq_len": seq_len,
    }


def is_up_to_date(out: Path, seq_len: int) -> bool:
    """Whether `out` holds complete streams of this fingerprint."""
    made_from = out / MADE_FROM
    return made_from.is_file() and json.loads(made_from.read_text()) == fingerprint(seq_len)


def progress(texts: list[str], split: str) -> Iterator[dict[str, str]]:
    """The texts as llm-foundry's `ConcatTokensDataset` takes them, behind a progress bar."""
    from tqdm import tqdm

    for text in tqdm(texts, desc=split, unit="module"):
        yield {"text": text}


def write_streams(out: Path, seq_len: int) -> dict[str, int]:
    """Write both splits into the empty folder `out` and return the tokens in each."""
    from llmfoundry.data import ConcatTokensDataset
    from streaming import MDSWriter
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokens = {"train": 0, "val": 0}
    for split in tokens:
        samples = ConcatTokensDataset(
            hf_dataset=progress(sources(split), split),
            tokenizer=tokenizer,
            max_length=seq_len + 1,
            bos_text="",
            eos_text=tokenizer.eos_token,
            no_wrap=False,
        )
        with MDSWriter(
            out=str(out / split), columns={"tokens": "ndarray:int32"}, hashes=["xxh64"], size_limit=1 << 20
        ) as writer:
            for sample in samples:
                writer.write(sample)
                tokens[split] += sample["tokens"].size
    (out / MADE_FROM).write_text(json.dumps(fingerprint(seq_len)))
    return tokens


def make_demo_data(out: Path = OUT, seq_len: int = SEQ_LEN) -> None:
    """Write the streams under `out` unless they are there; a run that is cut short leaves none that look complete."""
    if is_up_to_date(out, seq_len):
        print(f"{out} is up to date.")
        return
    if out.exists() and not (out / MADE_FROM).is_file():
        raise SystemExit(
            f"{out} is no folder of demo data, and would be overwritten. Remove it, or give another --out."
        )
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
    parser.add_argument(
        "--seq-len", type=int, default=SEQ_LEN, help="training.seq_len of the job; samples have one token more"
    )
    parser.add_argument("--train-tokenizer", type=Path, metavar="FOLDER", help="make the debug tokenizer instead")
    flags = parser.parse_args()
    if flags.train_tokenizer:
        train_tokenizer(flags.train_tokenizer)
    else:
        make_demo_data(flags.out, flags.seq_len)


if __name__ == "__main__":
    main()
