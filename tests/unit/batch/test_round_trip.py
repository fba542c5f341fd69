"""Ids that another tokenizer wrote are told from a tokenizer's own."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from streaming import MDSWriter
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torchtitan.tools.logging import init_logger
from transformers import PreTrainedTokenizerFast

from examples.mosaic_streaming.batch.first_samples import check_round_trip
from examples.mosaic_streaming.distributed.abort import AbortChannel
from examples.mosaic_streaming.errors import ConfigError
from tests.support.ranks import Rank, run_ranks
from tests.support.streams import TOKENIZER, build_loader, job, loader_config, read_samples

CODE = "\n".join(Path(os.__file__).with_name(f"{name}.py").read_text() for name in ("argparse", "ast", "heapq"))
PROSE = "\n".join(topics.values())
CHARACTERS = "Žluťoučký kůň — 数据流与分词器 — наборы данных, 🙂 ěščř; データの流れ\n" * 400
SPECIAL = ["<unk>", "<s>", "</s>"]
LENGTH, COUNT = 257, 32


def byte_level(vocabulary: int = 2048) -> Tokenizer:
    """Byte-level BPE, as of Llama 3, trained on prose."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained: dict[str, Any] = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator([PROSE], trainers.BpeTrainer(vocab_size=vocabulary, **trained))
    return tokenizer


def sentence_piece() -> Tokenizer:
    """BPE with a space before each text and bytes for what is unknown, as of Llama 2."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(back)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=SPECIAL + byte_tokens, show_progress=False)
    tokenizer.train_from_iterator([PROSE[:200_000]], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][: len(SPECIAL)]  # bytes aren't special
    return Tokenizer.from_str(json.dumps(content))


def unigram() -> Tokenizer:
    """Unigram behind a normalizer, as of T5."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trained: dict[str, Any] = {"special_tokens": SPECIAL, "unk_token": "<unk>", "show_progress": False}
    tokenizer.train_from_iterator([PROSE[:200_000]], trainers.UnigramTrainer(vocab_size=2048, **trained))
    return tokenizer


def of_the_tests() -> Tokenizer:
    """The one of `tests/assets`, trained on code."""
    return Tokenizer.from_file(f"{TOKENIZER}/tokenizer.json")


def without_decoder() -> Tokenizer:
    """One whose own text it doesn't read as it was."""
    tokenizer = of_the_tests()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def transformers_of(tokenizer: Tokenizer) -> Any:
    """The same for transformers."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path="assets")


TRAINED = [byte_level, sentence_piece, unigram]


def cut(tokenizer: Tokenizer, text: str, length: int = LENGTH) -> list[NDArray[np.int64]]:
    """Samples cut out of a text's ids, wherever that may be."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    starts = np.random.default_rng(0).integers(0, len(ids) - length, COUNT)
    return [np.array(ids[start : start + length]) for start in starts]


@pytest.mark.parametrize("text", [CODE, PROSE, CHARACTERS], ids=["code", "prose", "characters"])
@pytest.mark.parametrize("make", [*(pytest.param(make, marks=pytest.mark.long) for make in TRAINED), of_the_tests])
def test_own_ids_come_back_wherever_samples_are_cut(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = make()
    for length in (17, LENGTH, 2048):
        assert check_round_trip(cut(tokenizer, text, length), transformers_of(tokenizer), "stream") == []


def test_special_tokens_between_documents_are_left_aside() -> None:
    documents = [of_the_tests().encode(text).ids for text in PROSE[:60_000].split("\n\n")]
    ids = [token for document in documents for token in [0, *document, 1, 2, 2]]
    texts = [np.array(ids[start : start + LENGTH]) for start in range(0, len(ids) - LENGTH, LENGTH)]
    assert check_round_trip(texts, transformers_of(of_the_tests()), "stream") == []


@pytest.mark.parametrize("make", [byte_level, pytest.param(sentence_piece, marks=pytest.mark.long)])
def test_ids_of_another_tokenizer_are_refused_with_the_share_that_comes_back(make: Callable[[], Tokenizer]) -> None:
    for text in (CODE, PROSE):
        for own, other in ((of_the_tests(), make()), (make(), of_the_tests())):
            with pytest.raises(ConfigError, match=r"of stream, (\d+)% come back .*: another tokenizer wrote them"):
                check_round_trip(cut(other, text), transformers_of(own), "stream")


def test_what_cannot_be_told_is_a_warning() -> None:
    random = [np.random.default_rng(seed).integers(16, 2048, LENGTH) for seed in range(COUNT)]
    for texts, tokenizer in ((random, of_the_tests()), (cut(of_the_tests(), CODE), without_decoder())):
        [warning] = check_round_trip(texts, transformers_of(tokenizer), "stream")
        assert "can't be told" in warning and "'assets'" in warning


def test_few_ids_tell_nothing() -> None:
    other = byte_level()
    assert check_round_trip(cut(other, CODE)[:1], transformers_of(of_the_tests()), "stream") == []


def start(folder: Path, samples: list[NDArray[np.int64]], finetuning: bool = False) -> Rank:
    """A rank that reads a batch of a stream of these samples."""
    columns = ("input_ids", "labels") if finetuning else ("tokens",)
    with MDSWriter(out=str(folder), columns=dict.fromkeys(columns, "ndarray:int32")) as writer:
        for sample in samples:
            writer.write(dict(zip(columns, np.split(sample.astype(np.int32), len(columns)), strict=True)))
    config = loader_config(folder)
    if finetuning:
        config = {"name": "finetuning", "dataset": config["dataset"] | {"remote": str(folder)}}

    def run() -> None:
        init_logger()
        channel = AbortChannel()
        with channel.report_errors_once():
            loader = build_loader(config, job(2, seq_len=256), channel=channel)
            read_samples(loader, 1)
            loader.close()
            channel.close()

    [rank] = run_ranks(run)
    return rank


@pytest.mark.parametrize("finetuning", [False, True])
def test_start_refuses_text_of_another_tokenizer_of_the_same_size(tmp_path: Path, finetuning: bool) -> None:
    write = functools.partial(cut, text=CODE, length=LENGTH - finetuning)
    refused = start(tmp_path / "other", write(byte_level()), finetuning)
    assert refused.code == 1 and refused.output.splitlines()[-1].startswith("ConfigError: Of the first ")
    assert "another tokenizer wrote them" in refused.output and "Traceback" not in refused.output
    own = start(tmp_path / "own", write(of_the_tests()), finetuning)
    assert own.code == 0 and "come back" not in own.output, own.output


def test_start_warns_once_of_ids_that_are_no_text(tmp_path: Path) -> None:
    random = [np.random.default_rng(seed).integers(16, 2048, LENGTH) for seed in range(COUNT)]
    rank = start(tmp_path / "random", random)
    assert rank.code == 0 and rank.output.count("can't be told") == 1, rank.output
