"""Refuses settings with which TorchTitan would fail with a traceback, or ignore what they say, in each generation.

The sections of both generations' job configs that are looked at here have the same keys.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from examples.mosaic_streaming.config import BatchShape, Validation
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.titan.checkpoints import going_back
from examples.mosaic_streaming.titan.loaded import LoadedJob
from examples.mosaic_streaming.titan.versions import ON_CPU, generation

if TYPE_CHECKING:
    from torchtitan.distributed import ParallelDims

SUFFIX = "_mosaic"
"""What the Mosaic names of TorchTitan's text models end with: `llama3_mosaic` is that of `llama3`."""
DEGREES = {
    "pp": "pipeline_parallel_degree",
    "dp_replicate": "data_parallel_replicate_degree",
    "dp_shard": "data_parallel_shard_degree",
    "cp": "context_parallel_degree",
    "tp": "tensor_parallel_degree",
}
"""The degrees that a world size is made of, and what the section [parallelism] calls them."""


def check_start(job: LoadedJob, world_size: int) -> None:
    """Raise ConfigError for a job that would not start on Mosaic streams, on so many ranks."""
    comm, checkpoint = job.job_config.comm, job.job_config.checkpoint
    if job.validates and not job.validation:
        raise ConfigError(
            "validation.enable = true, but no validation streams are given. Name their file with "
            "--mosaic-validation-config PATH, before the `--`, or set validation.enable to false."
        )
    if comm.mode != "default":
        raise ConfigError(f"comm.mode = {comm.mode!r} has no real ranks, which Mosaic streams need.")
    if checkpoint.create_seed_checkpoint:
        if world_size != 1:
            raise ConfigError(
                f"checkpoint.create_seed_checkpoint on {world_size} ranks, but one has to save it, unsharded. "
                "Start with --nproc_per_node=1."
            )
        if not checkpoint.enable:
            raise ConfigError("checkpoint.create_seed_checkpoint needs checkpoint.enable = true.")


def warnings_of_job(job: LoadedJob) -> list[str]:
    """What the log has to warn of before a start."""
    from examples.mosaic_streaming.upstream import cpu

    warnings = []
    if cpu.ACTIVE:
        told = "No accelerator: TorchTitan runs on the CPU, which is for trying out and for tests."
        warnings.append(f"{told} {ON_CPU[generation()]}")
    if job.validation and not job.validates:
        warnings.append("validation.enable = false: the validation streams are not read.")
    if "dataloader" in job.job_config.checkpoint.exclude_from_loading:
        warnings.append(
            "checkpoint.exclude_from_loading has dataloader: the streams start from their beginning, again, and "
            "samples, tokens and targets are counted from there."
        )
    return warnings + going_back(job.job_config.checkpoint, job.checkpoint_folder)


def check_model(name: str, reads_text: Callable[[str], bool]) -> str:
    """TorchTitan's name of a Mosaic model; a ConfigError says which models there are that read text."""
    from examples.mosaic_streaming.upstream.model_registry import model_names

    base = name.removesuffix(SUFFIX)
    if base != name and reads_text(base):
        return base
    if base == name and reads_text(name):
        raise ConfigError(f"model.name = {name!r} does not read Mosaic streams. Set it to {name + SUFFIX!r}.")
    fault = "does not read Mosaic streams" if base == name else f"but TorchTitan has no text model {base!r}"
    text_models = ", ".join(model + SUFFIX for model in model_names() if reads_text(model))
    raise ConfigError(f"model.name = {name!r}, {fault}. Expected one of: {text_models}.")


def parallel_dims(make: Callable[[], "ParallelDims"], parallelism: Any, world_size: int) -> "ParallelDims":
    """Call TorchTitan to compute the degrees of parallelism; a ConfigError says why they don't fit the ranks."""
    try:
        dims = make()
    except AssertionError as error:
        degrees = {key: getattr(parallelism, key) for key in DEGREES.values()}
        given = ", ".join(f"{key} = {degree}" for key, degree in degrees.items() if degree not in (1, -1))
        problem = str(error) or f"{given} multiply to more"
        raise ConfigError(
            f"TorchTitan refuses the degrees of [parallelism] in the job config on {world_size} ranks: {problem}."
        ) from error
    etp = getattr(dims, "etp", 1)  # the expert-tensor-parallel degree, which 0.3 doesn't have
    if dims.ep > 1 and dims.dp_shard * dims.cp * dims.tp % (dims.ep * etp):
        raise ConfigError(
            f"parallelism.expert_parallel_degree = {dims.ep} (x expert_tensor_parallel_degree = {etp}) does not divide "
            f"dp_shard({dims.dp_shard}) * cp({dims.cp}) * tp({dims.tp}), the ranks that share out the experts."
        )
    return dims


def check_seq_len(seq_len: int, divisor: int, why: str) -> None:
    """Raise ConfigError unless the length of a row is a multiple of `divisor`, which the degrees named in `why` ask."""
    if seq_len % divisor:
        hint = f"For samples of {seq_len} tokens set {seq_len - 1}: then each label is real." if seq_len % 2 else ""
        raise ConfigError(
            f"training.seq_len = {seq_len}, but TorchTitan's models take multiples of {divisor}: {why}. "
            f"{hint or 'Change one of them.'}"
        )


def global_batch_size(training: Any, dp_world_size: int) -> int:
    """The sequences of an optimizer step, as in TorchTitan; ConfigError unless all ranks get whole micro-batches."""
    local, total = training.local_batch_size, training.global_batch_size
    if local < 1:
        raise ConfigError(f"training.local_batch_size = {local}, but each rank needs at least one sequence.")
    if total == 0 or (total > 0 and total % (local * dp_world_size)):
        raise ConfigError(
            f"training.global_batch_size = {total} is not a multiple of training.local_batch_size = {local} x "
            f"data-parallel degree = {dp_world_size}. Change one of them."
        )
    return total if total > 0 else local * dp_world_size


def validation_of(settings: Any, training: Any, pipeline: int) -> Validation | None:
    """How a job validates, if it does. `settings` and `training` are sections of its config.

    A shape that `settings` doesn't have is that of training. `pipeline` is the pipeline-parallel degree. ConfigError if
    a model which is built for training can't take the batches.

    Source: rotary embeddings have `training.seq_len` rows; a pipeline's stages receive tensors of the first batch's
    shape (torchtitan 0.2.2, models/*/model/args.py, 0.3.0, models/common/decoder.py; torch 2.15,
    distributed/pipelining/stage.py).
    """
    if not settings.enable:
        return None
    shape = {}
    for key in ("local_batch_size", "seq_len"):
        now, needed = getattr(settings, key), getattr(training, key)
        shape[key] = needed if now is None else now
        if pipeline > 1 and shape[key] != needed:
            raise ConfigError(
                f"validation.{key} = {now}, but the stages of a pipeline take batches of one shape, and "
                f"training.{key} = {needed}. Set it to that."
            )
    if shape["local_batch_size"] < 1:
        raise ConfigError(f"validation.local_batch_size = {shape['local_batch_size']}, expected at least 1.")
    if not 1 <= shape["seq_len"] <= training.seq_len:
        raise ConfigError(
            f"validation.seq_len = {shape['seq_len']}, but the model is made for training.seq_len = "
            f"{training.seq_len}. Set it to that, or less."
        )
    return Validation(BatchShape("validation", **shape), settings.steps, settings.freq)
