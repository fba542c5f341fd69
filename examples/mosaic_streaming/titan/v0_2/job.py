"""The `Job` that TorchTitan 0.2's job config describes, and settings with which there is none."""

import os

from torchtitan.components.optimizer import build_optimizers, build_optimizers_with_moe_load_balancing
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.train_spec import TrainSpec

from examples.mosaic_streaming.config import BatchShape, Job
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.titan import checks
from examples.mosaic_streaming.titan.checkpoints import check_checkpoints, checkpoints_of, steps_with
from examples.mosaic_streaming.titan.v0_2.load import checkpoint_folder
from examples.mosaic_streaming.titan.v0_2.models import base_spec, masks_documents, takes_positions
from examples.mosaic_streaming.upstream.model_registry import model_names

OPTIMIZERS = ("Adam", "AdamW")
"""The optimizers that TorchTitan knows."""


def check_job(job_config: JobConfig, world_size: int) -> None:
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


def parallel_dims(job_config: JobConfig, world_size: int) -> ParallelDims:
    """Compute the degrees of parallelism as TorchTitan does; a ConfigError says why they don't fit the ranks."""
    parallelism = job_config.parallelism
    keys = checks.DEGREES | {"ep": "expert_parallel_degree", "etp": "expert_tensor_parallel_degree"}
    degrees = {name: getattr(parallelism, key) for name, key in keys.items()}
    return checks.parallel_dims(lambda: ParallelDims(**degrees, world_size=world_size), parallelism, world_size)


def check_model(job_config: JobConfig, spec: TrainSpec, dims: ParallelDims) -> None:
    """Raise ConfigError for what TorchTitan's own models and optimizers would refuse only once they are built.

    Source: pipeline stages cut the masks of varlen attention, which are cumulative lengths, into equal parts. Those of
    the second micro-batch then don't begin at 0 (torch 2.13, distributed/pipelining/microbatch.py). Each
    `parallelize_fn` asserts the length (torchtitan 0.2.2, models/*/infra). `build_optimizers` knows the names of
    optimizers (components/optimizer.py).
    """
    model = job_config.model
    if model.flavor not in spec.model_args:
        raise ConfigError(f"model.flavor = {model.flavor!r}, but {model.name} has: {', '.join(spec.model_args)}.")
    if dims.pp > 1 and getattr(spec.model_args[model.flavor], "attn_type", "sdpa") == "varlen":
        raise ConfigError(
            f"model.flavor = {model.flavor!r} has varlen attention, whose masks pipeline parallelism "
            f"(parallelism.pipeline_parallel_degree = {dims.pp}) cuts wrongly. Choose a flavor with flex attention, or "
            "FSDP."
        )
    if model.name.removesuffix(checks.SUFFIX) in model_names():
        seq_len, why = job_config.training.seq_len, "2 x tensor-parallel x context-parallel degree"
        checks.check_seq_len(seq_len, dims.seq_len_divisor, why)
    titans = (build_optimizers, build_optimizers_with_moe_load_balancing)
    if spec.build_optimizers_fn in titans and job_config.optimizer.name not in OPTIMIZERS:
        raise ConfigError(f"optimizer.name = {job_config.optimizer.name!r}, expected one of: {', '.join(OPTIMIZERS)}.")


def make_job(job_config: JobConfig, world_size: int, ranks_per_node: int) -> Job:
    """Make the `Job` of a job config; a ConfigError says what TorchTitan would refuse in it, or not do."""
    from examples.mosaic_streaming.sampling import Layout  # which imports streaming, and so much of llm-foundry

    model, training = job_config.model, job_config.training
    dims, spec = parallel_dims(job_config, world_size), base_spec(model.name)
    check_model(job_config, spec, dims)
    degrees = {name: getattr(dims, name) for name in checks.DEGREES}
    layout = Layout(world_size, ranks_per_node, degrees)
    return Job(
        model=model.name,
        flavor=model.flavor,
        vocab_size=spec.model_args[model.flavor].vocab_size,
        assets=model.hf_assets_path,
        documents=masks_documents(spec.model_args[model.flavor]),
        positions=takes_positions(spec.model_cls, layout),
        masks_by_positions=False,
        document_flavors=tuple(name for name, args in spec.model_args.items() if masks_documents(args)),
        layout=layout,
        training=BatchShape("training", training.local_batch_size, training.seq_len),
        global_batch_size=checks.global_batch_size(training, layout.dp_world_size),
        microbatches=1,
        steps=training.steps,
        collective_timeout=job_config.comm.train_timeout_seconds,
        validation=checks.validation_of(job_config.validation, training, dims.pp),
        checkpoints=checkpoints_of(job_config.checkpoint, checkpoint_folder(job_config)),
    )
