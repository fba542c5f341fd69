"""Examples for instruction tuning that llm-foundry 0.22.0 would learn otherwise than they are meant, and not say so."""

from collections.abc import Mapping, Sequence
from typing import Any

from torchtitan.components.loss import IGNORE_INDEX
from transformers import PreTrainedTokenizerBase

NO_ECHO = 32
"""Tokens of a prompt from which on no response is taken to be just the same again."""

PROBE = [{"type": "text", "text": "the text of a part"}]


def check_turns(turns: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for an example without a response, or whose labels are not a response.

    llm-foundry puts `labels` behind `input_ids`. Those of transformers lie over them: they are as long, and repeat
    them or have -100 in places.

    Args:
        turns: of the example, each with `input_ids` and `labels`.
    """
    if turns and not len(turns[-1]["labels"]):
        raise ValueError("its response is empty")  # llm-foundry would fail later, and not say which
    for turn in turns:
        ids, labels = turn["input_ids"], turn["labels"]
        if not isinstance(turn, dict) or len(ids) != len(labels):  # what transformers' tokenizer has just made is none
            continue
        if IGNORE_INDEX in labels or (len(ids) >= NO_ECHO and list(ids) == list(labels)):
            raise ValueError(
                f"its labels repeat its input_ids, or have {IGNORE_INDEX} in places, as transformers wants them, but "
                "the finetuning loader learns labels as the response that follows input_ids: write the prompt as "
                "input_ids, and the response alone as labels"
            )


def takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template writes the text of a message that is a list of parts, rather than the list itself."""
    try:
        chat: Any = [{"role": "user", "content": PROBE}]
        written = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:  # a template can raise anything, and there may be none
        return False
    return PROBE[0]["text"] in written and str(PROBE) not in written


def join_parts(example: Mapping[str, Any]) -> dict[str, Any]:
    """A chat whose messages are strings, also where they are lists of parts; other examples stay.

    Raises:
        ValueError: a part is no text.
    """
    messages = example.get("messages")
    if not isinstance(messages, list) or not any(isinstance(message.get("content"), list) for message in messages):
        return dict(example)
    return dict(example) | {"messages": [message | {"content": text_of(message["content"])} for message in messages]}


def text_of(content: Any) -> Any:
    """The text of a message; of a list, that of its parts.

    Raises:
        ValueError: a part is no text.
    """
    if not isinstance(content, list):
        return content
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ValueError(f"a message has a part that is no text: {str(part)[:100]}")
    return "".join(part["text"] for part in content)
