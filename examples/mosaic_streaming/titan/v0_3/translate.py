"""Turns a job's file, whose keys are TorchTitan 0.2's, into a config of TorchTitan 0.3."""

import importlib
import math
import os
import re
from typing import Any, Literal

from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig
from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

from examples.mosaic_streaming.config import is_url, refuse, wrong_value
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.titan.checks import check_model
from examples.mosaic_streaming.titan.job_values import with_values
from examples.mosaic_streaming.titan.v0_3.trainer import check_text_model
from examples.mosaic_streaming.titan.v0_3.validator import MosaicValidator
from examples.mosaic_streaming.titan.versions import RENAMED, without_gone
from examples.mosaic_streaming.upstream.model_registry import flavors_of, reads_text

ADAM = {"name": "AdamW", "lr": 8e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
"""Settings of [optimizer] in 0.2, with their defaults: in 0.3, they are those of a group of parameters."""
DEFAULTS = {"training.disable_cuda_graphs": True, "validation.local_batch_size": 8, "validation.seq_len": 2048}
"""What 0.2 has by itself, and 0.3 hasn't: the rest has the same defaults."""
EXPERTS = "parallelism.expert_parallel_comm_backend"
POLICIES: dict[str, Any] = {"none": None, "full": FullAC, "selective": SelectiveAC, "memory_budget": MemoryBudgetAC}
"""Values of activation_checkpoint.mode."""


def translate(values: dict[str, Any], path: str) -> Any:
    """Make a config of the values of a job's file by their keys; a ConfigError, with its `path`, says what is wrong."""
    values = {key: value for key, value in DEFAULTS.items() if RENAMED.get(key, key) not in values} | values
    optimizer = ADAM | {key: values.pop(f"optimizer.{key}") for key in ADAM if f"optimizer.{key}" in values}
    mode = values.pop("activation_checkpoint.mode", "selective")
    wrong = [wrong_value("activation_checkpoint.mode", mode, Literal[*POLICIES], "the job config")]
    for key, default in ADAM.items():
        hint, limits = (Literal["Adam", "AdamW"], None) if key == "name" else (type(default), (0, math.inf))
        wrong.append(wrong_value(f"optimizer.{key}", optimizer[key], hint, "the job config", limits))
    refuse(wrong)
    name, flavor = values.pop("model.name", "llama3"), values.pop("model.flavor", "debugmodel")
    experts = values.pop(EXPERTS, "standard")
    spec = model_spec(name, flavor, **({} if experts == "standard" else {"moe_comm_backend": experts}))
    betas = (optimizer["beta1"], optimizer["beta2"])
    kwargs = {"lr": optimizer["lr"], "betas": betas, "eps": optimizer["eps"], "weight_decay": optimizer["weight_decay"]}
    group = ParamGroupConfig(pattern=".*", optimizer_name=optimizer["name"], optimizer_kwargs=kwargs)
    config = Trainer.Config(
        model_spec=spec,
        loss=ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size)),
        optimizer=OptimizersContainer.Config(param_groups=[group]),
        validator=MosaicValidator.Config(),
    )
    if (weights := values.get("checkpoint.initial_load_path")) and not is_url(weights):
        values["checkpoint.initial_load_path"] = os.path.abspath(weights)  # the only kind that 0.3 takes
    config.activation_checkpoint = POLICIES[mode] and POLICIES[mode].Config()  # checked with all other values
    unused = unused_keys(mode)
    values = without_gone({key: value for key, value in values.items() if key not in unused}, path)
    return with_values(config, values, RENAMED, path)


def unused_keys(mode: str) -> set[str]:
    """The settings of activation checkpointing that another mode has, and that this one ignores, as in 0.2."""
    keys = {mode: set(policy.Config.__dataclass_fields__) if policy else set() for mode, policy in POLICIES.items()}
    keys["selective"] |= {"selective_ac_option", "per_op_sac_force_recompute_mm_shapes_by_fqns"}
    return {f"activation_checkpoint.{key}" for key in set.union(*keys.values()) - keys[mode]}


def model_spec(model: str, flavor: str, **settings: Any) -> ModelSpec:
    """TorchTitan's spec of a Mosaic model; a ConfigError says which models there are, and which flavors.

    `settings` are those of the model's `model_registry` that not all models have. Attention is one of them, where 0.2
    has flavors such as `8B_flex`.
    """
    name = check_model(model, reads_text)
    if flavor not in flavors_of(name) and (old := re.fullmatch(r"(.+)_(flex|varlen)(_attn)?", flavor)):
        flavor, settings["attn_backend"] = old[1], old[2]
    if flavor not in flavors_of(name):
        raise ConfigError(f"model.flavor = {flavor!r}, but {model} has: {', '.join(flavors_of(name))}.")
    try:
        spec = importlib.import_module(f"torchtitan.models.{name}").model_registry(flavor, **settings)
    except TypeError as error:
        raise ConfigError(f"{EXPERTS} = {settings['moe_comm_backend']!r}, but {model} has no experts.") from error
    return check_text_model(spec)
