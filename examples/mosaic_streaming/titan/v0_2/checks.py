"""Refuses settings with which TorchTitan 0.2 would fail with a traceback, or ignore what they say."""

import os
from typing import TYPE_CHECKING

from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.titan import checks
from examples.mosaic_streaming.titan.checkpoints import check_checkpoints, steps_with
from examples.mosaic_streaming.titan.models import SUFFIX

if TYPE_CHECKING:
    from torchtitan.config import JobConfig
    from torchtitan.distributed import ParallelDims

OPTIMIZERS = ("Adam", "AdamW")
"""The optimizers that TorchTitan knows."""


def check_job(job_config: "JobConfig", world_size: int) -> None:
    """Raise ConfigError for a job that would not start on so many ranks, or not do what its config says.

    Source: TorchTitan doesn't look at `initial_load_path` where the checkpoint's folder exists, also without a finished
    step in it, as a job leaves it that is killed while it saves its first (torchtitan 0.2.2, components/checkpoint.py).
    """
    parallel_dims(job_config, world_size)
    checkpoint, folder = job_config.checkpoint, checkpoint_folder(job_config)
    check_checkpoints(checkpoint, folder, job_config.model.hf_assets_path)
    begins = checkpoint.enable and (checkpoint.initial_load_path or checkpoint.initial_load_in_hf)
    if begins and os.path.isdir(folder) and not steps_with(folder, ".metadata"):
        raise ConfigError(
            f"{folder} has no finished checkpoint, but as it exists, TorchTitan would begin with random weights, not "
            "those of checkpoint.initial_load_path. Remove that folder, or name another with --checkpoint.folder."
        )


def checkpoint_folder(job_config: "JobConfig") -> str:
    """The folder of all checkpoints of a job."""
    return os.path.join(job_config.job.dump_folder, job_config.checkpoint.folder)


def parallel_dims(job_config: "JobConfig", world_size: int) -> "ParallelDims":
    """Compute the degrees of parallelism as TorchTitan does; a ConfigError says why they don't fit the ranks."""
    from torchtitan.distributed import ParallelDims

    parallelism = job_config.parallelism
    return checks.parallel_dims(
        lambda: ParallelDims(
            dp_replicate=parallelism.data_parallel_replicate_degree,
            dp_shard=parallelism.data_parallel_shard_degree,
            cp=parallelism.context_parallel_degree,
            tp=parallelism.tensor_parallel_degree,
            pp=parallelism.pipeline_parallel_degree,
            ep=parallelism.expert_parallel_degree,
            etp=parallelism.expert_tensor_parallel_degree,
            world_size=world_size,
        ),
        parallelism,
        world_size,
    )


def check_model(job_config: "JobConfig") -> None:
    """Raise ConfigError unless the model has this flavor, and the flavor works with pipeline parallelism if that is on.

    Source: pipeline stages cut the masks of varlen attention, which are cumulative lengths, into equal parts. Those of
    the second micro-batch then don't begin at 0 (torch 2.13, distributed/pipelining/microbatch.py).
    """
    from examples.mosaic_streaming.titan.v0_2.models import base_spec

    model, pp = job_config.model, job_config.parallelism.pipeline_parallel_degree
    flavors = base_spec(model.name).model_args
    if model.flavor not in flavors:
        raise ConfigError(f"model.flavor = {model.flavor!r}, but {model.name} has: {', '.join(flavors)}.")
    if pp > 1 and getattr(flavors[model.flavor], "attn_type", "sdpa") == "varlen":
        raise ConfigError(
            f"model.flavor = {model.flavor!r} has varlen attention, whose masks pipeline parallelism "
            f"(parallelism.pipeline_parallel_degree = {pp}) cuts wrongly. Choose a flavor with flex attention, or FSDP."
        )


def check_training(job_config: "JobConfig", world_size: int) -> None:
    """Raise ConfigError for what TorchTitan's own models and optimizers would refuse only once they are built.

    Source: each `parallelize_fn` asserts the length (torchtitan 0.2.2, models/*/infra). `build_optimizers` knows the
    names of optimizers (components/optimizer.py).
    """
    from torchtitan.components.optimizer import build_optimizers, build_optimizers_with_moe_load_balancing

    from examples.mosaic_streaming.titan.v0_2.models import base_spec
    from examples.mosaic_streaming.upstream.model_registry import model_names

    model, seq_len = job_config.model.name, job_config.training.seq_len
    if model.removesuffix(SUFFIX) in model_names():
        divisor = parallel_dims(job_config, world_size).seq_len_divisor
        checks.check_seq_len(seq_len, divisor, "2 x tensor-parallel x context-parallel degree")
    titans = (build_optimizers, build_optimizers_with_moe_load_balancing)
    if base_spec(model).build_optimizers_fn in titans and job_config.optimizer.name not in OPTIMIZERS:
        raise ConfigError(f"optimizer.name = {job_config.optimizer.name!r}, expected one of: {', '.join(OPTIMIZERS)}.")
