"""The `Job` that TorchTitan's job config describes."""

from torchtitan.config import JobConfig
from torchtitan.protocols.train_spec import get_train_spec

from examples.mosaic_streaming.config import BatchShape, Checkpoints, Job, Validation
from examples.mosaic_streaming.sampling import Layout
from examples.mosaic_streaming.titan.v0_2.checkpoints import checkpoint_folder
from examples.mosaic_streaming.titan.v0_2.checks import (
    check_model,
    check_training,
    check_validation,
    global_batch_size,
    parallel_dims,
)
from examples.mosaic_streaming.titan.v0_2.documents import masks_documents, takes_positions


def make_job(job_config: JobConfig, world_size: int, ranks_per_node: int) -> Job:
    """Make the `Job` that a job config describes.

    Args:
        job_config: TorchTitan's job config. Its model is registered.
        world_size: processes.
        ranks_per_node: processes on each machine.

    Raises:
        ConfigError: TorchTitan would refuse it, or not do what it says.
    """
    check_model(job_config)
    check_training(job_config, world_size)
    model, training, checkpoint = job_config.model, job_config.training, job_config.checkpoint
    dims, spec = parallel_dims(job_config, world_size), get_train_spec(model.name)
    degrees = {name: getattr(dims, name) for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}
    layout = Layout(world_size, ranks_per_node, degrees)
    validation = None
    if job_config.validation.enable:
        check_validation(job_config)
        settings = job_config.validation
        shape = BatchShape("validation", settings.local_batch_size, settings.seq_len)
        validation = Validation(shape, settings.steps, settings.freq)
    return Job(
        model=model.name,
        flavor=model.flavor,
        vocab_size=spec.model_args[model.flavor].vocab_size,
        assets=model.hf_assets_path,
        documents=masks_documents(spec.model_args[model.flavor]),
        positions=takes_positions(spec.model_cls, layout),
        document_flavors=tuple(name for name, args in spec.model_args.items() if masks_documents(args)),
        layout=layout,
        training=BatchShape("training", training.local_batch_size, training.seq_len),
        global_batch_size=global_batch_size(job_config, layout.dp_world_size),
        steps=training.steps,
        collective_timeout=job_config.comm.train_timeout_seconds,
        validation=validation,
        checkpoints=Checkpoints(
            checkpoint.enable,
            checkpoint_folder(job_config),
            checkpoint.load_step,
            tuple(checkpoint.exclude_from_loading),
            checkpoint.last_save_model_only,
        ),
    )
