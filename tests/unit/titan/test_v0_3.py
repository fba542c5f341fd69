"""TorchTitan 0.3: a job's file or function becomes a config, whose Trainer reads Mosaic streams."""

import re
from pathlib import Path
from typing import Any

import pytest

from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.titan.versions import GONE, IN_FILE, RENAMED
from examples.mosaic_streaming.train import main
from tests.support.jobs import command, losses
from tests.support.ranks import run_ranks
from tests.support.titan import IS_0_2, job_config, load

if IS_0_2:
    pytest.skip("TorchTitan 0.3 alone", allow_module_level=True)

from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention, VarlenAttention
from torchtitan.models.llama3.config_registry import llama3_8b
from torchtitan.trainer import Trainer

from examples.mosaic_streaming.titan import mosaic
from examples.mosaic_streaming.titan.checks import SUFFIX
from examples.mosaic_streaming.titan.job_values import leaves
from examples.mosaic_streaming.titan.v0_3.translate import model_spec, translate
from examples.mosaic_streaming.upstream.model_registry import flavors_of, model_names, reads_text

NAME = {"model.name": "llama3_mosaic"}
MODELS = [name for name in model_names() if reads_text(name)]


def test_each_value_of_a_file_is_that_of_the_config() -> None:
    given: dict[str, Any] = {
        "job.dump_folder": "here",
        "job.print_config": True,
        "model.hf_assets_path": "assets",
        "training.steps": 7,
        "training.max_norm": 2,
        "optimizer.implementation": "foreach",
        "lr_scheduler.decay_type": "cosine",
        "parallelism.tensor_parallel_degree": 4,
        "parallelism.enable_async_tensor_parallel": True,
        "compile.enable": True,
        "checkpoint.interval": 3,
        "checkpoint.exclude_from_loading": ["dataloader"],
        "validation.enable": True,
        "validation.local_batch_size": 3,
        "validation.seq_len": 64,
        "validation.steps": 5,
        "profiling.profile_freq": 20,
        "comm.train_timeout_seconds": 9,
    }
    config = translate(NAME | given, "job.toml")
    values = {key: value for key, value, *_ in leaves(config)}
    assert {key: values[RENAMED.get(key, key)] for key in given} == given


def test_optimizer_model_and_loss_are_made_of_their_settings() -> None:
    given = {"optimizer.name": "Adam", "optimizer.lr": 1e-3, "optimizer.beta1": 0.8, "optimizer.weight_decay": 0}
    config = translate(NAME | {"model.flavor": "8B"} | given, "job.toml")
    [group] = config.optimizer.param_groups
    expected = {"lr": 1e-3, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0}
    assert (group.pattern, group.optimizer_name, group.optimizer_kwargs) == (".*", "Adam", expected)
    assert (config.model_spec.name, config.model_spec.flavor) == ("llama3", "8B")
    assert isinstance(config.loss, ChunkedLossWrapper.Config)
    assert config.loss.loss_fn.global_vocab_size == config.model_spec.model.vocab_size == 128256


@pytest.mark.parametrize(
    ("mode", "policy"),
    [("none", None), ("full", FullAC), ("selective", SelectiveAC), ("memory_budget", MemoryBudgetAC)],
)
def test_activation_checkpointing_is_a_policy(mode: str, policy: Any) -> None:
    given = {"activation_checkpoint.mode": mode, "compile.enable": True}
    config = translate(NAME | given, "job.toml").activation_checkpoint
    assert config is None if policy is None else type(config) is policy.Config


@pytest.mark.parametrize("mode", ["none", "full", "memory_budget"])
def test_settings_of_another_policy_are_ignored(mode: str) -> None:
    others = {"memory_budget": 0.5, "selective_ac_option": "2", "preserve_rng_state": True}
    given = {f"activation_checkpoint.{key}": value for key, value in others.items()}
    assert translate(NAME | {"activation_checkpoint.mode": mode, "compile.enable": True} | given, "job.toml")


def test_defaults_are_those_of_0_2() -> None:
    config = translate(NAME | {"parallelism.expert_parallel_comm_backend": "standard"}, "")
    assert (config.validator.local_batch_size, config.validator.seq_len) == (8, 2048)
    assert translate(NAME | {"validator.seq_len": 64}, "").validator.seq_len == 64


@pytest.mark.parametrize(("flavor", "kind"), [("8B_flex", FlexAttention), ("debugmodel_varlen_attn", VarlenAttention)])
def test_flavor_of_0_2_with_another_attention_is_the_flavor_with_it(flavor: str, kind: Any) -> None:
    spec = translate(NAME | {"model.flavor": flavor}, "job.toml").model_spec
    assert spec.flavor == flavor.partition("_")[0]
    assert isinstance(spec.model.first_attention.inner_attention, kind.Config)


def test_cuda_graphs_are_off_unless_the_file_says_otherwise() -> None:
    assert translate(NAME, "").training.disable_cuda_graphs
    assert not translate(NAME | {"training.disable_cuda_graphs": False}, "").training.disable_cuda_graphs
    assert translate(NAME | {"parallelism.pipeline_parallel_degree": 2, "training.steps": 1}, "")


def test_weights_to_begin_with_may_lie_at_a_relative_path() -> None:
    given = {"checkpoint.enable": True, "checkpoint.initial_load_path": "outputs/old/step-5"}
    assert translate(NAME | given, "").checkpoint.initial_load_path == str(Path("outputs/old/step-5").absolute())
    given["checkpoint.initial_load_path"] = "gs://bucket/step-5"
    assert translate(NAME | given, "").checkpoint.initial_load_path == "gs://bucket/step-5"


def test_each_setting_of_0_2_is_taken_renamed_or_refused_with_the_reason() -> None:
    """None is lost. The list is that of TorchTitan 0.2.2's JobConfig."""
    settings = Path("tests/assets/settings-0.2.2.txt").read_text().split()
    config = translate(NAME, "")
    known = {key for key, *_ in leaves(config)}
    by_hand = {f"optimizer.{key}" for key in ("name", "lr", "beta1", "beta2", "eps", "weight_decay")}
    by_hand |= {"model.name", "model.flavor", "activation_checkpoint.mode", "job.description", "job.config_file"}
    by_hand |= {"parallelism.expert_parallel_comm_backend", "experimental.custom_import"}
    by_hand |= {"activation_checkpoint.memory_budget", "activation_checkpoint.visualize_memory_budget_pareto"}
    for key in set(settings) - by_hand:
        prefixes = {key.rsplit(".", n)[0] for n in range(key.count(".") + 1)}
        assert RENAMED.get(key, key) in known or prefixes & GONE.keys(), key
    assert len(settings) == 149


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training.stepz": 3}, "training.stepz in job.toml: unknown. Keys like it: training.steps"),
        (
            {"quantize.linear.mx.recipe_name": "a"},
            "quantize.linear.mx.recipe_name = 'a' in job.toml: TorchTitan 0.3 has",
        ),
        ({"parallelism.expert_tensor_parallel_degree": 2}, "The nearest is parallelism.expert_parallel_degree."),
        ({"training.dataset": "c4"}, "Streams are set in the files of --mosaic-config and"),
        (
            {"activation_checkpoint.mode": "some"},
            "activation_checkpoint.mode = 'some' in the job config, expected one of",
        ),
        ({"activation_checkpoint.selective_ac_option": "2"}, 'Its selective mode is what 0.2 calls "op".'),
        ({"optimizer.lr": "high"}, "optimizer.lr = 'high' in the job config, expected a number, from 0 on."),
        ({"model.flavor": "9B"}, "model.flavor = '9B', but llama3_mosaic has: debugmodel, 1B, 3B, 8B, 70B, 405B."),
        ({"model.name": "llama3"}, "model.name = 'llama3' does not read Mosaic streams. Set it to 'llama3_mosaic'."),
        (
            {"model.name": "llama4_mosaic"},
            "but TorchTitan has no text model 'llama4'. Expected one of: deepseek_v3_mosaic",
        ),
        (
            {"parallelism.expert_parallel_comm_backend": "deepep"},
            "= 'deepep', but llama3_mosaic has no experts.",
        ),
    ],
)
def test_setting_that_0_3_does_not_know_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        translate(NAME | values, "job.toml")


def test_setting_that_0_3_does_not_have_is_taken_where_it_is_off() -> None:
    off = {key: value for key, (value, _) in GONE.items() if "." in key and value is not None}
    off |= {"fault_tolerance.enable": False, "fault_tolerance.group_size": 2, "training.dataloader.num_workers": None}
    translate(NAME | off, "job.toml")


@pytest.mark.parametrize("name", MODELS)
def test_each_text_model_has_a_mosaic_form(name: str) -> None:
    for flavor in flavors_of(name):
        spec = model_spec(name + SUFFIX, flavor)
        assert spec.flavor == flavor
    assert {"llama3", "qwen3", "deepseek_v3", "gpt_oss"} <= set(MODELS)
    assert "flux" not in MODELS


MISSING_ON_CPU = {"gpt_oss": r"scatter\(\): Expected self.dtype to be equal to src.dtype"}
"""What torch 2.15 or TorchTitan 0.3.0 lack on a CPU."""


@pytest.mark.parametrize(
    "name",
    [name if name == "llama3" else pytest.param(name, marks=[pytest.mark.long, pytest.mark.both]) for name in MODELS],
)
def test_debug_model_trains_on_a_cpu_where_it_can(files: Path, name: str) -> None:
    [rank] = run_ranks(lambda: main(command(files, f"--model.name={name}{SUFFIX}", "--training.steps=2")))
    if missing := MISSING_ON_CPU.get(name):
        assert rank.code == 1 and re.search(missing, rank.output), rank.output
    else:
        assert list(losses(rank.output)) == [1, 2], rank.output


MODULE = """
import dataclasses

from torchtitan.models.llama3.config_registry import llama3_debugmodel
from torchtitan.trainer import Trainer

from examples.mosaic_streaming.titan import mosaic

class MyTrainer(Trainer):
    def train_step(self, batches):
        print("mine")
        super().train_step(batches)

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        pass

def plain():
    config = llama3_debugmodel()
    config.training.seq_len, config.training.local_batch_size = 16, 2
    config.dump_folder = "{files}/outputs"
    config.parallelism.pipeline_parallel_schedule = "1F1B"
    return config

def mine():
    return mosaic(plain(), train="{files}/loader.toml")

def of_my_trainer():
    config = plain()
    fields = {{field.name: getattr(config, field.name) for field in dataclasses.fields(config)}}
    return mosaic(MyTrainer.Config(**fields), train="{files}/loader.toml")

def nothing():
    return None
"""


@pytest.fixture
def module(files: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files, and a module of the user's that can be imported."""
    (files / "my_models.py").write_text(MODULE.format(files=files))
    monkeypatch.syspath_prepend(str(files))
    return files


def start(function: str, *flags: str, module: str = "my_models") -> list[str]:
    """The command line for a function."""
    return ["--module", module, "--config", function, "--", *flags]


def test_function_of_the_user_trains(module: Path) -> None:
    """With TorchTitan's flags; the same samples and the same losses as with a job's file."""
    flags = ("--training.steps=3", "--debug.seed=1", "--metrics.disable_color_printing=true")
    [rank] = run_ranks(lambda: main(start("mine", *flags)))
    assert list(losses(rank.output)) == [1, 2, 3], rank.output
    assert "epoch: 0" in rank.output and "samples: 6" in rank.output


def test_trainer_of_the_user_is_kept(module: Path) -> None:
    [rank] = run_ranks(lambda: main(start("of_my_trainer", "--training.steps=2")))
    assert rank.code == 0 and rank.output.count("mine") == 2, rank.output


def test_stock_config_trains_with_the_loaders_file_on_the_command_line(module: Path) -> None:
    flags = ["--training.steps=1", "--training.seq_len=16", f"--dump_folder={module}/outputs"]
    given = start("llama3_debugmodel", *flags, "--metrics.disable_color_printing", module="llama3")
    [rank] = run_ranks(lambda: main(["--mosaic-config", f"{module}/loader.toml", *given]))
    assert list(losses(rank.output)) == [1], rank.output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (start("mine", module="my_modls"), "--module 'my_modls', but Python finds no module 'my_modls'. Start the job"),
        (start("mein"), "--config mein: no function of my_models, which has: plain, mine, of_my_trainer, nothing."),
        (start("nothing"), "my_models.nothing returns a NoneType, expected a Trainer.Config."),
        (start("plain"), "my_models.plain reads no Mosaic streams: name their file in mosaic(), or --mosaic-config."),
        (
            start("mine", "--dataloader.dataset=c4"),
            "--dataloader.dataset=c4: not a flag of TorchTitan 0.3. Streams are set",
        ),
        (start("mine", "--hf_assets_path=/no"), "ConfigError: hf_assets_path = '/no' has no tokenizer_config.json"),
        (start("mine", "--validator.enable=true"), "validator.enable = true, but no validation streams are given."),
    ],
)
def test_what_is_wrong_with_a_function_is_told_in_one_line(module: Path, given: list[str], message: str) -> None:
    """In 0.3's names of settings."""
    [rank] = run_ranks(lambda: main(given))
    assert rank.code == 1 and "Traceback" not in rank.output, rank.output
    assert message in rank.output


def test_config_is_made_mosaic_and_left_as_it_is() -> None:
    config = llama3_8b()
    made = mosaic(config, train="loader.toml", validation="held_out.toml")
    assert type(config) is Trainer.Config and not hasattr(config.dataloader, "path")
    assert (made.dataloader.path, made.validator.dataloader.path) == ("loader.toml", "held_out.toml")
    assert made.training == config.training and made.validator.freq == config.validator.freq
    again = mosaic(made, train="other.toml")
    assert type(again) is type(made) and again.dataloader.path == "other.toml"
    with pytest.raises(ConfigError, match=r"is started by: torchrun -m examples.mosaic_streaming.train"):
        made.build()


def test_cpu_gets_a_model_that_it_can_train() -> None:
    config = job_config()
    assert isinstance(config.model_spec.model.first_attention.inner_attention, ScaledDotProductAttention.Config)
    assert config.training.disable_cuda_graphs and config.training.mixed_precision_param == "float32"


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--job.dump_folder=here", "TorchTitan 0.3 calls it --dump_folder=here."),
        ("--validation.no-enable", "TorchTitan 0.3 calls it --validator.no-enable."),
        ("--job.no-print-config", "TorchTitan 0.3 calls it --debug.no-print_config."),
        ("--model.flavor=8B", "Set the model in the job's file, or by --module and --config."),
        ("--module=llama3", "Give it before the `--`."),
        ("--mosaic-config=x", "Give it before the `--`."),
        ("--optimizer.lr=1", "It has groups of parameters: set [optimizer] in the job's file"),
        ("--fault_tolerance.enable", "Checkpoints and torchrun's restarts are what there is."),
    ],
)
def test_flag_of_0_2_is_answered_with_the_right_spelling(flag: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        load("examples/mosaic_streaming/configs/mosaic_job.toml", flag)


def test_settings_that_are_renamed_exist() -> None:
    known = {key for key, *_ in leaves(translate(NAME, ""))}
    assert set(RENAMED.values()) <= known
    assert not set(RENAMED) & known and not {key for key in GONE if "." in key} & known
    assert not {key for key in IN_FILE if "." in key} & known
