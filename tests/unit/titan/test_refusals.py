"""Settings of the job config that upstream alone refuses: one line, in training and in preview; real crashes stay."""

import importlib
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from examples.mosaic_streaming import sampling
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.titan import check_job, job_values, make_job
from examples.mosaic_streaming.titan.job_values import AT_LEAST, leaves, wrong_job_values
from examples.mosaic_streaming.train import main
from tests.support.jobs import command, losses
from tests.support.looking import preview, printed
from tests.support.ranks import Rank, run_ranks
from tests.support.titan import IS_0_2, job_config, load, load_config, only_0_2, spell

CONFIGS = Path("examples/mosaic_streaming/configs")


def in_0_2(*cases: Any) -> tuple[Any, ...]:
    """Cases for TorchTitan 0.2 alone."""
    return cases if IS_0_2 else ()


def in_0_3(*cases: Any) -> tuple[Any, ...]:
    """Cases for TorchTitan 0.3 alone."""
    return () if IS_0_2 else cases


def refused(files: Path, *flags: str, world_size: int = 1) -> str:
    """The only line with an error, that training ends with; none of its ranks shows a traceback."""
    ranks = run_ranks(lambda: main(command(files, *flags)), world_size)
    said = "".join(rank.output for rank in ranks)
    assert ranks[0].code == 1 and "Traceback" not in said, said
    [line] = re.findall("^ConfigError: .*", said, re.MULTILINE)
    return str(line)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--training.seq_len=0"], "training.seq_len = 0 in the job config, expected a whole number, from 1 on."),
        pytest.param(
            ["--parallelism.data_parallel_shard_degree=3"],
            "Invalid parallel dims: dp_replicate(1) * dp_shard(3) * cp(1)",
            marks=pytest.mark.long,
        ),
        pytest.param(
            ["--optimizer.name=Muon"],
            "optimizer.name = 'Muon', expected one of: Adam, AdamW.",
            marks=pytest.mark.long,
        ),
    ],
)
def test_training_and_preview_refuse_it_in_the_same_line(files: Path, flags: list[str], message: str) -> None:
    line = refused(files, *flags)
    assert message in line
    assert line in printed(files, "plan", titan=tuple(flags), code=1).splitlines()


def check(*flags: str, ranks: int = 1) -> None:
    """What training and preview do with flags before they read any stream."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copy(CONFIGS / "mosaic_job.toml", folder)
        job, titan_flags = spell(Path(copy), flags)
        checked = load(job, *titan_flags)
        check_job(checked, ranks)
        make_job(checked, ranks, ranks)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--training.seq_len=-16"], "training.seq_len = -16 in the job config, expected a whole number, from 1 on."),
        *in_0_2((["--training.seq_len=15"], "training.seq_len = 15, but TorchTitan's models take multiples of 2: ")),
        *in_0_3(
            (
                ["--training.seq_len=15", "--parallelism.tensor_parallel_degree=2"],
                "training.seq_len = 15, but TorchTitan's models take multiples of 2: tensor-parallel x twice",
            ),
            (["--checkpoint.enable", "--checkpoint.keep_latest_k=1"], "We need to maintain at least 2 checkpoint rep"),
            (["--checkpoint.interval=0"], "mosaic_job.toml: Checkpoint interval needs to be at least 1 step."),
            (["--model.converters=a"], "--model.converters=a: not a flag of TorchTitan 0.3. Converters are arguments"),
            (["--quantize.linear.float8.emulate"], "Its converters are arguments of a model's `model_registry`."),
            (["--parallelism.expert_tensor_parallel_degree=2"], "The nearest is parallelism.expert_parallel_degree."),
        ),
        (["--metrics.log_freq=0"], "metrics.log_freq = 0 in the job config, expected a whole number, from 1 on."),
        (["--parallelism.tensor_parallel_degree=4"], "on 2 ranks: tensor_parallel_degree = 4 multiply to more."),
        (["--parallelism.tensor_parallel_degree=0"], "Parallelism degree should be >= 1, except for dp_shard."),
        (
            ["--parallelism.expert_parallel_degree=4"],
            "expert_parallel_degree = 4 (x expert_tensor_parallel_degree = 1)",
        ),
        *in_0_2(
            (
                ["--checkpoint.enable", "--checkpoint.keep_latest_k=1"],
                "checkpoint.keep_latest_k = 1, but TorchTitan keeps",
            )
        ),
        *in_0_2(
            (["--checkpoint.enable", "--checkpoint.interval=0"], "checkpoint.interval = 0 in the job config, expected")
        ),
        (["--checkpoint.enable", "--checkpoint.exclude_from_loading=data"], "exclude_from_loading has data, expected"),
        (["--checkpoint.enable", "--checkpoint.initial_load_path=/no"], "initial_load_path = '/no', but this machine"),
        (
            ["--checkpoint.enable", "--checkpoint.initial_load_in_hf"],
            "model.hf_assets_path = './tests/assets/tokenizer'",
        ),
        (
            ["--checkpoint.enable", "--checkpoint.initial_load_in_hf", "--checkpoint.no-initial-load-model-only"],
            "checkpoint.initial_load_in_hf = true, but checkpoint.initial_load_model_only = false"
            if IS_0_2
            else "initial_load_in_hf requires initial_load_model_only.",
        ),
        (
            ["--experimental.custom_import=no.where"],
            "experimental.custom_import = 'no.where', but Python finds no module",
        ),
        *in_0_2(
            (
                ["--job.custom_config_module=no.where"],
                "ModuleNotFoundError: No module named 'no'. The whole traceback is in",
            )
        ),
    ],
)
def test_what_would_fail_later_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check("--job.dump_folder=/nowhere", *flags, ranks=2)


@pytest.mark.parametrize(
    "flags",
    [
        ["--parallelism.tensor_parallel_degree=2"],
        ["--parallelism.expert_parallel_degree=2"],
        ["--checkpoint.enable", "--checkpoint.keep_latest_k=0", "--checkpoint.exclude_from_loading=dataloader"],
        [*in_0_2("--checkpoint.interval=0"), "--validation.freq=0", "--training.max_norm=inf", "--optimizer.lr=0"],
    ],
)
def test_what_runs_is_taken(flags: list[str]) -> None:
    check(*flags, ranks=2)


def test_checkpoint_to_begin_with_is_a_steps_folder(files: Path) -> None:
    for step in ("step-5", "step-10"):
        (files / "old" / step).mkdir(parents=True)
        (files / "old" / step / ".metadata").touch()
    with pytest.raises(ConfigError) as error:
        check("--checkpoint.enable", f"--checkpoint.initial_load_path={files}/old", "--job.dump_folder=/nowhere")
    assert f"has no .metadata, of a finished checkpoint. Name a step of it, such as {files}/old/step-10." in str(
        error.value
    )
    check("--checkpoint.enable", f"--checkpoint.initial_load_path={files}/old/step-5", "--job.dump_folder=/nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[training]\nsteps = "ten"', "training.steps = 'ten' in the job config, expected a whole number, from 1 on."),
        ("[training]\nseq_len = 16.0", "training.seq_len = 16.0 in the job config, expected a whole number"),
        ("[training]\nseq_len = true", "training.seq_len = True in the job config, expected a whole number"),
        ('[optimizer]\nlr = "1e-3"', "optimizer.lr = '1e-3' in the job config, expected a number, from 0 on."),
        ("[optimizer]\nlr = nan", "optimizer.lr = nan in the job config, expected a number"),
        ('[checkpoint]\nenable = "yes"', "checkpoint.enable = 'yes' in the job config, expected true or false."),
        (
            '[checkpoint]\nexclude_from_loading = "model"',
            "exclude_from_loading = 'model' in the job config, expected a list of strings",
        ),
        (
            '[lr_scheduler]\ndecay_type = "cos"',
            "decay_type = 'cos' in the job config, expected one of: linear, sqrt, cosine.",
        ),
        (
            "[training.dataloader]\nnum_workers = 1.5",
            "training.dataloader.num_workers = 1.5 in the job config, expected"
            if IS_0_2
            else "training.dataloader.num_workers = 1.5 in {path}: TorchTitan 0.3 has no such setting. Streams are",
        ),
        ("training = 3", "training = 3 in {path}, expected a section, [training], with its keys below."),
    ],
)
def test_value_of_another_type_in_the_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """TorchTitan takes them as they are: each would fail somewhere later, or count as true."""
    path = tmp_path / "job.toml"
    path.write_text(f'{text}\n[model]\nname = "llama3_mosaic"\n')
    with pytest.raises(ConfigError, match=re.escape(message.format(path=path))):
        load_config(path)


def test_each_limit_is_that_of_a_number_and_torchtitans_defaults_keep_them() -> None:
    config = job_config(checkpoint__enable=True, validation__enable=True)
    assert wrong_job_values(config) == []
    known = {key for key, *_ in leaves(config)}
    of_the_other = (
        {"validator.freq"} if IS_0_2 else {key for key in AT_LEAST if key.startswith(("optim", "validation"))}
    )
    assert AT_LEAST.keys() - known == of_the_other
    for key, least in ((key, least) for key, least in AT_LEAST.items() if key in known):
        section, name = key.split(".")
        before = getattr(getattr(config, section), name)
        setattr(getattr(config, section), name, least - 1)
        assert [f"{key} = {least - 1} " in line for line in wrong_job_values(config)] == [True]
        setattr(getattr(config, section), name, before)


def test_files_with_a_byte_order_mark_are_read(files: Path) -> None:
    for name in ("job.toml", "loader.toml"):
        (files / name).write_text((files / name).read_text().strip(), encoding="utf-8-sig")
    [rank] = run_ranks(lambda: main(command(files, "--training.steps=1")))
    assert rank.code == 0 and list(losses(rank.output)) == [1], rank.output
    assert preview(files, "plan")["run"]["global_batch_size"] == 4


@pytest.mark.parametrize(
    ("flags", "world_size", "message", "keys"),
    [
        *in_0_2((["--model.converters=foo"], 1, "KeyError: 'foo'", "model.converters")),
        pytest.param(
            *(["--optimizer.beta1=1"], 1, "ValueError: Invalid beta parameter at index 0: 1.0", ""),
            marks=pytest.mark.long,
        ),
        pytest.param(
            ["--activation_checkpoint.mode=selective", "--activation_checkpoint.selective_ac_option=foo"],
            1,
            "ValueError: Invalid selective AC option: foo.",
            "activation_checkpoint.selective_ac_option",
            marks=pytest.mark.long,
        ),
        pytest.param(
            ["--profiling.enable_profiling", "--profiling.profile_freq=1"],
            1,
            "AssertionError: profile_freq must be greater",
            "profiling.profile_freq",
            marks=pytest.mark.long,
        ),
        (
            ["--parallelism.pipeline_parallel_degree=2", "--parallelism.pipeline_parallel_schedule=Foo"],
            2,
            "ValueError: Unknown schedule name 'Foo'.",
            "parallelism.pipeline_parallel_schedule",
        ),
    ],
)
def test_what_torchtitan_refuses_before_the_first_step_is_one_line(
    files: Path, flags: list[str], world_size: int, message: str, keys: str
) -> None:
    line = refused(files, *flags, world_size=world_size)
    assert line.startswith(f"ConfigError: TorchTitan refuses this job: {message}")
    assert re.findall(r"Look at (.*) in the job config\.", line) == ([keys] if keys else [])
    [file] = re.findall(r"The whole traceback is in (.*)\.$", line)
    assert Path(file).parent == files / "outputs"
    assert "Traceback (most recent call last):" in Path(file).read_text()


def test_setting_that_is_handed_on_under_its_name_is_found(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(job_values.AT_LEAST, "training.gc_freq")
    line = refused(files, "--training.gc_freq=0")
    assert "AssertionError: gc_freq must be a positive integer (torchtitan.tools.utils, GarbageCollection.__ini" in line
    assert "Look at training.gc_freq in the job config." in line


def crashed(files: Path, monkeypatch: pytest.MonkeyPatch, where: object, name: str, error: BaseException) -> Rank:
    """A run in which a function fails."""

    def fail(*arguments: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(where, name, fail)
    [rank] = run_ranks(lambda: main(command(files)))
    return rank


def test_error_in_our_own_code_keeps_its_traceback(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = crashed(files, monkeypatch, sampling, "check_memory", KeyError("ours"))
    assert "Traceback" in rank.output and rank.output.splitlines()[-1] == "KeyError: 'ours'"


def test_error_in_code_of_the_users_keeps_its_traceback(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, of a model's: TorchTitan calls it."""
    module = importlib.import_module("torchtitan.models.llama3")
    model = module.Transformer if IS_0_2 else module.Llama3Model
    rank = crashed(files, monkeypatch, model, "init_weights", ValueError("the model's"))
    assert "Traceback" in rank.output and rank.output.splitlines()[-1] == "ValueError: the model's"


@only_0_2
def test_memory_that_a_device_lacks_keeps_its_traceback(files: Path) -> None:
    from torchtitan.models.llama3 import llama3_args

    def run() -> None:
        llama3_args["debugmodel"].dim = 1 << 26
        main(command(files))

    [rank] = run_ranks(run)
    assert "Traceback" in rank.output and "allocate memory" in rank.output.splitlines()[-1]


def test_error_after_the_first_step_keeps_its_traceback(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(job_values.AT_LEAST, "metrics.log_freq")
    [rank] = run_ranks(lambda: main(command(files, "--metrics.log_freq=0")))
    assert "Traceback" in rank.output and "ZeroDivisionError: " in rank.output.splitlines()[-1]
