"""llm-foundry's training YAMLs give the loaders that the same settings in a TOML file give."""

import functools
from pathlib import Path
from typing import Any

import pytest

from examples.mosaic_streaming.config.files import read_loader
from examples.mosaic_streaming.config.plan import Plan, read_loaders
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.train import main
from tests.support.jobs import command, logged
from tests.support.ranks import run_rank_values, run_ranks
from tests.support.reading import write_turns
from tests.support.streams import build_loader, sample_tokens

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
    plan, none = read_loaders(yaml, None)
    loader = plan.stages[0].file
    assert none is None
    assert loader.path == yaml
    assert loader.config["dataset"]["shuffle_seed"] == 17
    assert not {"remote", "num_canonical_nodes"} & set(loader.config["dataset"]), "null means the default"
    assert loader.config["dataset"]["local"].endswith("/stream")
    assert capsys.readouterr().err == (
        f"{yaml}: read train_loader, ignored variables, max_seq_len, model, eval_loader, optimizer.\n"
    )
    again, held_out = read_loaders(yaml, yaml)
    assert again == plan == Plan.of(loader)
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
    assert read_loaders(f"{tmp_path}/train.yaml", None)[0].stages[0].file.config == {"name": "text"}


@pytest.mark.long
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


FINETUNING = """\
max_seq_len: 17
train_loader:
  name: finetuning
  dataset:
    streams:
      local:
        remote: ''
        local: {stream}
        split: train
    shuffle: true
    max_seq_len: ${{max_seq_len}}
    eos_token_id: {eos}
    packing_ratio: null
    predownload: null
    num_canonical_nodes: null
    allow_pad_trimming: false
    decoder_only_format: true
  drop_last: true
  pin_memory: true
  num_workers: 0
  prefetch_factor: 2
  persistent_workers: true
"""
"""As llm-foundry's own are, with the keys of its yamls/finetune/dbrx-full-ft.yaml and b200-yamls/llama-8b-8192.yaml."""


def read_finetuning(folder: Path, eos: int, more: str = "") -> Any:
    """The first batch of the YAML's loader, and what a checkpoint would record of its settings."""
    file = folder / "train.yaml"
    file.write_text(FINETUNING.format(stream=folder / "turns", eos=eos).replace("    shuffle:", f"{more}    shuffle:"))

    def read() -> Any:
        loader = build_loader(read_loader(str(file), "train_loader").config)
        inputs, labels = next(iter(loader))
        return inputs["input"].tolist(), labels.tolist(), loader.state_dict()

    [found] = run_rank_values(read)
    return found


def test_finetuning_yaml_of_llm_foundrys_is_read_with_its_eos_token_id(tmp_path: Path) -> None:
    write_turns(tmp_path / "turns/train", 64)
    found = read_finetuning(tmp_path, 1)
    assert "eos_token_id" not in str(found[2])
    assert read_finetuning(tmp_path, 1, "    bos_token_id: 0\n") == found
    assert read_finetuning(tmp_path, 9, "    override_eos_token_id_mismatch_error: true\n") == found
    samples = [sample_tokens(sample).tolist() for sample in range(64)]
    inputs, labels, _ = found
    for row, targets in zip(inputs, labels, strict=True):
        assert [*row, targets[-1]] in samples and targets == [-100] * 3 + row[4:] + targets[-1:]


def test_eos_token_id_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    write_turns(tmp_path / "turns/train", 64)
    with pytest.raises(
        AssertionError, match=r"ConfigError: dataset.eos_token_id = 0 in .*, but the tokenizer .* has 1"
    ):
        read_finetuning(tmp_path, 0)


def test_name_of_a_tokenizer_is_told_its_place(tmp_path: Path) -> None:
    write_turns(tmp_path / "turns/train", 64)
    with pytest.raises(
        AssertionError, match=r"tokenizer_name \(the tokenizer is that of model.hf_assets_path in the job"
    ):
        read_finetuning(tmp_path, 1, "    tokenizer_name: mosaicml/mpt-7b\n")


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
