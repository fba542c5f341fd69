"""The commands of docs/data.md, on local files; what they make against tokens put together here."""

import contextlib
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from llmfoundry.cli.cli import app
from streaming import StreamingDataset
from tokenizers import Tokenizer

from examples.mosaic_streaming.shards.add_hashes import main as add_hashes
from tests.support.ranks import run_rank_values
from tests.support.streams import TOKENIZER, build_loader, job
from tests.support.titan import set_value

PAGE = Path("docs/data.md")
LENGTH = 257
EOS = "<|end_of_text|>"
DOCUMENTS = [Path(os.__file__).with_name(f"{name}.py").read_text() for name in ("this", "abc", "bisect", "heapq")]
PAIRS = [{"prompt": f"import {number}\n", "response": f"return {number} + 1"} for number in range(70)]
CHATS = [
    {"messages": [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["response"]}]}
    for pair in PAIRS
]


def blocks(language: str) -> list[str]:
    """The page's blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def commands() -> list[list[str]]:
    """The words of each command in the page's blocks, but those that need a network."""
    found: list[list[str]] = []
    begun = ""
    for line in "".join(blocks("bash")).replace("\\\n", " ").splitlines(keepends=True):
        begun += line
        with contextlib.suppress(ValueError):  # a quotation goes on
            found.append(shlex.split(begun))
            begun = ""
    assert not begun
    return [command for command in found if command[0] != "huggingface-cli"]


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    """A folder in which the inputs stand, and all the commands have been run."""
    (module_path / "tests").symlink_to(Path("tests").resolve())
    (module_path / "my_text").mkdir()
    for number, document in enumerate(DOCUMENTS):
        (module_path / f"my_text/{number}.txt").write_text(document)
    texts = [{"text": document} for document in DOCUMENTS]
    inputs: dict[str, list[Any]] = {"docs": texts, "pairs": PAIRS, "chats": CHATS}
    for name, rows in inputs.items():
        (module_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(str(module_path / "my_dataset"))
    outputs = [run_rank_values(functools.partial(run, command, module_path), timeout=120) for command in commands()]
    assert len(outputs) == 8
    return module_path


def run(command: list[str], place: Path) -> None:
    """Run a command as the shell would, but in this process, which has imported everything."""
    os.chdir(place)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(place / "cache")}
    if command[0] == "llmfoundry":
        app(command[1:], standalone_mode=False)
    elif command[1] == "-c":
        exec(command[2], {})
    else:
        assert command[:3] == ["python", "-m", "examples.mosaic_streaming.shards.add_hashes"]
        add_hashes(command[3:])


def ids(text: str) -> list[int]:
    """The tokens of a text, without llm-foundry and transformers."""
    found: list[int] = Tokenizer.from_file(f"{TOKENIZER}/tokenizer.json").encode(text, add_special_tokens=False).ids
    return found


def samples(folder: Path) -> list[dict[str, Any]]:
    """All samples of a stream."""

    def read() -> list[dict[str, Any]]:
        dataset = StreamingDataset(local=str(folder), batch_size=1)
        return [dataset[number] for number in range(len(dataset))]

    found: list[dict[str, Any]] = run_rank_values(read)[0]
    return found


@pytest.mark.parametrize("name", ["from_text", "from_json", "from_hf"])
def test_text_is_the_documents_one_after_another(folder: Path, name: str) -> None:
    found = samples(folder / "data" / name)
    assert {len(sample["tokens"]) for sample in found} == {LENGTH}
    together = [token for sample in found for token in sample["tokens"].tolist()]
    documents = {tuple(ids(document + EOS)) for document in DOCUMENTS}
    [eos] = ids(EOS)
    begin = 0
    for end in [number for number, token in enumerate(together) if token == eos]:
        assert tuple(together[begin : end + 1]) in documents
        begin = end + 1
    assert any(tuple(together[begin:]) == document[: len(together) - begin] for document in documents)
    assert sum(map(len, documents)) - LENGTH < len(together) <= sum(map(len, documents)), "but what fills no sample"


def test_pairs_and_chats_are_what_they_were(folder: Path) -> None:
    assert samples(folder / "data/pairs/train") == PAIRS
    for sample, pair in zip(samples(folder / "data/chats/train"), PAIRS, strict=True):
        [turn] = sample["turns"]
        assert turn["labels"][: len(ids(pair["response"]))] == ids(pair["response"])


def test_the_loader_reads_them_with_the_files_shown(folder: Path) -> None:
    def read(config: dict[str, Any]) -> list[int]:
        tokenizer = Path(TOKENIZER).resolve()
        os.chdir(folder)
        job_config = job(2, seq_len=LENGTH - 1)
        set_value(job_config, "model.hf_assets_path", str(tokenizer))
        inputs, labels = next(iter(build_loader(config, job_config)))
        assert inputs["input"].shape == labels.shape == (2, LENGTH - 1)
        return [int((row != -100).sum()) for row in labels]

    text, chats = [tomllib.loads(block) for block in blocks("toml")]
    text["dataset"]["num_canonical_nodes"] = 1
    assert run_rank_values(functools.partial(read, text)) == [[LENGTH - 1] * 2]
    [packed] = run_rank_values(functools.partial(read, chats))
    assert all(count > 30 for count in packed)
    for name in ("pairs", "chats"):
        dataset = {"remote": f"data/{name}", "local": f"cache_of_{name}", "split": "train"}
        [targets] = run_rank_values(functools.partial(read, {"name": "finetuning", "dataset": dataset}))
        assert all(0 < count < 30 for count in targets)


@pytest.mark.long
def test_the_command_itself_runs(folder: Path) -> None:
    """One of them through the shell, as a user would."""
    [command] = [shlex.join(words) for words in commands() if "from_json" in " ".join(words)]
    ended = subprocess.run(
        command.replace("from_json", "again"),
        shell=True,
        cwd=folder,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    assert len(samples(folder / "data/again")) == len(samples(folder / "data/from_json"))
