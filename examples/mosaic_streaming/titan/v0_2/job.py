"""The `Job` that TorchTitan's job config describes."""

from torchtitan.config import JobConfig

from examples.mosaic_streaming.config import BatchShape, Job
from examples.mosaic_streaming.titan.checkpoints import checkpoints_of
from examples.mosaic_streaming.titan.checks import global_batch_size, validation_of
from examples.mosaic_streaming.titan.v0_2.checks import check_job as check_job
from examples.mosaic_streaming.titan.v0_2.checks import check_model, check_training, checkpoint_folder, parallel_dims
from examples.mosaic_streaming.titan.v0_2.documents import masks_documents, takes_positions
from examples.mosaic_streaming.titan.v0_2.models import base_spec


def make_job(job_config: JobConfig, world_size: int, ranks_per_node: int) -> Job:
    """Make the `Job` that a job config describes.

    Raises:
        ConfigError: TorchTitan would refuse it, or not do what it says.
    """
    from examples.mosaic_streaming.sampling import Layout  # which imports streaming, and so much of llm-foundry

    check_model(job_config)
    check_training(job_config, world_size)
    model, training = job_config.model, job_config.training
    dims, spec = parallel_dims(job_config, world_size), base_spec(model.name)
    degrees = {name: getattr(dims, name) for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}
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
        global_batch_size=global_batch_size(training, layout.dp_world_size),
        microbatches=1,
        steps=training.steps,
        collective_timeout=job_config.comm.train_timeout_seconds,
        validation=validation_of(job_config.validation, training, dims.pp),
        checkpoints=checkpoints_of(job_config.checkpoint, checkpoint_folder(job_config)),
    )
