"""The `Job` that TorchTitan 0.3's config describes, and settings with which there is none."""

from typing import Any

from torchtitan.distributed import ParallelDims
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.tools import filesystem

from examples.mosaic_streaming.config import BatchShape, Job
from examples.mosaic_streaming.sampling import Layout
from examples.mosaic_streaming.titan import checks
from examples.mosaic_streaming.titan.checkpoints import check_checkpoints, checkpoints_of


def check_job(config: Any, world_size: int) -> None:
    """Raise ConfigError for a job that would not start on so many processes, or not do what its config says."""
    parallel_dims(config, world_size)
    check_checkpoints(config.checkpoint, checkpoint_folder(config), config.hf_assets_path)


def checkpoint_folder(config: Any) -> str:
    """The folder of all checkpoints of a job."""
    return str(filesystem.join(config.dump_folder, config.checkpoint.folder))


def parallel_dims(config: Any, world_size: int) -> ParallelDims:
    """Compute the degrees of parallelism as TorchTitan does.

    ConfigError if they don't fit the ranks, or the length of rows doesn't fit them (torchtitan 0.3.0, trainer.py).
    """
    parallelism = config.parallelism
    dims = checks.parallel_dims(lambda: ParallelDims.from_config(parallelism, world_size), parallelism, world_size)
    divisor = (dims.tp if parallelism.enable_sequence_parallel else 1) * (2 * dims.cp if dims.cp > 1 else 1)
    checks.check_seq_len(config.training.seq_len, divisor, "tensor-parallel x twice the context-parallel degree")
    return dims


def make_job(config: Any, world_size: int, ranks_per_node: int) -> Job:
    """Make the `Job` of a config that `mosaic` made; a ConfigError says what TorchTitan would refuse, or not do."""
    dims, spec, training = parallel_dims(config, world_size), config.model_spec, config.training
    degrees = {name: getattr(dims, name) for name in checks.DEGREES}
    layout = Layout(world_size, ranks_per_node, degrees)
    attention = getattr(spec.model.first_attention, "inner_attention", None)
    microbatch = config.parallelism.pipeline_parallel_microbatch_size
    return Job(
        model=f"{spec.name}{checks.SUFFIX}",
        flavor=spec.flavor,
        vocab_size=spec.model.vocab_size,
        assets=config.hf_assets_path,
        documents=isinstance(attention, FlexAttention.Config | VarlenAttention.Config),  # not SDPA, for a CPU
        positions=True,
        masks_by_positions=True,
        document_flavors=(),
        layout=layout,
        training=BatchShape("training", training.local_batch_size, training.seq_len),
        global_batch_size=checks.global_batch_size(training, layout.dp_world_size),
        microbatches=training.local_batch_size // microbatch if dims.pp > 1 else 1,
        steps=training.steps,
        collective_timeout=config.comm.train_timeout_seconds,
        validation=checks.validation_of(config.validator, training, dims.pp),
        checkpoints=checkpoints_of(config.checkpoint, checkpoint_folder(config)),
    )
