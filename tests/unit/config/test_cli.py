"""The command line, before anything slow is imported."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.mosaic_streaming.config.cli import parse_flags
from examples.mosaic_streaming.config.files import read_toml
from examples.mosaic_streaming.errors import ConfigError
from tests.support.titan import IS_0_2, load_config

JOB = "examples/mosaic_streaming/configs/mosaic_job.toml"
OURS = ["--config", "job.toml", "--mosaic-config", "loader.toml"]


def test_flags_behind_the_dashes_are_torchtitans() -> None:
    flags, titan = parse_flags([*OURS, "--", "--training.steps=20", "--", "x"])
    assert (flags.config, flags.mosaic_config) == ("job.toml", "loader.toml")
    assert titan == ["--training.steps=20", "--", "x"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (OURS[:2], "required: --mosaic-config"),
        ([], "required: --config"),
        ([*OURS, "--training.steps=20"], "--training.steps=20: not a flag of ours.*behind a `--`"),
        ([*OURS, "--", "--job.config_file=a.toml"], "with --config, before the `--`"),
        ([*OURS, "--", "--job.config-file", "a.toml"], "with --config, before the `--`"),
    ],
)
def test_wrong_command_line_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_flags(argv)


def test_both_spellings_of_booleans_mean_the_same_to_torchtitan() -> None:
    def parse(*flags: str) -> Any:
        return load_config(JOB, *flags)

    assert parse("--metrics.enable_tensorboard=true").metrics.enable_tensorboard
    assert parse("--metrics.enable-tensorboard=True").metrics.enable_tensorboard
    assert parse("--metrics.enable_tensorboard").metrics.enable_tensorboard
    assert not parse("--checkpoint.last_save_model_only=false").checkpoint.last_save_model_only
    assert not parse("--checkpoint.no-last-save-model-only").checkpoint.last_save_model_only
    if IS_0_2:
        assert parse("--training.dataloader.pin_memory=true").training.dataloader.pin_memory
    else:
        assert parse("--validator.enable=true").validator.enable


def test_true_is_kept_for_a_key_that_is_no_boolean() -> None:
    assert load_config(JOB, "--checkpoint.folder=true").checkpoint.folder == "true"


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Can't read .*nowhere.toml: No such file"):
        read_toml(str(tmp_path / "nowhere.toml"))


def test_syntax_error_is_told_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('name = "text"\nnum_workers = = 2\n')
    with pytest.raises(ConfigError, match=r"bad.toml is not valid TOML: .*line 2"):
        read_toml(str(path))


def test_help_has_our_flags_both_commands_and_the_way_to_torchtitans() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "examples.mosaic_streaming.train", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    for part in (
        "--config",
        "--mosaic-config",
        "--training.steps=20",
        "--metrics.enable_tensorboard=true",
        "-- --help",
    ):
        assert part in ended.stdout
    assert "torchtitan" not in ended.stderr, "--help imports what takes long"
