"""A mistake in a file is told in one line before anything slow is imported, by training and by preview."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.jobs import write_files
from tests.support.titan import IS_0_2

SLOW = {"torch", "torchtitan", "llmfoundry", "streaming", "composer", "transformers"}
COMMANDS = {"train": ["train"], "preview": ["preview", "plan"]}
NO_VALIDATION = "--validation.no-enable" if IS_0_2 else "--validator.no-enable"
CODE = """
import json, runpy, sys
try:
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
finally:
    print(json.dumps([*sys.modules]))
"""
OWN_LOADER = """
from typing import Any
from llmfoundry import registry
from llmfoundry.data.text_data import build_text_dataloader

def build(own_key: int, **arguments: Any) -> Any:
    assert own_key == 3
    return build_text_dataloader(**arguments)

registry.dataloaders.register("text", func=build)
"""
"""A module that puts another loader in the place of llm-foundry's."""


def replaced(name: str, old: str, new: str) -> Callable[[Path], object]:
    """A mistake: other words in a file."""
    return lambda files: (files / name).write_text((files / name).read_text().replace(old, new))


def a_plan(content: str) -> Callable[[Path], object]:
    """A mistake: a plan in place of the loader's file, which moves to `first.toml`."""

    def write(files: Path) -> None:
        loader = (files / "loader.toml").rename(files / "first.toml").read_text()
        (files / "second.toml").write_text(loader.replace("shuffle =", 'batching_method = "random"\nshuffle ='))
        (files / "loader.toml").write_text(content)

    return write


def a_yaml(content: str) -> Callable[[Path], object]:
    """A mistake: a plan whose loader is a YAML file."""

    def write(files: Path) -> None:
        (files / "loader.yaml").write_text(content)
        (files / "loader.toml").write_text('[[stage]]\nloader = "loader.yaml"\n')

    return write


STAGES = '[[stage]]\nloader = "first.toml"\n[[stage]]\nloader = "second.toml"\nfrom_step = '
MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no job file": (lambda files: (files / "job.toml").unlink(), "Can't read {files}/job.toml: No such file"),
    "no loader file": (lambda files: (files / "loader.toml").unlink(), "Can't read {files}/loader.toml: No such file"),
    "TOML of the job": (replaced("job.toml", "[model]", "[model"), "{files}/job.toml is not valid TOML: "),
    "TOML of the loader": (replaced("loader.toml", "=", "= ="), "{files}/loader.toml is not valid TOML: "),
    "no section": (replaced("job.toml", "[metrics]", "[[metrics]]"), "metrics = [{{'log_freq': 1, "),
    "no assets": (replaced("job.toml", "assets/", "nothing/"), "model.hf_assets_path = 'tests/nothing/tokenizer' has"),
    **(
        {
            "key of the job": (
                replaced("job.toml", "steps", "stepps"),
                "{files}/job.toml: unknown. Keys like it: training.",
            )
        }
        if IS_0_2
        else {}  # only 0.3's own classes say which keys it has
    ),
    "YAML": (a_yaml("train_loader: [\n"), "{files}/loader.yaml is not valid YAML: "),
    "section of YAML": (a_yaml("eval_loader: {}\n"), "{files}/loader.yaml: expected one `train_loader`, "),
    "loader": (replaced("loader.toml", '"text"', '"txt"'), "name = 'txt' in {files}/loader.toml, expected one of: "),
    "key": (replaced("loader.toml", "num_workers", "num_worker"), "num_worker (did you mean num_workers?)"),
    "key of dataset": (replaced("loader.toml", "shuffle", "shufle"), "dataset.shufle (did you mean shuffle?)"),
    "type": (replaced("loader.toml", "= true", "= 1"), "dataset.shuffle = 1 in {files}/loader.toml, expected true"),
    "unit": (
        replaced("loader.toml", "shuffle = true", 'cache_limit = "1xb"'),
        "dataset.cache_limit = '1xb' in {files}",
    ),
    "no index": (replaced("loader.toml", "/stream", "/nowhere"), "No index.json in {files}/nowhere (dataset in "),
    "key of a plan": (a_plan('[[stage]]\nloaders = "first.toml"\n'), "loaders (did you mean loader?)"),
    "order of a stage": (a_plan(f"{STAGES}3\n"), "dataset.batching_method = 'random' in {files}/second.toml, stage 2"),
    "steps of a plan": (a_plan(f"{STAGES}0\n"), "from_step = 0 in stage 2 of {files}/loader.toml, expected "),
}


def run(command: str, files: Path, *flags: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run a command on files in a new Python: how it ended, and which slow packages it had imported by then."""
    config = ["--config", f"{files}/job.toml", "--mosaic-config", f"{files}/loader.toml", *flags]
    module, *arguments = COMMANDS[command]
    python = [sys.executable, "-c", CODE, f"examples.mosaic_streaming.{module}", *arguments, *config]
    env = os.environ | {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "PYTHONPATH": f".:{files}"}
    ended = subprocess.run(python, env=env, capture_output=True, text=True, timeout=200)
    return ended, SLOW & {*json.loads(ended.stdout.splitlines()[-1])}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("make", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_told_before_slow_imports(
    tmp_path: Path, make: Callable[[Path], object], message: str, command: str
) -> None:
    make(write_files(tmp_path))
    ended, imported = run(command, tmp_path)
    assert ended.returncode == 1
    [line] = ended.stderr.splitlines()
    assert line.startswith("ConfigError: ") and message.format(files=tmp_path) in line
    assert not imported


@pytest.mark.parametrize(("flags", "is_read"), [([], True), (["--", NO_VALIDATION], False)])
def test_validation_file_is_checked_if_it_is_read(tmp_path: Path, flags: list[str], is_read: bool) -> None:
    write_files(tmp_path)
    replaced("job.toml", "[checkpoint]", "[validation]\nenable = true\n[checkpoint]")(tmp_path)
    (tmp_path / "held_out.toml").write_text(f'name = "text"\n[dataset]\nlocal = "{tmp_path}/nowhere"\n')
    ended, imported = run("preview", tmp_path, "--mosaic-validation-config", f"{tmp_path}/held_out.toml", *flags)
    assert (f"No index.json in {tmp_path}/nowhere" in ended.stderr) == is_read
    assert bool(imported) != is_read
    assert (ended.returncode == 1) == is_read


def test_code_of_the_users_may_register_a_loader(tmp_path: Path) -> None:
    """What its builder takes is only known once it is imported."""
    write_files(tmp_path)
    replaced("job.toml", "[checkpoint]", '[experimental]\ncustom_import = "own_loader"\n[checkpoint]')(tmp_path)
    replaced("loader.toml", "num_workers", "own_key = 3\nnum_workers")(tmp_path)
    (tmp_path / "own_loader.py").write_text(OWN_LOADER)
    ended, _ = run("preview", tmp_path)
    assert ended.returncode == 0, ended.stderr
    (tmp_path / "own_loader.py").write_text("")
    ended, _ = run("preview", tmp_path)
    assert ended.returncode == 1 and "own_key (valid: " in ended.stderr.splitlines()[-1]
