"""llm-foundry's training YAMLs give the loaders that the same settings in a TOML file give."""

import functools
from pathlib import Path

import pytest

from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.flags import read_loader, read_loaders
from examples.mosaic_streaming.train import main
from tests.jobs import command, logged
from tests.ranks import run_ranks

YAML = """\
variables:
  data_local: {stream}
  global_seed: 17
max_seq_len: 16
model:
  name: mpt_causal_lm
train_loader:
  name: text
  dataset:
    local: ${{variables.data_local}}
    remote: null
    num_canonical_nodes: null
    shuffle: true
    shuffle_seed: ${{variables.global_seed}}
    max_seq_len: 17
  drop_last: true
  num_workers: 0
eval_loader:
- label: held_out
  name: text
  dataset:
    local: ${{variables.data_local}}
  num_workers: 0
optimizer:
  lr: 6.0e-4
"""


@pytest.fixture
def yaml(files: Path) -> str:
    """A training YAML of llm-foundry's form."""
    (files / "train.yaml").write_text(YAML.format(stream=files / "stream"))
    return str(files / "train.yaml")


def test_interpolations_are_resolved_and_other_sections_named(yaml: str, capsys: pytest.CaptureFixture[str]) -> None:
    loader, none = read_loaders(yaml, None)
    assert none is None
    assert loader.path == yaml
    assert loader.config["dataset"]["shuffle_seed"] == 17
    assert not {"remote", "num_canonical_nodes"} & set(loader.config["dataset"]), "null means the default"
    assert loader.config["dataset"]["local"].endswith("/stream")
    assert capsys.readouterr().err == (
        f"{yaml}: read train_loader, ignored variables, max_seq_len, model, eval_loader, optimizer.\n"
    )
    again, held_out = read_loaders(yaml, yaml)
    assert again == loader
    assert held_out and held_out.config == {
        "name": "text",
        "dataset": {"local": loader.config["dataset"]["local"]},
        "num_workers": 0,
    }
    assert capsys.readouterr().err == (
        f"{yaml}: read train_loader, eval_loader, ignored variables, max_seq_len, model, optimizer.\n"
    )


def test_what_other_sections_refer_to_need_not_be_there(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("run_name: ${oc.env:NOT_SET_ANYWHERE}\ntrain_loader: {name: text}\n")
    assert read_loaders(f"{tmp_path}/train.yaml", None)[0].config == {"name": "text"}


def test_yaml_trains_and_validates_as_toml_does(files: Path, yaml: str) -> None:
    (files / "loader.toml").write_text(
        f'name = "text"\n[dataset]\nlocal = "{files}/stream"\nshuffle = true\nshuffle_seed = 17\n'
    )
    (files / "validation.toml").write_text(f'name = "text"\n[dataset]\nlocal = "{files}/stream"\n')
    flags = ("--debug.seed=3", "--validation.enable", "--validation.seq_len=16", "--validation.local_batch_size=4")
    by_toml = command(files, *flags)
    by_yaml = [yaml if argument == f"{files}/loader.toml" else argument for argument in by_toml]
    runs = []
    for arguments, validation in ((by_toml, f"{files}/validation.toml"), (by_yaml, yaml)):
        given = ["--mosaic-validation-config", validation, *arguments]
        ranks = run_ranks(functools.partial(main, given))
        assert ranks[0].code == 0, ranks[0].output
        validated = [line.split("loss: ")[1].split()[0] for line in ranks[0].output.splitlines() if "validate" in line
                     and "loss: " in line]  # fmt: skip
        assert ranks[0].output.count("Training reads the same as validation: ") == 1
        runs.append((logged(ranks), validated))
    assert runs[0] == runs[1]
    assert len(runs[0][0]) == 4 and len(runs[0][1]) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("train_loader: {name: '${nothing}'}", "train_loader in"),
        ("train_loader: {name: '${nothing}'}", "Interpolation key 'nothing' not found"),
        ("model: {}", "expected one `train_loader`, as in an llm-foundry training YAML, but it has: model."),
        ("train_loader: [{}, {}]", "expected one `train_loader`, as in an llm-foundry training YAML, but it has 2 of"),
        ("train_loder: {}\nmodel: {}", "but it has: train_loder."),
        ("", "but it has: nothing."),
        ("train_loader: {}\nother: '${'", "is not valid YAML"),
        ("5", "Can't read"),
    ],
)
def test_yaml_that_is_none_is_told(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "train.yml").write_text(content)
    with pytest.raises(ConfigError) as told:
        read_loader(str(tmp_path / "train.yml"), "train_loader")
    assert message in str(told.value) and str(tmp_path) in str(told.value)


def test_missing_yaml_is_told() -> None:
    with pytest.raises(ConfigError, match=r"Can't read /nowhere\.yaml: No such file"):
        read_loader("/nowhere.yaml", "train_loader")
