"""Refuses or mends examples for instruction tuning that llm-foundry 0.22.0 would silently learn wrongly."""

from collections.abc import Mapping, Sequence
from typing import Any

from torchtitan.components.loss import IGNORE_INDEX
from transformers import PreTrainedTokenizerBase

NO_ECHO = 32
"""A prompt of so many tokens is never repeated as its response."""

PROBE = [{"type": "text", "text": "the text of a part"}]


def check_turns(turns: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for an example without a response, or whose labels are no response.

    llm-foundry puts `labels` behind `input_ids`. In transformers' form they lie over each other: labels are as long as
    the ids, and repeat them or have -100 in places.
    """
    if turns and not len(turns[-1]["labels"]):
        raise ValueError("its response is empty")  # llm-foundry would fail later, and not say which
    for turn in turns:
        ids, labels = turn["input_ids"], turn["labels"]
        if not isinstance(turn, dict) or len(ids) != len(labels):  # transformers' tokenizer has just made others
            continue
        if IGNORE_INDEX in labels or (len(ids) >= NO_ECHO and list(ids) == list(labels)):
            raise ValueError(
                f"its labels repeat its input_ids, or have {IGNORE_INDEX} in places, as transformers wants them, but "
                "the finetuning loader learns labels as the response that follows input_ids: write the prompt as "
                "input_ids, and the response alone as labels"
            )


def takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template writes the text of a message that is a list of parts, not the list itself."""
    try:
        chat: Any = [{"role": "user", "content": PROBE}]
        written = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:  # a template can raise anything, and there may be none
        return False
    return PROBE[0]["text"] in written and str(PROBE) not in written


def join_parts(example: Mapping[str, Any]) -> dict[str, Any]:
    """Make strings of a chat's messages that are lists of parts; raise ValueError if a part is no text."""
    messages = example.get("messages")
    if not isinstance(messages, list) or not any(isinstance(message.get("content"), list) for message in messages):
        return dict(example)
    return dict(example) | {"messages": [message | {"content": text_of(message["content"])} for message in messages]}


def text_of(content: Any) -> Any:
    """The text of a message; of a list, the text of its parts."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ValueError(f"a message has a part that is no text: {str(part)[:100]}")
    return "".join(part["text"] for part in content)
