"""The `Job` that TorchTitan's job config describes, and settings with which there is none."""

from typing import Any

import pytest

from examples.mosaic_streaming.config import BatchShape, Job, LoaderFile, Validation
from examples.mosaic_streaming.errors import ConfigError
from examples.mosaic_streaming.titan import make_job
from tests.support.titan import IS_0_2, job_config, loaded, only_0_2


def job_of(world_size: int = 1, ranks_per_node: int = 1, **settings: Any) -> Job:
    """The job on so many ranks, with settings of the job config: `section__key=value`."""
    return make_job(loaded(job_config(**settings), LoaderFile({}, "loader.toml")), world_size, ranks_per_node)


def test_job_has_the_model_and_the_batches() -> None:
    made = job_of(training__local_batch_size=2, training__seq_len=64, training__steps=7)
    assert (made.model, made.flavor, made.vocab_size) == ("llama3_mosaic", "debugmodel", 2048)
    assert made.training == BatchShape("training", 2, 64)
    assert (made.global_batch_size, made.steps, made.validation) == (2, 7, None)
    assert not made.documents and made.positions
    assert made.microbatches == 1 and made.masks_by_positions != IS_0_2


@pytest.mark.parametrize(("given", "expected"), [(-1, 16), (32, 32)])
def test_global_batch_is_of_the_data_parallel_ranks_unless_it_is_given(given: int, expected: int) -> None:
    made = job_of(
        16,
        8,
        training__local_batch_size=4,
        training__global_batch_size=given,
        parallelism__tensor_parallel_degree=2,
        parallelism__data_parallel_replicate_degree=2,
        parallelism__pipeline_parallel_degree=2,
    )
    assert made.global_batch_size == expected
    assert made.layout.degrees == {"pp": 2, "dp_replicate": 2, "dp_shard": 2, "cp": 1, "tp": 2}
    assert (made.layout.dp_world_size, made.layout.replication) == (4, 4)
    assert made.positions != IS_0_2  # in 0.2, only a pipeline's first stage would get them
    assert made.microbatches == (1 if IS_0_2 else 4)  # each of one row


def test_job_that_validates_has_the_batches_of_a_round() -> None:
    made = job_of(validation__enable=True, validation__local_batch_size=3, validation__steps=5, validation__freq=9)
    assert made.validation == Validation(BatchShape("validation", 3, 2048), 5, 9)


@only_0_2
@pytest.mark.parametrize("flavor", ["debugmodel_flex_attn", "debugmodel_varlen_attn"])
def test_flavors_that_keep_attention_within_documents_are_known(flavor: str) -> None:
    made = job_of(model__flavor=flavor)
    assert made.documents and flavor in made.document_flavors and "debugmodel" not in made.document_flavors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training__local_batch_size": 0}, "training.local_batch_size = 0, but each rank needs at least one sequence"),
        ({"training__global_batch_size": 0}, "training.global_batch_size = 0 is not a multiple"),
        (
            {"training__local_batch_size": 2, "training__global_batch_size": 5},
            "training.global_batch_size = 5 is not a multiple of training.local_batch_size = 2 x data-parallel degree",
        ),
        ({"model__flavor": "9B"}, "model.flavor = '9B', but llama3_mosaic has: debugmodel"),
    ],
)
def test_settings_that_make_no_job_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        job_of(**settings)
