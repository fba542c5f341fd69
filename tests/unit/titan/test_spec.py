"""The Mosaic form of each of TorchTitan's text models."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from torchtitan.models import _supported_models

from examples.mosaic_streaming.titan.checks import SUFFIX
from examples.mosaic_streaming.titan.v0_2.models import base_spec, reads_text
from examples.mosaic_streaming.train import main
from tests.support.jobs import command, losses
from tests.support.ranks import run_ranks

MODELS = [name + SUFFIX for name in sorted(_supported_models) if reads_text(name)]


def missing_on_cpu(model_args: Any) -> str | None:
    """What torch 2.13 and TorchTitan 0.2.2 say of a flavor that can't be trained on a CPU."""
    if model_args.attn_type == "varlen":  # torch.nn.attention.varlen has CUDA's flash attention alone
        return "Could not run 'aten::_flash_attention_forward' with arguments from the 'CPU' backend"
    if model_args.attn_type == "flex":  # TorchTitan makes block masks on CUDA: `create_block_mask` has no `device`
        return "Tensor device mismatch|Found no NVIDIA driver|Torch not compiled with CUDA"
    if getattr(model_args, "moe_enabled", True) and hasattr(model_args, "moe_args"):
        return "\"histogram_cpu\" not implemented for 'Long'"  # which counts tokens for each expert
    return None


LONG = {"qwen3_mosaic"}
DEBUG = [
    pytest.param(model, flavor, marks=pytest.mark.long if missing_on_cpu(model_args) or model in LONG else [])
    for model in MODELS
    for flavor, model_args in base_spec(model).model_args.items()
    if flavor.startswith("debugmodel")
]


def test_each_model_that_reads_text_has_a_mosaic_form() -> None:
    models = {name.removesuffix(SUFFIX) for name in MODELS}
    assert {"llama3", "llama4", "qwen3", "deepseek_v3", "gpt_oss"} <= models
    assert set(_supported_models) - models == {"flux"}, "which reads images"


@pytest.mark.parametrize(("model", "flavor"), DEBUG)
def test_debug_flavor_trains_where_torchtitan_can(files: Path, model: str, flavor: str) -> None:
    given = command(files, f"--model.name={model}", f"--model.flavor={flavor}", "--training.steps=3")
    [rank] = run_ranks(lambda: main(given))
    if missing := missing_on_cpu(base_spec(model).model_args[flavor]):
        assert rank.code == 1
        assert re.search(missing, rank.output), rank.output
        assert not losses(rank.output)
    else:
        assert rank.code == 0, rank.output
        assert list(losses(rank.output)) == [1, 2, 3]


def test_model_that_reads_no_text_is_refused_with_those_that_do(files: Path) -> None:
    [rank] = run_ranks(lambda: main(command(files, "--model.name=flux_mosaic")))
    assert rank.code == 1
    assert "TorchTitan has no text model 'flux'. Expected one of: deepseek_v3_mosaic, gpt_oss_mosaic" in rank.output


def test_any_spec_that_reads_text_is_taken(files: Path) -> None:
    """One that a user's module registers, as TorchTitan's extensions do, with metrics of its own."""
    (files / "my_llama.py").write_text(
        "import dataclasses\n"
        "from torchtitan.components.metrics import MetricsProcessor\n"
        "from torchtitan.protocols.train_spec import get_train_spec, register_train_spec\n"
        "class MyMetrics(MetricsProcessor):\n"
        "    def log(self, step, *losses, extra_metrics):\n"
        "        print('my', sorted(extra_metrics))\n"
        "        super().log(step, *losses, extra_metrics)\n"
        "def build(job_config, parallel_dims, model_args):\n"
        "    return MyMetrics(job_config, parallel_dims)\n"
        'spec = dataclasses.replace(get_train_spec("llama3"), build_metrics_processor_fn=build)\n'
        'register_train_spec("my_llama", spec)\n'
    )

    def run() -> None:
        sys.path.insert(0, str(files))
        flags = ("--model.name=my_llama_mosaic", "--experimental.custom_import=my_llama", "--training.steps=1")
        main(command(files, *flags))

    [rank] = run_ranks(run)
    assert rank.code == 0, rank.output
    assert list(losses(rank.output)) == [1]
    assert "my ['data/bytes_fetched', 'data/cache_in_use(GiB)', 'data/epoch'," in rank.output
    assert "epoch: 0 (6.2%)  samples: 4  tokens: 64\n" in rank.output
