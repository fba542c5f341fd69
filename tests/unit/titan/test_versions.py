"""Which TorchTitan may be installed, and how each answers flags of the other."""

import importlib.metadata
import re
from pathlib import Path

import pytest

from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.titan.job_values import leaves
from examples.mosaic_streaming.titan.loaded import settings_given
from examples.mosaic_streaming.titan.versions import generation, names_as_given
from examples.mosaic_streaming.train import main
from tests.support.jobs import command
from tests.support.ranks import run_ranks
from tests.support.titan import GENERATION, load, only_0_2

JOB = "examples/mosaic_streaming/configs/mosaic_job.toml"


@pytest.mark.parametrize(
    ("version", "found"), [("0.2.2", "v0_2"), ("0.2.3", "v0_2"), ("0.3.0", "v0_3"), ("0.3.1.dev20261101", "v0_3")]
)
def test_generation_is_that_of_the_installed_version(monkeypatch: pytest.MonkeyPatch, version: str, found: str) -> None:
    assert generation() == GENERATION
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert generation() == found


@pytest.mark.parametrize("version", ["0.1.0", "0.2.1", "0.4.0", "1.0"])
def test_other_version_is_refused_with_the_range_in_one_line(
    files: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    [rank] = run_ranks(lambda: main(command(files)))
    assert rank.code == 1
    assert rank.output == f"ConfigError: TorchTitan {version} is installed, expected torchtitan >= 0.2.2, < 0.4.\n"


def test_torchtitan_that_is_missing_is_told_in_one_line(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    [rank] = run_ranks(lambda: main(command(files)))
    assert rank.output == "ConfigError: TorchTitan is not installed. Install torchtitan >= 0.2.2, < 0.4.\n"


@only_0_2
@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--dump_folder=here", "TorchTitan 0.2 calls it --job.dump_folder=here."),
        ("--hf_assets_path=there", "TorchTitan 0.2 calls it --model.hf_assets_path=there."),
        ("--validator.no-enable", "TorchTitan 0.2 calls it --validation.no-enable."),
        ("--module=llama3", "give the job's file with --config, before the `--`."),
        ("--validator.dataloader.dataset=c4", "Streams are set in the file of --mosaic-config."),
        ("--mosaic-validation-config=x", "Give it before the `--`."),
    ],
)
def test_flag_of_0_3_is_answered_with_the_right_spelling(flag: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        load(JOB, flag)


@only_0_2
def test_keys_read_in_torchtitans_source_are_those_of_its_class() -> None:
    from torchtitan.config import JobConfig

    from examples.mosaic_streaming.titan.v0_2.load import job_keys

    assert job_keys() == {key for key, *_ in leaves(JobConfig())}, "adapt job_keys in titan/v0_2/load.py"


@only_0_2
def test_module_may_add_keys_to_a_jobs_file(files: Path) -> None:
    (files / "own_keys.py").write_text(
        "from dataclasses import dataclass, field\n"
        "@dataclass\nclass Own:\n    key: int = 1\n"
        "@dataclass\nclass JobConfig:\n    own: Own = field(default_factory=Own)\n"
    )
    job = files / "job.toml"
    job.write_text(job.read_text() + "[own]\nkey = 3\n")
    with pytest.raises(ConfigError, match=re.escape(f"own.key in {job}: unknown. Keys like it: ")):
        load(job)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(files)
        assert load(job, "--job.custom_config_module=own_keys").job_config.own.key == 3


@only_0_2
def test_function_is_refused_with_what_is_expected(files: Path) -> None:
    [rank] = run_ranks(lambda: main(["--module", "llama3", "--config", "llama3_8b"]))
    assert rank.code == 1
    assert (
        "ConfigError: --module llama3: not a flag of TorchTitan 0.2. It belongs to 0.3: give the job's" in rank.output
    )


@pytest.mark.parametrize(
    ("said", "given"),
    [
        ("model.hf_assets_path = 'a', model.flavor = 'b'", "hf_assets_path = 'a', model_spec.flavor = 'b'"),
        ("my.model.flavor, validation.steps; training.steps", "my.model.flavor, validator.steps; training.steps"),
    ],
)
def test_settings_are_called_as_a_job_in_code_calls_them(said: str, given: str) -> None:
    for in_code, expected in ((True, given), (False, said)):
        with pytest.raises(ConfigError) as error, names_as_given(in_code):
            raise ConfigError(said)
        assert str(error.value) == expected


def test_settings_of_flags_are_those_that_torchtitan_reads() -> None:
    """Also with values of their own, and over those of the file, by their names in 0.3."""
    flags = [
        "--validation.no-enable",
        "--model.hf-assets-path",
        "/a-b",
        "--training.no_x",
        "--a.b=c-d=e",
        "--compile.enable",
    ]
    given = settings_given({"validation.enable": True, "training.steps": 4}, flags)
    assert given == {
        **{"validator.enable": "false", "hf_assets_path": "/a-b", "training.x": "false", "a.b": "c-d=e"},
        **{"compile.enable": "true", "training.steps": 4},
    }
