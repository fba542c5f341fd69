"""The pages: short enough, with links that lead somewhere, and commands that a test runs or the real parsers take."""

import ast
import contextlib
import importlib.util
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.mosaic_streaming import titan
from examples.mosaic_streaming.config import parse_flags
from examples.mosaic_streaming.preview.__main__ import build_parser
from tests.support.ranks import run_rank_values

README = Path("README.md")
PAGES = [README, *sorted(Path("docs").glob("*.md")), Path("examples/mosaic_streaming/README.md")]
TARGETS = set(re.findall(r"^([a-z-]+):", Path("Makefile").read_text(), re.MULTILINE))
TRAIN, PREVIEW = "examples.mosaic_streaming.train", "examples.mosaic_streaming.preview"

RUN_BY = {
    "docs/data.md": ("tests/e2e/test_data_prep.py", "folder"),
    "README.md": ("tests/e2e/test_train.py", "test_the_documented_command_trains_on_the_demo_data"),
}
"""Pages whose commands a test runs, with its file and the function that does so: of data.md all, of the README the
second torchrun command."""


def commands(text: str) -> list[list[str]]:
    """The words of each command in the bash blocks of a page; a command may go on over lines."""
    found: list[list[str]] = []
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        begun = ""
        for line in block.replace("\\\n", " ").splitlines(keepends=True):
            begun += line
            with contextlib.suppress(ValueError):  # a quotation goes on
                words = shlex.split(begun)
                found += [words] if words else []
                begun = ""
        assert not begun
    return found


def without_code(text: str) -> str:
    """A page without its code, in blocks and in lines."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def each_command() -> Iterator[tuple[str, list[str]]]:
    """All commands of all pages, with the page."""
    for page in PAGES:
        for command in commands(page.read_text()):
            yield str(page), command


def check_files(words: list[str]) -> None:
    """What follows --config and the like is a file of the project."""
    for flag, value in itertools.pairwise(words):
        if flag.endswith("config"):
            assert Path(value).is_file(), value


def check_titan_flags(config: str, flags: list[str]) -> None:
    """TorchTitan takes the flags behind the `--`."""
    run_rank_values(lambda: titan.load_job_config([f"--job.config_file={config}", *flags]) and None)


def test_readme_is_short() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 1600
    assert len(PAGES[-1].read_text().splitlines()) <= 80


@pytest.mark.parametrize("page", [*PAGES, Path("CHANGELOG.md")], ids=str)
def test_each_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_tests_that_run_commands_exist() -> None:
    for page, (file, function) in RUN_BY.items():
        assert Path(page) in PAGES
        defined = {node.name for node in ast.parse(Path(file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert function in defined
    assert 'PAGE = Path("docs/data.md")' in Path(RUN_BY["docs/data.md"][0]).read_text()
    assert 're.findall(r"```bash' in Path(RUN_BY["README.md"][0]).read_text(), "the command is read from the page"


def test_each_command_is_run_by_a_test_or_is_one_that_the_parsers_take() -> None:
    checked = 0
    for page, words in each_command():
        if page == "docs/data.md":
            continue  # tests/e2e/test_data_prep.py runs them
        checked += 1
        if words[0] in ("git", "export"):
            continue
        if words[0] == "make":
            assert set(words[1:]) <= TARGETS, words
        elif words[0] == "torchrun":
            module = words.index("-m")
            assert words[module + 1] == TRAIN
            flags, titan_flags = parse_flags(words[module + 2 :])
            check_files(words)
            check_titan_flags(flags.config, titan_flags)
        else:
            assert words[:3] == ["python", "-m", PREVIEW], (page, words)
            _, titan_flags = build_parser().parse(words[3:])
            check_files(words)
            check_titan_flags("examples/mosaic_streaming/configs/mosaic_job.toml", titan_flags)
    assert checked >= 12


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_modules_and_targets_in_the_text_exist(page: Path) -> None:
    for code in re.findall(r"`([^`\n]+)`", page.read_text()):
        if module := re.match(r"python -m ([\w.]+)", code):
            assert importlib.util.find_spec(module[1]), code
        if target := re.match(r"make ([a-z][a-z-]*)", code):
            assert target[1] in TARGETS, code
