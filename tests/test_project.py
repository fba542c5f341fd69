"""The project's own files: what `make` installs, and whether each package that is imported is declared."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text())


def normal(name: str) -> str:
    """The name of a package, without its version and in the spelling that all names have."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", name)[0]).lower()


DECLARED = {normal(package) for package in PROJECT["project"]["dependencies"]}
FOR_DEVELOPERS = {normal(package) for group in PROJECT["dependency-groups"].values() for package in group}


def imported(folder: str) -> Iterator[tuple[str, str]]:
    """What a folder's sources import from elsewhere, also inside of functions, each with its file."""
    for path in sorted((HERE / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                if not (HERE / name).exists():
                    yield name, str(path.relative_to(HERE))


@pytest.mark.parametrize(
    ("folder", "declared"),
    [("examples", DECLARED), ("tests", DECLARED | FOR_DEVELOPERS), ("docs", DECLARED | FOR_DEVELOPERS)],
)
def test_each_package_that_is_imported_is_declared(folder: str, declared: set[str]) -> None:
    packages = packages_distributions()
    found = {(name, file) for name, file in imported(folder)}
    assert found or folder == "docs"
    missing = [
        (name, file) for name, file in found if not declared & {normal(one) for one in packages.get(name, [name])}
    ]
    assert not missing


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose environment is older than its lock file, with no uv anywhere."""
    shutil.copy(HERE / "Makefile", tmp_path)
    for file in ("requirements.lock", "requirements-titan-0.3.lock", "requirements-bench.lock", ".venv/.synced"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    return tmp_path


def made(checkout: Path, *words: str) -> str:
    """The commands that `make` would run."""
    command = ["make", "--dry-run", *words, "UV=.tools/bin/uv"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=30, check=True).stdout


@pytest.mark.parametrize("target", ["demo", "test", "bench", "lint"])
def test_nothing_is_installed_where_the_environment_is_as_the_lock_file_says(checkout: Path, target: str) -> None:
    (checkout / ".venv/.bench").touch()
    said = made(checkout, target)
    assert ".venv/bin/" in said
    assert "pip" not in said and ".tools" not in said


def test_changed_lock_file_is_installed_and_uv_before_it(checkout: Path) -> None:
    (checkout / ".venv/.synced").unlink()
    said = made(checkout, "demo")
    assert 0 < said.index("-m venv .tools") < said.index(".tools/bin/uv pip sync") < said.index("make_demo_data")


def test_other_torchtitan_has_an_environment_of_its_own(checkout: Path) -> None:
    said = made(checkout, "demo", "TITAN=0.3")
    sync = "pip sync --python .venv-titan-0.3 --require-hashes --compile-bytecode requirements-titan-0.3.lock"
    assert 0 < said.index(sync) < said.index(".venv-titan-0.3/bin/torchrun") < said.index("--dump_folder=outputs/demo")
    assert ".venv/" not in said
    with pytest.raises(subprocess.CalledProcessError):
        made(checkout, "demo", "TITAN=0.4")


def test_what_benchmarks_need_is_installed_again_after_an_environment_was(checkout: Path) -> None:
    assert ".tools/bin/uv pip install" in made(checkout, "bench")
