"""Finds data that a loader can't read, or would misread or cut: columns, by the indexes, and examples."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from streaming import StreamingDataset
from streaming.base.format import Reader
from torch.utils.data import get_worker_info
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.tools.logging import logger
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils import PaddingStrategy

from examples.mosaic_streaming.errors import ConfigError, is_rank_0
from examples.mosaic_streaming.shards.index import FileError

TEXT, IDS, LISTS = ("str", "json", "pkl"), ("ndarray", "bytes", "pkl"), ("json", "pkl")
"""The encodings that a loader accepts for a kind of column."""

FORMS: dict[str, list[dict[str, tuple[str, ...]]]] = {
    "text": [{"text": TEXT}, {"tokens": IDS}],
    "finetuning": [
        {"turns": LISTS},
        {"input_ids": IDS, "labels": IDS},
        {"messages": LISTS},
        {"prompt": TEXT, "response": TEXT},
        {"prompt": TEXT, "completion": TEXT},
    ],
}
"""The columns that each loader reads, with their encodings; of several that fit a sample, it reads the first form.

Source: llm-foundry 0.22.0, data/text_data.py and data/finetuning/tasks.py.
"""

ALONE = {"messages", "prompt"}  # columns of forms beside which llm-foundry accepts no other columns

MIN_REPEAT_TOKENS = 32
"""Labels equal to a prompt of this many tokens or more are taken for a copy, not for a response."""


def columns_of(shard: Reader) -> dict[str, str]:
    """Map the names of a shard's columns to their encodings; JSON and CSV columns are text."""
    if isinstance(columns := getattr(shard, "columns", None), dict):
        return columns
    return dict(zip(shard.column_names, shard.column_encodings, strict=True))  # type: ignore[attr-defined]


def form_of(columns: Mapping[str, str], loader: str) -> tuple[str, ...]:
    """The columns that a loader reads, out of a sample's columns and encodings; empty if none fit."""
    for form in FORMS[loader]:
        if set(form) <= set(columns) and not (set(form) & ALONE and len(columns) > len(form)):
            return tuple(form)
    return ()


def check_columns(dataset: StreamingDataset, loader: str, labels: Sequence[str], path: str) -> None:
    """Raise ConfigError unless a loader can read all shards of all streams, and mix them in a batch."""
    if loader not in FORMS:
        return
    found: dict[tuple[str, ...], list[str]] = {}
    for number, label in enumerate(labels):
        begin = int(dataset.shard_offset_per_stream[number])
        shards = dataset.shards[begin : begin + int(dataset.shards_per_stream[number])]
        kinds = {tuple(columns_of(shard).items()): shard for shard in reversed(shards)}
        for columns, shard in reversed(kinds.items()):
            where = f"{label}, {shard.file_pairs[0][0].basename}," if len(kinds) > 1 else label
            form = check_form(dict(columns), loader, where, path)
            found.setdefault(form, []).append(f"{where} has {listed(dict(columns), form)}")
    if loader == "text" and len(found) > 1:  # the finetuning loader converts each form to turns
        raise ConfigError(
            f"{'; '.join(one for some in found.values() for one in some)}: a batch of the text loader has samples of "
            f"one form. Write all with the same column, or leave some out in {path}."
        )


def check_form(columns: Mapping[str, str], loader: str, where: str, path: str) -> tuple[str, ...]:
    """The columns that a loader reads of a shard or stream (`where`); ConfigError if it can't read any."""
    if not (form := form_of(columns, loader)):
        others = [name for name in FORMS if form_of(columns, name)]
        hint = f'set name = "{others[0]}" in {path}' if others else f"write it with these, or leave it out in {path}"
        forms = [f"`{'` and `'.join(one)}`" + " alone" * bool(ALONE & one.keys()) for one in FORMS[loader]]
        read = f"the {loader} loader reads {' or '.join(forms)}"
        raise ConfigError(f"{where} has {listed(columns, columns)}, but {read}: {hint}.")
    encodings = {name: kinds for columns_read in FORMS[loader] for name, kinds in columns_read.items()}
    for name in form:
        kind, _, dtype = columns[name].partition(":")
        if kind not in encodings[name] or dtype.startswith("float"):
            expected = f"{' or '.join(encodings[name][:2])}{' of whole numbers' * (encodings[name] == IDS)}"
            read = f"the {loader} loader reads that column as {expected}"
            raise ConfigError(f"{where} has {listed(columns, [name])}, but {read}. Write it so.")
    return form


def listed(columns: Mapping[str, str], names: Iterable[str]) -> str:
    """List columns with their encodings, for a message."""
    return ", ".join(f"`{name}` ({columns[name]})" for name in names)


def check_turns(turns: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for an example without a response, or with labels as transformers wants them.

    llm-foundry appends `labels` to `input_ids`. transformers' labels align with `input_ids` instead: they have the same
    length, and repeat them or have -100 in places.
    """
    if turns and not len(turns[-1]["labels"]):
        raise ValueError("its response is empty")  # llm-foundry would fail later, without naming the sample
    for turn in turns:
        ids, labels = turn["input_ids"], turn["labels"]
        if not isinstance(turn, dict) or len(ids) != len(labels):  # a BatchEncoding was just made from text
            continue
        if IGNORE_INDEX in labels or (len(ids) >= MIN_REPEAT_TOKENS and list(ids) == list(labels)):
            raise ValueError(
                f"its labels repeat its input_ids, or have {IGNORE_INDEX} in places, as transformers wants them, but "
                "the finetuning loader learns labels as the response that follows input_ids: write the prompt as "
                "input_ids, and the response alone as labels"
            )


@functools.cache
def takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template renders the text of a message given as parts, rather than the list itself."""
    parts: Any = [{"type": "text", "text": "the text of a part"}]
    try:
        written = str(tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False))
    except Exception:  # a template can raise anything, or be missing
        return False
    return parts[0]["text"] in written and str(parts) not in written


def text_of(content: Any) -> Any:
    """The text of a message's content, or of its parts; ValueError if one isn't text."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ValueError(f"a message has a part that is no text: {str(part)[:100]}")
    return "".join(part["text"] for part in content)


def encodes_plainly(kind: type) -> bool:
    """Whether a class of tokenizers leaves texts to `tokenizers`, and adds nothing of its own."""
    plain, names = PreTrainedTokenizerFast, ("__call__", "_encode_plus", "_batch_encode_plus")
    return all(getattr(kind, name, None) is getattr(plain, name) for name in names)


class WholeExamples:
    """Keeps the class of llm-foundry's that follows it from misreading or cutting examples without a word."""

    tokenizer: PreTrainedTokenizerBase
    max_seq_len: int  # in tokens of a row
    token_encoding_type: str  # of tokens that are stored as bytes
    keep_dtype = False  # whether token samples stay arrays of their stored dtype, rather than become int64 tensors
    may_cut = False  # whether text samples longer than `max_seq_len` may be truncated
    _has_warned = False

    def tokenize_example(self, example: Any) -> Any:
        """Tokenize an example, joining message parts where the chat template would print them as a list."""
        messages = example.get("messages") if isinstance(example, Mapping) and not takes_parts(self.tokenizer) else None
        if isinstance(messages, list) and any(isinstance(message.get("content"), list) for message in messages):
            joined = [message | {"content": text_of(message["content"])} for message in messages]
            example = dict(example) | {"messages": joined}
        return super().tokenize_example(example)  # type: ignore[misc]

    def _read_binary_tokenized_sample(self, sample: dict[str, Any]) -> Any:
        """Tokens of a text sample; llm-foundry would truncate a longer one silently."""
        tokens, row = sample["tokens"], self.max_seq_len
        if not isinstance(tokens, np.ndarray):
            tokens = np.frombuffer(tokens, self.token_encoding_type)
        if len(tokens) > row:
            if not self.may_cut:
                raise FileError(
                    f"it has {len(tokens):,} tokens, but rows take {row:,}. Raise seq_len, write samples of {row:,} "
                    f"tokens, or set dataset.max_seq_len = {row} to leave out the rest"
                )
            self._warn_of_cut(len(tokens), row)
        if self.keep_dtype:
            return tokens[:row]
        return super()._read_binary_tokenized_sample(sample)  # type: ignore[misc]

    def _tokenize(self, text_sample: Mapping[str, Any]) -> Any:
        """Tokens of a text and their attention mask, [max_seq_len] each; llm-foundry would truncate silently.

        It also has transformers pad, which makes lists of as many numbers as a row has places. Arrays are padded in a
        tenth of the time that torch takes to read such lists.
        """
        if self.keep_dtype:
            ids, encodings = self._encode(text_sample["text"])
            row = np.full(self.max_seq_len, self.tokenizer.pad_token_id, np.int32)
            row[: len(ids)] = ids  # this project's tokenizers pad on the right
            tokens: Any = {"input_ids": row, "attention_mask": np.arange(len(row)) < len(ids)}
        else:
            tokens = super()._tokenize(text_sample)  # type: ignore[misc]
            encodings = getattr(tokens, "encodings", None) or ()
        if left_out := [] if self._has_warned else [part for one in encodings for part in one.overflowing]:
            found = self.max_seq_len + sum(sum(part.attention_mask) for part in left_out)
            self._warn_of_cut(found, self.max_seq_len)
        return tokens

    def _encode(self, text: str) -> tuple[list[int], Sequence[Any]]:
        """The tokens of a text, cut to a row, and what a fast tokenizer knows of them.

        Where a token is in the text takes a fifth of the time to find out. transformers always asks for it (4.51,
        tokenization_utils_fast.py, `_batch_encode_plus`), and nobody needs it here.
        """
        tokenizer: Any = self.tokenizer
        if encodes_plainly(type(tokenizer)):
            strategies = PaddingStrategy.DO_NOT_PAD, TruncationStrategy.LONGEST_FIRST
            tokenizer.set_truncation_and_padding(*strategies, self.max_seq_len, 0, None, None)
            [found] = tokenizer.backend_tokenizer.encode_batch_fast([text])
            return found.ids, [found]
        settings = {"return_attention_mask": False, "return_token_type_ids": False}
        tokens = tokenizer(text, truncation=True, max_length=self.max_seq_len, **settings)
        return tokens["input_ids"], getattr(tokens, "encodings", None) or ()

    def _warn_of_cut(self, found: int, row: int) -> None:
        """Warn once that samples are truncated."""
        worker = get_worker_info()
        if not self._has_warned and is_rank_0() and (worker is None or worker.id == 0):
            logger.warning(
                f"A sample has {found:,} tokens, but the model reads the first {row:,} of each (dataset.max_seq_len), "
                "and never the others."
            )
        self._has_warned = True
