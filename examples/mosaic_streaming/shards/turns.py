"""Finds finetuning examples that llm-foundry 0.22.0 would silently train on in an unintended way."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torchtitan.components.loss import IGNORE_INDEX
from transformers import PreTrainedTokenizerBase

MIN_REPEAT_TOKENS = 32
"""Labels equal to a prompt of this many tokens or more are taken for a copy, not for a response."""


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


def join_parts(example: Mapping[str, Any]) -> dict[str, Any]:
    """Turn messages given as lists of parts into strings; other examples stay as they are."""
    messages = example.get("messages")
    if not isinstance(messages, list) or not any(isinstance(message.get("content"), list) for message in messages):
        return dict(example)
    return dict(example) | {"messages": [message | {"content": text_of(message["content"])} for message in messages]}


def text_of(content: Any) -> Any:
    """The text of a message's content, or of its parts; ValueError if one isn't text."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ValueError(f"a message has a part that is no text: {str(part)[:100]}")
    return "".join(part["text"] for part in content)
