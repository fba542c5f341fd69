"""What the rest of this project knows of a training job. `titan/` makes it of TorchTitan's job config."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from examples.mosaic_streaming.sampling import Layout


@dataclass(frozen=True)
class BatchShape:
    """The batches that a model takes from a loader.

    Attributes:
        section: the section of the job config that says so, for messages.
        local_batch_size: sequences per dp rank and micro-batch.
        seq_len: tokens in a sequence.
    """

    section: str
    local_batch_size: int
    seq_len: int


@dataclass(frozen=True)
class Validation:
    """How a job validates.

    Attributes:
        shape: of its batches.
        steps: batches of all ranks in a round; -1 for all that there are.
        freq: optimizer steps from round to round.
    """

    shape: BatchShape
    steps: int
    freq: int


@dataclass(frozen=True)
class Checkpoints:
    """How a job saves and loads checkpoints.

    Attributes:
        enable: whether it does.
        folder: with a folder `step-N` for each.
        load_step: the one to go on from; -1 for the last.
        exclude_from_loading: the states that a start leaves out: "dataloader", "train_state" and others.
        last_save_model_only: whether nothing can go on from the run's last one.
    """

    enable: bool
    folder: str
    load_step: int
    exclude_from_loading: tuple[str, ...]
    last_save_model_only: bool


@dataclass(frozen=True)
class Job:
    """A training job.

    Attributes:
        model: its name, of a Mosaic form.
        flavor: of the model.
        vocab_size: rows of the model's embedding.
        assets: the folder of the tokenizer's assets (`model.hf_assets_path`).
        documents: whether the flavor keeps attention within documents.
        positions: whether the model can be given positions.
        document_flavors: the flavors of the model that keep attention within documents.
        layout: the ranks, and which of them share data.
        training: the batches that are trained on.
        global_batch_size: sequences per optimizer step.
        steps: optimizer steps of the whole run.
        collective_timeout: seconds that ranks wait for each other in a training step.
        validation: None where the job doesn't validate.
        checkpoints: how they are saved and loaded.
    """

    model: str
    flavor: str
    vocab_size: int
    assets: str
    documents: bool
    positions: bool
    document_flavors: tuple[str, ...]
    layout: "Layout"
    training: BatchShape
    global_batch_size: int
    steps: int
    collective_timeout: float
    validation: Validation | None
    checkpoints: Checkpoints
