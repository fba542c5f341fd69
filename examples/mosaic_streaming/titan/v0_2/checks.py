"""Refuses settings of the job config with which TorchTitan would fail with a traceback, or ignore what they say."""

from typing import TYPE_CHECKING

from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.titan.v0_2.checkpoints import check_checkpoints

if TYPE_CHECKING:
    from torchtitan.config import JobConfig
    from torchtitan.distributed import ParallelDims

OPTIMIZERS = ("Adam", "AdamW")
"""The optimizers that TorchTitan knows."""


def check_job(job_config: "JobConfig", validates: bool, world_size: int) -> None:
    """Raise ConfigError for a job that would not start on Mosaic streams, or not do what its config says.

    Args:
        job_config: TorchTitan's job config.
        validates: whether there is a configuration of the validation loader.
        world_size: processes.
    """
    if job_config.validation.enable and not validates:
        raise ConfigError(
            "validation.enable = true, but no validation streams are given. Name their file with "
            "--mosaic-validation-config PATH, before the `--`, or set validation.enable to false."
        )
    if job_config.comm.mode != "default":
        raise ConfigError(f"comm.mode = {job_config.comm.mode!r} has no real ranks, which Mosaic streams need.")
    if job_config.checkpoint.create_seed_checkpoint:
        if world_size != 1:
            raise ConfigError(
                f"checkpoint.create_seed_checkpoint on {world_size} ranks, but one has to save it, unsharded. "
                "Start with --nproc_per_node=1."
            )
        if not job_config.checkpoint.enable:
            raise ConfigError("checkpoint.create_seed_checkpoint needs checkpoint.enable = true.")
    parallel_dims(job_config, world_size)
    check_checkpoints(job_config)


def warnings_of_job(job_config: "JobConfig", validates: bool) -> list[str]:
    """What the log has to warn of before a start; the arguments are those of `check_job`."""
    warnings = []
    if validates and not job_config.validation.enable:
        warnings.append("validation.enable = false: the validation streams are not read.")
    if "dataloader" in job_config.checkpoint.exclude_from_loading:
        warnings.append(
            "checkpoint.exclude_from_loading has dataloader: the streams start from their beginning, again, and "
            "samples, tokens and targets are counted from there."
        )
    return warnings


def parallel_dims(job_config: "JobConfig", world_size: int) -> "ParallelDims":
    """Compute the degrees of parallelism as TorchTitan does; a ConfigError says why they don't fit the ranks."""
    from torchtitan.distributed import ParallelDims

    parallelism = job_config.parallelism
    try:
        dims = ParallelDims(
            dp_replicate=parallelism.data_parallel_replicate_degree,
            dp_shard=parallelism.data_parallel_shard_degree,
            cp=parallelism.context_parallel_degree,
            tp=parallelism.tensor_parallel_degree,
            pp=parallelism.pipeline_parallel_degree,
            ep=parallelism.expert_parallel_degree,
            etp=parallelism.expert_tensor_parallel_degree,
            world_size=world_size,
        )
    except AssertionError as error:
        names = (
            "data_parallel_replicate",
            "data_parallel_shard",
            "context_parallel",
            "tensor_parallel",
            "pipeline_parallel",
        )
        degrees = {f"{name}_degree": getattr(parallelism, f"{name}_degree") for name in names}
        given = ", ".join(f"{name} = {degree}" for name, degree in degrees.items() if degree not in (1, -1))
        problem = str(error) or f"{given} multiply to more"
        raise ConfigError(
            f"TorchTitan refuses the degrees of [parallelism] in the job config on {world_size} ranks: {problem}."
        ) from error
    if dims.ep > 1 and dims.dp_shard * dims.cp * dims.tp % (dims.ep * dims.etp):
        raise ConfigError(
            f"parallelism.expert_parallel_degree = {dims.ep} (x expert_tensor_parallel_degree = {dims.etp}) does not "
            f"divide dp_shard({dims.dp_shard}) * cp({dims.cp}) * tp({dims.tp}), the ranks that share out the experts."
        )
    return dims


def check_model(job_config: "JobConfig") -> None:
    """Raise ConfigError unless the model has this flavor, and the flavor works with pipeline parallelism if that is on.

    Source: pipeline stages cut the masks of varlen attention, which are cumulative lengths, into equal parts. Those of
    the second micro-batch then don't begin at 0 (torch 2.13, distributed/pipelining/microbatch.py).
    """
    from torchtitan.protocols.train_spec import get_train_spec

    model, pp = job_config.model, job_config.parallelism.pipeline_parallel_degree
    flavors = get_train_spec(model.name).model_args
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
    from torchtitan.protocols.train_spec import get_train_spec

    from examples.mosaic_streaming.upstream.train_specs import model_names

    model, seq_len = job_config.model.name, job_config.training.seq_len
    divisor = parallel_dims(job_config, world_size).seq_len_divisor
    if model.removesuffix("_mosaic") in model_names() and seq_len % divisor:
        hint = f"For samples of {seq_len} tokens set {seq_len - 1}: then each label is real." if seq_len % 2 else ""
        raise ConfigError(
            f"training.seq_len = {seq_len}, but TorchTitan's models take multiples of {divisor}: 2 x tensor-parallel x "
            f"context-parallel degree. {hint or 'Change one of them.'}"
        )
    is_titans = get_train_spec(model).build_optimizers_fn in (
        build_optimizers,
        build_optimizers_with_moe_load_balancing,
    )
    if is_titans and job_config.optimizer.name not in OPTIMIZERS:
        raise ConfigError(f"optimizer.name = {job_config.optimizer.name!r}, expected one of: {', '.join(OPTIMIZERS)}.")


def global_batch_size(job_config: "JobConfig", dp_world_size: int) -> int:
    """Compute the sequences of an optimizer step as TorchTitan's Trainer does.

    Raises:
        ConfigError: they are no multiple of the micro-batches of all dp ranks.
    """
    local, total = job_config.training.local_batch_size, job_config.training.global_batch_size
    if local < 1:
        raise ConfigError(f"training.local_batch_size = {local}, but each rank needs at least one sequence.")
    if total == 0 or (total > 0 and total % (local * dp_world_size)):
        raise ConfigError(
            f"training.global_batch_size = {total} is not a multiple of training.local_batch_size = {local} x "
            f"data-parallel degree = {dp_world_size}. Change one of them."
        )
    return total if total > 0 else local * dp_world_size


def check_validation(job_config: "JobConfig") -> None:
    """Raise ConfigError for validation batches that a model which is built for training can't take.

    Source: rotary embeddings have `training.seq_len` rows; a pipeline's stages receive tensors of the first batch's
    shape (torchtitan 0.2.2, models/*/model/args.py; torch 2.13, distributed/pipelining/stage.py).
    """
    training, validation = job_config.training, job_config.validation
    if validation.local_batch_size < 1:
        raise ConfigError(f"validation.local_batch_size = {validation.local_batch_size}, expected at least 1.")
    if not 1 <= validation.seq_len <= training.seq_len:
        raise ConfigError(
            f"validation.seq_len = {validation.seq_len}, but the model is made for training.seq_len = "
            f"{training.seq_len}. Set it to that, or less."
        )
    if job_config.parallelism.pipeline_parallel_degree > 1:
        for key in ("local_batch_size", "seq_len"):
            now, needed = getattr(validation, key), getattr(training, key)
            if now != needed:
                raise ConfigError(
                    f"validation.{key} = {now}, but the stages of a pipeline take batches of one shape, and "
                    f"training.{key} = {needed}. Set it to that."
                )
