"""Instruction tuning: the labels of prompts, responses and chats against tokens put together here, token by token."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming import MDSWriter
from tokenizers import Tokenizer

from tests.support.looking import preview
from tests.support.ranks import run_rank_values
from tests.support.streams import TOKENIZER, build_loader, job
from tests.support.titan import masking, set_value
from tests.support.tokenizing import derive

SEQ_LEN = 256
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}<|end_of_text|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
WORDS = ["import os", "def f(x):", "return x + 1", "class A:", "yield from b", "raise ValueError", "lambda y: y"]
IGNORED = -100


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    """A tokenizer with a chat template that ends each message with EOS."""
    shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    file = tmp_path / "tokenizer/tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return tmp_path / "tokenizer"


def write(folder: Path, samples: list[dict[str, Any]], kind: str) -> Path:
    """Write a stream whose columns are all of one kind."""
    with MDSWriter(out=str(folder), columns=dict.fromkeys(samples[0], kind)) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def read(folder: Path, assets: Path, samples: int, **dataset: Any) -> list[tuple[list[int], list[int]]]:
    """Inputs and labels of the samples, in their order, as the model gets them."""
    config = job(local_batch_size=samples, seq_len=SEQ_LEN)
    set_value(config, "model.hf_assets_path", str(assets))
    settings = {"remote": str(folder), "local": str(folder), "num_canonical_nodes": 1, **dataset}

    def first_batch() -> tuple[list[list[int]], list[list[int]]]:
        loader = build_loader({"name": "finetuning", "num_workers": 0, "dataset": settings}, config)
        inputs, labels = next(iter(loader))
        return inputs["input"].tolist(), labels.tolist()

    [(inputs, labels)] = run_rank_values(first_batch)
    return list(zip(inputs, labels, strict=True))


def ids(text: str) -> list[int]:
    """The tokens of a text, without llm-foundry and transformers."""
    found: list[int] = Tokenizer.from_file(f"{TOKENIZER}/tokenizer.json").encode(text, add_special_tokens=False).ids
    return found


def expected(parts: list[tuple[list[int], bool]]) -> tuple[list[int], list[int]]:
    """A row from its parts, each with whether it is to be learned."""
    tokens = [token for part, _ in parts for token in part]
    learned = [is_target for part, is_target in parts for _ in part]
    padding = SEQ_LEN + 1 - len(tokens)
    targets = [token if is_target else IGNORED for token, is_target in zip(tokens, learned, strict=True)]
    return [*tokens, *[PAD] * padding][:-1], [*targets, *[IGNORED] * padding][1:]


[EOS], [PAD] = ids("<|end_of_text|>"), ids("<|pad|>")
TARGETS = [
    ({}, (False, True)),
    ({"target_prompts": "all"}, (True, True)),
    ({"target_prompts": "length>=8"}, (None, True)),
]


@pytest.mark.parametrize(("settings", "learned"), TARGETS)
def test_exactly_the_responses_are_learned(
    tmp_path: Path, assets: Path, settings: dict[str, str], learned: tuple[bool | None, bool]
) -> None:
    samples = [
        {"prompt": " ".join(WORDS[: 1 + number % 4]), "response": " ".join(WORDS[3 : 4 + number % 3])}
        for number in range(8)
    ]
    found = read(write(tmp_path / "stream", samples, "str"), assets, 8, **settings)
    for row, sample in zip(found, samples, strict=True):
        prompt, response = ids(sample["prompt"]), ids(sample["response"])
        is_long = len(prompt) >= 8
        assert row == expected(
            [(prompt, is_long if learned[0] is None else learned[0]), ([*response, EOS], learned[1])]
        )


def chats(count: int) -> list[list[dict[str, str]]]:
    """Chats of one to three turns."""
    return [
        [
            {"role": role, "content": WORDS[(number + turn + len(role)) % len(WORDS)]}
            for turn in range(1 + number % 3)
            for role in ("user", "assistant")
        ]
        for number in range(count)
    ]


@pytest.mark.parametrize("responses", ["last", "all"])
def test_chats_learn_the_last_or_all_responses(tmp_path: Path, assets: Path, responses: str) -> None:
    conversations = chats(6)
    folder = write(tmp_path / "stream", [{"messages": chat} for chat in conversations], "json")
    settings = {} if responses == "last" else {"target_responses": "all"}
    found = read(folder, assets, 6, **settings)
    for row, chat in zip(found, conversations, strict=True):
        parts = []
        for number in range(0, len(chat), 2):
            user, assistant = (message["content"] for message in chat[number : number + 2])
            is_learned = responses == "all" or number == len(chat) - 2
            parts += [
                (ids(f"[user] {user}<|end_of_text|>[assistant] "), False),
                (ids(f"{assistant}<|end_of_text|>"), is_learned),
            ]
        assert row == expected(parts)


@pytest.mark.parametrize("ratio", [2, 3.5, "auto"])
def test_packed_chats_have_the_same_labels_and_none_crosses(tmp_path: Path, assets: Path, ratio: Any) -> None:
    """Each document of a packed row is one of the examples, with its own labels; nothing else is in a row."""
    conversations = chats(64)
    folder = write(tmp_path / "stream", [{"messages": chat} for chat in conversations], "json")
    alone = {strip(row) for row in read(folder, assets, 64, target_responses="all")}
    config = masking(job(local_batch_size=4, seq_len=SEQ_LEN))
    set_value(config, "model.hf_assets_path", str(assets))
    settings = {"remote": str(folder), "local": str(folder), "num_canonical_nodes": 1, "packing_ratio": ratio}

    def read_packed() -> list[Any]:
        loader = build_loader(
            {"name": "finetuning", "num_workers": 0, "dataset": settings | {"target_responses": "all"}}, config
        )
        batches = iter(loader)
        return [next(batches) for _ in range(4)]

    [batches] = run_rank_values(read_packed)
    packed = 0
    for inputs, labels in batches:
        assert inputs["input"].shape == (4, SEQ_LEN)
        counted = torch.where(inputs["input"] == PAD, -1, (inputs["positions"] == 0).cumsum(1) - 1)
        rows = zip(inputs["input"], labels, inputs.get("sequence_id", counted), inputs["positions"], strict=True)
        for tokens, targets, sequence_id, position in rows:
            documents = [sequence_id == number for number in range(int(sequence_id.max()) + 1)]
            packed += len(documents) > 1
            for document in documents:
                whole = tuple(tokens[document].tolist()), tuple(targets[document].tolist())
                # Of one that fills its row, the last token is but a label.
                assert strip(whole) in alone or (document[-1] and whole in alone)
                assert position[document].tolist() == list(range(int(document.sum())))
            assert (targets[sequence_id == -1] == IGNORED).all()
            ends = torch.nonzero(sequence_id[1:] != sequence_id[:-1])[:, 0]
            assert (targets[ends] == IGNORED).all(), "no target of another document"
    assert packed


def strip(row: tuple[Sequence[int], Sequence[int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """An example's tokens and labels without padding, and without its last token, whose label is of no document."""
    tokens, labels = row
    length = next((number for number, token in enumerate(tokens) if token == PAD), len(tokens))
    return tuple(tokens[: length - 1]), tuple(labels[: length - 1])


def test_example_whose_response_is_cut_away_stops_the_run(tmp_path: Path, assets: Path) -> None:
    samples = [{"prompt": " ".join(WORDS * 40), "response": "x"}]
    folder = write(tmp_path / "stream", samples, "str")
    with pytest.raises(AssertionError, match="DataError"):
        read(folder, assets, 1)


def test_chat_whose_last_response_alone_has_tokens_is_read(tmp_path: Path, assets: Path) -> None:
    file = assets / "tokenizer_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE.replace("<|end_of_text|>", "")})
    )
    words = [("user", "x"), ("assistant", ""), ("user", "y"), ("assistant", "return x + 1")]
    chat = [{"role": role, "content": content} for role, content in words]
    [row] = read(write(tmp_path / "stream", [{"messages": chat}], "json"), assets, 1)
    assert row == expected(
        [
            (ids("[user] x[assistant] "), False),
            (ids("[user] y[assistant] "), False),
            (ids("return x + 1<|end_of_text|>"), True),
        ]
    )


def test_example_without_a_response_stops_the_run_and_is_named(tmp_path: Path, assets: Path) -> None:
    samples = [{"prompt": "x", "response": "y"}, {"prompt": "x", "response": ""}]
    folder = write(tmp_path / "stream", samples, "str")
    with pytest.raises(
        AssertionError, match=r"Sample 1 in shard\.00000\.mds of the stream in .* its response is empty"
    ):
        read(folder, assets, 2)


PARTS_TEMPLATE = TEMPLATE.replace(
    "{{ message.content }}",
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}<{{ part.text }}>{% endfor %}{% endif %}",
)
"""Of a tokenizer that takes parts."""


def in_parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("template", [TEMPLATE, PARTS_TEMPLATE, TEMPLATE.replace("content }}", "content + '' }}")])
def test_messages_of_parts_are_written_as_their_text(tmp_path: Path, assets: Path, template: str) -> None:
    file = assets / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    chat = [
        {"role": "user", "content": in_parts("def f", "(x):")},
        {"role": "assistant", "content": in_parts("return x")},
    ]
    plain = [{"role": "user", "content": "import os"}, {"role": "assistant", "content": "class A:"}]
    folder = write(tmp_path / "stream", [{"messages": chat}, {"messages": plain}], "json")
    user, assistant = ("<def f><(x):>", "<return x>") if template == PARTS_TEMPLATE else ("def f(x):", "return x")
    assert read(folder, assets, 2) == [
        expected([(ids(f"[user] {prompt}<|end_of_text|>[assistant] "), False), ([*ids(response), EOS], True)])
        for prompt, response in ((user, assistant), ("import os", "class A:"))
    ]


def test_part_that_is_no_text_stops_the_run_and_its_sample_is_named(tmp_path: Path, assets: Path) -> None:
    image = [{"type": "image_url", "image_url": {"url": "x.png"}}, *in_parts("what is it")]
    chat = [{"role": "user", "content": image}, {"role": "assistant", "content": "y"}]
    folder = write(tmp_path / "stream", [{"messages": chat}], "json")
    with pytest.raises(
        AssertionError, match=r"Sample 0 in shard\.00000\.mds of .* a part that is no text: .*image_url"
    ):
        read(folder, assets, 1)


@pytest.mark.parametrize("masked", [False, True])
def test_labels_as_transformers_wants_them_stop_the_run(tmp_path: Path, assets: Path, masked: bool) -> None:
    tokens = np.arange(20, 60, dtype=np.int32)
    labels = np.where(np.arange(40) < 10, -100, tokens).astype(np.int32) if masked else tokens
    samples = [{"input_ids": tokens[:4], "labels": tokens[4:]}, {"input_ids": tokens, "labels": labels}]
    folder = write(tmp_path / "stream", samples, "ndarray:int32")
    with pytest.raises(
        AssertionError, match=r"Sample 1 in shard\.00000\.mds of .* its labels repeat its input_ids, or"
    ):
        read(folder, assets, 2)


def test_response_that_repeats_its_prompt_is_learned_where_it_is_text(tmp_path: Path, assets: Path) -> None:
    text = " ".join(WORDS * 4)
    assert len(ids(text)) > 40
    found = read(write(tmp_path / "stream", [{"prompt": text, "response": text}], "str"), assets, 1)
    assert found == [expected([(ids(text), False), ([*ids(text), EOS], True)])]


def test_chats_without_a_template_are_warned_of_once(files: Path, assets: Path) -> None:
    folder = write(files / "chats", [{"messages": chat} for chat in chats(64)], "json")
    (files / "loader.toml").write_text(f'name = "finetuning"\n[dataset]\nremote = "{folder}"\nlocal = "{folder}"\n')
    warning = f"model.hf_assets_path = '{assets}' has no chat template: llm-foundry writes chats in a form of its own"
    flags = (f"--model.hf_assets_path={assets}", f"--training.seq_len={SEQ_LEN}", "--training.steps=1")
    assert "no chat template" not in str(preview(files, "plan", titan=flags)["warnings"])
    derive(assets)
    assert sum(warning in line for line in preview(files, "plan", titan=flags)["warnings"]) == 1
