"""The pages: short enough, with links that lead somewhere, names that exist, and commands that run.

The quick tests compare what the pages say with the real parsers, files, settings and messages. The `long` one runs the
commands of each page, one after the other, in a copy of the repository. docs/torchtitan-0.3.md has flags and settings
of TorchTitan 0.3, all other pages those of 0.2: they are compared where that generation is installed.
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.commands.download import DownloadCommand
from torch.distributed.run import get_args_parser

from examples.mosaic_streaming import titan
from examples.mosaic_streaming.config import parse_flags
from examples.mosaic_streaming.config.plan import check_tables, is_plan
from examples.mosaic_streaming.config.signatures import DATASET_KEYS
from examples.mosaic_streaming.preview.__main__ import build_parser
from examples.mosaic_streaming.titan.job_values import leaves
from examples.mosaic_streaming.titan.versions import GONE, RENAMED
from tests.support.ranks import run_rank_values
from tests.support.titan import ASSETS, IS_0_2, NO_FLAGS, job_config, load_config, only_0_2, only_0_3

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples/mosaic_streaming"
README, EXAMPLE_README, CHANGELOG = Path("README.md"), Path("examples/mosaic_streaming/README.md"), Path("CHANGELOG.md")
PAGES = [README, *sorted(page.relative_to(ROOT) for page in (ROOT / "docs").glob("*.md")), EXAMPLE_README]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
TRAIN, PREVIEW = "examples.mosaic_streaming.train", "examples.mosaic_streaming.preview"
PLANS, RECIPES, TITAN_0_3 = Path("docs/plans.md"), Path("docs/recipes.md"), Path("docs/torchtitan-0.3.md")
"""Pages with files to write, and the page with flags and settings of TorchTitan 0.3."""

RUN_BY = {
    "docs/data.md": ("tests/e2e/test_data_prep.py", "folder"),
    "README.md": ("tests/e2e/test_train.py", "test_the_documented_command_trains_on_the_demo_data"),
}
"""Pages whose commands another test runs, with its file and the function that does so: of data.md all that it can, of
the README the second torchrun command."""

TRAIN_COMMAND = (
    "torchrun --nproc_per_node=1 -m examples.mosaic_streaming.train "
    "--config examples/mosaic_streaming/configs/mosaic_job.toml "
    "--mosaic-config examples/mosaic_streaming/configs/mosaic_dataloader.toml"
)
TRAIN_20 = f"{TRAIN_COMMAND} -- --training.steps=20 --metrics.enable_tensorboard=true"

NOT_RUN = {
    TRAIN_20: "RUN_BY has the test that runs it",
    "make demo": "runs before the commands of a page that needs what it leaves",
    "git clone <this repository> && cd <its folder>": "needs a network",
    "huggingface-cli download": "needs a network",
    "python -m pytest": "runs a part of the tests",
    "export PYTHONPATH=$HOME/my_torchtitan": "needs a user's fork",
    "torchrun --nnodes=2": "needs two machines; tests/e2e/test_torchrun.py has two",
    "NNODES=2 MASTER=node-0 configs/launch/multinode.sh": "the same",
    "sbatch ": "needs Slurm; tests/e2e/test_recipes.py has commands like Slurm's",
    "PYTHONPATH=. torchrun --nproc_per_node=8": "needs eight GPUs",
    "torchrun --nproc_per_node=8": "the same",
    f"{TRAIN_COMMAND} --mosaic-position": "needs a checkpoint of a run on TorchTitan 0.2",
}
"""How the commands begin that the long test doesn't run, and why."""

MADE = ("outputs/", "data/", "my_", "moved.toml", "docs.jsonl")
"""How the names of files begin that users or commands of the pages make."""

USERS_OWN = ("s3:", "~/", "assets/hf/", "streaming/")
"""How other names begin that are no files of the project."""

UPSTREAM_MESSAGES = {
    "Invalid parallel dims:": "TorchTitan",
    "Truncating to max_seq_len=": "llm-foundry",
    "has removed all loss-generating tokens": "llm-foundry",
    "No space left on device": "Linux",
}
"""Parts of messages in the troubleshooting page that others write."""


def text_of(page: Path) -> str:
    """A page."""
    return (ROOT / page).read_text()


def blocks(page: Path, language: str) -> list[str]:
    """A page's blocks in a language, without the indentation of a list."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^ *```$", text_of(page), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, kind, block in found if kind == language]


def without_blocks(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


@functools.cache
def commands(page: Path) -> list[str]:
    """A page's commands, as the shell gets them; those of one line without more spaces than one."""
    found: list[str] = []
    for block in blocks(page, "bash"):
        begun = ""
        for line in block.replace("\\\n", " ").splitlines(keepends=True):
            begun += line
            with contextlib.suppress(ValueError):  # a quotation goes on
                if shlex.split(begun):
                    found.append(begun.strip())
                begun = ""
        assert not begun
    return [command if "\n" in command else re.sub(r" +", " ", command) for command in found]


def words_of(command: str) -> list[str]:
    """The words of a command, without variables that are set for it, and without where its output goes."""
    words = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), shlex.split(command)))
    return words[: words.index(">")] if ">" in words else words


def is_of_installed(page: Path) -> bool:
    """Whether a page has flags and settings of the TorchTitan that is installed."""
    return (page == TITAN_0_3) != IS_0_2


EVERY_COMMAND = [(page, command) for page in PAGES for command in commands(page)]


def check_files(words: list[str]) -> None:
    """What follows --config and the like is a file of the project, or one that a command of a page makes."""
    for flag, value in itertools.pairwise(words):
        if flag.endswith("config") and not (flag == "--config" and "--module" in words):
            assert value.startswith(MADE) or (ROOT / value).is_file(), value


def check_titan_flags(config: str, flags: list[str]) -> None:
    """TorchTitan takes the flags after `--`. A user's own model isn't there to be looked up."""
    flags = [os.path.expandvars(flag) for flag in flags if "custom_import" not in flag]
    run_rank_values(lambda: load_config(config, *flags, ASSETS) and None)


def check_command(page: Path, command: str) -> None:
    """The program that a command calls takes its flags. Of some, this only shows in the tests that run them.

    TorchTitan's flags are left out where another generation of it is installed than the page's.
    """
    words = words_of(command)
    if words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= TARGETS
    elif words[0] == "torchrun":
        module = words.index("-m")
        assert words[module + 1] == TRAIN
        get_args_parser().parse_args(words[1:])
        flags, titan_flags = parse_flags(words[module + 2 :])
        check_files(words)
        if is_of_installed(page) and not flags.module:  # a test of its own has those with --module
            check_titan_flags(flags.config, titan_flags)
    elif words[:3] == ["python", "-m", PREVIEW]:
        flags, titan_flags = build_parser().parse(words[3:])
        check_files(words)
        if is_of_installed(page):
            check_titan_flags(flags.config, titan_flags)
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2])
        assert all(word.startswith(MADE) or (ROOT / word).exists() for word in words[3:])
    elif words[:2] == ["huggingface-cli", "download"]:
        parser = argparse.ArgumentParser()
        DownloadCommand.register_subcommand(typing.cast(Any, parser.add_subparsers()))
        parser.parse_args(words[1:])
    elif scripts := [word for word in words if word.startswith("configs/launch/")]:
        files = [word for word in words if word.endswith(".toml")]
        assert all((ROOT / path).is_file() for path in (*scripts, *files))
        if is_of_installed(page):
            check_titan_flags(files[0], words[words.index(files[-1]) + 1 :])
    elif words[0] in ("mkdir", "mv"):
        assert all(word.startswith(MADE) for word in words[1:])
    else:
        assert words[:2] == ["python", "-c"] or words[0] in ("cp", "export", "git", "llmfoundry", "sed")


@pytest.mark.parametrize(("page", "command"), EVERY_COMMAND, ids=lambda value: str(value)[:60])
def test_each_command_is_one_that_the_parsers_take(page: Path, command: str) -> None:
    check_command(page, command)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_plans_in_the_pages_have_tables_and_keys_of_plans(page: Path) -> None:
    plans = [content for content in map(tomllib.loads, blocks(page, "toml")) if is_plan(content)]
    for content in plans:
        check_tables(content, str(page))
    assert plans or page not in (PLANS, RECIPES)


@only_0_3
def test_commands_with_a_module_make_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [block] = blocks(TITAN_0_3, "python")
    (tmp_path / block.split()[1]).write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    with_module = [words_of(command) for command in commands(TITAN_0_3) if "--module" in command]
    assert len(with_module) == 2
    for words in with_module:
        flags, titan_flags = parse_flags(words[words.index("-m") + 2 :])
        [steps] = run_rank_values(lambda: titan.load_job(flags, titan_flags).job_config.training.steps)  # noqa: B023
        assert f"--training.steps={steps}" in titan_flags


def test_pages_have_commands() -> None:
    assert len(EVERY_COMMAND) >= 30


def test_tests_that_run_commands_exist() -> None:
    for page, (file, function) in RUN_BY.items():
        assert Path(page) in PAGES
        defined = {node.name for node in ast.parse(text_of(Path(file))).body if isinstance(node, ast.FunctionDef)}
        assert function in defined
    assert 'PAGE = Path("docs/data.md")' in text_of(Path(RUN_BY["docs/data.md"][0]))
    assert 're.findall(r"```bash' in text_of(Path(RUN_BY["README.md"][0])), "the command is read from the page"


def test_each_exception_is_still_in_the_pages() -> None:
    every = [command for _, command in EVERY_COMMAND]
    assert [begin for begin in NOT_RUN if not any(command.startswith(begin) for command in every)] == []
    troubles = text_of(Path("docs/troubleshooting.md"))
    assert [words for words in UPSTREAM_MESSAGES if words not in troubles] == []


def test_the_two_commands_of_the_example_are_on_both_pages() -> None:
    found = [command for command in commands(README) if command.startswith(TRAIN_COMMAND)]
    assert found == [TRAIN_COMMAND, TRAIN_20]
    assert commands(EXAMPLE_README) == found


def test_readme_is_short() -> None:
    readme = text_of(README)
    assert len(readme.splitlines()) <= 200
    assert len(readme.split()) <= 1550
    assert len(text_of(EXAMPLE_README).splitlines()) <= 80


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)", without_blocks(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, CHANGELOG], ids=str)
def test_each_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", without_blocks(text_of(page)))):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = ROOT / page.parent / name if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_each_page_is_linked_from_the_readme() -> None:
    assert [page for page in PAGES[1:] if f"({page})" not in text_of(README)] == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_places_of_flags_are_told_in_the_same_words(page: Path) -> None:
    text = " ".join(without_blocks(text_of(page)).split())
    assert set(re.findall(r"(\w+) `--`", text)) <= {"after", "without"}


def job_keys(config: type, prefix: str = "") -> Iterator[str]:
    """The keys of TorchTitan's job config."""
    for name, kind in typing.get_type_hints(config).items():
        yield prefix + name
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from job_keys(kind, f"{prefix}{name}.")


@functools.cache
def settings() -> set[str]:
    """The settings of the TorchTitan that is installed, and those of a job's file that are others there."""
    if IS_0_2:
        from torchtitan.config import JobConfig

        return set(job_keys(JobConfig))
    return {key for key, *_ in leaves(job_config())} | {*RENAMED, *GONE, *NO_FLAGS} | {"activation_checkpoint.mode"}


@pytest.mark.parametrize("page", [*PAGES, CHANGELOG], ids=str)
def test_settings_modules_targets_and_files_in_the_text_exist(page: Path) -> None:
    sections = "|".join(sorted({key.partition(".")[0] for key in settings()}))
    dataset = {key for keys in DATASET_KEYS.values() for key in keys} | {"eos_token_id", "bos_token_id"}
    dataset |= {"token_encoding_type", "remote", "local", "split", "decoder_only_format", "streams", "batch_size"}
    for code in re.findall(r"`([^`\n]+)`", without_blocks(text_of(page))):
        for key in re.findall(rf"(?<![\w./])(?:--)?((?:{sections})\.(?:no-)?[a-z_]+)", code):
            assert not is_of_installed(page) or key.replace(".no-", ".") in settings() or key.endswith(".py"), code
        for key in re.findall(r"(?<![\w./])dataset\.([a-z_]+)", code):
            assert key in dataset, code
        if module := re.match(r"python -m ([\w.]+)", code):
            assert importlib.util.find_spec(module[1]) or page == CHANGELOG, code
        if target := re.match(r"make (?:[A-Z]+=[\d.]+ )?([a-z][a-z-]*)", code):
            assert target[1] in TARGETS, code
        if re.fullmatch(r"(?:[\w.-]+/)+(?:[\w.-]+\.(?:py|toml|sh|md))?", code):
            places = [ROOT, ROOT / "configs", EXAMPLE, EXAMPLE / "titan"]
            assert code.startswith((*MADE, *USERS_OWN)) or any((place / code).exists() for place in places), code


def test_names_in_the_tables_of_the_architecture_exist() -> None:
    """Of a package, those that its `__init__` exports; of a file, those that it defines; each patch, and no other."""
    page = text_of(Path("docs/architecture.md"))
    tables = page.split("## Top-level files")[1].split("\n## Questions")[0]
    for name, names in re.findall(r"^\| `([\w./]+)` \|.*\| (.*) \|$", tables, re.MULTILINE):
        source = (EXAMPLE / name / "__init__.py" if name.endswith("/") else EXAMPLE / name).read_text()
        for defined in re.findall(r"`(\w+)`", names):
            assert re.search(rf"\b{defined}\b", source), f"{defined} in {name}"
    patches = page.split("**What is patched upstream?**")[1].split("\n**")[0]
    written = re.findall(r"^\| `(\w+\.py)` \|", patches, re.MULTILINE)
    assert written == sorted(path.name for path in (EXAMPLE / "upstream").glob("*.py") if path.name != "__init__.py")


@only_0_2
def test_flavors_that_mask_documents_are_those_in_the_page() -> None:
    from examples.mosaic_streaming.titan.v0_2.models import base_spec, masks_documents

    written = {}
    for row in re.findall(r"^\| (`\w+_mosaic`.*) \|$", text_of(Path("docs/finetuning.md")), re.MULTILINE):
        models, _, flavors = re.sub(r" \(.*\)", "", row).partition(" | ")
        for model in re.findall(r"`(\w+)`", models):
            written[model] = re.findall(r"`([^`]+)`", flavors)
    found = {}
    for model in re.findall(r"`(\w+_mosaic)`", text_of(README)):
        flavors = base_spec(model).model_args
        found[model] = [flavor for flavor, model_args in flavors.items() if masks_documents(model_args)]
    assert written == found


def written_words() -> str:
    """All that the code can print: its strings, one a line, with … for values."""
    found: list[str] = []
    for path in EXAMPLE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
    return "\n".join(found)


def test_messages_in_the_troubleshooting_page_are_those_of_the_code() -> None:
    words, missing = written_words(), []
    page = text_of(Path("docs/troubleshooting.md")).split("## No error")[0]
    for row in re.findall(r"^\| (.*?) \|", page, re.MULTILINE):
        for message in re.findall(r"``(.+?)``|`([^`]+)`", row):
            for piece in re.split(r" ?… ?|\(validate_hash\)|\b[NM]\b", "".join(message)):
                piece = piece.strip(" ,.'")
                if len(piece) > 8 and piece not in words and piece not in UPSTREAM_MESSAGES:
                    missing.append(piece)
    assert not missing, "worded otherwise in the code: " + "; ".join(missing)


def runs_here(page: Path) -> list[str]:
    """A page's commands that the long test runs: a command of several pages on the first of them."""
    if str(page) == "docs/data.md":
        return []  # RUN_BY has the test that does
    if not is_of_installed(page):
        return []
    earlier = {command for other in PAGES[: PAGES.index(page)] for command in commands(other)}
    return [command for command in commands(page) if command not in earlier and not command.startswith(tuple(NOT_RUN))]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the repository, with this environment and the input that the pages speak of."""
    folder = tmp_path / "copy"
    left_out = (".git", ".venv*", ".tools", "data", "outputs", ".*_cache", "__pycache__", ".hypothesis")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out))
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    documents = [{"text": path.read_text()} for path in sorted(Path(os.__file__).parent.glob("c*.py"))]
    (folder / "docs.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return folder


def shell(command: str, folder: Path) -> str:
    """What a command prints."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("page", [page for page in PAGES if runs_here(page)], ids=str)
def test_commands_run(page: Path, copy: Path) -> None:
    """All of a page, as a reader would; a training command that doesn't say for how long does two steps."""
    if "outputs/demo" in "".join(runs_here(page)):
        shell("make --assume-old=.venv/.synced demo", copy)
    else:
        shell("python -W ignore -m examples.mosaic_streaming.make_demo_data", copy)
    for block in blocks(page, "python"):
        name = re.match(r"# (\w+\.py)\n", block)
        assert name, "a block of Python says which file it is"
        (copy / name[1]).write_text(block)
    for block in blocks(page, "toml"):
        if name := re.match(r"# (my_\w+\.toml)\n", block):
            (copy / name[1]).write_text(block)
    printed = ""
    for command in runs_here(page):
        if "torchrun" in command and "--training.steps" not in command:
            command += " --training.steps=2" if " -- " in command else " -- --training.steps=2"
        printed += shell(command, copy)
    if page in (PLANS, RECIPES):
        [shown] = blocks(page, "")
        assert [line for line in shown.splitlines() if line not in printed] == []
    if page == RECIPES:
        assert "distinct tokens: [" in printed
